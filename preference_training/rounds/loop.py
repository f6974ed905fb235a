"""The directory of a loop. What is done follows from which files there are; nothing else keeps count.

rounds.json        what the loop was started with
prompts.parquet    its prompts, as they were then
verdicts.jsonl     every score that a judge has given, by a hash of judge, prompt and response
comparisons.jsonl  verdicts of a language model that compares two responses
people/            pairs that wait for people, and their verdicts
round-1/           samples.parquet, held_out_samples.parquet: responses of the policy before the round
                   sampling.json, *.unanswered.jsonl: what was sampled from; which responses a server did not give
                   scores.parquet, held_out_scores.parquet: what the judge says of them; judged.json: of its own scores
                   pairs.parquet: what the round trains on; excluded.json: what was excluded, by reason
                   train.yaml, run/: the training, as a configuration and as a run; policy: a link to its checkpoint
                   summary.json: the round in numbers
final/             held-out responses of the last policy, their scores, and a summary
metrics.jsonl      the summaries as metrics, a row for each policy; tracked.json: what dashboards have of it
report.html        all of it as a page
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from preference_training.configuration.config_files import insert_config_file
from preference_training.configuration.keys import MAY_CHANGE_ON_RESUME, is_within
from preference_training.configuration.rerun import PATHS, rerun_values, write_rerun
from preference_training.configuration.run_dirs import writable
from preference_training.configuration.saved import save_config
from preference_training.configuration.schema import RunConfig, keys_with
from preference_training.configuration.validation import configured
from preference_training.core.errors import UserError
from preference_training.core.files import write_atomically
from preference_training.core.values import dotted
from preference_training.losses.registry import example_kind
from preference_training.rounds.pairing import Rule
from preference_training.rounds.prompts import LoopPrompt, read_stored
from preference_training.tracking.run_files import ROUNDS_FILE, json_object

ROUNDS, PROMPTS, VERDICTS = ROUNDS_FILE, "prompts.parquet", "verdicts.jsonl"
FINAL = "final"
# Of a round: what the judges say of their own scores: comparisons, disagreements.
JUDGED = "judged.json"
# The first way to pair that a loss trains on, by what its examples are.
USUAL_PAIRS = {"pairs": "best_worst", "rankings": "ranking", "labels": "unpaired", "targets": "best_of_n"}


@dataclass(frozen=True)
class RoundFiles:
    """The files of a round, whether they are there or not. number: from 1; None for what follows the last round."""

    directory: Path
    number: int | None

    @property
    def name(self) -> str:
        """As messages call it."""
        return self.directory.name

    @property
    def samples(self) -> Path:
        """Responses to the round's prompts."""
        return self.directory / "samples.parquet"

    @property
    def scores(self) -> Path:
        """Their scores."""
        return self.directory / "scores.parquet"

    @property
    def held_out_samples(self) -> Path:
        """Responses to the held-out prompts, of the policy before the round."""
        return self.directory / "held_out_samples.parquet"

    @property
    def held_out_scores(self) -> Path:
        """Their scores."""
        return self.directory / "held_out_scores.parquet"

    @property
    def sampling(self) -> Path:
        """What was sampled from: the template of the prompts, and the model."""
        return self.directory / "sampling.json"

    @property
    def pairs(self) -> Path:
        """What the round trains on."""
        return self.directory / "pairs.parquet"

    @property
    def excluded(self) -> Path:
        """How much was excluded from it, by reason."""
        return self.directory / "excluded.json"

    @property
    def training(self) -> Path:
        """The configuration of the round's training."""
        return self.directory / "train.yaml"

    @property
    def run(self) -> Path:
        """The run directory of its training."""
        return self.directory / "run"

    @property
    def policy(self) -> Path:
        """A link to the checkpoint that the training ended with."""
        return self.directory / "policy"

    @property
    def summary(self) -> Path:
        """The round in numbers."""
        return self.directory / "summary.json"

    def is_done(self, step: str) -> bool:
        """Whether one of the steps sample, judge, pair, train, summarize is done."""
        if step == "train":
            return self.policy.is_dir()
        of_prompts = self.number is not None
        files = {
            "sample": [self.samples, self.held_out_samples] if of_prompts else [self.held_out_samples],
            "judge": [self.scores, self.held_out_scores] if of_prompts else [self.held_out_scores],
            "pair": [self.pairs],
            "summarize": [self.summary],
        }
        return all(file.is_file() for file in files[step])

    @property
    def steps(self) -> tuple[str, ...]:
        """The steps of the round, in their order."""
        if self.number is None:
            return ("sample", "judge", "summarize")
        return ("sample", "judge", "pair", "summarize", "train")

    @property
    def next_step(self) -> str | None:
        """The first step that is not done; None where all are."""
        return next((step for step in self.steps if not self.is_done(step)), None)


