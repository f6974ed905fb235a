"""The reference's log-probs are computed once, found again by all they depend on, and never trusted when damaged."""

import copy
import errno
from dataclasses import replace
from threading import Event, Thread

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM

from preference_training.batching.iterator import BatchIterator, Packing
from preference_training.batching.packing import UNLIMITED, TokenBudget, iterate_examples, pack_examples
from preference_training.batching.schedule import RunLength, Schedule
from preference_training.core import files
from preference_training.core.process_group import SINGLE_PROCESS
from preference_training.data.prompt_table import PromptTable, Selection
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.modeling import reference_cache
from preference_training.modeling.logprobs import LiveReference
from preference_training.modeling.prefix_sharing.scoring_head import ScoringHead
from preference_training.modeling.prefix_sharing.sharing import share_prefixes
from preference_training.modeling.reference_cache import ReferencePlan, cache_key, cache_path, cached_reference
from tests.support.files import GOLDEN


def read(prompts: Selection) -> ReferencePlan:
    """These prompts read, wherever they are computed."""
    return ReferencePlan(prompts, prompts)


def whole(table: PromptTable) -> ReferencePlan:
    """All prompts of a table."""
    return read(Selection(table, numpy.arange(len(table))))


def prompt_of(n: int, last: int) -> TokenizedPrompt:
    """A prompt with three responses that differ with `n`; `last` is a token of the last one."""
    return TokenizedPrompt([5 + n, 6, 7], [[10 + n, 11, 0], [12 + n, 0], [13, 14, last, 0]], [(0, 1), (0, 2)])


TABLE = PromptTable.of(prompt_of(n, n) for n in range(9))
READ = whole(TABLE)


def reference_in(directory, model, plan):
    """The reference as a run gets it that keeps log-probs in `directory`."""
    return cached_reference(LiveReference(model), plan, cache_path(directory, model, plan))


def logps_in(directory, model, plan):
    """Its log-probs, by row."""
    return reference_in(directory, model, plan).logps


@pytest.fixture
def model():
    return AutoModelForCausalLM.from_pretrained(GOLDEN / "llama", dtype=torch.float32)


@pytest.fixture
def passes(monkeypatch):
    """Counts the passes that are computed."""
    counted = []
    usual = reference_cache.compute_logps
    monkeypatch.setattr(reference_cache, "compute_logps", lambda *args: (counted.append(1), usual(*args))[1])
    return counted


def test_cached_log_probs_are_those_of_the_live_reference(model, tmp_path):
    share_prefixes(model, "on")
    cached = reference_in(tmp_path, model, READ)
    live = LiveReference(copy.deepcopy(model))
    for prompt in TABLE:
        batch = pack_examples(list(iterate_examples([prompt])))
        torch.testing.assert_close(cached(batch), live(batch), rtol=1e-5, atol=1e-5)


def test_a_second_run_reads_what_the_first_computed(model, tmp_path, passes, capsys):
    first, second = (logps_in(tmp_path, model, READ) for _ in range(2))
    assert torch.equal(first, second) and len(passes) == 1
    out = capsys.readouterr().out
    assert "27 responses computed and saved" in out and "27 responses read from" in out


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "text"])
def test_a_damaged_file_is_noticed_and_recomputed(model, tmp_path, passes, capsys, damage):
    expected = logps_in(tmp_path, model, READ)
    path = cache_path(tmp_path, model, READ)
    whole = path.read_bytes()
    flipped = whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:]
    path.write_bytes({"cut": whole[:-10], "bit": flipped, "empty": b"", "text": b"not a tensor"}[damage])
    assert torch.equal(logps_in(tmp_path, model, READ), expected)
    assert len(passes) == 2 and "is damaged and will be recomputed" in capsys.readouterr().out
    assert path.read_bytes() == whole and not list(tmp_path.glob("*.partial"))


