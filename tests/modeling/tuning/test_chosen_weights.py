"""Weights that are trained where not all are: by patterns, and by their signal-to-noise ratio."""

import json
import math

import pytest
import torch

from preference_training.checkpointing.checkpoint import Checkpoint
from preference_training.checkpointing.saved_run import SavedRun
from preference_training.core.errors import UserError
from preference_training.modeling.loading import check_model, load_model
from preference_training.modeling.tuning import chosen_weights
from preference_training.modeling.tuning.chosen_weights import CHOSEN_FILE, best_of_each_kind, signal_to_noise, trained_names
from tests.modeling.test_adapters import configured, finished, trainer_of
from tests.support.building import weights_of

__all__ = ["configured"]


def changed(config, tokenizer) -> set[str]:
    """The names of the weights that a run changes."""
    trainer = trainer_of(config, tokenizer)
    before = {name: weight.detach().clone() for name, weight in trainer.models.policy.named_parameters()}
    trainer.train()
    assert sum(len(group["params"]) for group in trainer.step.updater.optimizer.param_groups) < len(before)
    return {name for name, weight in trainer.models.policy.named_parameters() if not torch.equal(weight, before[name])}


def test_only_what_patterns_name_is_trained_and_what_is_frozen_stays(configured, tokenizer):
    chosen = ["model.trainable=['layers\\.1\\.','^model\\.norm']", "model.freeze=[mlp]"]
    config = configured(*chosen)
    names = changed(config, tokenizer)
    assert names and all("layers.1." in name or name == "model.norm.weight" for name in names)
    assert not any("mlp" in name for name in names)
    [line] = [line for line in check_model(config.model, tokenizer) if line.startswith("model.trainable")]
    assert "weights are trained, the others are frozen" in line


def test_a_run_on_some_weights_resumes_bit_for_bit(configured, tokenizer, tmp_path):
    config = configured("model.freeze=[embed_tokens,'layers\\.0\\.']")
    finished(config, tokenizer, tmp_path / "run")
    whole, resumed = trainer_of(config, tokenizer), trainer_of(config, tokenizer)
    resumed.continue_from(Checkpoint.read(tmp_path / "run" / "step-4"))
    for trainer in (whole, resumed):
        trainer.train()
    for name, weight in weights_of(whole).items():
        assert torch.equal(weight, weights_of(resumed)[name]), name


def test_random_entries_have_no_signal_and_a_strong_direction_does():
    torch.manual_seed(0)
    noise = torch.randn(96, 192)
    direction = torch.randn(96, 1) @ torch.randn(1, 192)
    values = torch.linalg.svdvals((noise + direction).double())
    quartiles = values.quantile(torch.tensor([0.25, 0.75], dtype=values.dtype))
    bound = (quartiles[1] - quartiles[0]) / 1.349 * (1 + math.sqrt(96 / 192))
    expected = values[values > bound].sum() / values[values <= bound].sum() / values.max()
    assert signal_to_noise(noise + direction) == pytest.approx(float(expected), rel=1e-6)
    assert signal_to_noise((noise + direction).T) == pytest.approx(float(expected), rel=1e-6)
    stack = torch.stack([noise, noise + direction])
    assert signal_to_noise(stack) == pytest.approx((signal_to_noise(noise) + float(expected)) / 2)


def test_the_best_share_of_each_kind_is_chosen():
    kinds = [{"layers.0.a": None, "layers.1.a": None, "layers.2.a": None}, {"layers.0.b": None}]
    ratios = {"layers.0.a": 1.0, "layers.1.a": 3.0, "layers.2.a": 2.0, "layers.0.b": 0.1}
    assert best_of_each_kind(kinds, ratios, 0.5) == ["layers.1.a", "layers.2.a", "layers.0.b"]


def test_spectrum_trains_the_share_that_it_writes_down_and_a_resumed_run_keeps_it(configured, tokenizer, tmp_path):
    config = configured("model.spectrum_share=0.5")
    model = load_model(config.model, tokenizer, base_dir=tmp_path / "base")
    chosen = json.loads((tmp_path / CHOSEN_FILE).read_text())
    # Of two blocks with seven matrices each one of each kind, and embedding and head.
    assert len(chosen["trained"]) == 7 + 2 and len(chosen["signal_to_noise"]) == 14
    assert trained_names(model) == set(chosen["trained"]) & {name for name, _ in model.named_parameters()}
    other = "model.layers.0.mlp.up_proj.weight"
    (tmp_path / CHOSEN_FILE).write_text(json.dumps({"trained": [other]}))
    assert trained_names(load_model(config.model, tokenizer, base_dir=tmp_path / "base")) == {other}


def test_the_model_that_a_run_started_from_is_loaded_without_a_decomposition(configured, tokenizer, tmp_path, monkeypatch):
    checkpoint = finished(configured("model.spectrum_share=0.5"), tokenizer, tmp_path / "run")
    monkeypatch.setattr(chosen_weights, "signal_to_noise", lambda weight: pytest.fail("nothing is trained"))
    model = SavedRun(checkpoint=checkpoint, run=Checkpoint.read(checkpoint).run).load_initial_model()
    assert all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.trainable=[]"], "model.trainable: found \\[\\]"),
        (["model.freeze=['(']"], "model.freeze: found '\\(', expected a regular expression"),
        (["model.freeze=[mlp]", "+adapter=lora"], "model.freeze: found .* with an adapter, which freezes all weights"),
        (["model.spectrum_share=0.5", "model.trainable=[mlp]"], "model.spectrum_share: given beside model.trainable"),
        (["model.spectrum_share=1"], "model.spectrum_share: found 1, expected a share above 0 and below 1"),
        (["model.freeze=[mlp]", "trainer=TensorParallelTrainer"], "model.freeze: TensorParallelTrainer splits the weights"),
    ],
)
def test_what_cannot_work_is_refused_with_the_key(overrides, message, configured):
    with pytest.raises(UserError, match=message):
        configured(*overrides)


def test_patterns_that_match_nothing_or_leave_nothing_are_refused_with_names_that_there_are(configured, tokenizer):
    for override, message in (
        ("model.freeze=[q_prj]", r"model\.freeze: 'q_prj' is found in no name .*model\.layers\.0\.self_attn\.q_proj\.weight"),
        ("model.freeze=['.']", r"model\.freeze: found .*leaves no weight of LlamaForCausalLM to train"),
    ):
        with pytest.raises(UserError, match=message):
            check_model(configured(override).model, tokenizer)
