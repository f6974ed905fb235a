"""Compare this project with TRL and with its own padded path, on the same weights and rows in the same order.

    python benchmarks/bench.py --data hh.jsonl.gz --tokenizer DIR          # the whole table
    python benchmarks/bench.py --work dpo_hh_live --rounds 5               # one benchmark, on generated rows
    python benchmarks/bench.py --other DIR --contenders before tree        # against another checkout of this project
    python benchmarks/bench.py --smoke                                     # check that it runs

Every contender runs in its own process; rounds are interleaved, and ratios are taken within a round. Prints the table and
writes raw numbers to `benchmarks/results/`. Exit status 1 if the contenders' losses differ. Imports only the standard library,
so that this process stays small and does not add to a contender's memory.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path

import sweep
from report import DisagreementError, check_agreement, check_sweep, markdown, table_rows
from works import CONTENDERS, CPU, MFU, MFU_CONTENDER, MFU_WORK, OTHER_ROWS, SMOKE, SWEEP, WORKS, Preset

HERE = Path(__file__).parent


def main(arguments: list[str] | None = None, preset: Preset = CPU) -> int:
    """Run the benchmarks selected by the arguments; returns the exit status."""
    options = _parse(arguments, preset)
    preset = options.preset
    name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{preset.name}.json"
    path = Path(options.results) / name
    path.parent.mkdir(parents=True, exist_ok=True)

    def save(results: dict) -> None:
        part = path.with_suffix(".part")
        part.write_text(json.dumps(results, indent=1) + "\n")
        part.replace(path)

    with tempfile.TemporaryDirectory(prefix="bench_") as folder:
        try:
            results = campaign(options, preset, Path(folder), save)
        except DisagreementError as error:
            print(f"\nNO RESULT: {error}", file=sys.stderr)
            return 1
    results["table"] = table_rows(results)
    save(results)
    print(f"\n{markdown(results)}\n\nraw numbers: {path}")
    return 0


def campaign(options: argparse.Namespace, preset: Preset, folder: Path, save: Callable[[dict], None]) -> dict:
    """Run all rounds. Returns raw numbers with hardware and versions, and saves them after every run."""
    races = _races(preset.works, options.contenders)
    job = asdict(preset) | {"folder": str(folder), "data": options.data, "tokenizer": options.tokenizer}
    job |= {"works": list(races), "trl_options": options.trl, "model_dir": str(folder / "model"), "other": options.other}
    job["cpu_time"] = options.cpu_time
    facts = call_worker(job | {"contender": "prepare"}, folder)
    results = {
        # File names only, not local paths.
        "command": [Path(sys.argv[0]).name, *(Path(text).name if text.startswith("/") else text for text in sys.argv[1:])],
        "preset": asdict(preset),
        "works": list(preset.works),
        "data": "given" if options.data else "generated",
        "hardware": facts.pop("hardware"),
        "load": os.getloadavg(),
        "versions": facts.pop("versions"),
        "weights": facts,
        "runs": [],
        "sweeps": [],
    }
    for number in range(preset.rounds):
        for name, contenders in races.items():
            _race(job, folder, number, name, contenders, results, save)
        if SWEEP in preset.works:
            place = folder / f"sweep_{number}"
            place.mkdir()
            results["sweeps"].append(sweep.race(place, preset.betas, {"max_length": preset.max_length}))
            save(results)
            check_sweep(results["sweeps"][-1], preset.tolerance)
            print(f"round {number + 1}: sweep: {_seconds(results['sweeps'][-1])}", flush=True)
    return results


def _races(works: tuple[str, ...], contenders: list[str]) -> dict[str, list[str]]:
    """Which contenders run which benchmark. `mfu` may reuse an existing run."""
    races = {name: [other for other in contenders if other not in WORKS[name].without] for name in works if name in WORKS}
    if MFU in works and MFU_CONTENDER not in races.setdefault(MFU_WORK, []):
        races[MFU_WORK].append(MFU_CONTENDER)
    return races


def _race(
    job: dict, folder: Path, number: int, name: str, contenders: list[str], results: dict, save: Callable[[dict], None]
) -> None:
    """Run one round of one benchmark into `results`. Raises DisagreementError if the contenders' losses differ."""
    runs = []
    for contender in contenders:
        # A new directory each time, so that no round finds another's caches.
        output = folder / f"{number}_{name}_{contender}"
        output.mkdir()
        own = {"work": name, "contender": contender, "rows": str(folder / f"{name}.json"), "output_dir": str(output)}
        runs.append({"round": number, "work": name, "contender": contender} | call_worker(job | own, folder))
        results["runs"].append(runs[-1])
        save(results)
        seconds = " ".join(f"{value:.2f}" for value in runs[-1]["seconds"])
        peak = runs[-1]["peak_bytes"]["process"] / 1e9
        print(f"round {number + 1}: {name}: {contender}: {seconds} s a step, {peak:.1f} GB", flush=True)
    worst = check_agreement(runs, job["tolerance"])
    if len(runs) > 1:
        print(f"round {number + 1}: {name}: losses and log-probs agree to {worst:.1e}", flush=True)


