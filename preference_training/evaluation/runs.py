"""A run that trains nothing: the policy's held-out scores, its distance from the reference, its win rate, its tasks.

results.json        everything that was found, with intervals
answers.jsonl       the sampled answers
judgements.jsonl    the verdicts on them, which a second evaluation does not ask for again
"""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from torch import nn

from preference_training.batching.batches import evaluation_batches, evaluation_prompts
from preference_training.checkpointing.checkpoints import checkpoints_of, read_state, read_weights
from preference_training.configuration.composition import (
    CONFIG_DIR,
    GROUPS,
    OPEN_SECTIONS,
    explain_composition_error,
    known_keys,
)
from preference_training.configuration.validation import task_names
from preference_training.core.errors import UserError, first_line, nearest
from preference_training.core.values import UNREADABLE
from preference_training.data.prompt_table import PromptTable
from preference_training.evaluation.held_out import HeldOut
from preference_training.evaluation.held_out_report import ExampleFacts, kl_estimate, lines_of, summary, warnings_of
from preference_training.evaluation.judges import build_judge
from preference_training.evaluation.task_suites import TaskList
from preference_training.evaluation.win_rates import Comparison, win_rate
from preference_training.generation.sampling import OTHER, POLICY, sample_responses
from preference_training.modeling.token_budget import shared_budget, token_budget


class EvaluationRun:
    """What an evaluation needs, loaded: `evaluator` has the policy, and scores it as training does.

    prompts are the held-out ones. Without a checkpoint the policy is the model as configured, and so is the reference; with one
    the policy's weights are the checkpoint's. build_evaluator builds the evaluator from what is loaded here. Raises UserError
    where judge, tasks or models cannot be had.
    """

    def __init__(
        self,
        config,
        placement,
        prompts: PromptTable,
        checkpoint: Path | None,
        needs_reference: bool,
        build_evaluator: Callable,
    ):
        self.config, self.placement, self.checkpoint = config, placement, checkpoint
        self.ranks, self.tokenizer = placement.ranks, placement.tokenizer
        wanted, is_rank_zero = config.evaluation, placement.ranks.is_rank_zero
        names = task_names(config)
        self.tasks = TaskList(names, wanted.task_path) if names else None
        self.judge = build_judge(config, placement.device) if wanted.judge and is_rank_zero else None
        policy = placement.load_policy()
        if checkpoint is not None and needs_reference and is_rank_zero:
            check_beginning(config, checkpoint, placement.began_with)
        self.budget = shared_budget(token_budget(policy, config.max_tokens_per_microbatch), self.ranks)
        self.examples = evaluation_prompts(prompts, config.n_eval_examples, config.seed)
        self.asked = [prompt.prompt_ids for prompt in self.examples][: wanted.n_prompts]
        sizes = config.eval_batch_size, config.n_eval_examples, config.seed
        # Of a run that is not ours samples.jsonl is left as it is.
        number = 0 if checkpoint else config.n_eval_model_samples * placement.samples(config.sample_during_eval)
        self.evaluator = build_evaluator(
            policy=policy,
            reference=placement.reference(policy) if needs_reference else None,
            held_out=evaluation_batches(prompts, *sizes, self.budget, self.ranks),
            sample_prompts=[prompts[k].prompt_ids for k in range(min(len(prompts), number))],
        )

    def evaluate(self, directory: Path) -> dict:
        """Everything the configuration asks for, printed and written; the results, which all processes but the first lack.

        directory: where results.json goes, unless `evaluation.to` says otherwise.
        """
        models, wanted = self.evaluator.models, self.config.evaluation
        other = None
        if wanted.judge and wanted.against == "reference":
            # The policy's weights are still those that the reference has.
            other = self.answers(models.policy, OTHER)
        if self.checkpoint is not None:
            self.take_checkpoint()
        self.evaluator.evaluate()
        trained = self.evaluator.state.examples
        results: dict = {"checkpoint": str(self.checkpoint) if self.checkpoint else None, "examples_trained": trained}
        responses = self.answers(models.policy) if wanted.judge or models.reference is not None else []
        ratios = None
        if models.reference is not None:
            parts = self.asked, responses, self.config.eval_batch_size, self.budget, self.ranks
            results["kl"], ratios = kl_estimate(models.policy, models.reference, *parts)
        if wanted.judge and other is None:
            models.reference = None
            other = self.answers(self.model_of(wanted.against), OTHER)
        if not self.ranks.is_rank_zero:
            return {}
        path = Path(wanted.to) if wanted.to else directory / "results.json"
        return self.report(path, results, self.evaluator.held_out, responses, other, ratios)

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
            write_text(path.with_name("answers.jsonl"), "".join(json.dumps(row) + "\n" for row in rows))
        if self.judge is not None:
            comparisons = [Comparison(*row) for row in zip(*texts.values(), strict=True)]
            results["win_rate"] = win_rate(self.judge, comparisons, path.with_name("judgements.jsonl"), wanted)
            write_results(path, results)
        if self.tasks is not None:
            options = wanted.task_limit, self.config.eval_batch_size
            results["tasks"] = self.tasks.results(self.evaluator.models.policy, self.tokenizer, *options)
        results["warnings"] = warnings_of(results)
        write_results(path, results)
        print("", *lines_of(results), f"results: {path}", sep="\n", flush=True)
        return results

    def take_checkpoint(self) -> None:
        """The checkpoint's weights in place of the reference's, and how far it was."""
        models, state, saved = self.evaluator.models, self.evaluator.state, read_state(self.checkpoint)
        weights = self.placement.weights(models.policy)
        read_weights(self.checkpoint, weights)
        self.placement.set_weights(models.policy, weights)
        state.examples, state.updates, state.tokens = saved["examples"], saved["updates"], saved.get("tokens", 0)
        if saved["run"]["config"]["loss"] == OmegaConf.to_container(self.config.loss, resolve=True):
            # beta-DPO's statistics, which evaluations read.
            models.loss.load_state_dict(saved["loss"])

    def answers(self, model: nn.Module, stream: str = POLICY) -> list[list[int]]:
        """Token ids of a model's sampled answers to the prompts that are asked, drawn from a stream of noise."""
        sizes = self.config.max_length, self.config.seed
        return sample_responses(model, self.tokenizer, self.asked, *sizes, self.ranks, stream)

    def model_of(self, archive: str) -> nn.Module:
        """The model of another checkpoint directory, placed as the policy is."""
        placement = copy.copy(self.placement)
        placement.config = OmegaConf.merge(self.config, {"model": {"archive": archive}})
        return placement.load_policy()


def check_beginning(config: DictConfig, checkpoint: Path, found: str | None) -> None:
    """Raise UserError where the reference, a model with the hash `found`, is not what a checkpoint's run began with."""
    run = read_state(checkpoint)["run"]
    if run["config"]["model"] == OmegaConf.to_container(config.model, resolve=True) and run["began_with"] != found:
        raise UserError(
            f"model: the weights are not those that the run of {checkpoint} began with, which are its reference. Expected the "
            "model, or model.archive, as it was then; model.archive=PATH names another reference."
        )


def write_results(path: Path, results: dict) -> None:
    """Write results as JSON."""
    write_text(path, json.dumps(results, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place, then rename it. Raises UserError where it cannot be written."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(text)
        partial.replace(path)
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
    checkpoint = found[0] if found else path
    try:
        then = read_state(checkpoint)["run"]["config"]
        config = OmegaConf.create({group: then[group] for group in GROUPS} | then)
    except UNREADABLE as error:
        why = (
            f"no checkpoint with a state.json that can be read ({first_line(error)})" if path.is_dir() else "no such directory"
        )
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