def test_a_full_disk_costs_the_file_and_not_the_run(model, tmp_path, passes, monkeypatch, capsys):
    expected = logps_in(tmp_path / "other", model, READ)

    def full(*paths):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    assert torch.equal(logps_in(tmp_path, model, READ), expected)
    out = capsys.readouterr().out
    place = cache_path(tmp_path, model, READ)
    assert f"warning: reference: its log-probs cannot be kept in {place} for other runs: No space left on device" in out
    assert "27 responses computed\n" in out and not list(tmp_path.glob("*.safetensors*"))
    monkeypatch.undo()
    assert torch.equal(logps_in(tmp_path, model, READ), expected) and len(list(tmp_path.glob("*.safetensors"))) == 1


def test_a_place_without_room_for_a_lock_costs_the_file_and_not_the_run(model, tmp_path, capsys):
    (tmp_path / "file").write_text("no directory")
    expected = logps_in(tmp_path / "other", model, READ)
    assert torch.equal(logps_in(tmp_path / "file" / "below", model, READ), expected)
    assert "its log-probs cannot be kept in" in capsys.readouterr().out


def test_the_key_changes_with_weights_data_dtype_and_kernels(model):
    key = cache_key(model, READ)
    assert key == cache_key(copy.deepcopy(model), whole(PromptTable.of(TABLE)))
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved.lm_head.weight[0, 0] += 1e-3
    other_response = whole(PromptTable.of([*(prompt_of(n, n) for n in range(8)), prompt_of(8, 9)]))
    sharing = copy.deepcopy(model)
    share_prefixes(sharing, "on")
    others = [
        cache_key(moved, READ),
        cache_key(model, read(Selection(TABLE, numpy.arange(8)))),
        cache_key(model, whole(PromptTable.of(TABLE, first_row=3))),
        cache_key(model, other_response),
        cache_key(copy.deepcopy(model).to(torch.bfloat16), READ),
        cache_key(sharing, READ),
    ]
    assert len({key, *others}) == 7


def test_held_out_responses_are_numbered_behind_those_that_are_trained_on(model, tmp_path):
    held_out = PromptTable.of((prompt_of(n, n) for n in range(20, 23)), first_row=TABLE.num_responses)
    plan = read(Selection(TABLE, numpy.array([7, 2])).joined(Selection(held_out, numpy.array([1]))))
    cached, live = reference_in(tmp_path, model, plan), LiveReference(copy.deepcopy(model))
    assert cached.logps.isfinite().nonzero().flatten().tolist() == [6, 7, 8, 21, 22, 23, 30, 31, 32]
    for prompt in (TABLE[7], TABLE[2], held_out[1]):
        batch = pack_examples(list(iterate_examples([prompt])))
        torch.testing.assert_close(cached(batch), live(batch), rtol=1e-5, atol=1e-5)


def test_rows_without_a_prompt_are_nan(model, tmp_path):
    assert logps_in(tmp_path, model, read(Selection(TABLE, numpy.arange(1, 9)))).isnan().tolist() == [True] * 3 + [False] * 24


def test_of_two_concurrent_runs_one_computes_and_the_other_waits_and_reads(model, tmp_path, monkeypatch, capsys):
    waits, found, usual = Event(), [], reference_cache.compute_logps
    second = Thread(target=lambda: found.append(logps_in(tmp_path, model, READ)))
    acquired = reference_cache._try_acquire
    monkeypatch.setattr(reference_cache, "_try_acquire", lambda *args: acquired(*args) or waits.set())

    def compute(*args):
        second.start()
        assert waits.wait(60), "the second run comes while the first computes"
        return usual(*args)

    monkeypatch.setattr(reference_cache, "compute_logps", compute)
    found.append(logps_in(tmp_path, model, READ))
    second.join(60)
    assert torch.equal(*found)
    out = capsys.readouterr().out
    assert [out.count(text) for text in ("computed and saved", "waiting for the run", "responses read from")] == [1, 1, 1]


# ---- what the key holds ---------------------------------------------------------------------------------------------------


