"""The labelling app, from the command line.

    python -m preference_collection serve                  the page
    python -m preference_collection import FILE            problems, and labels, from CSV, JSON lines, Parquet, an older store
    python -m preference_collection export PATH            a data set for `lc` in a directory, or a .jsonl or .parquet file
    python -m preference_collection push DIRECTORY NAME    an exported directory to the hub
    python -m preference_collection score CHECKPOINT       which pairs the policy is unsure of, for the list of problems

Behind each may stand settings of config/collect.yaml: store=my.duckdb
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from preference_collection.settings import OVERRIDES, PASSWORD, check_access, load_settings
from preference_training.core.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def arguments(line: Sequence[str] | None) -> argparse.Namespace:
    """The command line, understood."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="the page")
    take = commands.add_parser("import", help="problems and labels from a file")
    take.add_argument("file", type=Path)
    take.add_argument("--skip-bad-rows", action="store_true", help="leave out rows that cannot be used, and count them")
    out = commands.add_parser("export", help="judgements as training data")
    out.add_argument("path", type=Path, help="a directory, or a file that ends in .jsonl or .parquet")
    out.add_argument("--names", action="store_true", help="labellers by their names, not by numbers")
    up = commands.add_parser("push", help="an exported directory to the hub")
    up.add_argument("directory", type=Path)
    up.add_argument("repository", help="USER/NAME")
    up.add_argument("--public", action="store_true", help="for everybody to see")
    score = commands.add_parser("score", help="ask a checkpoint which solution it prefers")
    score.add_argument("checkpoint")
    for command in (serve, take, out, up, score):
        command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of config/collect.yaml")
    # Settings may stand behind options too, which the library takes for one or the other.
    options, rest = parser.parse_known_args(line)
    if wrong := [text for text in rest if text.startswith("-") or "=" not in text]:
        parser.error(f"unrecognised: {' '.join(wrong)}")
    options.overrides += rest
    return options


def serve(options: argparse.Namespace, settings) -> None:
    """Become the page's server."""
    check_access(settings, os.environ.get(PASSWORD))
    from preference_collection.store import open_store

    # What is wrong with the store is said here, and not on a page.
    open_store(settings.store, settings.read_only).close()
    page = Path(__file__).parent / "app.py"
    flags = {
        "server.port": settings.port, "server.address": settings.address, "server.headless": "true",
        "browser.gatherUsageStats": "false", "server.fileWatcherType": "none", "client.toolbarMode": "minimal",
        "client.showErrorDetails": "none",
    }  # fmt: skip
    line = [f"--{name}={value}" for name, value in flags.items()]
    os.environ[OVERRIDES] = json.dumps(options.overrides)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.execv(sys.executable, [sys.executable, "-m", "streamlit", "run", str(page), *line])


def run(options: argparse.Namespace, settings) -> str:
    """Do what was asked for, and say what came of it."""
    if options.command == "push":
        from preference_collection.export import push

        return f"pushed to {push(options.directory, options.repository, not options.public)}"
    from preference_collection.store import open_store

    with closing(open_store(settings.store, settings.read_only or options.command == "export")) as store:
        if options.command == "import":
            from preference_collection.importing import import_into

            return f"{settings.store}: {import_into(store, options.file, options.skip_bad_rows).line()}"
        if options.command == "score":
            from preference_collection.checkpoint_source import margins

            pairs = store.pairs()
            store.add_scores(options.checkpoint, margins(options.checkpoint, pairs))
            return f"{settings.store}: {len(pairs)} pairs scored by {options.checkpoint}"
        from preference_collection.export import export_dataset, export_records

        write = export_records if options.path.suffix else export_dataset
        counts = write(store, options.path, options.names)
        return f"{options.path}: {', '.join(f'{count} {kind}' for kind, count in counts.items())}"


def main(line: Sequence[str] | None = None) -> None:
    """Do what was asked for. A mistake of the user's is one message, and exit status 2."""
    options = arguments(line)
    try:
        settings = load_settings(options.overrides)
        if options.command == "serve":
            serve(options, settings)
        print(run(options, settings))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
