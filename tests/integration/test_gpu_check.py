"""`benchmarks/gpu_check.py`: every part runs, what it would run on a GPU is understood, and whatever happens is on the disk."""

import importlib
import json
import subprocess
import sys
import time
import zipfile
from math import inf, nan
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

from preference_training.configuration.composition import force_open_sections
from preference_training.modeling.prefix_sharing.attention_choice import Measured, Shape
from tests.support.files import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import bench
import gpu_check
from gpu_check import PARTS, Check, Part
from gpu_parts import choice, making, whole_runs
from gpu_parts.found import Found, Settings
from gpu_parts.whole_runs import COMMON, FailedRunError, largest_difference


def part(name: str, tmp_path: Path) -> dict:
    """What a part finds on a CPU, computed in this process."""
    found = Found(tmp_path / f"{name}.json")
    getattr(importlib.import_module(f"gpu_parts.{PARTS[name].module}"), name)(found, Settings(tmp_path, is_cpu=True))
    return json.loads(found.path.read_text())


# ---- parts ----------------------------------------------------------------------------------------------------------------

# The others take seconds: the whole check runs them all.
QUICK = ("environment", "speed_trl", "several_gpus", "memory")


@pytest.mark.parametrize("name", QUICK)
def test_a_part_runs_on_a_cpu_and_finds_nothing_wrong(name, tmp_path):
    found = part(name, tmp_path)
    assert found.pop("failed") == []
    assert found, "it found nothing"


class SmallGpu(Settings):
    """A GPU that is a CPU: what only a GPU does is done, in small sizes."""

    device = "cpu"

    def choose(self, on_gpu, on_cpu):
        return on_cpu


@pytest.fixture
def small_gpu(monkeypatch, tmp_path):
    """What the parts ask CUDA, answered."""
    # It looks for a GPU when it is imported.
    importlib.import_module("peft")
    properties = SimpleNamespace(name="NVIDIA H200", total_memory=140 << 30, multi_processor_count=132)
    answers = {
        "device_count": 1, "get_device_properties": properties, "get_device_capability": (9, 0),
        "get_device_name": "NVIDIA H200", "mem_get_info": (10 << 30, 140 << 30), "memory_allocated": 1 << 20,
        "max_memory_allocated": 1 << 30, "max_memory_reserved": 1 << 30, "synchronize": None, "empty_cache": None,
        "reset_peak_memory_stats": None, "set_sync_debug_mode": None,
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    cpu = torch.device("cpu")
    for module in (making, importlib.import_module("gpu_parts.attention")):
        monkeypatch.setattr(module, "pick_device", lambda: cpu)
    monkeypatch.setattr("preference_training.distributed.placement.pick_device", lambda: cpu)
    monkeypatch.setattr("preference_training.batching.micro_batches.prepared", lambda batch, _: batch.for_gpu())
    monkeypatch.setattr("measure.gemm_flops", lambda width, dtype: 7e14)
    return SmallGpu(tmp_path, is_cpu=False)


# What is measured is not as it must be on a GPU.
GPU_WAYS = {"environment": {"kernels"}, "speed_hh": {"trie"}, "speed_large": {"trie"}, "profile": set()}
# The stand-in always says that a step took 1 GB.
GPU_WAYS["memory"] = {"a step, as a dry run estimates it"}


@pytest.mark.parametrize("name", GPU_WAYS)
def test_what_a_part_does_on_a_gpu_only_is_done_to_its_end(name, small_gpu, tmp_path, monkeypatch):
    if name == "environment":
        # Nowhere else: torch and others would begin to use it.
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr("gpu_parts.environment.unsupported_device", lambda device: "it needs the package triton")
    found = Found(tmp_path / f"{name}.json")
    getattr(importlib.import_module(f"gpu_parts.{PARTS[name].module}"), name)(found, small_gpu)
    errors = {key: value["error"] for key, value in found.facts.items() if isinstance(value, dict) and "error" in value}
    assert not errors and set(found.failed) == GPU_WAYS[name]


@pytest.mark.parametrize("name", PARTS)
def test_every_part_is_a_function_of_its_module(name):
    assert callable(getattr(importlib.import_module(f"gpu_parts.{PARTS[name].module}"), name))


@pytest.mark.campaign
def test_the_whole_check_writes_a_line_for_every_part(tmp_path):
    folders = ["--work", tmp_path / "work", "--results", tmp_path]
    command = [sys.executable, ROOT / "benchmarks" / "gpu_check.py", "--cpu", *folders]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "work" / "results.jsonl").read_text().splitlines()]
    assert {line["part"] for line in lines} == set(PARTS)
    [path] = tmp_path.glob("*_gpu_check_cpu.json")
    whole = json.loads(path.read_text())
    assert whole["results"] == lines and whole["versions"]["torch"] and whole["hardware"]["cores"]


