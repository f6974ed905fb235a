"""Held-out metrics of several models on the same rows: those that a run holds out, by its loss, against its reference."""

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
from torch import nn

from preference_training.batching.micro_batches import evaluation_batches
from preference_training.checkpointing.checkpoint import Checkpoint
from preference_training.configuration.saved import model_config
from preference_training.core.machine import pick_device, release_memory
from preference_training.evaluation.breakdown import COLUMNS, estimates
from preference_training.evaluation.held_out import HeldOut, evaluate_held_out
from preference_training.evaluation.intervals import mean_interval
from preference_training.evaluation.runs import load_run_config
from preference_training.export.source import Source
from preference_training.modeling import loading
from preference_training.modeling.logprobs import LiveReference, RememberedReference
from preference_training.modeling.prefix_sharing.sharing import share_prefixes
from preference_training.modeling.state import move_to_devices
from preference_training.modeling.token_budget import token_budget
from preference_training.training.preparation import prepare_run


@dataclass(frozen=True)
class Measured:
    """A model's held-out metrics: metric -> {mean, low, high}, and what they are means of."""

    metrics: dict[str, dict]
    held_out: HeldOut

    @classmethod
    def of(cls, held_out: HeldOut) -> "Measured":
        """The metrics of an evaluation, with intervals for those of the table of every evaluation."""
        names = [name for name in COLUMNS if name in held_out.examples]
        values = numpy.column_stack([held_out.examples[name].double().numpy() for name in names])
        found = estimates(names, values, numpy.asarray(held_out.sources), held_out.least)
        means = {name: {"mean": mean, "low": None, "high": None} for name, mean in held_out.means().items()}
        return cls(means | {name: found[name] for name in names}, held_out)

    def minus(self, other: "Measured", metric: str) -> tuple[float, float, float] | None:
        """How much more of a metric it has than another model, example by example: mean and 95% interval; None if unknown."""
        if metric not in self.held_out.examples:
            return None
        differences = (self.held_out.examples[metric] - other.held_out.examples[metric]).double().numpy()
        bounds = mean_interval(differences, numpy.asarray(self.held_out.sources)) if numpy.isfinite(differences).all() else None
        return (float(differences.mean()), *bounds) if bounds else None


class HeldOutRows:
    """The held-out rows of a run, its loss and its reference, which measure any model of its architecture.

    overrides: "key=value", as on train.py's command line. Raises UserError where the run cannot be evaluated.
    """

    def __init__(self, run: Path, overrides: Sequence[str] = (), trust_remote_code: bool = False):
        self.source = Source.read(run, trust_remote_code)
        config = load_run_config(run, list(overrides))
        prepared = prepare_run(config, run.resolve())
        self.config, self.tokenizer, self.loss = prepared.config, prepared.tokenizer, prepared.loss
        self.table = prepared.data[0].table
        if self.source.config["loss"] == config.loss.given():
            # Running statistics of beta-DPO, which its evaluation uses.
            self.loss.load_state_dict(Checkpoint.read(self.source.checkpoint).state["loss"])
        self.device, self.batches = pick_device(), None
        self.reference = None
        if self.loss.needs_reference:
            model = self._placed(self.source.load_initial_model().eval().requires_grad_(False))
            self.reference = LiveReference(model) if self.loss.reads_tokens else RememberedReference(LiveReference(model))

    @property
    def name(self) -> str:
        """The name of the run's directory."""
        return self.source.checkpoint.parent.name

    def measure(self, directory: Path) -> Measured:
        """The metrics of a whole model in a directory."""
        values = {"name_or_path": str(directory), "policy_dtype": self.config.model.policy_dtype}
        config = model_config(values, trust_remote_code=self.source.trust_remote_code, head=self.source.head)
        model = self._placed(loading.load_model(replace(config, autocast_dtype=None), self.tokenizer))
        try:
            if self.batches is None:
                budget = token_budget(model, self.config.max_tokens_per_microbatch)
                sizes = self.config.eval_batch_size, self.config.n_eval_examples, self.config.seed
                self.batches = evaluation_batches(self.table, *sizes, budget)
            if isinstance(self.reference, RememberedReference):
                self.reference.restart()
            return Measured.of(evaluate_held_out(model.eval(), self.reference, self.loss, self.batches))
        finally:
            del model
            release_memory()

    def _placed(self, model: nn.Module) -> nn.Module:
        model = move_to_devices(model, self.device)
        with redirect_stdout(io.StringIO()):
            # Of the policy as of the reference: how each is computed was said when the run was trained.
            share_prefixes(model, self.config.prefix_sharing, self.config.prefix_attention)
        return model
