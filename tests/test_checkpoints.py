"""Checkpoints: they load with plain transformers, and they replace each other whole."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoints import save_checkpoint, save_policy_pt
from conftest import GOLDEN


def golden_model():
    return AutoModelForCausalLM.from_pretrained(GOLDEN / "llama", dtype=torch.float32)


def test_a_checkpoint_loads_with_plain_transformers(tmp_path, tokenizer):
    model = golden_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    save_checkpoint(tmp_path, 128, model, model.state_dict(), tokenizer, {"examples": 128})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "LATEST", dtype=torch.float32)
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / "LATEST")("lunch on dawn").input_ids])
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


def test_latest_points_at_the_newest_checkpoint_and_nothing_partial_is_left(tmp_path, tokenizer):
    for examples in (64, 128, 128):
        model = golden_model()
        save_checkpoint(tmp_path, examples, model, model.state_dict(), tokenizer, {"examples": examples})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step-128", "step-64"]
    assert (tmp_path / "LATEST").resolve() == tmp_path / "step-128"


def test_policy_pt_holds_tensors_and_plain_values_only(tmp_path, tokenizer):
    model = golden_model()
    weights = model.state_dict()
    save_policy_pt(save_checkpoint(tmp_path, 64, model, weights, tokenizer, {}), weights, 64, {"loss/eval": 0.5})
    archive = torch.load(tmp_path / "LATEST" / "policy.pt", weights_only=True)
    assert (archive["step_idx"], archive["metrics"]) == (64, {"loss/eval": 0.5})
    assert archive["state"].keys() == model.state_dict().keys()
