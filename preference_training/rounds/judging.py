"""The step that judges: a score for every response of a round. What a judge has said is never asked for again."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import xxhash

from preference_training.core.errors import UserError
from preference_training.core.machine import said_while_slow
from preference_training.rounds.judges.base import Judge, JudgedInput, Score
from preference_training.rounds.judges.choice import build_judge
from preference_training.rounds.loop import Loop, counted
from preference_training.rounds.prompts import LoopPrompt, as_json
from preference_training.rounds.tables import SCORES, read_table, write_table
from preference_training.tracking.run_files import json_lines


class Verdicts:
    """Scores in a JSON Lines file, by hashes of judge, prompt, response and row.

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
        return xxhash.xxh3_128_hexdigest(json.dumps([judge.identity, as_json(sample.prompt), sample.response, row]).encode())

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


def judge(loop: Loop, number: int, again: bool = False) -> None:
    """Score the responses of a round. again: ask again where the judge could not judge. Raises UserError, PendingError."""
    files = loop.round(number)
    tables = {files.held_out_samples: files.held_out_scores} | ({files.samples: files.scores} if files.number else {})
    # Those that are trained on first.
    wanted = {samples: scores for samples, scores in reversed(tables.items()) if again or not scores.is_file()}
    if not wanted:
        return
    verdicts, chosen = Verdicts(loop.verdicts, again), build_judge(loop.config)
    prompts = {prompt.prompt_id: prompt for prompt in loop.prompts}
    try:
        for samples, scores in wanted.items():
            rows = read_table(samples, ["prompt_id", "number", "text"])
            inputs = [_input(prompts[row["prompt_id"]], row["text"]) for row in rows]
            _ask(
                chosen,
                inputs,
                verdicts,
                f"{files.name}: judging {counted(len(rows), 'response')} of {samples.stem}, by {chosen.name}",
            )
            write_table(scores, _scores(chosen, rows, inputs, verdicts), SCORES)
    finally:
        chosen.close()


def _input(prompt: LoopPrompt, response: str) -> JudgedInput:
    return JudgedInput(prompt.prompt, response, prompt.row)


def _ask(judge: Judge, inputs: Sequence[JudgedInput], verdicts: Verdicts, what: str) -> None:
    """Ask a judge for the scores that are not known, each once."""
    unknown = {key: each for each in inputs if (key := Verdicts.key(judge, each)) not in verdicts.known}
    known = len({Verdicts.key(judge, each) for each in inputs}) - len(unknown)
    if inputs:
        print(what + f"; {known:,} are known" * bool(known), flush=True)
    with said_while_slow("still judging"):
        for start in range(0, len(unknown), judge.at_once):
            some = list(unknown.values())[start : start + judge.at_once]
            verdicts.add(judge, some, judge.judge(some))


def _scores(judge: Judge, rows: Sequence[dict], inputs: Sequence[JudgedInput], verdicts: Verdicts) -> Iterator[dict]:
    for row, each in zip(rows, inputs, strict=True):
        score = verdicts.known[Verdicts.key(judge, each)]
        yield {
            "prompt_id": row["prompt_id"],
            "number": row["number"],
            "score": score.value,
            "reason": score.reason,
            "judge": judge.name,
        }
