"""What held-out scores say of a checkpoint: overall and in parts, whether its reward likes length, how far it has gone.

Shapes: E examples (pairs; responses for SFT). Every number has a 95% interval over prompts, as intervals.py has them: the pairs
of one prompt are not independent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy

from preference_training.batching.batches import TokenBudget, batches_of, examples_of
from preference_training.core import metric_names
from preference_training.core.metric_names import HELD_OUT_PROMPTS
from preference_training.core.ranks import ALONE, Ranks
from preference_training.data.prompt_table import Selection
from preference_training.data.rows.templates import user_markers
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.evaluation.held_out import HeldOut, score
from preference_training.evaluation.intervals import Bounds, correlation, mean_interval, share_interval
from preference_training.evaluation.phrasing import FEWEST_PROMPTS, too_few, with_interval

# What a table shows of each part, with its heading.
COLUMNS = {metric_names.EVAL_LOSS: "loss", metric_names.EVAL_ACCURACY: "accuracy", metric_names.EVAL_MARGIN: "margin"}
# Which columns are shares: means of numbers from 0 to 1.
SHARES = (metric_names.EVAL_ACCURACY, "by_reward", "by_label")
# How many reasons of a judge's silence are shown.
REASONS_SHOWN = 5
LENGTH_BOUNDS = (32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class ExampleFacts:
    """What is known of each held-out example, in the order of its metrics: lists and arrays of [E].

    Lengths are tokens: of the prompt, of the preferred response (SFT: the response), and of the other one, which SFT has none
    of. turns counts what the user says in the prompt; prompts numbers the prompts.
    """

    data_sets: list[str]
    prompts: numpy.ndarray
    prompt_lengths: numpy.ndarray
    response_lengths: numpy.ndarray
    other_lengths: numpy.ndarray | None
    turns: numpy.ndarray

    @classmethod
    def of(cls, prompts: Selection, n_examples: int | None, tokenizer) -> "ExampleFacts":
        """The facts of the first `n_examples` examples (None: all) of some prompts."""
        markers, rows, number = user_markers(tokenizer), [], -1
        last = None
        for prompt, pair in islice(examples_of(prompts), n_examples):
            if prompt is not last:
                text, number, last = tokenizer.decode(prompt.prompt_ids), number + 1, prompt
                turns = max(1, *(text.count(marker) for marker in markers))
            lengths = [len(prompt.responses[index]) for index in pair or (0, 0)]
            # A source is "NAME, test prompt 5".
            rows.append((prompt.source.rsplit(", ", 1)[0], number, len(prompt.prompt_ids), *lengths, turns, pair is not None))
        names, *numbers, paired = zip(*rows, strict=True)
        prompts_of, prompt_lengths, responses, others, turns_of = map(numpy.array, numbers)
        return cls(list(names), prompts_of, prompt_lengths, responses, others if all(paired) else None, turns_of)

    def parts(self) -> dict[str, dict[str, numpy.ndarray]]:
        """Ways to divide the examples: name of the way → name of the part → which examples, [E] bool."""
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


# ---- the numbers ----------------------------------------------------------------------------------------------------------


def summary(held_out: HeldOut, facts: ExampleFacts) -> dict:
    """Loss, accuracy and margin of all examples and of each part of them, and for pairs `length_bias`; plain values."""
    names = [name for name in COLUMNS if name in held_out.examples]
    values = numpy.column_stack([held_out.examples[name].double().numpy() for name in names])
    result = {"all": part(names, values, facts.prompts)}
    for way, parts in facts.parts().items():
        result[way] = {name: part(names, values[chosen], facts.prompts[chosen]) for name, chosen in parts.items()}
    if facts.other_lengths is not None:
        result["length_bias"] = length_bias(held_out, facts)
    return result


def part(names: Sequence[str], values: numpy.ndarray, prompts: numpy.ndarray) -> dict:
    """How many examples and prompts, and each named column's mean [E, K] with its interval; null where there is one prompt."""
    number = len(numpy.unique(prompts))
    columns = {name: values[:, k] for k, name in enumerate(names)}
    bounds = {name: _interval(name, column, prompts) if number > 1 else None for name, column in columns.items()}
    means = {name: _estimate(column.mean(), bounds[name]) for name, column in columns.items()}
    return {"examples": len(values), "prompts": number, **means}


