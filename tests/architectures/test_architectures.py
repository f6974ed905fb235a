"""The short form of `make architectures`: an architecture of each kind through every check, and what the page shows of all."""

import importlib.util
import json
import warnings
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from preference_training.distributed.sharding import find_blocks, without_shared
from tests.architectures import checks, two_processes
from tests.architectures.tiny_models import DENSE, TINY, make

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
ALONE = [name for name in checks.CHECKS if name != "fsdp"]
# One of each kind, and what its cells say where they do not say ok: rotary positions; learned ones and Conv1D; windows and
# soft-caps; ALiBi; experts; attention sinks; chunks and scaled queries; a state beside attention.
SHARED = {"prefix": "shared"}
STATE = {"prefix": "padded: it is recurrent: one response would pass its state on to the next"}
KINDS: dict[str, dict[str, str]] = {
    "llama": SHARED,
    "gpt2": SHARED,
    "gemma2": SHARED,
    "mpt": {"prefix": "padded: it does not compute its attention through transformers' attention interface"},
    "mixtral": SHARED,
    "gpt_oss": SHARED,
    "llama4-scaled": SHARED,
    "falcon_h1": STATE,
}
# For two processes: tied weights, scaled logits, experts, blocks within blocks, tensors without dimensions, layers that share
# weights.
FOR_TWO = ("gpt2", "gemma2", "mixtral", "mamba", "apertus", "zamba2")
# Those that make test tries; make test-long tries the others.
SHORTLY = ("llama", "gpt2", "falcon_h1")
pytestmark = pytest.mark.filterwarnings("ignore")


def architecture(name: str, folder: Path) -> checks.Architecture:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return checks.Architecture(name, folder / name)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in SHORTLY else pytest.mark.long) for name in KINDS])
def test_an_architecture_is_trained_saved_and_exported_as_plain_transformers_have_it(name, tmp_path):
    found = dict(checks.outcomes(architecture(name, tmp_path), ALONE))
    assert {check: said for check, said in found.items() if said != "ok"} == KINDS[name]


@pytest.mark.long
@pytest.mark.usefixtures("forked_workers")
def test_two_processes_train_an_architecture_of_each_kind_as_one_does(tmp_path):
    some = [architecture(name, tmp_path) for name in FOR_TWO]
    checks.run_sharded(some)
    assert {of.name: said for of in some for _, said in checks.outcomes(of, ["fsdp"]) if said != "ok"} == {}


def test_a_run_of_two_processes_that_die_is_told_and_those_behind_it_are_followed(monkeypatch, tmp_path):
    def launch(function, arguments, workers, port):
        wanted, folder = arguments
        for number, _, _ in wanted:
            if number == 1:
                raise two_processes.WorkerDiedError("rank 1 of 2 died (SIGKILL)")
            for rank in range(workers):
                said = "ended" if number == 0 else f"refused: by {rank}"
                (Path(folder) / f"{number}.{rank}").write_text(json.dumps([rank, said]))

    monkeypatch.setattr(two_processes, "launch", launch)
    ends = two_processes.runs([({}, tmp_path)] * 3)
    assert ends == ["ended", "TRACEBACK: rank 1 of 2 died (SIGKILL)", "refused: by 0"]


@pytest.mark.parametrize(
    ("name", "block"), [("mamba", "MambaBlock"), ("biogpt", "BioGptDecoderLayer"), ("llama", "LlamaDecoderLayer")]
)
def test_blocks_lie_beside_each_other_and_are_found_where_a_model_does_not_name_them(name, block, tmp_path):
    make(name, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    blocks = find_blocks(model, None)
    assert [type(found).__name__ for found in blocks] == [block] * 2
    assert blocks == find_blocks(model, block)


def test_of_blocks_that_share_weights_those_parts_are_laid_out_by_themselves_that_share_none(tmp_path):
    make("zamba", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    parts = without_shared(find_blocks(model, None))
    weights = [weight for part in parts for weight in part.parameters()]
    shared = set(model.model.layers[1].shared_transf.parameters())
    # Each is laid out once, and those that are shared stay with the rest of the model.
    assert len(set(weights)) == len(weights) and not shared & set(weights)
    assert {*weights, *shared} == set(model.model.layers.parameters())
    blocks = find_blocks(AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **DENSE)), None)
    assert without_shared(blocks) == blocks


# ---- the page -------------------------------------------------------------------------------------------------------------


def page_script():
    spec = importlib.util.spec_from_file_location("architectures_page", ROOT / "scripts" / "architectures_page.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_the_page_shows_every_architecture_and_check_of_the_sweep_without_a_wrong_number_or_a_crash():
    kept = json.loads((HERE / "results.json").read_text())["results"]
    assert list(kept) == list(TINY), "run make architectures ARCHITECTURES=--write"
    assert all(list(found) == list(checks.CHECKS) for found in kept.values())
    bad = {
        (name, check): said
        for name, found in kept.items()
        for check, said in found.items()
        if "WRONG" in said or "TRACE" in said
    }
    assert not bad
    script = page_script()
    assert script.PAGE.read_text() == script.page(), "run python scripts/architectures_page.py"


def test_a_reason_is_a_note_of_the_page_once():
    cell, reasons = page_script().cell, []
    assert cell("llama", "dpo", "ok", reasons) == "ok"
    assert cell("llama", "prefix", "padded: it | cannot", reasons) == cell("opt", "prefix", "padded: it | cannot", reasons)
    assert cell("llama", "fsdp", "refused: model: no", reasons) == "refused (2)"
    assert reasons == ["it \\| cannot", "model: no"]
