"""A run that trains nothing: the policy's held-out scores, its distance from the reference, its win rate, its tasks.

results.json        everything that was found, with intervals
answers.jsonl       the sampled answers
judgements.jsonl    the verdicts on them, which a second evaluation does not ask for again
"""

import copy
import json
import math
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from torch import nn

from preference_training.batching.batches import BatchIterator, evaluation_batches, evaluation_prompts
from preference_training.checkpointing.checkpoint import Checkpoint, checkpoints_of
from preference_training.configuration.composition import (
    CONFIG_DIR,
    GROUPS,
    OPEN_SECTIONS,
    explain_composition_error,
    known_keys,
)
from preference_training.configuration.validation import task_names
from preference_training.core.errors import UserError, first_line, nearest
from preference_training.core.files import write_atomically
from preference_training.core.values import UNREADABLE
from preference_training.data.prompt_table import PromptTable
from preference_training.evaluation.held_out import HeldOut
from preference_training.evaluation.held_out_report import ExampleFacts, kl_estimate, lines_of, summary, warnings_of
from preference_training.evaluation.judges import build_judge
from preference_training.evaluation.task_suites import TaskList
from preference_training.evaluation.win_rates import Comparison, win_rate
from preference_training.generation.sampling import OTHER, POLICY, sample_responses
from preference_training.modeling.token_budget import shared_budget, token_budget
from preference_training.tracking.run_files import ANSWERS, JUDGEMENTS, RESULTS_FILE, STATE


