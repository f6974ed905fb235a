"""Evaluation without training: held-out metrics, KL divergence to the reference, win rate, tasks.

results.json                all results, with intervals
held_out_examples.jsonl     the metrics of each held-out example, to compare two models by prompt
answers.jsonl               the sampled responses
judgements.jsonl            the verdicts on them, which a later evaluation reuses
"""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import nn

from preference_training.batching.micro_batches import evaluation_batches, evaluation_prompts
from preference_training.checkpointing.checkpoint import Checkpoint, list_checkpoints
from preference_training.configuration.saved import changed_config, known_values
from preference_training.configuration.schema import RunConfig
from preference_training.core.errors import UserError, first_line
from preference_training.core.files import write_atomically
from preference_training.core.machine import said_while_slow
from preference_training.core.values import UNREADABLE
from preference_training.data.prompt_table import PromptTable
from preference_training.distributed.placement import Placement, same_devices
from preference_training.evaluation.breakdown import ExampleFacts, break_down
from preference_training.evaluation.held_out import HeldOut, kl_estimate, response_batches
from preference_training.evaluation.judges import build_judge
from preference_training.evaluation.results_text import format_results, warnings
from preference_training.evaluation.task_suites import TaskList
from preference_training.evaluation.win_rates import Comparison, win_rate
from preference_training.generation.sampling import OTHER, POLICY, Sampler
from preference_training.generation.settings import GenerationSettings
from preference_training.modeling.token_budget import common_budget, token_budget
from preference_training.tracking.run_files import ANSWERS, HELD_OUT_EXAMPLES, JUDGEMENTS, RESULTS_FILE
from preference_training.tracking.tracker import held_out_line


class EvaluationRun:
    """The loaded parts of an evaluation: `evaluator` holds the policy and scores it as in training.

    prompts: the held-out ones. The policy has the weights of the checkpoint, or else those of the configured model.
    build_evaluator: builds the evaluator from what is loaded here. Raises UserError where the judge, the tasks or the models
    cannot be loaded.
    """

    def __init__(
        self,
        placement: Placement,
        prompts: PromptTable,
        checkpoint: Checkpoint | None,
        needs_reference: bool,
        build_evaluator: Callable,
    ):
        config = placement.config
        self.config, self.placement, self.checkpoint = config, placement, checkpoint
        self.ranks, self.tokenizer = placement.ranks, placement.tokenizer
        options, is_rank_zero = config.evaluation, placement.ranks.is_rank_zero
        names = config.evaluation.task_names
        self.tasks = TaskList(names, options.task_path) if names else None
        self.judge = build_judge(options, config.cache_dir, placement.device) if options.judge and is_rank_zero else None
        if self.judge is not None and (note := self.judge.identify()):
            # Before the responses are sampled, which takes long.
            print(f"warning: judge: {note}", flush=True)
        loader = same_devices(placement, replace(config, model=config.model.untrained()))
        loader.base_dir = placement.base_dir
        policy = loader.load_policy()
        if checkpoint is not None and needs_reference and is_rank_zero:
            check_reference(config, checkpoint, loader.began_with)
        self.budget = common_budget(token_budget(policy, config.max_tokens_per_microbatch), self.ranks)
        self.examples = evaluation_prompts(prompts, config.n_eval_examples, config.seed)
        self.sample_prompts = [prompt.prompt_ids for prompt in self.examples][: options.n_prompts]
        sizes = config.eval_batch_size, config.n_eval_examples, config.seed
        # An evaluated run keeps its own samples.jsonl.
        number = 0 if checkpoint else config.n_eval_model_samples * placement.samples(config.sample_during_eval)
        self.evaluator = build_evaluator(
            policy=policy,
            reference=placement.reference(policy) if needs_reference else None,
            held_out=evaluation_batches(prompts, *sizes, self.budget, self.ranks),
            sample_prompts=[prompts[k].prompt_ids for k in range(min(len(prompts), number))],
        )

    def evaluate(self, directory: Path) -> dict:
        """Compute, print and write everything that the configuration asks for; returns the results on rank 0, {} elsewhere.

        directory: for results.json, unless `evaluation.to` is set.
        """
        models, options = self.evaluator.models, self.config.evaluation
        other = None
        if options.judge and options.against == "reference":
            other = self.sample_reference()
        if self.checkpoint is not None:
            self.load_checkpoint()
        self.evaluator.evaluate()
        if self.ranks.is_rank_zero:
            # Known before the responses are sampled, which takes longer.
            print(f"held out: {held_out_line(self.evaluator.held_out.means())}", flush=True)
        trained = self.evaluator.state.examples
        results: dict = {"checkpoint": str(self.checkpoint.path) if self.checkpoint else None, "examples_trained": trained}
        responses = self.sample(models.policy) if options.judge or models.reference is not None else []
        ratios = None
        if models.reference is not None:
            sizes = self.config.eval_batch_size, self.budget
            batches = response_batches(self.sample_prompts, responses, *sizes, self.ranks)
            results["kl"], ratios = kl_estimate(models.policy, models.reference, batches, self.ranks)
        if options.judge and other is None:
            models.reference = None
            other = self.sample(self.load_other(options.against), OTHER)
        if not self.ranks.is_rank_zero:
            return {}
        path = Path(options.to) if options.to else directory / RESULTS_FILE
        return self.report(path, results, self.evaluator.held_out, responses, other, ratios)

    def report(self, path: Path, results: dict, held_out: HeldOut, responses: list, other: list | None, ratios) -> dict:
        """Add the results of judge and tasks, write and print all; what is known already is written first."""
        options = self.config.evaluation
        facts = ExampleFacts.of(self.examples, self.config.n_eval_examples, self.tokenizer)
        means = {name: mean if math.isfinite(mean) else None for name, mean in held_out.means().items()}
        results |= {"metrics": means, "held_out": break_down(held_out, facts)}
        results["config"] = self.config.as_dict()
        texts = {"prompt": self.sample_prompts, "policy": responses} | ({"other": other} if other is not None else {})
        texts = {name: self.tokenizer.batch_decode(ids, skip_special_tokens=True) for name, ids in texts.items()}
        write_results(path, results)
        write_text(path.with_name(HELD_OUT_EXAMPLES), held_out.lines())
        if responses:
            rows = [dict(zip(texts, row, strict=True)) for row in zip(*texts.values(), strict=True)]
            if ratios is not None:
                rows = [row | {"log_ratio": ratio} for row, ratio in zip(rows, ratios, strict=True)]
            write_text(path.with_name(ANSWERS), "".join(json.dumps(row) + "\n" for row in rows))
        if self.judge is not None:
            comparisons = [Comparison(*row) for row in zip(*texts.values(), strict=True)]
            results["win_rate"] = win_rate(self.judge, comparisons, path.with_name(JUDGEMENTS), options)
            write_results(path, results)
        if self.tasks is not None:
            sizes = options.task_limit, self.config.eval_batch_size
            results["tasks"] = self.tasks.results(self.evaluator.models.policy, self.tokenizer, *sizes)
        results["warnings"] = warnings(results)
        write_results(path, results)
        print("", *format_results(results), f"results: {path}", sep="\n", flush=True)
        return results

    def load_checkpoint(self) -> None:
        """Load the checkpoint's weights and progress."""
        models, state, saved = self.evaluator.models, self.evaluator.state, self.checkpoint.state
        weights = self.placement.weights(models.policy)
        self.checkpoint.read_weights(weights)
        self.placement.set_weights(models.policy, weights)
        state.examples, state.updates, state.tokens = saved["examples"], saved["updates"], saved.get("tokens", 0)
        if saved["run"]["config"]["loss"] == self.config.loss.given():
            # The running statistics of beta-DPO, which its evaluation uses.
            models.loss.load_state_dict(saved["loss"])

    def sample(self, model: nn.Module, stream: str = POLICY) -> list[list[int]]:
        """The token ids of a model's responses to the sample prompts."""
        room = self.config.evaluation.max_sample_length
        settings = GenerationSettings(temperature=1.0, max_new_tokens=room) if room else None
        if self.ranks.is_rank_zero:
            longest = f"of up to {room:,} tokens" if room else f"up to max_length={self.config.max_length:,}"
            print(f"sampling responses to {len(self.sample_prompts):,} prompts, {longest}", flush=True)
        sampler = Sampler(self.tokenizer, self.config.max_length, self.config.seed, self.ranks, settings)
        with said_while_slow("still sampling"):
            return sampler.responses(model, self.sample_prompts, stream)

    def sample_reference(self) -> list[list[int]]:
        """The token ids of the reference's responses, before the checkpoint is loaded."""
        models = self.evaluator.models
        if self.config.model.reference_archive is None or models.reference is None:
            # The policy has its weights until then.
            return self.sample(models.policy, OTHER)
        with models.reference.as_reference(models.reference.model):
            return self.sample(models.reference.model, OTHER)

    def load_other(self, archive: str) -> nn.Module:
        """The model of another checkpoint, placed like the policy."""
        model = replace(self.config.model.untrained(), archive=archive, reference_archive=None)
        return same_devices(self.placement, replace(self.config, model=model)).load_policy()


