"""The command line of the labeling app.

    python -m preference_collection serve                  serve the page
    python -m preference_collection import FILE            import tasks, answers and labels: what training reads, an older store
    python -m preference_collection export PATH            export training data: a data set (a directory), .jsonl or .parquet
    python -m preference_collection push DIRECTORY NAME    upload an exported directory to the Hub
    python -m preference_collection generate               make answers to tasks that have no comparison yet
    python -m preference_collection judge                  ask a model which answers are better
    python -m preference_collection score CHECKPOINT       find the comparisons that the policy is uncertain about
    python -m preference_collection score --ledger RUN     find those whose label the margins of a run call into question

Each command accepts settings of config/collect.yaml: store=my.duckdb
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import closing

from preference_collection.exchange.commands import (
    add_export,
    add_import,
    add_push,
    add_score,
    prepare_export,
    prepare_import,
    prepare_score,
    with_own_settings,
)
from preference_collection.generation.commands import add_generate, add_judge, prepare_generate, prepare_judge
from preference_collection.settings import PASSWORD, check_access, load_settings
from preference_training.core.errors import UserError

# What each command does with a store, checked before the store is opened.
PREPARE = {
    "import": prepare_import, "export": prepare_export, "generate": prepare_generate, "judge": prepare_judge,
    "score": prepare_score,
}  # fmt: skip


def arguments(line: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="serve the page")
    moving = add_import(commands), add_export(commands), add_push(commands), add_score(commands)
    asking = add_generate(commands), add_judge(commands)
    for command in (serve, *moving, *asking):
        command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of config/collect.yaml")
    # argparse does not collect settings that follow an option.
    options, rest = parser.parse_known_args(line)
    if wrong := [text for text in rest if text.startswith("-") or "=" not in text]:
        parser.error(f"unrecognized: {' '.join(wrong)}")
    options.overrides += rest
    return with_own_settings(options)


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
    work = PREPARE[options.command](options, settings)
    from preference_collection.store.store import open_store

    with closing(open_store(settings.store, settings.read_only or options.command == "export")) as store:
        return f"{options.path if options.command == 'export' else settings.store}: {work(store)}"


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