def _interval(name: str, column: numpy.ndarray, prompts: numpy.ndarray) -> Bounds | None:
    if not numpy.isfinite(column).all():
        return None
    return share_interval(column, prompts) if name in SHARES else mean_interval(column, prompts)


def intervals_of(held_out: HeldOut) -> dict[str, float]:
    """The bounds of the 95% intervals of loss, accuracy and margin, NAME/low and NAME/high, and how many prompts there are.

    A single prompt has no intervals.
    """
    names = [name for name in COLUMNS if name in held_out.examples]
    values = numpy.column_stack([held_out.examples[name].double().numpy() for name in names])
    found = part(names, values, numpy.asarray(held_out.sources))
    bounds = {f"{name}/{end}": found[name][end] for name in names for end in ("low", "high")}
    return {name: bound for name, bound in bounds.items() if bound is not None} | {HELD_OUT_PROMPTS: found["prompts"]}


def _estimate(mean: float | None, bounds: Bounds | None) -> dict:
    known = mean is not None and numpy.isfinite(mean)
    low, high = bounds if known and bounds is not None else (None, None)
    return {"mean": float(mean) if known else None, "low": low, "high": high}


def length_bias(held_out: HeldOut, facts: ExampleFacts) -> dict:
    """Whether the implicit reward follows the length of a response, in tokens.

    correlation: Pearson's, of reward and length over the responses of all pairs; null where either never varies. Of the pairs
    whose lengths differ, the shares in which the longer response has the larger reward (an equal one counts a half), and in
    which it is the preferred one by its label.
    """
    rewards = [held_out.examples[metric_names.reward("eval", which)].double().numpy() for which in ("chosen", "rejected")]
    lengths = [facts.response_lengths, facts.other_lengths]
    both = map(numpy.concatenate, (rewards, lengths, [facts.prompts, facts.prompts]))
    result = {"correlation": _estimate(*correlation(*both))}
    longer = numpy.sign(lengths[0] - lengths[1])
    differ = longer != 0
    if differ.any():
        by_reward = (1 + longer * numpy.sign(rewards[0] - rewards[1])) / 2
        shares = part(["by_reward", "by_label"], numpy.column_stack([by_reward, longer > 0])[differ], facts.prompts[differ])
        result["longer_preferred"] = shares
    return result


def kl_estimate(
    policy, reference, prompts: Sequence[list[int]], responses: Sequence[list[int]], batch_size: int, budget: TokenBudget,
    ranks: Ranks = ALONE,
) -> tuple[dict, list[float]]:  # fmt: skip
    """KL(policy || reference) from responses that were sampled of the policy: the mean log-ratio, an unbiased estimate.

    prompts and responses are token ids; a response that was cut counts as far as it goes. Returns the estimate for an answer
    and for a token (all log-ratios over all tokens), in nats, and each answer's log-ratio.
    """
    sampled = [TokenizedPrompt(prompt, [response], []) for prompt, response in zip(prompts, responses, strict=True)]
    scores = score(policy, reference, batches_of(list(examples_of(sampled)), batch_size, budget, ranks), ranks)
    ratios = (scores.policy - scores.reference)[scores.order].numpy()
    tokens = numpy.array([len(response) for response in responses])
    per_answer = _estimate(ratios.mean(), mean_interval(ratios))
    per_token = _estimate(ratios.sum() / tokens.sum(), mean_interval(ratios, sizes=tokens))
    counts = {"answers": len(ratios), "tokens": int(tokens.sum())}
    return counts | {"per_answer": per_answer, "per_token": per_token}, ratios.tolist()


