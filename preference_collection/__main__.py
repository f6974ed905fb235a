"""The command line of the labeling app.

    python -m preference_collection serve                  serve the page
    python -m preference_collection import FILE            import problems and labels: CSV, JSON lines, Parquet, an older store
    python -m preference_collection export PATH            export a data set for `lc` (a directory), .jsonl or .parquet
    python -m preference_collection push DIRECTORY NAME    upload an exported directory to the Hub
    python -m preference_collection generate               make answers to tasks that have no comparison yet
    python -m preference_collection judge                  ask a model which answers are better
    python -m preference_collection score CHECKPOINT       find the pairs that the policy is uncertain about

Each command accepts settings of config/collect.yaml: store=my.duckdb
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from preference_collection.generation.commands import add_generate, add_judge, prepare_generate, prepare_judge
from preference_collection.settings import PASSWORD, check_access, load_settings
from preference_training.core.errors import UserError


def arguments(line: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="serve the page")
    take = commands.add_parser("import", help="import problems and labels from a file")
    take.add_argument("file", type=Path)
    take.add_argument("--skip-bad-rows", action="store_true", help="skip invalid rows, and count them")
    out = commands.add_parser("export", help="export judgments as training data")
    out.add_argument("path", type=Path, help="a directory, or a .jsonl or .parquet file")
    out.add_argument("--names", action="store_true", help="write the names of labelers instead of numbers")
    up = commands.add_parser("push", help="upload an exported directory to the Hub")
    up.add_argument("directory", type=Path)
    up.add_argument("repository", help="USER/NAME")
    up.add_argument("--public", action="store_true", help="make the data set public")
    asking = add_generate(commands), add_judge(commands)
    score = commands.add_parser("score", help="score all pairs with a checkpoint")
    score.add_argument("checkpoint")
    for command in (serve, take, out, up, *asking, score):
        command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of config/collect.yaml")
    # argparse does not collect settings that follow an option.
    options, rest = parser.parse_known_args(line)
    if wrong := [text for text in rest if text.startswith("-") or "=" not in text]:
        parser.error(f"unrecognized: {' '.join(wrong)}")
    options.overrides += rest
    return options


def serve(settings) -> None:
    """Serve the page until it is stopped."""
    password = os.environ.get(PASSWORD, "")
    check_access(settings, password)
    from preference_collection.web.serving import serve

    serve(settings, password)


def run(options: argparse.Namespace, settings) -> str:
    """Run a command and return a line about the result."""
    if options.command == "push":
        from preference_collection.exchange.export import push

        return f"pushed to {push(options.directory, options.repository, not options.public)}"
    prepare = {"generate": prepare_generate, "judge": prepare_judge}.get(options.command)
    ask = prepare and prepare(options, settings)
    from preference_collection.store.store import open_store

    with closing(open_store(settings.store, settings.read_only or options.command == "export")) as store:
        if ask:
            return f"{settings.store}: {ask(store)}"
        if options.command == "import":
            from preference_collection.exchange.importing import import_into

            return f"{settings.store}: {import_into(store, options.file, options.skip_bad_rows).line()}"
        if options.command == "score":
            from preference_collection.generation.checkpoint_source import margins

            number = len(store.comparison_ids())
            store.add_scores(options.checkpoint, list(margins(options.checkpoint, store.comparisons())))
            return f"{settings.store}: {number} pairs scored by {options.checkpoint}"
        from preference_collection.exchange.export import export_dataset, export_records

        write = export_records if options.path.suffix else export_dataset
        counts = write(store, options.path, options.names)
        return f"{options.path}: {', '.join(f'{count} {kind}' for kind, count in counts.items())}"


def main(line: Sequence[str] | None = None) -> None:
    """Run the command. A user error gives one message, and exit status 2."""
    options = arguments(line)
    try:
        settings = load_settings(options.overrides)
        if options.command == "serve":
            serve(settings)
            return
        print(run(options, settings))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        print(f"stopped. {interrupt}".strip(), file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