class EvaluationRun:
    """What an evaluation needs, loaded: `trainer` has the policy, and scores it as training does.

    prompts are the held-out ones. Without a checkpoint the policy is the model as configured, and so is the reference; with one
    the policy's weights are the checkpoint's. Raises UserError where judge, tasks or models cannot be had.
    """

    def __init__(self, config, trainer_class, placement, loss, prompts: PromptTable, checkpoint: Checkpoint | None, tracker):
        self.config, self.placement, self.checkpoint = config, placement, checkpoint
        self.ranks, self.tokenizer = placement.ranks, placement.tokenizer
        wanted, is_main = config.evaluation, placement.ranks.is_main
        names = task_names(config)
        self.tasks = TaskList(names, wanted.task_path) if names else None
        self.judge = build_judge(config, placement.device) if wanted.judge and is_main else None
        policy = placement.policy()
        if checkpoint is not None and loss.needs_reference and is_main:
            check_beginning(config, checkpoint, placement.began_with)
        self.budget = shared_budget(token_budget(policy, config.max_tokens_per_microbatch), self.ranks)
        self.examples = evaluation_prompts(prompts, config.n_eval_examples, config.seed)
        self.asked = [prompt.prompt_ids for prompt in self.examples][: wanted.n_prompts]
        sizes = config.eval_batch_size, config.n_eval_examples, config.seed
        # Of a run that is not ours samples.jsonl is left as it is.
        number = 0 if checkpoint else config.n_eval_model_samples * placement.samples(config.sample_during_eval)
        self.trainer = trainer_class(
            config,
            policy=policy,
            reference=placement.reference(policy) if loss.needs_reference else None,
            loss=loss,
            tokenizer=self.tokenizer,
            train_batches=BatchIterator(PromptTable.of([]), config.batch_size),
            eval_batches=evaluation_batches(prompts, *sizes, self.budget, self.ranks),
            sample_prompts=[prompts[k].prompt_ids for k in range(min(len(prompts), number))],
            tracker=tracker,
            ranks=self.ranks,
        )

    def evaluate(self, directory: Path) -> dict:
        """Everything the configuration asks for, printed and written; the results, which all processes but the first lack.

        directory: where results.json goes, unless `evaluation.to` says otherwise.
        """
        trainer, wanted = self.trainer, self.config.evaluation
        other = None
        if wanted.judge and wanted.against == "reference":
            # The policy's weights are still those that the reference has.
            other = self.answers(trainer.policy, OTHER)
        if self.checkpoint is not None:
            self.take_checkpoint()
        trainer.evaluate()
        results: dict = {
            "checkpoint": str(self.checkpoint.path) if self.checkpoint else None,
            "examples_trained": trainer.examples,
        }
        responses = self.answers(trainer.policy) if wanted.judge or trainer.reference is not None else []
        ratios = None
        if trainer.reference is not None:
            parts = self.asked, responses, self.config.eval_batch_size, self.budget, self.ranks
            results["kl"], ratios = kl_estimate(trainer.policy, trainer.reference, *parts)
        if wanted.judge and other is None:
            trainer.reference = None
            other = self.answers(self.model_of(wanted.against), OTHER)
        if not self.ranks.is_main:
            return {}
        path = Path(wanted.to) if wanted.to else directory / RESULTS_FILE
        return self.report(path, results, trainer.held_out, responses, other, ratios)

    def report(self, path: Path, results: dict, held_out: HeldOut, responses: list, other: list | None, ratios) -> dict:
        """Write and print results, those of judge and tasks too; what is known is in the file before these are asked."""
        wanted = self.config.evaluation
        facts = ExampleFacts.of(self.examples, self.config.n_eval_examples, self.tokenizer)
        means = {name: mean if math.isfinite(mean) else None for name, mean in held_out.means().items()}
        results |= {"metrics": means, "held_out": summary(held_out, facts)}
        results["config"] = OmegaConf.to_container(self.config, resolve=True)
        texts = {"prompt": self.asked, "policy": responses} | ({"other": other} if other is not None else {})
        texts = {name: self.tokenizer.batch_decode(ids, skip_special_tokens=True) for name, ids in texts.items()}
        write_results(path, results)
        if responses:
            rows = [dict(zip(texts, row, strict=True)) for row in zip(*texts.values(), strict=True)]
            if ratios is not None:
                rows = [row | {"log_ratio": ratio} for row, ratio in zip(rows, ratios, strict=True)]
            write_text(path.with_name(ANSWERS), "".join(json.dumps(row) + "\n" for row in rows))
        if self.judge is not None:
            comparisons = [Comparison(*row) for row in zip(*texts.values(), strict=True)]
            results["win_rate"] = win_rate(self.judge, comparisons, path.with_name(JUDGEMENTS), wanted)
            write_results(path, results)
        if self.tasks is not None:
            options = wanted.task_limit, self.config.eval_batch_size
            results["tasks"] = self.tasks.results(self.trainer.policy, self.tokenizer, *options)
        results["warnings"] = warnings_of(results)
        write_results(path, results)
        print("", *lines_of(results), f"results: {path}", sep="\n", flush=True)
        return results

    def take_checkpoint(self) -> None:
        """The checkpoint's weights in place of the reference's, and how far it was."""
        trainer, state = self.trainer, self.checkpoint.state
        trainer.take_weights(self.checkpoint)
        trainer.examples, trainer.updates, trainer.tokens = state["examples"], state["updates"], state.get("tokens", 0)
        if self.checkpoint.config["loss"] == OmegaConf.to_container(self.config.loss, resolve=True):
            # beta-DPO's statistics, which evaluations read.
            trainer.loss.load_state_dict(state["loss"])

    def answers(self, model: nn.Module, stream: str = POLICY) -> list[list[int]]:
        """Token ids of a model's sampled answers to the prompts that are asked, drawn from a stream of noise."""
        sizes = self.config.max_length, self.config.seed
        return sample_responses(model, self.tokenizer, self.asked, *sizes, self.ranks, stream)

    def model_of(self, archive: str) -> nn.Module:
        """The model of another checkpoint directory, placed as the policy is."""
        placement = copy.copy(self.placement)
        placement.config = OmegaConf.merge(self.config, {"model": {"archive": archive}})
        return placement.policy()


def check_beginning(config: DictConfig, checkpoint: Checkpoint, found: str | None) -> None:
    """Raise UserError where the reference, a model with the hash `found`, is not what a checkpoint's run began with."""
    run = checkpoint.run
    if run["config"]["model"] == OmegaConf.to_container(config.model, resolve=True) and run["began_with"] != found:
        raise UserError(
            f"model: the weights are not those that the run of {checkpoint.path} began with, which are its reference. Expected "
            "the model, or model.archive, as it was then; model.archive=PATH names another reference."
        )


