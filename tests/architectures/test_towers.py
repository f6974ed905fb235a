"""Models that read more than text: what text does not reach stays as it was, and text is trained as in any other model."""

import warnings

import pytest
import torch

from preference_training.core.errors import UserError
from preference_training.modeling.loading import check_model, load_model
from preference_training.modeling.prefix_sharing.sharing import share_prefixes
from preference_training.modeling.tokenizer import byte_level_tokenizer
from tests.architectures import checks, plain

pytestmark = pytest.mark.filterwarnings("ignore")
TOWERS = ("model.vision_tower.", "model.multi_modal_projector.")
ADAM = ("loss=sft", "optimizer=AdamW", "lr=1e-2")


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return checks.Architecture("gemma3", tmp_path_factory.mktemp("towers") / "gemma3")


def loaded(gemma, *overrides: str):
    """The model of a run's configuration."""
    return load_model(gemma.configured("none", "n_steps=1", *overrides).model, byte_level_tokenizer())


def trained_parts(model) -> set[str]:
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert names
    return {".".join(name.split(".")[:2]) for name in names}


@pytest.mark.long
def test_a_model_with_a_tower_is_trained_on_text_and_goes_on_bit_for_bit(gemma):
    whole = gemma.run("whole", *ADAM, "n_steps=3")
    assert "text does not reach model.vision_tower, model.multi_modal_projector of Gemma3ForConditional" in whole.said
    begun = gemma.run("begun", *ADAM, "n_steps=2")
    again = gemma.run("begun", *ADAM, "n_steps=3", resume=begun.dir)
    expected, found = checks.weights_in(whole.checkpoint), checks.weights_in(again.checkpoint)
    before = checks.weights_of(plain.load(gemma.model))
    after = checks.weights_of(plain.load(again.checkpoint))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if not name.startswith(TOWERS)}
    gemma.require_plain(again, paired=False)


def test_a_model_with_a_tower_shares_prefixes(gemma):
    assert share_prefixes(loaded(gemma), "on")


def test_adapters_leave_out_what_text_does_not_reach(gemma):
    for choice in (["+adapter=lora"], ["+adapter=lora", "model.lora.target_modules=[q_proj,k_proj]"], ["+adapter=qlora"]):
        model = loaded(gemma, *choice)
        assert trained_parts(model) == {"model.language_model"}
        assert all(weight.is_floating_point() for weight in model.model.vision_tower.parameters())


@pytest.mark.parametrize("choice", ["model.freeze=[vision_tower]", "model.freeze=[embed_tokens]", "model.spectrum_share=0.5"])
def test_chosen_weights_are_those_that_text_reaches(gemma, choice):
    assert trained_parts(loaded(gemma, choice)) == {"model.language_model"}


def test_a_tower_alone_is_refused_as_what_is_trained(gemma):
    with pytest.raises(UserError, match=r"model\.trainable: found \['vision_tower'\], which leaves no weight .* text reaches"):
        check_model(gemma.configured("none", "n_steps=1", "model.trainable=[vision_tower]").model, byte_level_tokenizer())
