"""From raw numbers to results: agreement of contenders, ratios within each round, a Markdown table. Standard library only.

A run is a dict with round, work, contender and the measurements of `worker.py`. The first step of a run is a warm-up: its loss
is compared, but its time is not counted.
"""

from statistics import median

from works import BUILDING_SHARE, CONTENDERS, MFU, MFU_CONTENDER, MFU_WORK, MORE_PAIRS, OTHER_ROWS, SWEEP, TITLES, WORKS

# FLOPs per weight and token: 6 for forward and backward, 2 for a forward pass alone.
TRAINED, SCORED = 6, 2
Run = dict


class DisagreementError(Exception):
    """The contenders' results differ, so their times are not comparable."""


# ---- agreement ------------------------------------------------------------------------------------------------------------


def check_agreement(runs: list[Run], tolerance: float) -> float:
    """The largest relative difference between contenders' losses and log-probs, step by step. `runs` belong to one work.

    At the first step all weights are the same, so a tenth of `tolerance` is allowed there. The log-probs are compared
    because a DPO loss starts at ln 2 for any data. Raises DisagreementError beyond that.
    """
    first, *others = runs
    worst = 0.0
    for other in others:
        for name in ("losses", "chosen_logps", "rejected_logps"):
            expected, found = first.get(name, []), other.get(name, [])
            if len(expected) != len(found):
                raise DisagreementError(f"{_pair(first, other)}: {len(expected)} and {len(found)} steps in {name}")
            for step, (a, b) in enumerate(zip(expected, found, strict=True)):
                difference = abs(a - b) / abs(a)
                # Written so that NaN counts as a disagreement.
                if not difference <= tolerance * (1 if step else 0.1):
                    raise DisagreementError(f"{_pair(first, other)}: {name} of step {step + 1} are {a} and {b}")
                worst = max(worst, difference)
    return worst


def _pair(first: Run, other: Run) -> str:
    return f"{first['work']}: {first['contender']} and {other['contender']} disagree"


def check_sweep(result: dict, tolerance: float) -> None:
    """Raise DisagreementError if a job of the sweep and the separate run with the same beta have different losses."""
    together, separate = result["sweep"]["losses"], result["separate"]["losses"]
    same = together.keys() == separate.keys() and all(
        len(together[beta]) == len(separate[beta]) > 0
        and all(abs(a - b) <= tolerance * abs(a) for a, b in zip(together[beta], separate[beta], strict=True))
        for beta in together
    )
    if not same:
        raise DisagreementError(f"{SWEEP}: the sweep and the separate runs disagree:\n{together}\n{separate}")


# ---- ratios ---------------------------------------------------------------------------------------------------------------


def speedups(runs: list[Run], work: str, slow: str, fast: str) -> list[float]:
    """The speedup of `fast` in each round: the median over steps of the ratio of times."""
    return [
        median(a / b for a, b in zip(rivals[slow]["seconds"][1:], rivals[fast]["seconds"][1:], strict=True))
        for rivals in _rounds(runs, work)
        if slow in rivals and fast in rivals
    ]


def throughputs(runs: list[Run], work: str, contender: str) -> list[float]:
    """Examples per second for each round, over all counted steps."""
    size = WORKS[work].examples_per_step
    return [
        size * (len(rivals[contender]["seconds"]) - 1) / sum(rivals[contender]["seconds"][1:])
        for rivals in _rounds(runs, work)
        if contender in rivals
    ]


def memory_ratios(runs: list[Run], work: str, large: str, small: str) -> list[float]:
    """The peak memory of `small` relative to `large` in each round; the GPU's if there is one."""
    return [
        _peak(rivals[small]) / _peak(rivals[large]) for rivals in _rounds(runs, work) if large in rivals and small in rivals
    ]


def time_ratios(runs: list[Run], work: str, other: str) -> list[float]:
    """The time of this project's steps of one benchmark relative to that of another, in each round."""
    rounds = zip(_rounds(runs, work), _rounds(runs, other), strict=False)
    both = ((a["tree"]["seconds"], b["tree"]["seconds"]) for a, b in rounds if "tree" in a and "tree" in b)
    return [median(a / b for a, b in zip(seconds[1:], others[1:], strict=True)) for seconds, others in both]


def building_shares(runs: list[Run]) -> list[float]:
    """The share of this project's steps that building tries takes, in each round: the largest among all benchmarks."""
    shares: dict[int, list[float]] = {}
    for run in runs:
        if run["contender"] == "tree":
            share = median(a / b for a, b in zip(run["building_seconds"][1:], run["seconds"][1:], strict=True))
            shares.setdefault(run["round"], []).append(share)
    return [max(of_round) for of_round in shares.values()]