def write_results(path: Path, results: dict) -> None:
    """Write results as JSON."""
    write_text(path, json.dumps(results, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place, then rename it. Raises UserError where it cannot be written."""
    try:
        write_atomically(path, text)
    except OSError as error:
        raise UserError(
            f"evaluation.to: {path} cannot be written: {error.strerror}. Expected a file in a folder of yours, with room."
        ) from error


# ---- the configuration of a run -------------------------------------------------------------------------------------------


def config_of_run(path: Path, overrides: list[str]) -> DictConfig:
    """The configuration with which a run's checkpoint is evaluated: the run's own, and `overrides` of it ("key=value").

    path: a run directory or one of its checkpoints. Keys that the run did not know yet have their defaults. Raises UserError
    for a path that is neither, and for keys that do not exist.
    """
    found = checkpoints_of(path)
    try:
        then = Checkpoint.read(found[0] if found else path).config
        config = OmegaConf.create({group: then[group] for group in GROUPS} | then)
    except UNREADABLE as error:
        why = f"no checkpoint with a {STATE} that can be read ({first_line(error)})" if path.is_dir() else "no such directory"
        raise UserError(f"{path}: {why}. Expected a run directory, or a checkpoint in it (step-N, LATEST).") from error
    base = composed("model=blank_model", f"loss={config.loss.get('name')}", f"trainer={config.trainer.get('name')}")
    # Nothing of these is the run's own.
    fixed = {"eval_only": True, "dry_run": False, "resume": str(path), "evaluation": base.evaluation}
    config = OmegaConf.merge(base, config, fixed)
    for text in overrides:
        config = overridden(config, text)
    _refuse_code(config, overrides, path)
    return config


def _refuse_code(config: DictConfig, overrides: list[str], path: Path) -> None:
    """Raise UserError where a run's own configuration, which may be anybody's, would have code executed."""
    run = OmegaConf.to_container(config)
    named = {
        "loss.function": run["loss"].get("function"),
        "datasets": next((text for text in _texts(run["datasets"]) if ".py:" in text), None),
        "model.trust_remote_code": "true" if run["model"].get("trust_remote_code") else None,
    }
    given = {text.lstrip("+").partition("=")[0] for text in overrides}
    for key, code in named.items():
        if code is not None and not given & {key, key.partition(".")[0]}:
            raise UserError(
                f"{key}: the run of {path} says {code}, by which code would be executed that you have not named. Where you "
                f"trust it, say so too: {key}={code}."
            )


def _texts(value) -> list[str]:
    """All texts in lists and dicts."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [value] if isinstance(value, str) else [text for each in inside for text in _texts(each)]


def composed(*overrides: str) -> DictConfig:
    """The configuration that overrides compose to. Raises UserError where one names what does not exist."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException

    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            config = compose("config", overrides=list(overrides))
    except HydraException as error:
        raise UserError(explain_composition_error(error)) from error
    OmegaConf.set_struct(config, False)
    return config


def overridden(config: DictConfig, text: str) -> DictConfig:
    """A configuration with "key=value" as on `train.py`'s command line; of a group, all of it. Raises UserError for others."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        [override] = OverridesParser.create().parse_overrides([text])
    except HydraException as error:
        raise UserError(f"{text}: {first_line(error)}. Expected key=value, as on train.py's command line.") from error
    key = override.key_or_group
    if override.is_sweep_override() or override.is_delete():
        raise UserError(f"{text}: expected key=value, with one value.")
    if key in GROUPS:
        # In place of the old group, whose keys may be others.
        return OmegaConf.create({**config, key: composed(text)[key]})
    if key not in known_keys() and not key.startswith(tuple(f"{name}." for name in OPEN_SECTIONS)):
        raise UserError(f"{key}: no such key; {nearest(key, known_keys())}")
    OmegaConf.update(config, key, override.value(), merge=False, force_add=True)
    return config
