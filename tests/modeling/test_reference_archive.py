"""A reference that is another model than the one that training starts from: model.reference_archive."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file

from preference_training.core.errors import UserError
from preference_training.modeling.adapters.files import save_adapter_config
from preference_training.modeling.adapters.weights import adapter_weights
from preference_training.modeling.loading import check_model, load_model
from preference_training.modeling.logprobs import CachedReference, LiveReference, response_scores
from tests.modeling.test_adapters import BATCH, configured, finished, trainer_of

__all__ = ["configured"]


def logps(config, tokenizer) -> torch.Tensor:
    """Log-probs of the model of a configuration, by itself."""
    with torch.no_grad():
        return response_scores(load_model(config.model, tokenizer), BATCH)


@pytest.fixture
def runs(configured, tokenizer, tmp_path):
    """Checkpoints of a run on all weights and of one that went on from it."""
    first = finished(configured(), tokenizer, tmp_path / "first")
    return first, finished(configured(f"model.archive={first}"), tokenizer, tmp_path / "second")


def test_the_reference_has_the_weights_of_its_own_archive_and_keeps_them(configured, tokenizer, runs):
    first, second = runs
    trainer = trainer_of(configured(f"model.archive={second}", f"model.reference_archive={first}"), tokenizer)
    trainer.train()
    expected = logps(configured(f"model.archive={first}"), tokenizer)
    assert torch.allclose(trainer.models.reference(BATCH), expected, atol=1e-5)
    assert not torch.allclose(logps(configured(f"model.archive={second}"), tokenizer), expected, atol=1e-2)


def test_base_is_the_model_without_an_archive(configured, tokenizer, runs):
    _, second = runs
    trainer = trainer_of(configured(f"model.archive={second}", "model.reference_archive=base"), tokenizer)
    assert torch.allclose(trainer.models.reference(BATCH), logps(configured(), tokenizer), atol=1e-5)


def test_under_an_adapter_base_is_the_model_itself_without_a_copy(configured, tokenizer, tmp_path):
    first = finished(configured("+adapter=lora"), tokenizer, tmp_path / "first")
    given = ("+adapter=lora", f"model.archive={first}", "model.reference_archive=base")
    check_model(configured(*given).model, tokenizer)
    trainer = trainer_of(configured(*given), tokenizer)
    assert trainer.models.reference.model is trainer.models.policy
    trainer.train()
    assert torch.allclose(trainer.models.reference(BATCH), logps(configured(), tokenizer), atol=1e-5)


@pytest.mark.long
def test_under_an_adapter_it_may_be_another_adapter(configured, tokenizer, tmp_path):
    first = finished(configured("+adapter=lora"), tokenizer, tmp_path / "first")
    second = finished(configured("+adapter=lora", f"model.archive={first}"), tokenizer, tmp_path / "second")
    given = ("+adapter=lora", f"model.archive={second}", f"model.reference_archive={first}")
    trainer = trainer_of(configured(*given), tokenizer)
    expected = logps(configured("+adapter=lora", f"model.archive={first}"), tokenizer)
    began = logps(configured("+adapter=lora", f"model.archive={second}"), tokenizer)
    with torch.no_grad():
        assert torch.allclose(response_scores(trainer.models.policy, BATCH), began, atol=1e-5)
    trainer.train()
    assert torch.allclose(trainer.models.reference(BATCH), expected, atol=1e-5)
    assert not torch.allclose(began, expected, atol=1e-3)


OTHER_KINDS = [
    ("r=8", "alpha=4"),
    ("r=4", "alpha=16", "use_rslora=true"),
    ("r=8", "alpha=16", "use_dora=true"),
]


def written_adapter(config, tokenizer, folder):
    """An adapter of a configuration with random weights, as peft would write it."""
    model = load_model(config.model, tokenizer)
    torch.manual_seed(3)
    weights = {name: torch.randn_like(weight) * 0.05 for name, weight in adapter_weights(model.state_dict()).items()}
    if config.model.lora.use_dora:
        weights |= {name: adapter_weights(model.state_dict())[name] * 1.1 for name in weights if "magnitude" in name}
    folder.mkdir()
    save_adapter_config(model, folder)
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_an_adapter_as_reference_computes_with_its_own_rank_scale_and_kind(kind, configured, tokenizer, tmp_path):
    then = configured("+adapter=lora", *(f"model.lora.{option}" for option in kind))
    adapter = written_adapter(then, tokenizer, tmp_path / "adapter")
    base = load_model(configured().model, tokenizer)
    with torch.no_grad():
        expected = response_scores(PeftModel.from_pretrained(base, adapter).base_model.model, BATCH)
    config = configured("+adapter=lora", "model.lora.r=8", f"model.reference_archive={adapter}")
    check_model(config.model, tokenizer)
    policy = load_model(config.model, tokenizer)
    assert torch.allclose(LiveReference(policy)(BATCH), expected, atol=1e-4)
    with torch.no_grad():
        began = response_scores(policy, BATCH)
    assert torch.allclose(began, logps(configured(), tokenizer), atol=1e-5)
    assert not torch.allclose(began, expected, atol=1e-2)


def test_an_adapter_of_other_modules_is_no_reference(configured, tokenizer, tmp_path):
    then = configured("+adapter=lora", "model.lora.target_modules=[q_proj]")
    adapter = written_adapter(then, tokenizer, tmp_path / "adapter")
    with pytest.raises(UserError, match=r"model\.reference_archive: the adapter .* does not adapt .*_proj"):
        check_model(configured("+adapter=lora", f"model.reference_archive={adapter}").model, tokenizer)


PROMPTS = [[5, 6, 7], [8, 9]]


def answers(config, tokenizer) -> list[str]:
    """What the model of a configuration answers by itself."""
    trainer = trainer_of(config, tokenizer)
    trainer.batches.sample_prompts = PROMPTS
    return trainer.evaluator.responses()


def samples(trainer) -> tuple[list, list]:
    """The two columns of samples of a trainer before its first step."""
    trainer.batches.sample_prompts = PROMPTS
    trainer.before_first_step()
    rows = trainer.evaluator.sample()
    return [row["policy"] for row in rows], [row.get("reference") for row in rows]


def test_samples_of_the_reference_are_those_of_its_own_archive(configured, tokenizer, runs):
    first, second = runs
    apart = [f"model.archive={second}", f"model.reference_archive={first}", "do_first_eval=false"]
    expected = [answers(configured(f"model.archive={each}"), tokenizer) for each in (second, first)]
    assert expected[0] != expected[1]
    assert list(samples(trainer_of(configured(*apart), tokenizer))) == expected


def test_under_an_adapter_they_are_sampled_even_where_only_log_probs_are_kept(configured, tokenizer, tmp_path):
    first = finished(configured("+adapter=lora"), tokenizer, tmp_path / "first")
    apart = ["+adapter=lora", f"model.archive={first}", "model.reference_archive=base", "do_first_eval=false"]
    trainer = trainer_of(configured(*apart), tokenizer)
    trainer.models.reference = CachedReference(torch.zeros(8))
    policy, reference = samples(trainer)
    assert reference == answers(configured(), tokenizer) != policy


def test_where_only_log_probs_of_another_model_are_kept_samples_are_the_policys_alone(configured, tokenizer):
    said = []
    trainer = trainer_of(configured("model.reference_archive=base", "do_first_eval=false"), tokenizer)
    trainer.models.reference = CachedReference(torch.zeros(8))
    trainer.observers.tracker.log_message = said.append
    assert samples(trainer)[1] == [None, None]
    assert any("samples: the reference is another model than the policy and only its log-probs" in line for line in said)


def test_what_cannot_be_a_reference_is_refused(configured, runs):
    first, _ = runs
    with pytest.raises(UserError, match=r"model\.reference_archive: nowhere: no such file or directory"):
        configured("model.reference_archive=nowhere")
    with pytest.raises(UserError, match=r"model\.reference_archive: found .*first/LATEST, expected an adapter or base"):
        configured("+adapter=lora", f"model.reference_archive={first}")


def test_an_archive_of_another_model_is_refused_early_under_the_key_that_names_it(configured, tokenizer, runs, tmp_path):
    first, second = runs
    other = tmp_path / "policy.pt"
    torch.save({"state": {"one.weight": torch.zeros(2)}}, other)
    given = f"model.archive={second}", f"model.reference_archive={other}"
    with pytest.raises(UserError, match=r"^model\.reference_archive: .*policy\.pt does not fit"):
        check_model(configured(*given).model, tokenizer)
    adapter = written_adapter(configured("+adapter=lora"), tokenizer, tmp_path / "adapter")
    with pytest.raises(UserError, match=r"^model\.reference_archive: .* is an adapter, and model\.lora\.r is not given"):
        check_model(configured(f"model.archive={first}", f"model.reference_archive={adapter}").model, tokenizer)


def test_an_adapter_of_other_weights_is_refused_under_the_key_that_names_it(configured, tokenizer, runs, tmp_path):
    first, _ = runs
    adapter = finished(configured("+adapter=lora", f"model.archive={first}"), tokenizer, tmp_path / "adapter")
    with pytest.raises(UserError, match=r"^model\.reference_archive: the adapter .* was trained on other weights"):
        load_model(configured("+adapter=lora", f"model.reference_archive={adapter}").model, tokenizer)


def test_two_models_are_said_to_be_two(configured):
    assert configured().two_models_notice is None
    assert "the reference is base" in configured("model.reference_archive=base").two_models_notice
