"""docs/key-reference.md: every key of config/, with its default and the comment above it.

python scripts/key_reference.py [--check]

--check writes nothing, and exits with status 1 if the page is out of date.
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIG, PAGE = ROOT / "config", ROOT / "docs" / "key-reference.md"

HEAD = """# Configuration reference

```bash
python train.py loss=dpo --cfg job
```

```text
seed: 0
exp_name: run
batch_size: 16
...
loss:
  name: dpo
  beta: 0.1
```

`python scripts/key_reference.py` generates this page from the comments in `config/`; edit those. Set a key on the command line
(`lr=1e-6 loss.beta=0.3`). An unknown key is refused, with a suggestion of the nearest one. `python train.py --cfg job` prints
the configuration that a command line composes. `null` means that no value is set.

"""
# Groups whose files hold keys, and their descriptions; of the other groups, a line for each preset.
GROUPS = {
    "model": "Every preset has these keys. `model=blank_model` sets none of them.",
    "loss": "`loss=NAME` selects a file; its keys are listed below it.",
    "trainer": "`trainer=NAME` selects a file. `BasicTrainer` has no keys of its own.",
    "rounds": "Only with `+rounds=default`: a loop of rounds ([Without labels](without-labels.md)).",
}
PRESETS = {"model": "base_model", "adapter": None, "experiment": None}


@dataclass(frozen=True)
class Key:
    """A key of a file: its dotted name, its default as the file writes it, and the lines of its comment."""

    name: str
    default: str
    comment: tuple[str, ...]

    @property
    def row(self) -> str:
        """Its row of the table."""
        text, unit = explained(self.comment)
        return f"| `{self.name}` | {code(self.default)} | {text.strip()} | {unit} |"


def read_keys(file: Path, prefix: str = "") -> list[Key]:
    """The keys of a YAML file, in its order; those of sections by dotted names. What a list holds belongs to its key."""
    found: list[Key] = []
    # The indent of the list that is being read; deeper lines continue its last item.
    list_indent: int | None = None
    comment: list[str] = []
    above: list[tuple[int, str]] = []
    for line in file.read_text().splitlines():
        indent, text = len(line) - len(line.lstrip()), line.strip()
        is_item = text.startswith("- ") and bool(found)
        if text and list_indent is not None and not is_item:
            list_indent = list_indent if indent > list_indent else None
        if text.startswith("#"):
            comment.append(text.removeprefix("#").removeprefix(" "))
        elif text and list_indent is not None and not is_item:
            found[-1] = Key(found[-1].name, f"{found[-1].default}, {text}", found[-1].comment)
        elif match := re.match(r"([\w-]+):\s*(.*)$", text):
            above = [each for each in above if each[0] < indent]
            found.append(Key(prefix + "".join(f"{name}." for _, name in above) + match[1], match[2], tuple(comment)))
            above.append((indent, match[1]))
            comment = []
        elif is_item:
            found[-1] = Key(found[-1].name, f"{found[-1].default}\n{text.removeprefix('- ')}", found[-1].comment)
            comment, list_indent = [], indent
        else:
            # An empty line: what stood above is of the file.
            comment = []
    return [key for key in found if not key.name.startswith((f"{prefix}defaults", f"{prefix}hydra"))]


def explained(comment: tuple[str, ...]) -> tuple[str, str]:
    """A comment as the text of a cell, and its unit. Lines that are set in stay lines."""
    text = ""
    for before, line in zip(("", *comment), comment, strict=False):
        is_set_in = line.startswith(" ")
        # Columns: a name, and its meaning.
        words = re.sub(r"([^\s:]):?\s{2,}(\S)", r"\1: \2", line.strip())
        text += ("<br>" if is_set_in or before.startswith(" ") else " ") + escaped(words)
    unit = re.search(r" Unit: ([^.;]*)\.$", text)
    return (text[: unit.start()], unit[1]) if unit else (text, "")


def escaped(text: str) -> str:
    """Text that Markdown leaves as it is, in a table."""
    return re.sub(r"([\\`*_|\[\]<>])", r"\\\1", text).replace("\\<", "&lt;").replace("\\>", "&gt;")


def code(text: str) -> str:
    """A value as code in a cell of a table."""
    if "\n" in text:
        # The items of a list, as they are written on the command line.
        items = [f"{{{item}}}" if ": " in item else item for item in text.strip().split("\n")]
        text = f"[{', '.join(items)}]"
    return f"`{text}`".replace("|", "\\|") if text else ""


def table(keys: list[Key]) -> str:
    """The table of some keys; sections, which have no default, are rows too if they have a comment."""
    shown = [key.row for key in keys if key.default or key.comment]
    return "\n".join(["| key | default | description | unit |", "|---|---|---|---|", *shown]) + "\n"


def headline(file: Path) -> str:
    """What a file is, by its first line of comment."""
    lines = [line for line in file.read_text().splitlines() if not line.startswith("# @package")]
    return escaped(" ".join(_first_comment(lines)))


def _first_comment(lines: list[str]) -> list[str]:
    end = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return [line.removeprefix("#").strip() for line in lines[:end]]


def choices() -> str:
    """The groups that a run is composed from, as config.yaml's defaults name them."""
    rows, comment = [], []
    for line in (CONFIG / "config.yaml").read_text().split("defaults:")[1].splitlines()[1:]:
        text = line.strip()
        if not line.startswith(" "):
            break
        if text.startswith("#"):
            comment.append(text.removeprefix("# "))
        elif match := re.match(r"- (\w+): (\w+)$", text):
            rows.append(Key(match[1], match[2], tuple(comment)).row)
            comment = []
    return "\n".join(["| group | default | description | unit |", "|---|---|---|---|", *rows]) + "\n"