def check_reference(config: RunConfig, checkpoint: Checkpoint, found: str | None) -> None:
    """Raise UserError where the reference, a model with the hash `found`, is not the initial model of the checkpoint's run."""
    run = checkpoint.run
    if run["config"]["model"] == config.as_dict()["model"] and run["began_with"] != found:
        raise UserError(
            f"model: the weights are not the initial weights of the run of {checkpoint.path}, which are its reference. "
            "Expected the model, or model.archive, as it was then. Set model.archive=PATH to use another reference."
        )


def write_results(path: Path, results: dict) -> None:
    """Write results as JSON."""
    write_text(path, json.dumps(results, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file atomically. Raises UserError where it cannot be written."""
    try:
        write_atomically(path, text)
    except OSError as error:
        raise UserError(
            f"evaluation.to: cannot write {path}: {error.strerror}. Expected a file in a writable folder with enough space."
        ) from error


# ---- the configuration of a run -------------------------------------------------------------------------------------------


def load_run_config(path: Path, overrides: list[str], evaluation: dict | None = None) -> RunConfig:
    """The configuration to evaluate a run's checkpoint with: the run's own, with `overrides` ("key=value").

    path: a run directory or one of its checkpoints. Keys that are newer than the run have their defaults. Raises UserError for
    other paths and unknown keys.
    """
    found = list_checkpoints(path)
    try:
        then = known_values(Checkpoint.read(found[0] if found else path).config)
    except UNREADABLE as error:
        why = (
            f"no checkpoint with a state.json that can be read ({first_line(error)})" if path.is_dir() else "no such directory"
        )
        raise UserError(f"{path}: {why}. Expected a run directory, or a checkpoint in it (step-N, LATEST).") from error
    # These do not come from the run.
    fixed = {"eval_only": True, "dry_run": False, "resume": str(path)}
    return changed_config(then, path, fixed, overrides, evaluation or {})
