"""Small programming problems, composed of a vocabulary: English with one meaning, a Python function, and assertions about it.

    python benchmarks/code_problems.py          # writes examples/code_problems.jsonl: 150 problems, 100 to train, 50 held out

A problem takes a collection (a list of numbers, the digits of a number, the words of a text, ...), keeps some of its items,
maps them, and reduces them. `easy` has one condition or one map, `medium` both, `hard` two conditions. A composition is what a
problem is made of, without its constants and its wording. No composition is both trained and held out, and `training_problems`
also leaves out what behaves like a held-out problem.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, islice, product, zip_longest
from pathlib import Path

PATH = Path(__file__).parent.parent / "examples" / "code_problems.jsonl"
NAME = "solve"
DIFFICULTIES = ("easy", "medium", "hard")
SEED = 150


@dataclass(frozen=True)
class Word:
    """An item of the vocabulary: its name, its code (of an item {x} or a list {L}, with constants {K}, {C}), how it is said."""

    name: str
    code: str
    said: tuple[str, ...]


def _words(*rows: tuple[str, str, str]) -> tuple[Word, ...]:
    return tuple(Word(name, code, tuple(said.split(" / "))) for name, code, said in rows)


NUMBERS, WORDS, LETTERS = "numbers", "words", "letters"
# Collections by the kind of their items. Name: the parameter and the collection; said: what its items are and where they are.
COLLECTIONS = {
    NUMBERS: _words(
        ("numbers:list", "numbers", "numbers in the list / numbers of the list"),
        ("n:range", "range(1, n + 1)", "numbers from 1 to n / integers from 1 to n"),
        ("n:digits", "[int(d) for d in str(n)]", "digits of n / decimal digits of n"),
    ),
    WORDS: _words(
        ("words:list", "words", "words in the list / words of the list"),
        ("text:words", "text.split()", "words of the text / words in the text"),
    ),
    LETTERS: _words(("text:letters", "text", "characters of the text / characters in the text")),
}
CONDITIONS = {
    NUMBERS: _words(
        ("even", "{x} % 2 == 0", "are even / are divisible by two"),
        ("odd", "{x} % 2 == 1", "are odd / are not even"),
        ("greater", "{x} > {K}", "are greater than {K} / are above {K}"),
        ("less", "{x} < {K}", "are less than {K} / are below {K}"),
        ("multiple", "{x} % {K} == 0", "are divisible by {K} / are multiples of {K}"),
        ("differs", "{x} != {K}", "are not {K} / differ from {K}"),
    ),
    WORDS: _words(
        ("longer", "len({x}) > {K}", "are longer than {K} characters / have more than {K} characters"),
        ("shorter", "len({x}) < {K}", "are shorter than {K} characters / have fewer than {K} characters"),
        ("begins", "{x}.startswith('{C}')", "begin with '{C}' / start with '{C}'"),
        ("ends", "{x}.endswith('{C}')", "end with '{C}' / have '{C}' at the end"),
        ("contains", "'{C}' in {x}", "contain '{C}' / have a '{C}' in them"),
        ("capital", "{x}[0].isupper()", "begin with a capital letter / are capitalized"),
    ),
    LETTERS: _words(
        ("vowel", "{x} in 'aeiou'", "are vowels / are one of a, e, i, o and u"),
        ("digit", "{x}.isdigit()", "are digits / are decimal digits"),
        ("letter", "{x}.isalpha()", "are letters / are in the alphabet"),
        ("upper", "{x}.isupper()", "are capital letters / are in upper case"),
        ("other", "{x} != '{C}'", "are not '{C}' / differ from '{C}'"),
        ("before", "{x} < '{C}'", "come before '{C}' / are less than '{C}'"),
    ),
}
MAPS = {
    NUMBERS: _words(
        ("square", "{x} * {x}", "squares / second powers"),
        ("double", "2 * {x}", "doubles / products with two"),
        ("plus", "{x} + {K}", "values plus {K} / sums with {K}"),
        ("times", "{K} * {x}", "multiples by {K} / products with {K}"),
        ("negative", "-{x}", "negatives / values with the opposite sign"),
        ("remainder", "{x} % {K}", "remainders by {K} / values modulo {K}"),
    ),
    WORDS: _words(
        ("upper", "{x}.upper()", "upper case forms / forms in capitals"),
        ("backward", "{x}[::-1]", "reversed forms / forms read backward"),
        ("first", "{x}[0]", "first characters / initials"),
        ("last", "{x}[-1]", "last characters / final characters"),
        ("twice", "{x} + {x}", "doubled forms / forms written twice"),
        ("cut", "{x}[:{K}]", "first {K} characters / beginnings of {K} characters"),
    ),
    LETTERS: _words(
        ("lower", "{x}.lower()", "lower case forms / small forms"),
        ("upper", "{x}.upper()", "upper case forms / capital forms"),
        ("twice", "{x} + {x}", "doubled forms / forms written twice"),
        ("dashed", "{x} + '-'", "forms with a dash behind / forms followed by a dash"),
    ),
}
ANY = _words(
    ("list", "{L}", "the list of / a list of"),
    ("reversed", "{L}[::-1]", "the reversed list of / a list in reverse order of"),
    ("sorted", "sorted({L})", "the sorted list of / a list in ascending order of"),
    ("count", "len({L})", "the number of / the count of"),
    ("distinct", "len(set({L}))", "the number of distinct / the count of different"),
    ("leading", "{L}[:{K}]", "the first {K} of / a list of the first {K} of"),
)
JOINED = _words(
    ("joined", "' '.join({L})", "a text that joins with spaces / the concatenation with spaces of"),
    ("chained", "''.join({L})", "a text that joins without gaps / the concatenation without spaces of"),
)
REDUCTIONS = {
    NUMBERS: (
        *ANY,
        *_words(
            ("sum", "sum({L})", "the sum of / the total of"),
            ("largest", "max({L}, default=0)", "the largest of / the maximum of"),
            ("smallest", "min({L}, default=0)", "the smallest of / the minimum of"),
        ),
    ),
    WORDS: (*ANY, *JOINED),
    LETTERS: (*ANY, *JOINED),
}
# A count does not depend on what its items become.
WITHOUT_MAP = ("count",)
CONSTANTS, CHARACTERS = range(2, 8), "abcdeorst"


@dataclass(frozen=True)
class Composition:
    """What a problem is made of. map: None for the items themselves."""

    kind: str
    collection: Word
    conditions: tuple[Word, ...]
    map: Word | None
    reduction: Word

    @property
    def difficulty(self) -> str:
        """easy, medium or hard."""
        return "hard" if len(self.conditions) == 2 else "medium" if self.conditions and self.map else "easy"

    @property
    def key(self) -> str:
        """Names of its parts, such as "n:digits | even, less | square | sum"; the order of conditions does not matter."""
        conditions = ", ".join(sorted(each.name for each in self.conditions))
        return f"{self.collection.name} | {conditions} | {self.map.name if self.map else ''} | {self.reduction.name}"


@dataclass(frozen=True)
class Problem:
    """A composition with constants and wording. constants: K and C of each word by its name."""

    composition: Composition
    constants: dict[str, dict]
    prompt: str

    @property
    def solution(self) -> str:
        """Its function."""
        return solution_of(self.composition, self.constants)


def compositions() -> Iterator[Composition]:
    """All there are."""
    for kind in COLLECTIONS:
        conditions = CONDITIONS[kind]
        pairs = [pair for pair in product(conditions, conditions) if pair[0] != pair[1]]
        for chosen in [(), *[(each,) for each in conditions], *pairs]:
            for collection, mapped, reduction in product(COLLECTIONS[kind], (None, *MAPS[kind]), REDUCTIONS[kind]):
                is_useless = mapped is not None and reduction.name in WITHOUT_MAP
                if not is_useless and (chosen or mapped):
                    yield Composition(kind, collection, chosen, mapped, reduction)


def constants_for(kind: str, draw: random.Random) -> dict[str, dict]:
    """Constants for all words of a kind."""
    words = (*COLLECTIONS[kind], *CONDITIONS[kind], *MAPS[kind], *REDUCTIONS[kind])
    return {word.code: {"K": draw.choice(CONSTANTS), "C": draw.choice(CHARACTERS)} for word in words}


def problem_of(made_of: Composition, draw: random.Random) -> Problem:
    """A problem with drawn constants and wording."""
    constants = constants_for(made_of.kind, draw)
    items = [made_of.collection, *made_of.conditions, made_of.map, made_of.reduction]
    said = [draw.choice(word.said).format(**constants[word.code]) if word else "" for word in items]
    where, *conditions, mapped, reduction = said
    what = f"{mapped} of the {where}" if mapped else where
    if not reduction.endswith((" distinct", " different")):
        what = f"the {what}"
    that = f" that {' and '.join(conditions)}" if conditions else ""
    parameter = made_of.collection.name.partition(":")[0]
    return Problem(made_of, constants, f"Write `{NAME}({parameter})` that returns {reduction} {what}{that}.")


def solution_of(made_of: Composition, constants: dict[str, dict]) -> str:
    """The function of a composition with constants."""
    variable = {NUMBERS: "x", WORDS: "w", LETTERS: "c"}[made_of.kind]

    def code(word: Word | None, **fields: str) -> str:
        return word.code.format(x=variable, **constants[word.code], **fields) if word else variable

    tests = " and ".join(map(code, made_of.conditions))
    listed = f"[{code(made_of.map)} for {variable} in {code(made_of.collection)}{f' if {tests}' if tests else ''}]"
    parameter = made_of.collection.name.partition(":")[0]
    return f"def {NAME}({parameter}):\n    return {code(made_of.reduction, L=listed)}"


# ---- behavior ----------------------------------------------------------------------------------------------------------------

VOCABULARY = [
    "tree",
    "Stone",
    "about",
    "Sea",
    "dot",
    "creases",
    "Ada",
    "rod",
    "tests",
    "oat",
    "Boat",
    "east",
    "order",
    "sad",
    "aorta",
]
NUM_INPUTS = 66


@cache
def inputs(collection: str) -> list:
    """Arguments of many shapes for a collection, the empty one first; always the same."""
    draw = random.Random(collection)
    parameter, _, shape = collection.partition(":")

    def one(size: int):
        if parameter == "numbers":
            return [draw.randint(-9, 12) for _ in range(size)]
        if parameter == "n":
            return size * 2 if shape == "range" else draw.randint(0, 10 ** min(size, 9))
        if shape == "letters":
            return "".join(draw.choice("aeiouABEbcdorst 1234") for _ in range(2 * size))
        chosen = [draw.choice(VOCABULARY) for _ in range(size)]
        return chosen if parameter == "words" else " ".join(chosen)

    return [one(number % 11) for number in range(NUM_INPUTS)]


def behavior(code: str, collection: str) -> tuple[str, ...]:
    """What a solution of our own returns for each of a collection's inputs, as text."""
    scope: dict = {}
    exec(code, scope)
    return tuple(repr(scope[NAME](argument)) for argument in inputs(collection))