# ---- the table ------------------------------------------------------------------------------------------------------------


def shown(estimate: dict) -> str:
    """An estimate as the table has it."""
    return "-" if estimate["mean"] is None else with_interval(*estimate.values())


def lines_of(results: dict) -> list[str]:
    """The results of an evaluation as lines for the console; [95% interval]."""
    held_out, lines = results["held_out"], []
    names = [name for name in COLUMNS if name in held_out["all"]]
    rows = {"all": held_out["all"]}
    rows |= {f"{way} {name}": row for way, rows_of in held_out.items() if way not in ("all", "length_bias")
             for name, row in rows_of.items()}  # fmt: skip
    width = max(len(name) for name in rows) + 2
    lines.append(f"{'held out':{width}}{'examples':>9}" + "".join(f"{COLUMNS[name]:>32}" for name in names))
    for title, row in rows.items():
        lines.append(f"{title:{width}}{row['examples']:>9,}" + "".join(f"{shown(row[name]):>32}" for name in names))
    if bias := held_out.get("length_bias"):
        lines.append(f"reward and length of a response: correlation {shown(bias['correlation'])}")
        if shares := bias.get("longer_preferred"):
            by_reward, by_label = shown(shares["by_reward"]), shown(shares["by_label"])
            lines.append(f"share of pairs whose longer response is preferred: by reward {by_reward}, by label {by_label}")
    if kl := results.get("kl"):
        answers = f"{shown(kl['per_answer'])} nats an answer, {shown(kl['per_token'])} a token"
        lines.append(f"KL to the reference, from {kl['answers']:,} sampled answers: {answers}")
    if "win_rate" in results:
        lines += lines_of_win_rate(results["win_rate"])
    for name, task in results.get("tasks", {}).items():
        lines.append(f"{name}: " + ", ".join(f"{metric} {value:.4g}" for metric, value in task.items() if value is not None))
    return lines + warnings_of(results)


def warnings_of(results: dict) -> list[str]:
    """Which of an evaluation's numbers are of too few prompts to decide anything by."""
    held_out = results["held_out"]
    found = {"held-out numbers": held_out["all"]["prompts"]}
    if "kl" in results:
        found["KL to the reference"] = results["kl"]["answers"]
    if "win_rate" in results:
        found["win rate"] = results["win_rate"]["comparisons"] - results["win_rate"]["unanswered"]
    said = [text for what, prompts in found.items() if (text := too_few(prompts, what))]
    rows = {f"{way} {name}": row for way, rows in held_out.items() if way not in ("all", "length_bias")
            for name, row in rows.items()}  # fmt: skip
    rows["pairs whose responses differ in length"] = held_out.get("length_bias", {}).get("longer_preferred", held_out["all"])
    few = [name for name, row in rows.items() if row["prompts"] < FEWEST_PROMPTS <= held_out["all"]["prompts"]]
    if few:
        said.append(f"parts of fewer than {FEWEST_PROMPTS} prompts, too few to decide anything by: {', '.join(few)}")
    return [f"warning: {text}" for text in said]


def lines_of_win_rate(found: dict) -> list[str]:
    """What a judge has said of all comparisons, and why it has not said more."""
    answered = f"{found['wins']:,} won, {found['ties']:,} tied, {found['losses']:,} lost, {found['unanswered']:,} not judged"
    rate = "refused, too many are missing" if found["rate"] is None else shown(found["rate"])
    lines = [f"win rate against {found['against']} under {found['judge']}: {rate} ({answered})"]
    for what, title in (("reasons", "not answered"), ("retried", "asked again")):
        lines += [f"  {title}: {count:,} x {reason}" for reason, count in list(found.get(what, {}).items())[:REASONS_SHOWN]]
        if (more := len(found.get(what, {})) - REASONS_SHOWN) > 0:
            lines.append(f"  {title}: {more:,} more reasons, in the results file")
    return [*lines, f"  {found['note']}"] if found.get("note") else lines
