"""What the recipes for dialogues reach, from the newest results of benchmarks/dialogues.py.

python scripts/dialogues_page.py [--check]

Writes the table in docs/recipes.md, the picture docs/dialogues.svg, and a line in each recipe in config/experiment/. --check
writes nothing, and exits with status 1 if one of them is out of date.
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path

from preference_training.core.files import run_file

ROOT = Path(__file__).resolve().parent.parent
RESULTS, RECIPES = ROOT / "benchmarks" / "results", ROOT / "config" / "experiment"
PAGE, PICTURE = ROOT / "docs" / "recipes.md", ROOT / "docs" / "dialogues.svg"

# Between these lines of the page stands what is generated.
BEGIN, END = "<!-- generated: python scripts/dialogues_page.py -->", "<!-- end of what is generated -->"
NOT_MEASURED = "Not measured yet."
NAMES = {"dpo": "DPO", "ipo": "IPO", "beta_dpo": "beta-DPO", "simpo": "SimPO", "orpo": "ORPO", "kto": "KTO"}
HEAD = (
    "| method | accuracy, % | by its own reward, % | accuracy minus DPO's, points | win rate, % | KL, nats per response | "
    "length, tokens | CPU minutes |",
    "|---|---|---|---|---|---|---|---|",
)


def newest_results() -> Path | None:
    """The newest file of raw results; None where there is none."""
    return max(RESULTS.glob("*_dialogues_cpu.json"), default=None)


# ---- the table --------------------------------------------------------------------------------------------------------------


def percent(value: float) -> str:
    """A share in percent."""
    return f"{100 * value:.1f}"


def points(value: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{100 * value:+.1f}"


def number(value: float) -> str:
    """A number of two or three digits."""
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def cell(found: dict | None, write: Callable[[float], str]) -> str:
    """A value with its interval; empty where it is unknown."""
    if found is None or found["mean"] is None:
        return ""
    interval = "" if found["low"] is None else f" [{write(found['low'])}, {write(found['high'])}]"
    return write(found["mean"]) + interval


def length(facts: dict, model: str) -> str:
    """The length of a model's responses; empty in raw results that have only their words."""
    return cell(facts.get("tokens", {}).get(model), number)


def minutes(times: dict) -> str:
    """The processor time of training."""
    return f"{times['training']['cpu_seconds'] / 60:.0f}"


def row(method: str, facts: dict, times: dict) -> str:
    """A method's row."""
    cells = [
        cell(facts["accuracy"], percent),
        cell(facts["accuracy of its own reward"], percent),
        "" if method == "dpo" else cell(facts["accuracy minus DPO's"], points),
        cell(facts["win rate"]["rate"], percent),
        cell(facts["kl"]["per_answer"], number),
        length(facts, "policy"),
        minutes(times),
    ]
    return f"| {NAMES[method]} | {' | '.join(cells)} |"


def differences(methods: dict) -> str:
    """Which methods' accuracies differ from DPO's by more than chance, in a sentence."""
    found = {NAMES[name]: facts["accuracy minus DPO's"] for name, facts in methods.items() if name != "dpo"}
    known = {name: of for name, of in found.items() if of is not None and of["low"] is not None}
    above = [name for name, of in known.items() if of["low"] > 0]
    below = [name for name, of in known.items() if of["high"] < 0]
    rest = [name for name in known if name not in above + below]
    if not known:
        return ""
    if len(rest) == len(known):
        return "No method's accuracy differs significantly from DPO's."
    groups = ("higher for", above), ("lower for", below), ("no significant difference for", rest)
    parts = [f"{words} {', '.join(names)}" for words, names in groups if names]
    return f"Accuracy, compared with DPO's: {'; '.join(parts)}."


def tables(file: Path | None) -> str:
    """What stands between the two lines of the page."""
    if file is None or not (methods := json.loads(file.read_text())["methods"]):
        return NOT_MEASURED
    facts = json.loads(file.read_text())
    times, one = facts["times"], next(iter(methods.values()))
    held_out = sum(one["win rate"][name] for name in ("wins", "ties", "losses"))
    sft = f"| SFT | | | | | 0 | {length(one, 'other')} | {minutes(times['sft'])} |"
    rows = [row(name, methods[name], times[name]) for name in NAMES if name in methods]
    loads = [times[name]["load"] for name in methods if "load" in times[name]]
    machine = f"{facts['hardware']['cores']} cores" + (f", load average at most {max(loads):.0f}" if loads else "")
    about = (
        f"Win rates, KL and lengths are of {held_out} held-out prompts. Raw results: `{file.relative_to(ROOT)}` ({machine})."
    )
    parts = ["\n".join([*HEAD, sft, *rows]), differences(methods), picture_link(methods), about]
    return "\n\n".join(part for part in parts if part)


def picture_link(methods: dict) -> str:
    """The picture, in Markdown."""
    return f"![{description(methods)}](dialogues.svg)"


def description(methods: dict) -> str:
    """What the picture shows, in words."""
    return (
        f"Win rate against KL divergence with 95% intervals: SFT, {', '.join(NAMES[name] for name in NAMES if name in methods)}"
    )


def page() -> str:
    """The page, with the numbers of the newest results."""
    between = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", flags=re.DOTALL)
    return between.sub(lambda _: f"{BEGIN}\n\n{tables(newest_results())}\n\n{END}", PAGE.read_text())


# ---- the recipes ------------------------------------------------------------------------------------------------------------


def recipes() -> dict[Path, str]:
    """The text of each method's recipe, with what it reached."""
    file = newest_results()
    methods = json.loads(file.read_text())["methods"] if file else {}
    line = re.compile("^# Reached.*$", flags=re.MULTILINE)
    found = {}
    for name, facts in methods.items():
        path = RECIPES / f"dialogues_{name}.yaml"
        found[path] = line.sub(lambda _, facts=facts: reached(facts), path.read_text())
    return found


def reached(facts: dict) -> str:
    """What a method reached, in a comment."""
    accuracy, rate = (cell(of, percent) for of in (facts["accuracy"], facts["win rate"]["rate"]))
    kl = cell(facts["kl"]["per_answer"], number)
    return f"# Reached (docs/recipes.md): accuracy {accuracy}%, win rate {rate}%, KL {kl} nats."


# ---- the picture ------------------------------------------------------------------------------------------------------------


def picture(file: Path) -> str:
    """The win rate of each method over its KL divergence, as SVG."""
    drawing = run_file(ROOT / "benchmarks" / "science_parts" / "drawing.py", "drawing")
    methods = json.loads(file.read_text())["methods"]
    dots = [drawing.Series("SFT", [0.0], [50.0], 6, is_points=True)]
    for color, name in enumerate(name for name in NAMES if name in methods):
        rate, kl = methods[name]["win rate"]["rate"], methods[name]["kl"]["per_answer"]
        y, low, high = ([100 * rate[end]] for end in ("mean", "low", "high"))
        across = {"x_low": [kl["low"]], "x_high": [kl["high"]]}
        dots.append(drawing.Series(NAMES[name], [kl["mean"]], y, color, is_points=True, low=low, high=high, **across))
    axes = "KL from the SFT model, nats per response", "win rate against the SFT model, %"
    return drawing.picture([drawing.Panel("SmolLM2 on HH dialogues", *axes, dots)], description(methods))


def main() -> None:
    """Write the page and its picture, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with status 1 where something is out of date")
    parser.parse_args()
    from generated import write_or_check

    if file := newest_results():
        write_or_check(PICTURE, picture(file))
    for path, text in recipes().items():
        write_or_check(path, text)
    write_or_check(PAGE, page())


if __name__ == "__main__":
    main()
