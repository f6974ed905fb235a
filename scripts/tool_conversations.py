"""Write invented conversations with tools, for SFT and for DPO; see docs/conversations-with-tools.md.

python scripts/tool_conversations.py [DIRECTORY] [--conversations 200] [--pairs 100]

    tools_sft.jsonl   {messages, tools}: a system turn, then one or two questions that are answered with a tool
    tools_dpo.jsonl   {chosen, rejected, tools}: conversations that part at turn 3, the assistant's first. The chosen one calls
                      the right tool; the other makes up a result, or calls a tool with wrong arguments. Both go on
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import NamedTuple

SYSTEM = "You answer with the tools. You never guess what a tool can find out."
CITIES = ["Oslo", "Lima", "Cairo", "Quito", "Perth", "Turin", "Dakar", "Hanoi", "Leeds", "Tunis", "Osaka", "Malmo"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
EVENTS = ["dentist", "choir", "staff meeting", "swimming lesson", "book club", "guitar lesson", "team lunch", "haircut"]
SKIES = ["clear", "cloudy", "rainy", "windy", "foggy"]
UNITS = {("miles", "km"): 1.609, ("pounds", "kg"): 0.4536, ("inches", "cm"): 2.54, ("gallons", "liters"): 3.785}


class Question(NamedTuple):
    """A question, the call that answers it, what the tool returns, and the answer to that result.

    other: arguments for another question, with their result, which the same sentence would answer wrongly.
    """

    text: str
    tool: str
    arguments: dict
    result: dict
    answer: Callable[[dict], str]
    other: tuple[dict, dict]


def weather(random: Random) -> Question:
    """A question about the weather."""
    (city, elsewhere), day = random.sample(CITIES, 2), random.choice(DAYS)
    result, wrong = ({"sky": random.choice(SKIES), "celsius": random.randint(-5, 34)} for _ in range(2))
    text = random.choice(["What will the weather be in {} on {}?", "I am going to {} on {}. What is the forecast?"])
    return Question(
        text.format(city, day), "get_weather", {"city": city, "day": day}, result,
        lambda found: f"In {city} it will be {found['sky']} on {day}, at {found['celsius']} °C.",
        ({"city": elsewhere, "day": day}, wrong),
    )  # fmt: skip


def calculator(random: Random) -> Question:
    """A question of arithmetic."""
    a, sign = random.randint(12, 99), random.choice("+-*")
    b, other = random.sample(range(12, 100), 2)
    expression, wrong = f"{a} {sign} {b}", f"{a} {sign} {other}"
    result, of_wrong = ({"result": {"+": a + x, "-": a - x, "*": a * x}[sign]} for x in (b, other))
    return Question(
        random.choice(["What is {}?", "Please work out {}."]).format(expression),
        "calculate", {"expression": expression}, result,
        lambda found: f"{expression} is {found['result']}.",
        ({"expression": wrong}, of_wrong),
    )  # fmt: skip


def calendar(random: Random) -> Question:
    """A question about what is planned."""
    day, other = random.sample(DAYS, 2)
    result, wrong = ({"event": event, "time": f"{random.randint(8, 19)}:30"} for event in random.sample(EVENTS, 2))
    text = random.choice(["What do I have on {}?", "Is anything planned for {}?"])
    return Question(
        text.format(day), "list_events", {"day": day}, result,
        lambda found: f"On {day} you have: {found['event']}, at {found['time']}.",
        ({"day": other}, wrong),
    )  # fmt: skip


def units(random: Random) -> Question:
    """A question about units."""
    (unit, to), factor = random.choice(list(UNITS.items()))
    value, other = random.sample(range(2, 90), 2)
    return Question(
        random.choice(["How many {1} are {2} {0}?", "Convert {2} {0} to {1}."]).format(unit, to, value),
        "convert_units", {"value": value, "unit": unit, "to": to}, {"value": round(value * factor, 2)},
        lambda found: f"{value} {unit} are {found['value']} {to}.",
        ({"value": other, "unit": unit, "to": to}, {"value": round(other * factor, 2)}),
    )  # fmt: skip


QUESTIONS = (weather, calculator, calendar, units)
THANKS = [("Thanks!", "You are welcome."), ("That is all, thank you.", "Glad to help.")]


def tool(name: str, description: str, **properties: str) -> dict:
    """A tool as chat templates read it."""
    parameters = {"type": "object", "properties": {key: {"type": kind} for key, kind in properties.items()}}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = [
    tool("get_weather", "Forecast of a city", city="string", day="string"),
    tool("calculate", "Value of an expression", expression="string"),
    tool("list_events", "Events of a day", day="string"),
    tool("convert_units", "Convert a value to another unit", value="number", unit="string", to="string"),
]


def asked(question: Question) -> dict:
    """The user's turn."""
    return {"role": "user", "content": question.text}


def answered(question: Question, arguments: dict, result: dict) -> list[dict]:
    """The turns after a question: a call, what the tool returns, and the answer."""
    call = {"type": "function", "function": {"name": question.tool, "arguments": arguments}}
    return [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "name": question.tool, "content": json.dumps(result)},
        {"role": "assistant", "content": question.answer(result)},
    ]


def opening(random: Random) -> tuple[list[Question], list[dict]]:
    """Two questions of different kinds, and the tools of a conversation: theirs, and sometimes all."""
    questions = [ask(random) for ask in random.sample(QUESTIONS, 2)]
    needed = {question.tool for question in questions}
    everything = random.random() < 0.5
    return questions, [each for each in TOOLS if everything or each["function"]["name"] in needed]


def conversation(random: Random) -> dict:
    """A row for SFT, with two to four assistant turns."""
    questions, tools = opening(random)
    turns = [{"role": "system", "content": SYSTEM}]
    for question in questions[: random.randint(1, 2)]:
        turns += [asked(question), *answered(question, question.arguments, question.result)]
    if len(turns) < 8 and random.random() < 0.5:
        thanks, welcome = random.choice(THANKS)
        turns += [{"role": "user", "content": thanks}, {"role": "assistant", "content": welcome}]
    return {"messages": turns, "tools": tools}


def pair(random: Random) -> dict:
    """A row for DPO: two conversations that share the system turn and the user's first."""
    (question, _), tools = opening(random)
    shared = [{"role": "system", "content": SYSTEM}, asked(question)]
    thanks, welcome = random.choice(THANKS)
    closing = [{"role": "user", "content": thanks}, {"role": "assistant", "content": welcome}]
    arguments, wrong = question.other
    made_up = [{"role": "assistant", "content": question.answer(wrong)}]
    rejected = made_up if random.random() < 0.5 else answered(question, arguments, wrong)
    chosen = answered(question, question.arguments, question.result)
    return {"chosen": [*shared, *chosen, *closing], "rejected": [*shared, *rejected, *closing], "tools": tools}


def write(path: Path, make: Callable[[Random], dict], number: int, seed: int) -> None:
    """Write rows, the same ones each time."""
    random = Random(seed)
    path.write_text("".join(json.dumps(make(random), ensure_ascii=False) + "\n" for _ in range(number)))
    print(f"{path}: {number} rows")


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description="Write invented conversations with tools.")
    parser.add_argument("directory", nargs="?", type=Path, default=Path())
    parser.add_argument("--conversations", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=100)
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    write(options.directory / "tools_sft.jsonl", conversation, options.conversations, seed=1)
    write(options.directory / "tools_dpo.jsonl", pair, options.pairs, seed=2)


if __name__ == "__main__":
    main()