def changed(model, change):
    """A copy of a model after a change."""
    other = copy.deepcopy(model)
    change(other)
    return other


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.config, "rms_norm_eps", 0.1),
        lambda model: model.config.rope_parameters.update(rope_theta=1e6),
        lambda model: model.model.rotary_emb.inv_freq.mul_(2),
        lambda model: setattr(model, "autocast_dtype", torch.bfloat16),
        lambda model: model.set_attn_implementation("eager"),
        lambda model: setattr(model.get_output_embeddings(), "__class__", ScoringHead),
        lambda model: setattr(model.model.norm, "__class__", type("OtherNorm", (type(model.model.norm),), {})),
    ],
    ids=["norm", "rope", "buffer", "autocast", "attention", "head", "kernel"],
)
def test_the_key_changes_with_whatever_the_log_probs_depend_on(model, change):
    assert cache_key(changed(model, change), READ) != cache_key(model, READ)


@pytest.mark.parametrize(
    ("name", "value"), [("_name_or_path", "x"), ("use_cache", False), ("transformers_version", "x"), ("eos_token_id", 1)]
)
def test_the_key_does_not_depend_on_the_name_of_a_model(model, name, value):
    assert cache_key(changed(model, lambda other: setattr(other.config, name, value)), READ) == cache_key(model, READ)


def test_the_key_changes_with_settings_versions_and_machine(model, monkeypatch):
    keys = {cache_key(model, READ), cache_key(model, READ, {"compile": True}), cache_key(model, READ, {"compile": False})}
    monkeypatch.setattr(reference_cache.transformers, "__version__", "99.0")
    keys.add(cache_key(model, READ))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    keys.add(cache_key(model, READ))
    assert len(keys) == 5


def test_the_key_does_not_depend_on_where_our_own_classes_live(model, monkeypatch):
    share_prefixes(model, "on")
    assert isinstance(model.get_output_embeddings(), ScoringHead)
    before = cache_key(model, whole(TABLE))
    monkeypatch.setattr(ScoringHead, "__module__", "moved")
    assert cache_key(model, whole(TABLE)) == before


def run(
    seed: int = 0, size: int = 4, packs: int = 1, budget: int = 10**6, evaluated: int = 4, epochs: int = 1
) -> ReferencePlan:
    """What a run reads with these settings."""
    held_out = PromptTable.of((prompt_of(n, n) for n in range(20, 23)), first_row=TABLE.num_responses)
    most = TokenBudget(budget, budget)
    steps = BatchIterator(Schedule(TABLE, size, seed, length=RunLength(n_epochs=epochs)), packs, Packing(budget=most))
    return ReferencePlan.for_run(steps, held_out, evaluated, None, seed, most, SINGLE_PROCESS)


def test_the_key_changes_with_everything_that_determines_the_packs(model):
    others = [run(seed=1), run(size=6), run(packs=2), run(budget=20), run(evaluated=2)]
    assert len({cache_key(model, plan) for plan in (run(), *others)}) == 6


@pytest.mark.parametrize("rule", ["PACKING_VERSION", "MIN_SHARED"])
def test_the_key_changes_with_the_rules_by_which_packs_are_made(rule, model, monkeypatch):
    before = cache_key(model, run())
    monkeypatch.setattr(reference_cache, rule, 1)
    assert cache_key(model, run()) != before


def test_the_key_changes_with_how_often_an_epoch_visits_a_data_set(model):
    parts = [replace(PromptTable.of([prompt_of(n, n)]).parts[0], weight=weight) for n, weight in ((0, 1.0), (1, 2.0))]
    tables = PromptTable(parts), PromptTable([replace(part, weight=3.0 - part.weight) for part in parts])
    runs = [
        ReferencePlan.for_run(BatchIterator(Schedule(table, 2)), PromptTable.of([], 6), 2, None, 0, UNLIMITED, SINGLE_PROCESS)
        for table in tables
    ]
    assert cache_key(model, runs[0]) != cache_key(model, runs[1])


def test_runs_with_the_same_packs_share_their_log_probs(model):
    # More epochs, and more memory than any pack needs.
    assert cache_key(model, run()) == cache_key(model, run(epochs=3)) == cache_key(model, run(budget=2 * 10**6))
