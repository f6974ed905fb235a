"""What quantization costs: perplexity and reward accuracy of the run's held-out examples, before and after; calibration rows.

Rows are those of the run, read again by its own configuration. Models are computed as plain transformers loads them.
"""

from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from io import StringIO

import torch
from torch import Tensor, nn

from preference_training.batching.micro_batches import evaluation_batches
from preference_training.batching.packing import PackedBatch
from preference_training.checkpointing.checkpoint import Checkpoint
from preference_training.configuration.schema import RunConfig
from preference_training.core.errors import UserError
from preference_training.core.metric_names import EVAL, EVAL_ACCURACY
from preference_training.core.values import counted
from preference_training.data.entries import read_entries
from preference_training.data.preparation import Prepared
from preference_training.evaluation.held_out import score_responses
from preference_training.evaluation.runs import load_run_config
from preference_training.export.source import Source
from preference_training.losses.base import Loss, example_metrics
from preference_training.losses.registry import build_loss
from preference_training.modeling.logprobs import RememberedReference, response_scores
from preference_training.reporting.model_card import Quality, Quantized
from preference_training.training.preparation import data_version, fit_templates, prepare_data

# So many held-out examples are scored, each of at most so many at once.
EXAMPLES, AT_ONCE = 256, 4
# What a quantized model may lose without a warning: perplexity, as a share of that of the full weights, and accuracy.
MAX_RISE, MAX_FALL = 0.05, 0.02


@dataclass(frozen=True)
class RunRows:
    """The training and held-out rows of a checkpoint's run."""

    source: Source
    config: RunConfig
    loss: Loss
    data: tuple[Prepared, ...]

    @classmethod
    def of(cls, source: Source) -> "RunRows":
        """Read them again. Raises UserError where they are gone, or would execute code."""
        # Held-out rows have no weights.
        config = load_run_config(source.checkpoint, []).changed({"data.weights": None})
        loss = build_loss(**config.loss.given(), seed=config.seed)
        earlier = Checkpoint.read(source.checkpoint)
        tokenizer = source.load_tokenizer()
        # What preparation says, the run has said.
        with redirect_stdout(StringIO()):
            config, entries = fit_templates(config.with_head(loss.model_head), read_entries(config), tokenizer, earlier)
            data = prepare_data(config, entries, tokenizer, loss, version=data_version(earlier))
        if not len(data[1].table):
            raise UserError("nothing is held out")
        return cls(source, config, loss, data)

    @cached_property
    def batches(self) -> list[PackedBatch]:
        """The held-out examples of the run's own evaluations, at most EXAMPLES of them."""
        number = min(self.config.n_eval_examples or EXAMPLES, EXAMPLES)
        return evaluation_batches(self.data[1].table, min(self.config.eval_batch_size, AT_ONCE), number, self.config.seed)

    @cached_property
    def _reference(self) -> RememberedReference | None:
        """The log-probs of the model that the run started from, computed once."""
        if not self.loss.needs_reference:
            return None
        model = self.source.load_initial_model().eval()

        def score(batch: PackedBatch) -> Tensor:
            with torch.no_grad():
                return response_scores(model, batch)

        remembered = RememberedReference(score)
        for batch in self.batches:
            remembered(batch)
        return remembered

    def quality(self, model: nn.Module) -> Quality:
        """Perplexity and reward accuracy of a model on the held-out examples."""
        reference = None if self.loss.reads_tokens else self._reference
        if reference is not None:
            reference.restart()
        reads_tokens = self.loss.reads_tokens or self.loss.reads_collision
        was_training = model.training
        scores = score_responses(model.eval(), reference, self.batches)
        model.train(was_training)
        examples = scores.examples
        is_good = torch.ones(len(examples), dtype=torch.bool) if examples.labels is None else examples.labels
        first = examples.first[is_good]
        perplexity = (-scores.policy[first].sum() / examples.lengths[first].sum()).exp().item()
        if reads_tokens:
            # Its rewards are of tokens, whose log-probs of the reference nobody keeps.
            return Quality(perplexity, None, len(examples))
        output = self.loss(scores.policy, scores.reference, examples)
        accuracies = example_metrics(self.loss, output, scores.policy, examples, EVAL).get(EVAL_ACCURACY)
        return Quality(perplexity, None if accuracies is None else accuracies.nanmean().item(), len(examples))

    def windows(self, number: int, length: int) -> list[Tensor]:
        """Token ids of training rows one after the other, in at most so many windows of a length: [1, length] each."""
        table, ids = self.data[0].table, []
        for prompt in table:
            for example in range(prompt.num_examples):
                ids += prompt.sequences[prompt.members(example)[0]]
            if len(ids) >= number * length:
                break
        length = min(length, len(ids))
        starts = range(0, len(ids) - length + 1, length)
        return [torch.tensor(ids[start : start + length])[None] for start in starts][:number]


def readable_rows(source: Source) -> tuple[RunRows | None, str]:
    """The rows of a run, or None and why there are none."""
    try:
        return RunRows.of(source), ""
    except UserError as error:
        return None, str(error)


def describe_quality(measured: Quantized) -> list[str]:
    """Lines on what quantization has cost, with a warning where that is more than MAX_RISE or MAX_FALL."""
    before, after, kind = measured.before, measured.after, measured.kind
    rise = after.perplexity / before.perplexity - 1
    words = [f"held-out perplexity {after.perplexity:.4g}, {before.perplexity:.4g} in full ({rise:+.1%})"]
    reasons = [f"perplexity rises by {rise:.1%}, more than {MAX_RISE:.0%}"] if not rise <= MAX_RISE else []
    if before.accuracy is not None and after.accuracy is not None:
        words.append(f"reward accuracy {after.accuracy:.3g}, {before.accuracy:.3g} in full")
        fall = before.accuracy - after.accuracy
        reasons += [f"reward accuracy falls by {fall:.3f}, more than {MAX_FALL}"] if fall > MAX_FALL else []
    lines = [f"{kind}: {'; '.join(words)}; {counted(after.examples, 'example')}"]
    return lines + ([f"warning: {kind} loses much: {' and '.join(reasons)}"] if reasons else [])


def missing_rows(quantize: str | None, why: str) -> Sequence[str]:
    """Notes where there are no rows to measure with. Raises UserError where they are needed to calibrate."""
    if quantize == "int4":
        raise UserError(f"--quantize: int4 is calibrated with the run's training rows, which cannot be read: {why}")
    return [f"what quantization costs was not measured: the run's rows cannot be read: {why}"]
