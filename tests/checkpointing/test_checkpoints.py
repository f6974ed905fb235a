"""Checkpoints: they load with plain transformers, replace each other whole, and what is damaged is noticed."""

import errno
import json
import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer

from preference_training.checkpointing import model_files
from preference_training.checkpointing.checkpoint import Checkpoint, best_first, find_damage, list_checkpoints, newest_usable
from preference_training.checkpointing.model_files import file_numbers, write_scalars
from preference_training.checkpointing.snapshot import Snapshot
from preference_training.checkpointing.writer import CheckpointWriter, SaveOptions
from tests.support.files import GOLDEN


def golden_model(**changes):
    return AutoModelForCausalLM.from_pretrained(GOLDEN / "llama", dtype=torch.float32, **changes)


def snapshot(model, examples: int = 64, optimizer=None, **state) -> Snapshot:
    kept = get_optimizer_state_dict(model, optimizer)["state"] if optimizer else {}
    return Snapshot.of(examples, model.state_dict(keep_vars=True), kept, {"examples": examples} | state)


@pytest.fixture
def written(tmp_path, tokenizer):
    """Write checkpoints of the golden model: `written(64, 128)`, each with a held-out loss if `losses` gives one."""

    def write(*examples: int, losses=(), with_policy_pt=False, **settings) -> list[str]:
        said: list[str] = []
        model = golden_model()
        optimizer = torch.optim.AdamW(model.parameters())
        with CheckpointWriter(tmp_path, model, tokenizer, options=SaveOptions(**settings), log_message=said.append) as writer:
            for number, count in enumerate(examples):
                held_out = {"loss/eval": losses[number]} if losses else None
                writer.write(snapshot(model, count, optimizer, held_out=held_out), with_policy_pt)
            writer.wait()
        return said

    return write


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_loads_with_plain_transformers(tied, tmp_path, tokenizer):
    model = golden_model(tie_word_embeddings=tied)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    with CheckpointWriter(tmp_path, model, tokenizer) as writer:
        writer.write(snapshot(model), with_policy_pt=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "LATEST", dtype=torch.float32)
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / "LATEST")("lunch on dawn").input_ids])
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    archive = torch.load(tmp_path / "LATEST" / "policy.pt", weights_only=True)
    assert (archive["step_idx"], archive["metrics"]) == (64, {})
    assert archive["state"].keys() == model.state_dict().keys()
    assert all(torch.equal(archive["state"][name], weight) for name, weight in model.state_dict().items())


def test_weights_beyond_one_file_are_written_in_several_with_an_index(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(model_files, "FILE_SIZE", 50_000)
    model = golden_model()
    with CheckpointWriter(tmp_path, model, tokenizer) as writer:
        writer.write(snapshot(model))
    assert len(list((tmp_path / "step-64").glob("model-*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "LATEST", dtype=torch.float32)
    assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in model.state_dict().items())


def test_files_are_filled_in_order_and_a_tensor_is_never_cut(monkeypatch):
    monkeypatch.setattr(model_files, "FILE_SIZE", 40)
    sizes = {"a": 4, "b": 6, "c": 1, "d": 20, "e": 1}
    assert file_numbers({name: torch.zeros(size) for name, size in sizes.items()}) == {"a": 1, "b": 1, "c": 2, "d": 3, "e": 4}


def test_weights_and_optimizer_come_back_bit_for_bit(tmp_path, tokenizer):
    model = golden_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(torch.tensor([[1, 2, 3]])).logits.square().mean().backward()
    optimizer.step()
    with CheckpointWriter(tmp_path, model, tokenizer) as writer:
        writer.write(snapshot(model, optimizer=optimizer))
    other = golden_model()
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2)
    Checkpoint.read(tmp_path / "LATEST").read_weights(other.state_dict(keep_vars=True))
    state = get_optimizer_state_dict(other, other_optimizer)
    Checkpoint.read(tmp_path / "LATEST").read_optimizer(state["state"])
    set_optimizer_state_dict(other, other_optimizer, state)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
        for name, value in optimizer.state[one].items():
            assert torch.equal(value, other_optimizer.state[two][name]), name


def test_tensors_without_dimensions_are_written_where_bringing_parts_together_has_left_zeros(tmp_path):
    tensors = {"a": torch.tensor(0.5), "b": torch.tensor(-3.0, dtype=torch.bfloat16), "c": torch.ones(2)}
    save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, tmp_path / "model-1.safetensors")
    write_scalars(tmp_path, tensors | {"of another file": torch.tensor(1.0)})
    found = load_file(tmp_path / "model-1.safetensors")
    assert {name: tensor.tolist() for name, tensor in found.items()} == {"a": 0.5, "b": -3.0, "c": [0, 0]}


def test_an_optimizer_that_keeps_nothing_is_read_as_it_was_written(tmp_path, tokenizer):
    model = golden_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with CheckpointWriter(tmp_path, model, tokenizer) as writer:
        writer.write(snapshot(model, optimizer=optimizer))
    state = get_optimizer_state_dict(model, optimizer)
    Checkpoint.read(tmp_path / "LATEST").read_optimizer(state["state"])
    set_optimizer_state_dict(model, optimizer, state)


def test_latest_points_at_the_newest_checkpoint_and_nothing_partial_is_left(tmp_path, written):
    written(64, 128, 128)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step-128", "step-64"]
    assert (tmp_path / "LATEST").resolve() == tmp_path / "step-128"
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-128", "step-64"]


def test_the_newest_are_kept_and_the_best_beside_them(tmp_path, written):
    written(10, 20, 30, 40, 50, losses=[0.5, 0.2, 0.4, 0.3, 0.6], keep_last=1, keep_best=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-50", "step-40", "step-20"]


def test_a_checkpoint_that_cannot_be_read_or_was_evaluated_to_no_number_is_not_among_the_best(tmp_path, written):
    written(10, 20, 30, 40, losses=[0.1, 0.2, float("nan"), 0.3])
    (tmp_path / "step-10" / "state.json").write_text("damaged")
    assert [path.name for path in best_first(list_checkpoints(tmp_path), "loss/eval")] == ["step-20", "step-40"]


def test_in_the_background_what_is_written_is_the_run_as_it_was_then(tmp_path, tokenizer, monkeypatch):
    model, may_write = golden_model(), threading.Event()
    expected = {name: weight.clone() for name, weight in model.state_dict().items()}
    usual = HuggingFaceStorageWriter.write_data
    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", lambda *args: may_write.wait(30) and usual(*args))
    with CheckpointWriter(tmp_path, model, tokenizer, options=SaveOptions(background=True)) as writer:
        writer.write(snapshot(model))
        with torch.no_grad():
            for weight in model.parameters():
                weight.zero_()
        assert not (tmp_path / "LATEST").exists()
        may_write.set()
        writer.wait()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "LATEST", dtype=torch.float32)
    assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in expected.items())