def useful_shares(runs: list[Run], work: str, contender: str, weights: dict) -> list[float]:
    """Useful arithmetic per second, relative to the rate of a matrix product in the same process, in each round."""
    a_weight = TRAINED if WORKS[work].loss == "sft" or WORKS[work].cached else TRAINED + SCORED
    shares = []
    for run in (rivals[contender] for rivals in _rounds(runs, work) if contender in rivals):
        flops = a_weight * (
            weights["body_weights"] * sum(run["tokens"][1:]) + weights["head_weights"] * sum(run["response_tokens"][1:])
        )
        shares.append(flops / sum(run["seconds"][1:]) / run["gemm_flops"])
    return shares


def _rounds(runs: list[Run], work: str) -> list[dict[str, Run]]:
    """The runs of each round, by contender."""
    rounds: dict[int, dict[str, Run]] = {}
    for run in runs:
        if run["work"] == work:
            rounds.setdefault(run["round"], {})[run["contender"]] = run
    return list(rounds.values())


def _peak(run: Run) -> int:
    return run["peak_bytes"].get("device", run["peak_bytes"]["process"])


# ---- the table ------------------------------------------------------------------------------------------------------------


def table_rows(results: dict) -> list[dict]:
    """The rows of the table, as dicts: the value of each round, the median, and the floor."""
    runs, weights, rows = results["runs"], results["weights"], []
    for name in dict.fromkeys(run["work"] for run in runs):
        work = WORKS[name]
        for rival in CONTENDERS[:-1]:
            title = f"{work.title}, against {TITLES[rival]}"
            rows.append(_row(name, title, speedups(runs, name, rival, "tree"), work.floors.get(rival)))
        if work.memory_floor:
            title = f"{work.title}, peak memory over TRL's"
            rows.append(_row(name, title, memory_ratios(runs, name, "trl", "tree"), work.memory_floor, at_most=True))
    more, fewer, most = MORE_PAIRS
    title = f"{WORKS[more].title}, time over that with {len(WORKS[fewer].pairs)} pairs"
    rows.append(_row(more, title, time_ratios(runs, more, fewer), most, at_most=True))
    title = "building tries, largest share of a step"
    rows.append(_row("building", title, building_shares(runs), BUILDING_SHARE, at_most=True))
    if MFU in results["works"]:
        rows.append(_row(MFU, OTHER_ROWS[MFU][0], useful_shares(runs, MFU_WORK, MFU_CONTENDER, weights), OTHER_ROWS[MFU][1]))
    ratios = [result["separate"]["seconds"] / result["sweep"]["seconds"] for result in results["sweeps"]]
    rows.append(_row(SWEEP, OTHER_ROWS[SWEEP][0], ratios, OTHER_ROWS[SWEEP][1]))
    return [row for row in rows if row["rounds"]]


def _row(work: str, title: str, values: list[float], floor: float | None, at_most: bool = False) -> dict:
    found = median(values) if values else None
    reached = None if found is None or floor is None else (found <= floor if at_most else found >= floor)
    return {
        "work": work, "title": title, "median": found, "rounds": values, "floor": floor, "at_most": at_most, "reached": reached
    }  # fmt: skip


def markdown(results: dict) -> str:
    """The results and the underlying throughput, as two tables."""
    lines = ["| what | floor | measured | over rounds | reached |", "|---|---|---|---|---|"]
    for row in results["table"]:
        share = row["work"] == MFU
        floor = "" if row["floor"] is None else f"{'≤' if row['at_most'] else '≥'} {_number(row['floor'], share)}"
        reached = {None: "", True: "yes", False: "no"}[row["reached"]]
        spread = f"{_number(min(row['rounds']), share)} to {_number(max(row['rounds']), share)}"
        lines.append(f"| {row['title']} | {floor} | {_number(row['median'], share)} | {spread} | {reached} |")
    if not results["runs"]:
        return "\n".join(lines)
    contenders = [name for name in CONTENDERS if any(run["contender"] == name for run in results["runs"])]
    lines += ["", f"| examples/s (peak memory) | {' | '.join(TITLES[name] for name in contenders)} |"]
    lines.append("|---" * (len(contenders) + 1) + "|")
    for name in dict.fromkeys(run["work"] for run in results["runs"]):
        lines.append(f"| {WORKS[name].title} | {' | '.join(_speed(results['runs'], name, other) for other in contenders)} |")
    return "\n".join(lines)


def _speed(runs: list[Run], work: str, contender: str) -> str:
    rates = throughputs(runs, work, contender)
    if not rates:
        return ""
    peaks = [_peak(run) for run in runs if (run["work"], run["contender"]) == (work, contender)]
    return f"{median(rates):.2f} ({median(peaks) / 1e9:.1f} GB)"


def _number(value: float, share: bool) -> str:
    return f"{value:.0%}" if share else f"{value:.2f}" if value >= 0.1 else f"{value:.1g}"
