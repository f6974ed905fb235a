"""Mistakes on the command line of scripts/benchmark.py that are found before the libraries of models are imported."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from preference_training.core.errors import UserError
from preference_training.data.files import check_data_file


def check_arguments(options: Namespace) -> None:
    """Raise UserError for options that do not go together, and for files that are not there."""
    if options.command == "pairs":
        _check_pairs(options)
        return
    if bool(options.outputs) == bool(options.model):
        raise UserError("--outputs: expected files of outputs, or --model, which writes them now: one of both.")
    check_data_file(options.baseline, "--baseline")
    for _, file in named_files(options.outputs or ()):
        check_data_file(file, "--outputs")


def _check_pairs(options: Namespace) -> None:
    if options.model is None and not options.reward_model:
        raise UserError("pairs: nothing to score them by. Add --model MODEL, or --reward-model MODEL.")
    if options.reference and options.model is None:
        raise UserError("--reference: what the log-probs of --model are compared with, and none is given. Drop it.")
    check_data_file(options.file, "pairs")


def named_files(given: Sequence[str]) -> list[tuple[str, str]]:
    """Files of outputs with the names of their models: [NAME=]FILE. Raises UserError where two have one name."""
    named = []
    for each in given:
        name, equals, file = each.partition("=")
        named.append((name, file) if equals and not Path(each).exists() else (Path(each).stem, each))
    names = [name for name, _ in named]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--outputs: two models are called {name}. Name them: --outputs one=FILE other=FILE")
    return named
