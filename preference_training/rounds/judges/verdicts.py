"""Scores that judges have given, in a file: what a judge has said is never asked for again."""

import json
from collections.abc import Sequence
from pathlib import Path

import xxhash

from preference_training.core.errors import UserError
from preference_training.rounds.judges.base import Judge, JudgedInput, Score
from preference_training.rounds.prompts import as_json
from preference_training.tracking.run_files import json_lines


class Verdicts:
    """Scores in a JSON Lines file, by hashes of judge, prompt, response and row; of a judge that compares, of the others too.

    Those that are given together are appended at once. unjudged_again: responses that the judge could not judge are unknown.
    """

    def __init__(self, path: Path, unjudged_again: bool = False):
        self.path, self.known = path, {}
        # Half a line of a process that was killed stays a line of its own, which is skipped.
        content = path.read_bytes() if path.is_file() else b""
        self.begin = b"" if content.endswith(b"\n") or not content else b"\n"
        for row in json_lines(path):
            key, value = row.get("key"), row.get("score")
            if isinstance(key, str) and (isinstance(value, int | float) or (value is None and not unjudged_again)):
                self.known[key] = Score(value, row.get("reason"))

    @staticmethod
    def key(judge: Judge, sample: JudgedInput) -> str:
        """The hash of a judge and all that it is given."""
        row = json.dumps(sample.row, sort_keys=True, default=str)
        others = [[sorted(sample.among), sorted(sample.against)]] * judge.compares
        given = [judge.identity, as_json(sample.prompt), sample.response, row, *others]
        return xxhash.xxh3_128_hexdigest(json.dumps(given).encode())

    def unknown(self, judge: Judge, samples: Sequence[JudgedInput]) -> list[JudgedInput]:
        """The samples without a score, each once."""
        keyed = {self.key(judge, sample): sample for sample in samples}
        return [sample for key, sample in keyed.items() if key not in self.known]

    def scores(self, judge: Judge, samples: Sequence[JudgedInput]) -> list[Score]:
        """The scores of samples, all of which are known."""
        return [self.known[self.key(judge, sample)] for sample in samples]

    def ask(self, judge: Judge, samples: Sequence[JudgedInput]) -> None:
        """Ask a judge for the scores that are not known, each once, and keep them. Raises UserError, PendingError."""
        judge.judge_each(self.unknown(judge, samples), lambda some, scores: self.add(judge, some, scores))

    def add(self, judge: Judge, samples: Sequence[JudgedInput], scores: Sequence[Score]) -> None:
        """Keep scores. Raises UserError where they cannot be written."""
        rows = [
            {"key": self.key(judge, sample), "judge": judge.name, "score": score.value, "reason": score.reason}
            for sample, score in zip(samples, scores, strict=True)
        ]
        lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        try:
            with self.path.open("ab", buffering=0) as file:
                file.write(self.begin + lines)
        except OSError as error:
            raise UserError(
                f"local_run_dir: cannot write {self.path}: {error.strerror}. Expected a folder with room."
            ) from error
        self.begin = b""
        self.known |= {row["key"]: score for row, score in zip(rows, scores, strict=True)}
