"""The commands that move data: `import`, `export`, `push` and `score`."""

import argparse
from pathlib import Path

import yaml

from preference_training.core.errors import UserError


def add_import(commands) -> argparse.ArgumentParser:
    """Add `import` to the commands of a parser."""
    parser = commands.add_parser("import", help="import tasks, answers and labels: what training reads, or an older store")
    parser.add_argument("file", help="a file, folder, pattern or set of the Hub; an older store: a DuckDB file, or md:NAME")
    parser.add_argument("--skip-bad-rows", action="store_true", help="skip invalid rows, and count them")
    parser.add_argument(
        "--map", action="append", default=[], metavar="KEY=COLUMN",
        help="which column is which, as in an entry of datasets: --map prompt=question --map chosen=good --map rejected=bad",
    )  # fmt: skip
    return parser


def add_export(commands) -> argparse.ArgumentParser:
    """Add `export` to the commands of a parser."""
    parser = commands.add_parser("export", help="export judgments as training data")
    parser.add_argument("path", type=Path, help="a directory, or a .jsonl or .parquet file")
    parser.add_argument("--names", action="store_true", help="write the names of labelers instead of numbers")
    parser.add_argument(
        "--agreed",
        action="store_true",
        help="exclude judgments of comparisons on which labelers disagree and that nobody has settled",
    )
    return parser


def add_push(commands) -> argparse.ArgumentParser:
    """Add `push` to the commands of a parser."""
    parser = commands.add_parser("push", help="upload an exported directory to the Hub")
    parser.add_argument("directory", type=Path)
    parser.add_argument("repository", help="USER/NAME")
    parser.add_argument("--public", action="store_true", help="make the data set public")
    return parser


def add_score(commands) -> argparse.ArgumentParser:
    """Add `score` to the commands of a parser."""
    parser = commands.add_parser(
        "score", help="find the comparisons that a policy is uncertain about, or that may be mislabeled"
    )
    parser.add_argument("checkpoint", nargs="?", help="a checkpoint, which scores all comparisons")
    parser.add_argument("--ledger", type=Path, metavar="RUN", help="a run, whose margins say which labels may be wrong")
    return parser


def with_own_settings(options: argparse.Namespace) -> argparse.Namespace:
    """The options of a command, where a setting in the place of a checkpoint is none."""
    if options.command == "score" and "=" in (options.checkpoint or "") and not Path(options.checkpoint).exists():
        options.overrides, options.checkpoint = [options.checkpoint, *options.overrides], None
    return options


def prepare_import(options: argparse.Namespace, settings):
    """What `import` does with a store, checked before the store is opened. Raises UserError."""
    from preference_collection.exchange.importing import import_into

    given = dict(map(_mapped, options.map))
    return lambda store: "\n".join(import_into(store, options.file, options.skip_bad_rows, given).lines())


def _mapped(text: str) -> tuple[str, object]:
    """A key of an entry and its value: the name of a column, or a list or object of them in YAML. Raises UserError."""
    key, sign, value = text.partition("=")
    if not (sign and key.strip() and value.strip()):
        raise UserError(f"--map: found {text!r}, expected KEY=COLUMN, such as prompt=question.")
    if value.strip()[0] not in "[{" and value not in ("true", "false"):
        return key.strip(), value
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"--map: {text!r} cannot be read: {str(error).splitlines()[0]}. Expected KEY=[COLUMN, ...].") from error


def prepare_export(options: argparse.Namespace, settings):
    """What `export` does with a store."""
    from preference_collection.exchange.export import counts_line, export_dataset, export_records

    write = export_records if options.path.suffix else export_dataset
    return lambda store: counts_line(write(store, options.path, options.names, options.agreed))


def prepare_score(options: argparse.Namespace, settings):
    """What `score` does with a store, checked before the store is opened. Raises UserError."""
    if bool(options.checkpoint) == bool(options.ledger):
        raise UserError("score: expected a checkpoint, or --ledger RUN.")
    if options.ledger:
        from preference_collection.exchange.ledger import add_ledger, check_run

        check_run(options.ledger)
        return lambda store: add_ledger(store, options.ledger)
    from preference_collection.generation.checkpoint_source import margins

    def score(store) -> str:
        found = list(margins(options.checkpoint, store.comparisons()))
        store.add_scores(options.checkpoint, found)
        return f"{len(found)} comparison{'s' * (len(found) != 1)} scored by {options.checkpoint}"

    return score
