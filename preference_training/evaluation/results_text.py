"""The results of an evaluation as text: the table that is printed and shown in reports, and its warnings."""

from preference_training.evaluation.breakdown import COLUMNS
from preference_training.evaluation.phrasing import MIN_PROMPTS, too_few, with_interval

# Reasons for missing verdicts that are listed.
MAX_REASONS = 5
# The parts of the held-out results that are not a way to divide the examples.
WHOLE = ("all", "length_bias")


def format_results(results: dict) -> list[str]:
    """All results of an evaluation, as lines; [95% interval]."""
    lines = _held_out_table(results["held_out"])
    if kl := results.get("kl"):
        estimates = f"{_format(kl['per_answer'])} nats per response, {_format(kl['per_token'])} per token"
        lines.append(f"KL to the reference, from {kl['answers']:,} sampled responses: {estimates}")
    if "win_rate" in results:
        lines += format_win_rate(results["win_rate"])
    for lines_of_benchmark in results.get("benchmarks", {}).values():
        lines += lines_of_benchmark
    for name, task in results.get("tasks", {}).items():
        lines.append(f"{name}: " + ", ".join(f"{metric} {value:.4g}" for metric, value in task.items() if value is not None))
    return lines + warnings(results)


def _held_out_table(held_out: dict) -> list[str]:
    metrics = [name for name in COLUMNS if name in held_out["all"]]
    rows = {"all": held_out["all"]} | _parts(held_out)
    width = max(len(name) for name in rows) + 2
    lines = [f"{'held out':{width}}{'examples':>9}" + "".join(f"{COLUMNS[name]:>32}" for name in metrics)]
    for title, row in rows.items():
        lines.append(f"{title:{width}}{row['examples']:>9,}" + "".join(f"{_format(row[name]):>32}" for name in metrics))
    if bias := held_out.get("length_bias"):
        lines.append(f"correlation of reward and response length: {_format(bias['correlation'])}")
        if shares := bias.get("longer_preferred"):
            by_reward, by_label = _format(shares["by_reward"]), _format(shares["by_label"])
            lines.append(f"share of pairs whose longer response is preferred: by reward {by_reward}, by label {by_label}")
    return lines


def _parts(held_out: dict) -> dict[str, dict]:
    """The rows of all parts of the examples, such as "data set toy"."""
    return {f"{way} {name}": row for way, rows in held_out.items() if way not in WHOLE for name, row in rows.items()}


def _format(estimate: dict) -> str:
    return "-" if estimate["mean"] is None else with_interval(*estimate.values())


def warnings(results: dict) -> list[str]:
    """Which of an evaluation's numbers are based on too few prompts."""
    held_out = results["held_out"]
    prompts = {"held-out metrics": held_out["all"]["prompts"]}
    if "kl" in results:
        prompts["KL to the reference"] = results["kl"]["answers"]
    if "win_rate" in results:
        prompts["win rate"] = results["win_rate"]["comparisons"] - results["win_rate"]["unanswered"]
    found = [text for what, number in prompts.items() if (text := too_few(number, what))]
    rows = _parts(held_out)
    rows["pairs whose responses differ in length"] = held_out.get("length_bias", {}).get("longer_preferred", held_out["all"])
    small = [name for name, row in rows.items() if row["prompts"] < MIN_PROMPTS <= held_out["all"]["prompts"]]
    if small:
        found.append(f"parts of fewer than {MIN_PROMPTS} prompts, too few to decide anything by: {', '.join(small)}")
    return [f"warning: {text}" for text in found]


def format_win_rate(found: dict) -> list[str]:
    """A win rate with its counts, and the reasons for missing verdicts."""
    counts = f"{found['wins']:,} won, {found['ties']:,} tied, {found['losses']:,} lost, {found['unanswered']:,} not judged"
    rate = "none, too many verdicts are missing" if found["rate"] is None else _format(found["rate"])
    lines = [f"win rate against {found['against']}, judged by {found['judge']}: {rate} ({counts})"]
    for what, title in (("reasons", "not answered"), ("retried", "retried")):
        reasons = found.get(what, {})
        lines += [f"  {title}: {count:,} x {reason}" for reason, count in list(reasons.items())[:MAX_REASONS]]
        if (more := len(reasons) - MAX_REASONS) > 0:
            lines.append(f"  {title}: {more:,} more reasons, in the results file")
    return [*lines, f"  {found['note']}"] if found.get("note") else lines
