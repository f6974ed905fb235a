"""Generated files: write them, or check that they are up to date."""

import sys
from pathlib import Path


def write_or_check(file: Path, content: str) -> None:
    """Write a generated file; with --check on the command line, exit with status 1 if it is out of date."""
    if "--check" not in sys.argv[1:]:
        file.write_text(content)
    elif not file.is_file() or file.read_text() != content:
        sys.exit(f"{file.parent.name}/{file.name} is out of date. Run: python scripts/{Path(sys.argv[0]).name}")
