"""What the README and the pages of docs/ show: files, and commands, which are to work as they stand there."""

import re
import shlex
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from textwrap import dedent

from tests.support.files import ROOT

PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
FENCE = re.compile(r'^( *)```(\w+)(?: title="([^"]+)")?\n(.*?)^\1```$', flags=re.MULTILINE | re.DOTALL)
ASSIGNMENT = re.compile(r"[A-Z_0-9]+=")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; title is the name of the file that it shows, if it shows one."""

    language: str
    title: str | None
    text: str

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command of a block of bash; its own variables are put in, and && parts two commands."""
        if self.language != "bash":
            return []
        found, variables, pending = [], {}, ""
        for line in self.text.replace("\\\n", " ").splitlines():
            pending += f"\n{line}" if pending else line
            for name, value in variables.items():
                pending = pending.replace(f"${name}", value)
            try:
                words = shlex.split(pending, comments=True)
            except ValueError:
                # A quotation goes on in the next line.
                continue
            pending = ""
            assigned = [word.partition("=") for word in takewhile(ASSIGNMENT.match, words)]
            if len(assigned) == len(words):
                variables |= {name: value for name, _, value in assigned}
            else:
                found += _parts(words[len(assigned) :])
        return found


def _parts(words: list[str]) -> list[list[str]]:
    """Commands that stand in one line."""
    parts: list[list[str]] = [[]]
    for word in words:
        if word == "&&":
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, in its order."""
    return [Block(language, title or None, dedent(text)) for _, language, title, text in FENCE.findall(PAGES[page])]


def commands(pattern: str, pages=PAGES) -> list[tuple[str, list[str]]]:
    """(page, words) of every command that begins as the pattern says."""
    shown = [(page, words) for page in pages for block in blocks(page) for words in block.commands]
    return [(page, words) for page, words in shown if re.match(pattern, " ".join(words))]


def write_files(page: str, folder: Path) -> None:
    """Write what a page shows as files, and before it what the README shows so."""
    for each in dict.fromkeys(["README.md", page]):
        for block in blocks(each):
            if block.title:
                (folder / block.title).write_text(block.text)


# What starts a training: by itself, under a launcher, in the queue of a cluster.
TRAINING = r"(python (-u )?|torchrun .*)train\.py|sbatch scripts/slurm\.sbatch"


def training_arguments(words: list[str]) -> list[str]:
    """What of the words of a training's command is for train.py."""
    last = max(number for number, word in enumerate(words) if word.endswith(("train.py", "slurm.sbatch")))
    return words[last + 1 :]
