"""A loop of rounds as its directory records it, read once.

The loop may still be in progress. Missing and damaged files count as empty.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy

from preference_training.configuration.saved import read_config
from preference_training.core.errors import UserError
from preference_training.core.metric_names import ROUND
from preference_training.core.values import UNREADABLE, dotted
from preference_training.data.records.record import Prompt
from preference_training.reporting.charts import Line, metric_line, metric_values
from preference_training.rounds.loop import PROMPTS, RoundFiles, all_files
from preference_training.rounds.prompts import read_stored
from preference_training.rounds.summary import loop_metrics, policy_name, read_summary
from preference_training.rounds.tables import read_table


@dataclass(frozen=True)
class Response:
    """A policy's response to a held-out prompt. score: None where it was not judged."""

    policy: str
    text: str
    score: float | None
    reason: str | None
    ended: bool


@dataclass(frozen=True)
class LoopRecord:
    """A loop's configuration, its rounds in their order with what follows the last, and the summary of each ({}: none yet)."""

    directory: Path
    config: dict[str, Any]
    rounds: list[RoundFiles]
    summaries: list[dict[str, Any]]

    @classmethod
    def read(cls, directory: Path) -> "LoopRecord":
        """Read the directory of a loop."""
        rounds = all_files(directory)
        return cls(directory, read_config(directory), rounds, [read_summary(files) for files in rounds])

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The configuration by dotted keys."""
        return dotted(self.config)

    @cached_property
    def rows(self) -> list[dict[str, float]]:
        """The metrics of the policies that have a summary."""
        return loop_metrics(self.rounds)

    @property
    def progress(self) -> str:
        """How far the loop is, in words."""
        trained = sum(files.number is not None and files.is_done("train") for files in self.rounds)
        if self.rounds and all(files.next_step is None for files in self.rounds):
            return f"finished: {_rounds(trained)}"
        return f"{trained} of {_rounds(len(self.rounds) - 1)} trained"

    def held_out(self, place: int) -> dict[str, Any]:
        """The held-out part of a summary; empty where there is none."""
        found = self.summaries[place].get("held_out") if self.summaries else None
        return found if isinstance(found, dict) else {}

    @property
    def measured(self) -> list[int]:
        """The places of the summaries that have a held-out part: of the policy after as many rounds."""
        return [place for place in range(len(self.summaries)) if self.held_out(place)]

    def line(self, metric: str, label: str, style: int = 0) -> Line | None:
        """The line of a metric over the rounds that its policy was trained in."""
        return metric_line(self.rows, self._places, metric, label, style=style, is_sparse=True)

    @cached_property
    def _places(self) -> numpy.ndarray:
        return metric_values(self.rows, ROUND)

    @cached_property
    def held_out_prompts(self) -> dict[int, Prompt]:
        """The held-out prompts by their numbers."""
        try:
            return {each.prompt_id: each.prompt for each in read_stored(self.directory / PROMPTS) if each.held_out}
        except (UserError, *UNREADABLE):
            return {}

    def responses(self, prompts: Iterable[int]) -> dict[int, list[Response]]:
        """The first response of each policy to some held-out prompts, by the prompt."""
        found: dict[int, list[Response]] = {prompt: [] for prompt in prompts}
        for place, files in enumerate(self.rounds):
            try:
                rows = read_table(files.held_out_samples, ("prompt_id", "number", "text", "ended"))
            except UserError:
                continue
            verdicts = _verdicts(files)
            for row in rows:
                if row["number"] == 0 and row["prompt_id"] in found:
                    score, reason = verdicts.get(row["prompt_id"], (None, None))
                    answer = Response(policy_name(place), row["text"], score, reason, row["ended"])
                    found[row["prompt_id"]].append(answer)
        return found


def _rounds(number: int) -> str:
    return f"{number} round{'s' * (number != 1)}"


def _verdicts(files: RoundFiles) -> dict[int, tuple[float | None, str | None]]:
    """Score and reason of the first response to each held-out prompt."""
    try:
        rows = read_table(files.held_out_scores, ("prompt_id", "number", "score", "reason"))
    except UserError:
        return {}
    return {row["prompt_id"]: (row["score"], row["reason"]) for row in rows if row["number"] == 0}