def group_section(group: str, description: str) -> list[str]:
    """The section of a group whose files hold keys."""
    parts = [f"## {group}", description]
    base = PRESETS.get(group)
    for file in [CONFIG / group / f"{base}.yaml"] if base else sorted((CONFIG / group).glob("*.yaml")):
        keys = read_keys(file, f"{group}.")
        parts += [*([] if base else [f"### {group}={file.stem}", headline(file)]), table(keys)]
    return [*parts, *presets(group)] if base else parts


def presets(group: str) -> list[str]:
    """A line for each preset of a group, with what it changes; nothing where there is none."""
    files = sorted(file for file in (CONFIG / group).glob("*.yaml") if file.stem != PRESETS[group])
    rows = [f"| `{file.stem}` | {headline(file)} | {changes(file)} |" for file in files]
    return ["\n".join(["| preset | description | what it sets |", "|---|---|---|", *rows]) + "\n"] if rows else []


def changes(file: Path) -> str:
    """What a preset sets, as code."""
    keys = [key for key in read_keys(file) if key.default]
    return ", ".join(code(f"{key.name}={key.default}") for key in keys)


def page() -> str:
    """The whole page."""
    parts = ["## Groups", choices(), "## The run", table(read_keys(CONFIG / "config.yaml"))]
    for group, description in GROUPS.items():
        parts += group_section(group, description)
    for group in sorted(PRESETS.keys() - GROUPS.keys()):
        found = presets(group) if (CONFIG / group).is_dir() else []
        parts += [f"## +{group}", f"Added by `+{group}=NAME`.", *found] if found else []
    parts += ["## The labeling app", headline(CONFIG / "collect.yaml"), table(read_keys(CONFIG / "collect.yaml"))]
    return HEAD + "\n\n".join(part.strip("\n") for part in parts) + "\n"


def main() -> None:
    """Write the page, or check that it is up to date."""
    from generated import write_or_check

    write_or_check(PAGE, page())


if __name__ == "__main__":
    main()