@dataclass(frozen=True)
class Loop:
    """A loop that was started in a directory. config: with the section `rounds`. values: its command line, key -> value."""

    directory: Path
    config: RunConfig
    values: dict[str, Any]

    @classmethod
    def open(cls, directory: Path) -> "Loop":
        """The loop of a directory. Raises UserError where there is none."""
        started = json_object(directory / ROUNDS)
        if not isinstance(started.get("rounds"), int):
            raise UserError(
                f"{directory}: no loop of rounds: it has no {ROUNDS}. Expected the run directory of train.py +rounds=default."
            )
        overrides = insert_config_file(["--config-name", "rerun", "--config-dir", str(directory)])
        config = configured(*overrides, f"rounds.rounds={started['rounds']}", f"local_run_dir={json.dumps(str(directory))}")
        return cls(directory, config, rerun_values(text for text in overrides if not text.startswith("--")))

    @classmethod
    def start(cls, directory: Path, config: RunConfig) -> "Loop":
        """Note what a loop is started with, or continued: the number of rounds may differ then. Raises UserError."""
        earlier = json_object(directory / ROUNDS)
        given = rerun_values(config.origin.overrides)
        if earlier:
            check_same_loop(directory, earlier, config, given)
        with writable(directory):
            directory.mkdir(parents=True, exist_ok=True)
            if earlier and earlier["rounds"] != config.rounds.rounds:
                # It is of another policy than the one that will be the last.
                shutil.rmtree(directory / FINAL, ignore_errors=True)
            save_config(config, directory)
            write_rerun(config, directory)
            kept = {"rounds": config.rounds.rounds, "given": given, "config": config.as_dict()}
            write_atomically(directory / ROUNDS, json.dumps(kept, indent=1) + "\n")
        paths = {key: given[key] for key in PATHS if key in given and "." in key}
        return cls(directory, config.changed(paths | {"local_run_dir": str(directory)}), given)

    @cached_property
    def rule(self) -> Rule:
        """How responses are paired."""
        rounds = self.config.rounds
        pairs = rounds.pairs or USUAL_PAIRS[example_kind(self.config.loss.name)]
        return Rule(pairs, rounds.margin, rounds.top_k, rounds.threshold, rounds.length_matched, rounds.truncated)

    @cached_property
    def prompts(self) -> list[LoopPrompt]:
        """All prompts of the loop, those held out among them."""
        return read_stored(self.directory / PROMPTS)

    @property
    def held_out(self) -> list[LoopPrompt]:
        """The prompts that are never trained on."""
        return [prompt for prompt in self.prompts if prompt.held_out]

    @property
    def verdicts(self) -> Path:
        """Every score that a judge has given."""
        return self.directory / VERDICTS

    def round(self, number: int) -> RoundFiles:
        """The files of a round, from 1; of the one after the last, those of the last policy."""
        return files_of(self.directory, self.config.rounds.rounds, number)

    def rounds(self) -> Iterator[RoundFiles]:
        """The rounds in their order, and what follows the last."""
        return (self.round(number) for number in range(1, self.config.rounds.rounds + 2))

    def archive_before(self, number: int) -> Path | None:
        """The weights of the policy that a round begins with; None for those that the loop was started with."""
        return self.round(number - 1).policy.resolve() if number > 1 else None

    def config_before(self, number: int) -> RunConfig:
        """The configuration whose model is the policy that a round begins with. Raises UserError where there is none yet."""
        archive = self.archive_before(number)
        if archive is None:
            return self.config
        if not archive.is_dir():
            raise UserError(
                f"round {number - 1} of {self.directory} is not trained yet. Its policy is what round {number} samples from."
            )
        return self.config.changed({"model.archive": str(archive)})


def files_of(directory: Path, rounds: int, number: int) -> RoundFiles:
    """The files of a round of a loop with so many rounds; of the one after the last, those of the last policy."""
    return RoundFiles(directory / FINAL, None) if number > rounds else RoundFiles(directory / f"round-{number}", number)


def all_files(directory: Path) -> list[RoundFiles]:
    """The rounds of a loop in their order, and what follows the last, whatever has become of its configuration."""
    rounds = json_object(directory / ROUNDS).get("rounds")
    return [files_of(directory, rounds, number) for number in range(1, rounds + 2)] if isinstance(rounds, int) else []


def check_same_loop(directory: Path, then: dict[str, Any], config: RunConfig, given: dict[str, Any]) -> None:
    """Raise UserError where a loop that is continued was started with other values of keys that may not change.

    given: the values of the command line, with absolute paths.
    """
    before, now = dotted(then.get("config", {})), dotted(config.as_dict())
    fixed = [key for key in sorted(before.keys() & now.keys()) if not is_within(key, keys_with(MAY_CHANGE_ON_RESUME))]
    # The prompts were read when the loop was started.
    fixed = [key for key in fixed if key not in ("rounds.prompts", "rounds.held_out") or not isinstance(now[key], str)]
    changed = [key for key in fixed if key not in PATHS and before[key] != now[key]]
    paths = {key: [values.get(key) for values in (then.get("given", {}), given)] for key in PATHS}
    before |= {key: values[0] for key, values in paths.items()}
    now |= {key: values[1] for key, values in paths.items()}
    changed += [key for key in fixed if key in PATHS and before[key] != now[key]]
    if changed:
        listed = "; ".join(f"{key}: was {before[key]!r}, is {now[key]!r}" for key in changed)
        raise UserError(
            f"resume: {directory} is a loop with another configuration: {listed}. Restore it, or start another loop."
        )
