"""The two halves of the training prompts: by a hash of the prompt's token ids, so that all pairs of a prompt are in one."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy

from preference_training.core.errors import UserError
from preference_training.data.preparation import Prepared, kept_part
from preference_training.data.prompt_table import PromptTable
from preference_training.data.records.report import DataReport


def halves(train: Prepared, half: int, directory: Path) -> tuple[Prepared, Prepared]:
    """One half of the training data, 1 or 2, and the other one. Raises UserError where one of them is empty.

    directory: of prepared data, where the halves are kept.
    """
    is_ours = [part.prompt_hashes % numpy.uint64(2) == half - 1 for part in train.table.parts]
    counts = [sum(int(each.sum()) for each in is_ours), sum(int((~each).sum()) for each in is_ours)]
    if not all(counts):
        raise UserError(
            f"data.weights: the halves of the training data have {max(counts)} prompts and none. Expected more prompts."
        )
    return _chosen(train, is_ours, directory), _chosen(train, [~each for each in is_ours], directory)


def _chosen(train: Prepared, kept: Sequence[numpy.ndarray], directory: Path) -> Prepared:
    found = [
        part if some.all() else kept_part(part, some, directory)
        for part, some in zip(train.table.parts, kept, strict=True)
        if some.any()
    ]
    counts = iter([int(some.sum()) for some in kept])
    # What was skipped and changed is that of the whole.
    reports = [DataReport(num_prompts=next(counts) if report.num_prompts else 0) for report in train.reports]
    return replace(train, table=PromptTable(found, train.table.first_row), reports=reports)
