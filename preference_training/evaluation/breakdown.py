"""Held-out metrics broken down by data set, length and turns, and the length bias of the reward.

Shapes: E examples (pairs; responses for SFT), K metrics. Every number has a 95% interval over prompts (intervals.py), because
the pairs of one prompt are not independent.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy

from preference_training.batching.packing import iterate_examples
from preference_training.core import metric_names
from preference_training.core.metric_names import EVAL_ACCURACY, EVAL_LOSS, EVAL_MARGIN, HELD_OUT_PROMPTS
from preference_training.data.prompt_table import Selection
from preference_training.data.rows.templates import user_markers
from preference_training.evaluation.held_out import HeldOut
from preference_training.evaluation.intervals import Bounds, correlation, estimate, mean_interval, share_interval

LOSS, ACCURACY, MARGIN = EVAL_LOSS, EVAL_ACCURACY, EVAL_MARGIN
# The metrics of each part, with their headings.
COLUMNS = {LOSS: "loss", ACCURACY: "accuracy", MARGIN: "margin"}
# Shares: means of values between 0 and 1.
SHARES = (ACCURACY, "by_reward", "by_label")
# Examples whose values a run remembers: checkpoints hold them as text, twenty bytes each.
MOST_COMPARED = 10_000
LENGTH_BOUNDS = (32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class ExampleFacts:
    """Properties of the held-out examples, in the order of their metrics: lists and arrays of [E].

    Lengths in tokens: of the prompt, of the preferred response (SFT: the response), and of the rejected one (SFT: None).
    prompts: the number of the prompt, the same for all that come from one record. turns: the number of the user's turns in it.
    """

    data_sets: list[str]
    prompts: numpy.ndarray
    prompt_lengths: numpy.ndarray
    response_lengths: numpy.ndarray
    other_lengths: numpy.ndarray | None
    turns: numpy.ndarray

    @classmethod
    def of(cls, prompts: Selection, n_examples: int | None, tokenizer) -> "ExampleFacts":
        """The properties of the first `n_examples` examples (None: all) of some prompts."""
        markers, rows = user_markers(tokenizer), []
        # The chunks of one text share a source: they are one prompt.
        numbers_of: dict[str, int] = {}
        last = None
        for prompt, example in islice(iterate_examples(prompts), n_examples):
            if prompt is not last:
                text, last = tokenizer.decode(prompt.prompt_ids), prompt
                turns = max(1, *(text.count(marker) for marker in markers))
                number = numbers_of.setdefault(prompt.source, len(numbers_of))
                # Labels belong to single responses.
                is_paired = bool(prompt.examples) and prompt.labels is None
            members = prompt.members(example)
            lengths = [len(prompt.responses[index]) for index in (members[0], members[-1])]
            # A source is "NAME, test prompt 5".
            rows.append((prompt.source.rsplit(", ", 1)[0], number, len(prompt.prompt_ids), *lengths, turns, is_paired))
        names, *numbers, paired = zip(*rows, strict=True)
        prompts_of, prompt_lengths, responses, others, turns_of = map(numpy.array, numbers)
        return cls(list(names), prompts_of, prompt_lengths, responses, others if all(paired) else None, turns_of)

    def parts(self) -> dict[str, dict[str, numpy.ndarray]]:
        """Partitions of the examples: name of the partition → name of the part → its examples, [E] bool."""
        names = numpy.array(self.data_sets)
        return {
            "data set": {name: names == name for name in dict.fromkeys(self.data_sets)},
            "prompt tokens": _by_length(self.prompt_lengths),
            "response tokens": _by_length(self.response_lengths),
            "turns of the user": {str(turns): self.turns == turns for turns in numpy.unique(self.turns)},
        }


def _by_length(lengths: numpy.ndarray) -> dict[str, numpy.ndarray]:
    number = numpy.searchsorted(LENGTH_BOUNDS, lengths)
    lows = (1, *(bound + 1 for bound in LENGTH_BOUNDS))
    names = [f"{low}-{high}" for low, high in zip(lows, LENGTH_BOUNDS, strict=False)] + [f"{lows[-1]}-"]
    return {names[k]: number == k for k in numpy.unique(number)}


def break_down(held_out: HeldOut, facts: ExampleFacts) -> dict:
    """Loss, accuracy and margin of all examples and of each part, and for pairs the `length_bias`; plain values."""
    names = [name for name in COLUMNS if name in held_out.examples]
    values = numpy.column_stack([held_out.examples[name].double().numpy() for name in names])
    least = held_out.least
    result = {"all": estimates(names, values, facts.prompts, least)}
    for way, parts in facts.parts().items():
        result[way] = {name: estimates(names, values[chosen], facts.prompts[chosen], least) for name, chosen in parts.items()}
    if facts.other_lengths is not None:
        result["length_bias"] = length_bias(held_out, facts)
    return result


def estimates(
    names: Sequence[str], values: numpy.ndarray, prompts: numpy.ndarray, least: Mapping[str, float] | None = None
) -> dict:
    """The numbers of examples and prompts, and the mean of each metric [E, K] with its interval (None for a single prompt).

    least: the least value of a metric, for those that have one.
    """
    ends = {name: (least or {}).get(name, -math.inf) for name in names}
    number = len(numpy.unique(prompts))
    columns = {name: values[:, k] for k, name in enumerate(names)}
    bounds = {name: _interval(name, column, prompts, ends[name]) if number > 1 else None for name, column in columns.items()}
    means = {name: estimate(column.mean(), bounds[name]) for name, column in columns.items()}
    return {"examples": len(values), "prompts": number, **means}


def _interval(name: str, column: numpy.ndarray, prompts: numpy.ndarray, least: float) -> Bounds | None:
    if not numpy.isfinite(column).all():
        return None
    return share_interval(column, prompts) if name in SHARES else mean_interval(column, prompts, least=least)


def interval_metrics(held_out: HeldOut) -> dict[str, float]:
    """The 95% intervals as metrics NAME/low and NAME/high, and the number of prompts; no bounds for a single prompt."""
    names = [name for name in COLUMNS if name in held_out.examples]
    values = numpy.column_stack([held_out.examples[name].double().numpy() for name in names])
    found = estimates(names, values, numpy.asarray(held_out.sources), held_out.least)
    bounds = {f"{name}/{end}": found[name][end] for name in names for end in ("low", "high")}
    return {name: bound for name, bound in bounds.items() if bound is not None} | {HELD_OUT_PROMPTS: found["prompts"]}


def values_by_example(held_out: HeldOut, comparable: bool) -> dict[str, list[float]]:
    """Loss and accuracy of each example, to compare later evaluations with: pair by pair, which finds far smaller changes.

    comparable: whether the loss is. Empty for more than MOST_COMPARED examples, whose means are precise enough.
    """
    names = [name for name in (LOSS, ACCURACY) if name in held_out.examples and (comparable or name != LOSS)]
    return {name: held_out.examples[name].tolist() for name in names} if len(held_out.sources) <= MOST_COMPARED else {}


def change_metrics(held_out: HeldOut, before: dict[str, list[float]]) -> dict[str, float]:
    """How far loss and accuracy have changed since `before`, with 95% intervals: NAME/change and its /low and /high."""
    sources, found = numpy.asarray(held_out.sources), {}
    for name, values in before.items():
        # A resumed run may evaluate other examples.
        if len(values) != len(sources):
            continue
        differences = held_out.examples[name].double().numpy() - numpy.asarray(values)
        if numpy.isfinite(differences).all() and (bounds := mean_interval(differences, sources)):
            found |= dict(zip(metric_names.change(name), (float(differences.mean()), *bounds), strict=True))
    return found


def length_bias(held_out: HeldOut, facts: ExampleFacts) -> dict:
    """How the implicit reward depends on the length of a response in tokens.

    correlation: Pearson's, of reward and length over all responses; None where either is constant. longer_preferred: among the
    pairs whose lengths differ, the shares in which the longer response has the higher reward (ties count half), and in which it
    is labeled as preferred.
    """
    rewards = [held_out.examples[metric_names.reward("eval", which)].double().numpy() for which in ("chosen", "rejected")]
    lengths = [facts.response_lengths, facts.other_lengths]
    both = map(numpy.concatenate, (rewards, lengths, [facts.prompts, facts.prompts]))
    result = {"correlation": estimate(*correlation(*both))}
    longer = numpy.sign(lengths[0] - lengths[1])
    differ = longer != 0
    if differ.any():
        by_reward = (1 + longer * numpy.sign(rewards[0] - rewards[1])) / 2
        shares = estimates(
            ["by_reward", "by_label"], numpy.column_stack([by_reward, longer > 0])[differ], facts.prompts[differ]
        )
        result["longer_preferred"] = shares
    return result