def _seconds(result: dict) -> str:
    return ", ".join(f"{name} {numbers['seconds']:.1f} s" for name, numbers in result.items())


def call_worker(job: dict, folder: Path) -> dict:
    """Run one job in its own process; returns its result. Its output is shown only if it fails."""
    job_file, result_file = folder / "job.json", folder / "result.json"
    job_file.write_text(json.dumps(job))
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "WANDB_MODE": "disabled",
        # Both contenders detect a GPU by themselves.
        **({"CUDA_VISIBLE_DEVICES": ""} if job["device"] == "cpu" else {}),
    }
    command = [sys.executable, str(HERE / "worker.py"), str(job_file), str(result_file)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, errors="replace")
    if done.returncode:
        name = f"{job['contender']} {job.get('work', '')}"
        raise RuntimeError(f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(result_file.read_text())


# ---- arguments ------------------------------------------------------------------------------------------------------------


def _parse(arguments: list[str] | None, preset: Preset) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="file of dialogues with chosen and rejected; default: generated rows")
    parser.add_argument("--tokenizer", help="directory of the tokenizer; default: a word-level one, built in")
    parser.add_argument("--rounds", type=int, help=f"number of rounds; default: {preset.rounds}")
    parser.add_argument("--steps", type=int, help=f"optimizer steps per run, one of them warm-up; default: {preset.steps}")
    parser.add_argument("--work", nargs="+", choices=[*WORKS, *OTHER_ROWS], metavar="NAME", help="benchmarks; default: all")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--other", metavar="DIR", help="another checkout of this project, for the contender before")
    parser.add_argument("--cpu-time", action="store_true", help="compare CPU time of all threads, for a busy machine")
    parser.add_argument("--trl", nargs="+", default=[], metavar="KEY=VALUE", help="further settings for the contender trl")
    parser.add_argument("--results", default=str(HERE / "results"), help="directory of the JSON file")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and two steps")
    options = parser.parse_args(arguments)
    if bool(options.data) != bool(options.tokenizer):
        parser.error("--data and --tokenizer belong together: generated rows are made of the generated tokenizer's words")
    for name in ("data", "tokenizer", "other"):
        path = getattr(options, name)
        if path and not Path(path).exists():
            parser.error(f"--{name}: {path}: no such file or directory")
        setattr(options, name, path and str(Path(path).resolve()))
    preset = replace(SMOKE, device=preset.device, dtype=preset.dtype) if options.smoke else preset
    chosen = {"rounds": options.rounds, "steps": options.steps, "works": tuple(options.work or ())}
    options.preset = replace(preset, **{name: value for name, value in chosen.items() if value})
    if options.preset.steps < 2:
        parser.error("--steps: the first one is not counted, so there must be two")
    if not options.other:
        options.contenders = [name for name in options.contenders if name != "before"]
    options.trl = dict(_setting(text, parser) for text in options.trl)
    return options


def _setting(text: str, parser: argparse.ArgumentParser) -> tuple[str, object]:
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except ValueError:
        parser.error(f"--trl {text}: expected KEY=VALUE with a JSON value, as in gradient_checkpointing=true")


if __name__ == "__main__":
    sys.exit(main())