def variants(problem: Problem) -> list[str]:
    """Solutions that differ in one part or in the constants: wrong ones, where they behave differently."""
    made_of, kind = problem.composition, problem.composition.kind
    found = [replace(made_of, reduction=each) for each in REDUCTIONS[kind]]
    found += [replace(made_of, map=each) for each in (None, *MAPS[kind])]
    for place in range(len(made_of.conditions)):
        before, behind = made_of.conditions[:place], made_of.conditions[place + 1 :]
        found += [replace(made_of, conditions=(*before, *each, *behind)) for each in [(), *zip(CONDITIONS[kind])]]
    others = [{name: {"K": k, "C": c} for name in problem.constants} for k, c in zip(CONSTANTS, CHARACTERS, strict=False)]
    return [solution_of(each, problem.constants) for each in found] + [solution_of(made_of, each) for each in others]


def wrong_solution(problem: Problem, draw: random.Random) -> str:
    """A solution that is wrong in one part or in the constants."""
    collection = problem.composition.collection.name
    right = behavior(problem.solution, collection)
    return draw.choice([code for code in dict.fromkeys(variants(problem)) if behavior(code, collection) != right])


def tests_of(problem: Problem, most: int = 8) -> list[str]:
    """Assertions on the empty argument, and on those that tell most variants from the solution."""
    arguments, right = (
        inputs(problem.composition.collection.name),
        behavior(problem.solution, problem.composition.collection.name),
    )
    alive = [answers for code in variants(problem) if (answers := behavior(code, problem.composition.collection.name)) != right]
    chosen = [0]
    while len(chosen) < most:
        alive = [answers for answers in alive if answers[chosen[-1]] == right[chosen[-1]]]
        told = [sum(answers[at] != right[at] for answers in alive) for at in range(NUM_INPUTS)]
        best = max((at for at in range(NUM_INPUTS) if at not in chosen), key=lambda at: (told[at], len(right[at])))
        if len(chosen) >= 6 and not told[best]:
            break
        chosen.append(best)
    return [f"assert {NAME}({arguments[at]!r}) == {right[at]}" for at in chosen]