def test_what_breaks_in_a_piece_of_a_part_is_kept_and_the_next_one_runs(tmp_path):
    found = Found(tmp_path / "part.json")
    assert found.attempt("division", lambda: 1 / 0) is None
    found.attempt("sum", lambda: {"value": 2}, must=lambda each: each["value"] == 3)
    kept = json.loads(found.path.read_text())
    assert kept["division"]["error"].startswith("ZeroDivisionError") and kept["sum"]["value"] == 2
    assert kept["failed"] == ["division", "sum"]


# ---- the driver -------------------------------------------------------------------------------------------------------------

# Stand-ins for parts: what a process of each does, and the seconds that it has.
PROGRAMS = {
    "good": ("open('good.json', 'w').write('{\"failed\": [], \"answer\": 42}')", 20),
    "broken": ("raise MemoryError('out of memory')", 20),
    "hanging": ("import time; open('hanging.json', 'w').write('{\"failed\": [], \"begun\": 1}'); time.sleep(100)", 2),
    "last": ("open('last.json', 'w').write('{\"failed\": []}')", 20),
}


class StandIns(Check):
    """A check whose parts are small programs."""

    def _process(self, name: str, log: int) -> subprocess.Popen:
        command = [sys.executable, "-c", PROGRAMS[name][0]]
        return subprocess.Popen(command, cwd=self.work, stdout=log, stderr=log, start_new_session=True)


@pytest.fixture
def stand_ins(monkeypatch, tmp_path):
    """A check of the stand-ins, one after the other."""
    monkeypatch.setattr(gpu_check, "PARTS", {name: Part("none", seconds, True) for name, (_, seconds) in PROGRAMS.items()})
    return lambda seconds=60.0: StandIns(tmp_path, is_cpu=False, seconds=seconds)


def test_a_part_that_fails_or_hangs_is_a_result_and_not_the_end(stand_ins, tmp_path, capsys):
    saved = []

    def save(lines: list[dict]) -> None:
        # The line is on the disk before anything else happens.
        saved.append([json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()])
        assert saved[-1] == lines

    good, broken, hanging, last = stand_ins().run(list(PROGRAMS), save)
    assert [len(lines) for lines in saved] == [1, 2, 3, 4]
    assert good["answer"] == 42 and good["exit"] == last["exit"] == 0
    assert broken["exit"] == 1 and "MemoryError: out of memory" in broken["end_of_log"]
    assert hanging["exit"].startswith("no end after") and hanging["begun"] == 1
    assert [gpu_check.passed(line) for line in (good, broken, hanging, last)] == [True, False, False, True]
    assert capsys.readouterr().out.count('"part"') == 4


def test_parts_that_no_time_is_left_for_are_named(stand_ins):
    lines = stand_ins(seconds=1.0).run(["good", "last"], lambda lines: None)
    assert [line["exit"] for line in lines] == ["not begun: no time left"] * 2


