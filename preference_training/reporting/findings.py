"""What a reader of a run must know first."""

from dataclasses import dataclass
from typing import Literal

from preference_training.reporting.observations import observations
from preference_training.reporting.run_record import RunRecord


@dataclass(frozen=True)
class Finding:
    """A sentence about a run. kind: what it is about. severity: whether the run is of use."""

    kind: str
    severity: Literal["error", "warning", "note"]
    text: str


def findings(run: RunRecord) -> list[Finding]:
    """What the files of a run say about it, the most severe first."""
    return [Finding("observation", "warning", text) for text in observations(run)]
