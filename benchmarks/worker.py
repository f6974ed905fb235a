"""Run one contender in its own process, to measure its peak memory: `python worker.py JOB.json RESULT.json`.

A contender's `run(job, work, data)` returns one number per optimizer step for each of:

    seconds         wall time of the step, including the preparation of its batch
    losses          the loss that the step minimized, averaged over its pairs (SFT: over its responses, summed over tokens)
    chosen_logps    mean log-prob of the chosen responses under the policy; DPO only
    rejected_logps  the same for the rejected responses

This module adds the peak memory, and measures the rate of a large matrix product afterwards, so that it is not counted.
"""

import importlib
import json
import logging
import sys
import warnings
from pathlib import Path

from works import WORKS


def main() -> None:
    """Run the job in the job file, and write the result file."""
    job = json.loads(Path(sys.argv[1]).read_text())
    result = _prepare(job) if job["contender"] == "prepare" else _race(job)
    Path(sys.argv[2]).write_text(json.dumps(result))


def _prepare(job: dict) -> dict:
    import measure
    import rows

    return rows.prepare(job) | {"hardware": measure.hardware(), "versions": measure.versions()}


def _race(job: dict) -> dict:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import measure

    work = WORKS[job["work"]]
    data = json.loads(Path(job["rows"]).read_text())
    if job["contender"] == "before":
        # Its own code drives its own package; measurements and rows are this checkout's.
        sys.path[:0] = [job["other"], f"{job['other']}/benchmarks"]
    # Each contender imports only its own libraries, which count toward its memory.
    name = "trl_contender" if job["contender"].startswith("trl") else "project_contender"
    result = importlib.import_module(name).run(job, work, data)
    result["peak_bytes"] = measure.peak_bytes()
    result["gemm_flops"] = measure.gemm_flops(job["gemm"], job["dtype"])
    result["tokens"], result["response_tokens"] = _token_counts(data, work.prompts_per_step)
    return result


def _token_counts(data: dict, prompts_per_step: int) -> tuple[list[int], list[int]]:
    """The tokens of each step, counting every prompt and response once, and its response tokens."""
    responses = [sum(map(len, data["prompts"][number]["responses"])) for number in data["order"]]
    prompts = [len(data["prompts"][number]["prompt"]) for number in data["order"]]
    starts = range(0, len(responses), prompts_per_step)
    answer = [sum(responses[start : start + prompts_per_step]) for start in starts]
    return [sum(prompts[start : start + prompts_per_step]) + count for start, count in zip(starts, answer, strict=True)], answer


if __name__ == "__main__":
    main()
