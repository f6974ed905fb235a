"""Real processes `python train.py ...`: what they print, what they load, and what a mistake of the user's looks like."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.support import forked
from tests.support.files import ROOT
from tests.support.light import LightRuns

TRAIN = ROOT / "train.py"
# Each takes seconds to import, and none is needed to see that a command line is wrong.
HEAVY = ("torch", "transformers", "datasets", "wandb", "pyarrow", "pandas")


def run(folder: Path, *arguments: str, forbidden: LightRuns | None = None) -> subprocess.CompletedProcess:
    """`python train.py` with `arguments` in `folder`; `forbidden`: with modules in place of the heavy ones."""
    return forbidden.run(folder, *arguments) if forbidden else forked.run([TRAIN, *arguments], folder)


@pytest.fixture(scope="module")
def no_heavy_library(tmp_path_factory) -> Iterator[LightRuns]:
    """Runs with modules in place of the heavy libraries, which end the process at once with status 99."""
    folder = tmp_path_factory.mktemp("forbidden")
    for name in HEAVY:
        end = f"import os, sys\nsys.stderr.write('{name} was imported')\nsys.stderr.flush()\nos._exit(99)"
        (folder / f"{name}.py").write_text(end)
    runs = LightRuns(folder)
    yield runs
    runs.end()


def assert_refused(done: subprocess.CompletedProcess, folder: Path, beside: set[str] = frozenset()) -> str:
    """The message of a refusal: status 2, one message on stderr, no traceback, no run directory. Returns the message.

    beside are folders that lie where run directories would.
    """
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "Error executing job" not in done.stderr
    assert {path.name for path in folder.glob("runs/*")} == beside
    assert not (folder / "multirun").exists() and not (folder / "outputs").exists()
    return done.stderr.strip()


# ---- composition --------------------------------------------------------------------------------------------------------


def test_cfg_job_prints_the_composition_and_loads_no_heavy_library(tmp_path, no_heavy_library):
    done = run(tmp_path, "--cfg", "job", "loss=dpo", "loss.beta=0.3", "datasets=[hh,shp]", forbidden=no_heavy_library)
    assert (done.returncode, done.stderr) == (0, "")
    composed = yaml.safe_load(done.stdout)
    assert composed["loss"]["beta"] == 0.3
    assert composed["datasets"] == ["hh", "shp"]
    assert composed["model"]["tokenizer_name_or_path"] == "byte_level"
    assert "hydra" not in composed
    assert list(tmp_path.iterdir()) == []


def test_the_modules_that_stand_for_the_heavy_libraries_are_really_in_their_way(tmp_path, no_heavy_library):
    # Without this, the tests of what is not imported would prove nothing.
    done = run(tmp_path, forbidden=no_heavy_library)
    assert done.returncode == 99
    assert done.stderr.endswith(" was imported")


# ---- mistakes that are seen before anything heavy is loaded ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("loss=dpo loss.betaa=1", "loss.betaa: no such key; did you mean loss.beta?"),
        ("loss=dpo +loss.betta=1", "loss.betta: no such key; did you mean loss.beta?"),
        ("loss=dppo", "loss=dppo: there is no such loss; did you mean dpo?"),
        ("trainer=FSDPTrainr", "trainer=FSDPTrainr: there is no such trainer; did you mean FSDPTrainer?"),
        ("datasets=[shpp]", "datasets: unknown data set 'shpp'; did you mean shp? "),
        ("datasets=[toy,missing.jsonl]", "datasets: missing.jsonl: no such file."),
        ("datasets=[missing.py:mine]", "datasets: missing.py: no such file."),
        ("loss=dpo loss.beta=0", "loss.beta: found 0, expected a number above 0"),
        ("loss=dpo loss.mode_loss=beta_dpoo", "loss.mode_loss: no mode 'beta_dpoo'; "),
        (
            "batch_size=15 gradient_accumulation_steps=2",
            "batch_size: found 15, expected a multiple of gradient_accumulation_steps, which is 2.",
        ),
        ("eval_every=15", "eval_every: found 15, expected at least batch_size, which is 16; "),
        ("max_prompt_length=256", "max_prompt_length: found 256, expected less than max_length, which is 256: "),
        ("model.archive=missing/LATEST/policy.pt", "model.archive: missing/LATEST/policy.pt: no such file or directory."),
        ("objective=loss/evel", "objective: loss=sft has no metric 'loss/evel'; did you mean loss/eval?"),
        ("~lr", "lr: removed by ~, but required."),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_status_2_before_a_heavy_library_is_loaded(
    tmp_path, no_heavy_library, arguments, told
):
    done = run(tmp_path, *arguments.split(), forbidden=no_heavy_library)
    message = assert_refused(done, tmp_path)
    assert message.startswith(told)
    assert "\n" not in message
    assert done.stdout == ""


@pytest.mark.parametrize(("local_rank", "said"), [("0", 1), ("1", 0)])
def test_of_the_workers_of_a_launcher_the_first_on_a_machine_says_what_is_wrong(tmp_path, monkeypatch, local_rank, said):
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(name, value)
    assert assert_refused(run(tmp_path, "loss.betaa=1"), tmp_path).count("loss.betaa: no such key") == said


# ---- mistakes in files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            '{"prompt": "p", "chosen": "c", "rejected": "r"}\n{"prompt": "p", "chosen": "c"}\n',
            "datasets: rows.jsonl, row 2: no field 'rejected', the row has prompt, chosen.",
        ),
        ("", "datasets: rows.jsonl: no usable row (it has none). Expected rows with chosen and rejected, "),
    ],
    ids=["a row without a field", "an empty file"],
)
def test_a_mistake_in_a_data_file_is_one_line_with_file_and_row_and_status_2(tmp_path, content, told):
    (tmp_path / "rows.jsonl").write_text(content)
    message = assert_refused(run(tmp_path, "datasets=[rows.jsonl]", "loss=dpo"), tmp_path, beside={"prepared_data"})
    assert message.startswith(told)
    assert "\n" not in message
    left = {path.suffix for path in (tmp_path / "runs" / "prepared_data").iterdir()}
    assert left <= {".lock"}, "what was prepared by half is gone"


@pytest.fixture
def archive(request, tmp_path) -> str:
    """Something in `tmp_path` that cannot be the archive of the embedded model, by the name of its kind."""
    if request.param == "a model of another width":
        from transformers import AutoConfig, AutoModelForCausalLM

        sizes = {"hidden_size": 64, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
        config = AutoConfig.for_model("llama", vocab_size=258, num_key_value_heads=4, tie_word_embeddings=True, **sizes)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "archive")
    elif request.param == "a folder without weights":
        (tmp_path / "archive").mkdir()
    else:
        (tmp_path / "archive").write_text("not a checkpoint")
    return "archive"


@pytest.mark.parametrize(
    ("archive", "told"),
    [
        (
            "a model of another width",
            [
                "model.archive: archive does not fit LlamaForCausalLM as configured; ",
                "\n  model.embed_tokens.weight is [258, 64], expected [620, 128]",
                "\n  model.layers.0.input_layernorm.weight is [64], expected [128]",
                "\nChoose the model preset that the archive was trained with.",
            ],
        ),
        ("a folder without weights", ["model.archive: archive: the directory has no model.safetensors."]),
        ("a text file", ["model.archive: archive: it cannot be read as tensors"]),
    ],
    indirect=["archive"],
    ids=["of another width", "a folder without weights", "a text file"],
)
def test_an_archive_that_does_not_fit_is_refused_with_what_differs_and_status_2(tmp_path, archive, told):
    message = assert_refused(run(tmp_path, f"model.archive={archive}"), tmp_path)
    assert message.startswith(told[0])
    assert message.count("model.archive:") == 1
    assert all(part in message for part in told)