def damages():
    return {
        "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
        "bit flipped": lambda file: file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1])),
        "deleted": lambda file: file.unlink(),
    }


@pytest.mark.parametrize("damage", damages())
def test_damage_to_any_file_is_noticed_and_the_next_older_checkpoint_is_taken(damage, tmp_path, written):
    written(64, 128, with_policy_pt=True)
    newest, said = tmp_path / "step-128", []
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    assert {"checksums.json", "state.json", "policy.pt", "model.safetensors", "config.json"} < {file.name for file in files}
    for file in files:
        content = file.read_bytes()
        damages()[damage](file)
        assert newest_usable(tmp_path, said.append).path == tmp_path / "step-64", file
        assert "step-128 is skipped" in said[-1] and file.name in said[-1]
        file.write_bytes(content)
    assert find_damage(newest) is None
    shutil.rmtree(tmp_path / "step-64")
    damages()[damage](newest / "state.json")
    assert newest_usable(tmp_path, said.append) is None


def test_a_full_disk_costs_that_checkpoint_and_a_line(tmp_path, tokenizer, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    model, said = golden_model(), []
    with CheckpointWriter(tmp_path, model, tokenizer, log_message=said.append) as writer:
        writer.write(snapshot(model, 64))
        with monkeypatch.context() as patched:
            patched.setattr(HuggingFaceStorageWriter, "write_data", full)
            writer.write(snapshot(model, 128))
            assert writer.failed
            patched.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
            writer.write(snapshot(model, 192))
            assert writer.failed
        assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step-64"]
        assert "step-128 could not be written, the run continues: [Errno 28] No space left on device" in said[1]
        assert "step-192 could not be written, the run continues: needs 0 MiB" in said[2]
        writer.write(snapshot(model, 256))
        assert not writer.failed
    assert newest_usable(tmp_path).path == tmp_path / "step-256"


FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "state.json", "policy.pt",
    "checksums.json",
)  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_disk_that_is_full_at_any_of_its_files_costs_a_checkpoint_and_no_more(name, tmp_path, tokenizer, monkeypatch):
    complete, model, said = CheckpointWriter._complete, golden_model(), []

    def without_room(writer, snapshot, partial, with_policy_pt):
        # Every write to it fails as on a full disk.
        (partial / name).symlink_to("/dev/full")
        complete(writer, snapshot, partial, with_policy_pt)

    monkeypatch.setattr(CheckpointWriter, "_complete", without_room)
    with CheckpointWriter(tmp_path, model, tokenizer, log_message=said.append) as writer:
        writer.write(snapshot(model), with_policy_pt=True)
        assert writer.failed
    assert len(said) == 1 and said[0].endswith("the run continues: [Errno 28] No space left on device")
    assert not list(tmp_path.iterdir())


def test_a_bug_while_writing_keeps_its_traceback(tmp_path, tokenizer):
    model = golden_model()
    bad = snapshot(model, 64, number=object())
    with CheckpointWriter(tmp_path, model, tokenizer) as writer, pytest.raises(TypeError, match="object does not go"):
        writer.write(bad)


def test_state_holds_plain_values_and_bytes_exactly(tmp_path, tokenizer):
    model = golden_model()
    state = {"third": 1 / 3, "tiny": 5e-324, "bytes": torch.arange(256, dtype=torch.uint8), "none": None, "list": [1, "é"]}
    with CheckpointWriter(tmp_path, model, tokenizer, options=SaveOptions(run={"seed": 3})) as writer:
        writer.write(snapshot(model, **state))
    found = Checkpoint.read(tmp_path / "LATEST").state
    assert torch.equal(found.pop("bytes"), state.pop("bytes"))
    assert found == state | {"examples": 64, "run": {"seed": 3}}
    json.loads((tmp_path / "LATEST" / "state.json").read_text())
