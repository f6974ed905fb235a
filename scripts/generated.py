"""Files that a script makes from what the project holds: written by the script, or compared with what it would write."""

import sys
from pathlib import Path


def write_or_check(file: Path, made: str) -> None:
    """Write a generated file; with --check on the command line, end with status 1 where it is not what would be written."""
    if "--check" not in sys.argv[1:]:
        file.write_text(made)
    elif not file.is_file() or file.read_text() != made:
        sys.exit(f"{file.parent.name}/{file.name} is not up to date: run python scripts/{Path(sys.argv[0]).name}")