def test_parts_that_measure_are_alone_and_others_run_beside_each_other(tmp_path, monkeypatch):
    check = Check(tmp_path, is_cpu=False, seconds=60)
    running = lambda *names: [gpu_check.Running(name, None, 1) for name in names]  # noqa: E731
    assert check._may_begin("values", running("compiling", "runs"))
    assert not check._may_begin("speed_hh", running("runs")) and not check._may_begin("runs", running("speed_hh"))
    assert not check._may_begin("values", running("environment")) and check._may_begin("speed_hh", [])


def test_without_a_gpu_nothing_but_the_environment_is_run(tmp_path, monkeypatch, capsys):
    begun = []

    def no_gpu(self, name: str, log: int) -> subprocess.Popen:
        begun.append(name)
        program = "open('environment.json', 'w').write('{\"failed\": [\"no_gpu\"], \"no_gpu\": true}')"
        return subprocess.Popen([sys.executable, "-c", program], cwd=self.work, start_new_session=True)

    monkeypatch.setattr(Check, "_process", no_gpu)
    assert gpu_check.main(["--work", str(tmp_path / "work"), "--results", str(tmp_path)]) == 2
    assert begun == ["environment"] and "--cpu" in capsys.readouterr().err


def test_packages_come_from_wheels_without_pip(tmp_path):
    with zipfile.ZipFile(tmp_path / "some-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("some_package/__init__.py", "found = True")
    folder = gpu_check.unpacked(tmp_path, tmp_path / "packages")
    environment = Check(tmp_path, False, 1, folder)._environment()
    program = [sys.executable, "-c", "import some_package; print(some_package.found)"]
    done = subprocess.run(program, env=environment, capture_output=True, check=False)
    assert done.stdout.strip() == b"True"
    with pytest.raises(SystemExit, match="make_wheels"):
        gpu_check.unpacked(tmp_path / "packages", tmp_path / "none")


def test_a_part_in_a_fork_has_its_status_and_its_output_in_its_log(tmp_path):
    from gpu_parts.found import Fork

    with (tmp_path / "log").open("w") as log:
        fork = Fork("no_such_module", "values", tmp_path, log.fileno())
    while fork.poll() is None:
        time.sleep(0.01)
    assert fork.wait() == 1 and "no_such_module" in (tmp_path / "log").read_text()


# ---- what is run on a GPU ---------------------------------------------------------------------------------------------------

MODELS = making.FAMILIES | {"billion": making.BILLION, "eight billion": making.EIGHT_BILLION}
WIDTHS = {"head_80": 320, "billion": 2048, "eight billion": 4096}


@pytest.mark.parametrize("name", MODELS)
def test_models_are_of_architectures_that_there_are(name):
    config = making.build_config(MODELS[name], "bfloat16")
    assert AutoConfig.for_model(**config.model.from_config).hidden_size == WIDTHS.get(name, 256)


@pytest.mark.parametrize("name", ["pairs of HH", "7 responses", "system prompt of 300"])
def test_attention_is_chosen_on_batches_of_their_names(name, tmp_path):
    trie = choice.batches(Settings(tmp_path, is_cpu=False))[name]().trie
    shape = Shape.of(64, trie)
    assert 13_000 < trie.num_tokens < 20_000
    # Some responses, and some prompts behind the system prompt, begin with the same random token.
    assert shape.levels in {"pairs of HH": (1,), "7 responses": (1, 2), "system prompt of 300": (2, 3)}[name]
    # Padding is a tree too.
    assert {"pairs of HH": 1.9, "7 responses": 6, "system prompt of 300": 70}[name] < shape.branches


def test_the_lines_of_the_choice_are_what_the_table_of_the_choice_is_made_of():
    line = Measured(Shape(64, 2.0, 1), "varlen")
    assert eval(repr(line)) == line


SETTINGS = [(*common, *other) for common, other, _ in whole_runs.OPTIONS.values()]
SETTINGS += [(*whole_runs.SHARDED, *overrides) for overrides in whole_runs.FSDP.values()]


@pytest.mark.parametrize("overrides", SETTINGS, ids=" ".join)
def test_every_run_of_a_gpu_is_one_that_train_py_accepts(overrides, compose):
    assert compose(*force_open_sections([*COMMON, "loss=dpo", *overrides, "n_steps=2"])).n_steps == 2


def test_the_large_models_have_the_parameters_that_their_names_say():
    from transformers import AutoModelForCausalLM

    for values, expected in ((making.BILLION, 1.4e9), (making.EIGHT_BILLION, 8.0e9)):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
        assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(expected, rel=0.02)


# ---- whole runs -------------------------------------------------------------------------------------------------------------


def row(examples: int, loss: float) -> dict:
    return {"counters/examples": examples, "loss/train": loss, "logps_train/chosen": -2.0, "logps_train/rejected": -4.0}


def test_the_largest_difference_is_relative_and_of_the_same_steps():
    # |0.5 - 0.4| / 0.4
    assert largest_difference([row(16, 0.6), row(32, 0.5)], [row(16, 0.6), row(32, 0.4)]) == pytest.approx(0.25)
    assert largest_difference([row(16, nan)], [row(16, 0.6)]) == inf
    with pytest.raises(FailedRunError, match="16"):
        largest_difference([row(16, 0.6)], [row(32, 0.6)])


def test_two_runs_that_log_the_same_pass_and_two_that_do_not_are_said_to(monkeypatch, tmp_path):
    def start(overrides: tuple[str, ...]) -> tuple[int, str]:
        folder = Path(overrides[-1].removeprefix("local_run_dir="))
        folder.mkdir()
        rows = [row(16, 0.6), row(32, 0.4 if "lr=1" in overrides else 0.5), {"loss/eval": 0.7}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
        return 0, "a line\nwarning: warm-up takes long\n"

    monkeypatch.setattr(whole_runs, "start", start)
    found = Found(tmp_path / "part.json")
    assert whole_runs.run(tmp_path / "one")["said"] == ["warning: warm-up takes long"]
    for name, overrides in {"same": (), "other": ("lr=1",)}.items():
        whole_runs.compare_runs(found, name, tmp_path / "one", tmp_path / name, overrides, 1e-4)
    assert found.failed == ["other"] and found.facts["same"]["difference"] == 0
    # |0.4 - 0.5| / 0.5
    assert found.facts["other"]["difference"] == pytest.approx(0.2)


def test_a_run_that_fails_is_a_result_with_its_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(whole_runs, "start", lambda overrides: (3, "out of memory"))
    found = Found(tmp_path / "part.json")
    found.attempt("sft", whole_runs.run, tmp_path / "sft")
    assert found.facts["sft"]["error"] == "FailedRunError: exit status 3: out of memory"


# ---- gpu.py -----------------------------------------------------------------------------------------------------------------


def test_the_benchmark_keeps_each_run_as_it_ends(tmp_path, monkeypatch):
    def worker(job: dict, folder: Path) -> dict:
        if job["contender"] == "prepare":
            return {"hardware": {}, "versions": {}}
        kept = [len(json.loads(path.read_text())["runs"]) for path in tmp_path.glob("*.json")]
        seen.append(kept)
        if len(seen) == 3:
            raise RuntimeError("the third run failed")
        return {"seconds": [1.0, 1.0], "losses": [0.7, 0.6], "peak_bytes": {"process": 1}}

    seen: list = []
    monkeypatch.setattr(bench, "call_worker", worker)
    monkeypatch.setattr(bench, "check_agreement", lambda runs, tolerance: 0.0)
    options = ["--smoke", "--rounds", "2", "--work", "sft_hh", "--contenders", "padded", "tree", "--results", str(tmp_path)]
    with pytest.raises(RuntimeError, match="third"):
        bench.main(options)
    assert seen == [[], [1], [2]]
