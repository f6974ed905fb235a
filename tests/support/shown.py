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
# A cell of a table that is a command.
CELL = re.compile(r"(?<=\| )`((?:python|pip|make|torchrun) [^`]+)`(?= \|)")
# Its files are those that commands of other pages read.
OWN_DATA = "docs/your-own-data.md"


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
    """(page, words) of every command that begins as the pattern says, in a block or in a cell of a table."""
    shown = [(page, words) for page in pages for block in blocks(page) for words in block.commands]
    shown += [(page, words) for page in pages for words in table_commands(page)]
    return [(page, words) for page, words in shown if re.match(pattern, " ".join(words))]


def table_commands(page: str) -> list[list[str]]:
    """The words of the commands that are cells of a page's tables."""
    return [shlex.split(text) for text in CELL.findall(PAGES[page])]


def write_files(page: str, folder: Path) -> None:
    """Write what a page shows as files, and before it what the page on own data shows so."""
    for each in dict.fromkeys([OWN_DATA, page]):
        for block in blocks(each):
            if block.title:
                (folder / block.title).write_text(block.text)


# What starts a training: by itself, under a launcher, in the queue of a cluster.
TRAINING = r"(python (-u )?|torchrun .*)train\.py|sbatch scripts/slurm\.sbatch"


def training_arguments(words: list[str]) -> list[str]:
    """What of the words of a training's command is for train.py."""
    last = max(number for number, word in enumerate(words) if word.endswith(("train.py", "slurm.sbatch")))
    return words[last + 1 :]
