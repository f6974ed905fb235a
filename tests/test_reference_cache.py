"""The reference's log-probs are computed once, found again by all they depend on, and never trusted when damaged."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import reference_cache
from batches import TokenizedPrompt, examples_of, pack
from conftest import GOLDEN
from logprobs import CachedReference, LiveReference
from models import share_prefixes
from reference_cache import cache_key, cache_path, reference_logps_of

PROMPTS = [
    TokenizedPrompt([5 + n, 6, 7], [[10 + n, 11, 0], [12 + n, 0], [13, 14, n, 0]], [(0, 1), (0, 2)], "", "", first_row=3 * n)
    for n in range(9)
]


def logps_in(directory, model, prompts):
    """The log-probs as a run gets them that keeps them in `directory`."""
    return reference_logps_of(model, prompts, cache_path(directory, model, prompts))


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
    cached = CachedReference(logps_in(tmp_path, model, PROMPTS))
    live = LiveReference(copy.deepcopy(model))
    for prompt in PROMPTS:
        batch = pack(list(examples_of([prompt])))
        torch.testing.assert_close(cached(batch), live(batch), rtol=1e-5, atol=1e-5)


def test_a_second_run_reads_what_the_first_computed(model, tmp_path, passes, capsys):
    first, second = (logps_in(tmp_path, model, PROMPTS) for _ in range(2))
    assert torch.equal(first, second) and len(passes) == 1
    out = capsys.readouterr().out
    assert "27 responses computed once" in out and "27 responses read from" in out


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "text"])
def test_a_damaged_file_is_noticed_and_computed_anew(model, tmp_path, passes, capsys, damage):
    expected = logps_in(tmp_path, model, PROMPTS)
    path = cache_path(tmp_path, model, PROMPTS)
    whole = path.read_bytes()
    flipped = whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:]
    path.write_bytes({"cut": whole[:-10], "bit": flipped, "empty": b"", "text": b"not a tensor"}[damage])
    assert torch.equal(logps_in(tmp_path, model, PROMPTS), expected)
    assert len(passes) == 2 and "is damaged and computed anew" in capsys.readouterr().out
    assert path.read_bytes() == whole and not list(tmp_path.glob("*.partial"))


def test_the_key_changes_with_weights_data_dtype_and_way_of_computing(model):
    key = cache_key(model, PROMPTS)
    assert key == cache_key(copy.deepcopy(model), list(PROMPTS))
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved.lm_head.weight[0, 0] += 1e-3
    other_response = [*PROMPTS[:-1], TokenizedPrompt([13, 6, 7], [[18, 11, 0], [20, 0], [13, 14, 9, 0]], [(0, 1)], "", "", 24)]
    sharing = copy.deepcopy(model)
    share_prefixes(sharing, "on")
    others = [
        cache_key(moved, PROMPTS),
        cache_key(model, PROMPTS[:-1]),
        cache_key(model, other_response),
        cache_key(copy.deepcopy(model).to(torch.bfloat16), PROMPTS),
        cache_key(sharing, PROMPTS),
    ]
    assert len({key, *others}) == 6


def test_rows_that_no_prompt_has_are_not_a_number(model, tmp_path):
    assert logps_in(tmp_path, model, PROMPTS[1:])[:3].isnan().all()
