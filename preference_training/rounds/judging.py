"""The step that judges: a score for every response of a round. What a judge has said is never asked for again."""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from preference_training.core.machine import said_while_slow
from preference_training.core.values import counted
from preference_training.rounds.judges.base import Judge, JudgedInput, PendingError
from preference_training.rounds.judges.choice import build_judge, build_second_judge
from preference_training.rounds.judges.verdicts import Verdicts
from preference_training.rounds.loop import JUDGED, Loop, RoundFiles
from preference_training.rounds.tables import SCORES, read_table, save_text, write_table
from preference_training.tracking.run_files import json_object


def judge(loop: Loop, number: int, again: bool = False) -> None:
    """Score the responses of a round. again: ask again where the judge could not judge. Raises UserError, PendingError."""
    files = loop.round(number)
    tables = {files.held_out_samples: files.held_out_scores} | ({files.samples: files.scores} if files.number else {})
    # Those that are trained on first.
    wanted = {samples: scores for samples, scores in reversed(tables.items()) if again or not scores.is_file()}
    if not wanted:
        return
    verdicts, chosen = Verdicts(loop.verdicts, again), build_judge(loop.config)
    try:
        second = build_second_judge(loop.config) if files.held_out_samples in wanted else None
        try:
            _judge(Judging(loop, number, verdicts), wanted, chosen, second)
        finally:
            if second is not None:
                second.close()
    finally:
        chosen.close()


def _judge(judging: "Judging", wanted: dict[Path, Path], chosen: Judge, second: Judge | None) -> None:
    pending: PendingError | None = None
    for samples, scores in wanted.items():
        try:
            judging.judge(samples, scores, chosen, second if samples == judging.files.held_out_samples else None)
        except PendingError as error:
            # The questions of the other table are told with it.
            pending = error
    if pending is not None:
        raise pending


class Judging:
    """The judging of a round's tables."""

    def __init__(self, loop: Loop, number: int, verdicts: Verdicts):
        self.loop, self.number, self.verdicts = loop, number, verdicts
        self.prompts = {prompt.prompt_id: prompt for prompt in loop.prompts}

    @property
    def files(self) -> RoundFiles:
        """The files of the round."""
        return self.loop.round(self.number)

    def judge(self, samples: Path, scores: Path, chosen: Judge, second: Judge | None) -> None:
        """Score a table of samples. Raises UserError, PendingError."""
        rows = read_table(samples, ["prompt_id", "number", "text"])
        inputs = self._inputs(rows, samples == self.files.held_out_samples)
        given = {"": chosen} | ({"second_": second} if second is not None else {})
        for each in given.values():
            self._ask(each, inputs, f"{samples.stem}, by {each.name}")
        self._keep_facts({f"{prefix}{samples.stem}": each.facts(inputs) for prefix, each in given.items()})
        write_table(scores, self._scores(rows, inputs, chosen, second), SCORES)

    def _inputs(self, rows: Sequence[dict], held_out: bool) -> list[JudgedInput]:
        groups: dict[int, dict[str, None]] = defaultdict(dict)
        compared = rows
        if held_out:
            earlier = self.loop.round(1).held_out_samples
            compared = read_table(earlier, ["prompt_id", "text"]) if self.number > 1 else []
        for row in compared:
            groups[row["prompt_id"]].setdefault(row["text"])
        found = []
        for row in rows:
            prompt, others = self.prompts[row["prompt_id"]], tuple(groups[row["prompt_id"]])
            among, against = ((), others) if held_out else (others, ())
            found.append(JudgedInput(prompt.prompt, row["text"], prompt.row, among, against))
        return found

    def _ask(self, judge: Judge, inputs: Sequence[JudgedInput], what: str) -> None:
        unknown = len(self.verdicts.unknown(judge, inputs))
        known = len({Verdicts.key(judge, each) for each in inputs}) - unknown
        if inputs:
            said = f"; {known:,} are known" * bool(known)
            print(f"{self.files.name}: judging {counted(len(inputs), 'response')} of {what}{said}", flush=True)
        with said_while_slow("still judging"):
            self.verdicts.ask(judge, inputs)

    def _keep_facts(self, facts: dict[str, Any]) -> None:
        """Write what the judges say of their own scores, before the scores: it is there whenever they are."""
        known = json_object(self.files.directory / JUDGED) | facts
        save_text(self.files.directory / JUDGED, json.dumps({name: known[name] for name in sorted(known)}, indent=1) + "\n")

    def _scores(
        self, rows: Sequence[dict], inputs: Sequence[JudgedInput], chosen: Judge, second: Judge | None
    ) -> Iterator[dict]:
        others = self.verdicts.scores(second, inputs) if second is not None else [None] * len(inputs)
        for row, score, other in zip(rows, self.verdicts.scores(chosen, inputs), others, strict=True):
            yield {
                "prompt_id": row["prompt_id"],
                "number": row["number"],
                "score": score.value,
                "reason": score.reason,
                "judge": chosen.name,
                "second_score": None if other is None else other.value,
            }