def is_sound(problem: Problem) -> bool:
    """Whether the answers vary, and every part matters."""
    made_of, right = problem.composition, behavior(problem.solution, problem.composition.collection.name)
    less = [
        replace(made_of, conditions=tuple(each for each in made_of.conditions if each != one)) for one in made_of.conditions
    ]
    less += [replace(made_of, map=None)] * (made_of.map is not None)
    matters = all(behavior(solution_of(each, problem.constants), made_of.collection.name) != right for each in less)
    return matters and len(set(right)) > 5


# ---- the 150 problems --------------------------------------------------------------------------------------------------------

NUM_TRAIN, NUM_HELD_OUT = {"easy": 33, "medium": 33, "hard": 34}, {"easy": 17, "medium": 17, "hard": 16}


def benchmark() -> list[dict]:
    """The rows of examples/code_problems.jsonl."""
    rows = [_row(problem, is_held_out) for problem, is_held_out in benchmark_problems()]
    return [{"id": f"{row['difficulty']}-{number:03}", **row} for number, row in enumerate(rows, start=1)]


@cache
def benchmark_problems() -> list[tuple[Problem, bool]]:
    """The 150 problems, and whether each is held out."""
    draw = random.Random(SEED)
    found: list[tuple[Problem, bool]] = []
    behaviors: set[tuple[str, ...]] = set()
    for difficulty in DIFFICULTIES:
        some = [each for each in compositions() if each.difficulty == difficulty]
        draw.shuffle(some)
        is_held_out = [True] * NUM_HELD_OUT[difficulty] + [False] * NUM_TRAIN[difficulty]
        problems = list(islice(_distinct(some, draw, behaviors), len(is_held_out)))
        draw.shuffle(is_held_out)
        found += zip(problems, is_held_out, strict=True)
    return found


def _distinct(some: list[Composition], draw: random.Random, behaviors: set[tuple[str, ...]]) -> Iterator[Problem]:
    """Problems that behave unlike each other and all before. Collections take turns: some have many more compositions."""
    queues = [[each for each in some if each.collection == one] for kind in COLLECTIONS.values() for one in kind]
    keys = set()
    for made_of in filter(None, chain.from_iterable(zip_longest(*queues))):
        if made_of.key in keys:
            continue
        problem = problem_of(made_of, draw)
        found = behavior(problem.solution, made_of.collection.name)
        if is_sound(problem) and found not in behaviors:
            keys.add(made_of.key)
            behaviors.add(found)
            yield problem


def _row(problem: Problem, is_held_out: bool) -> dict:
    return {
        "prompt": problem.prompt, "function_name": NAME, "tests": tests_of(problem), "solution": problem.solution,
        "difficulty": problem.composition.difficulty, "split": "held_out" if is_held_out else "train",
        "composition": problem.composition.key,
    }  # fmt: skip


def read_problems(split: str) -> list[dict]:
    """The rows of a split, train or held_out."""
    return [row for line in PATH.read_text().splitlines() if (row := json.loads(line))["split"] == split]


def training_problems(count: int, seed: int) -> list[Problem]:
    """Further problems of the same language. None has a held-out composition, or behaves like a held-out problem."""
    held_out = read_problems("held_out")
    keys, behaviors = {row["composition"] for row in held_out}, set()
    for row in held_out:
        behaviors.add(behavior(row["solution"], row["composition"].partition(" | ")[0]))
    by_difficulty = {name: [each for each in compositions() if each.difficulty == name] for name in DIFFICULTIES}
    draw, seen, found = random.Random(seed), set(), []
    while len(found) < count:
        made_of = draw.choice(by_difficulty[DIFFICULTIES[len(found) % 3]])
        if made_of.key in keys:
            continue
        problem = problem_of(made_of, draw)
        if problem.prompt in seen or not is_sound(problem):
            continue
        if behavior(problem.solution, made_of.collection.name) in behaviors:
            continue
        seen.add(problem.prompt)
        found.append(problem)
    return found


if __name__ == "__main__":
    rows = benchmark()
    PATH.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{PATH}: {len(rows)} problems")
