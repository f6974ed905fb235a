"""NEFTune: the noise itself, where it is and where not, and that it depends on nothing but seed, step, token and position."""

import math

import pytest
import torch

from preference_training.batching.micro_batches import MicroBatch
from preference_training.batching.packing import TokenBudget, iterate_examples
from preference_training.checkpointing.checkpoint import Checkpoint
from preference_training.configuration.checks.model import check_noise
from preference_training.core.errors import UserError
from preference_training.modeling.logprobs import response_scores
from preference_training.modeling.tuning.embedding_noise import EmbeddingNoise, uniform
from tests.modeling.test_adapters import BATCH, PROMPTS, configured, finished, model_of, trainer_of
from tests.support.building import weights_of

__all__ = ["configured"]
NOISY = ("loss=simpo", "model.neftune_alpha=5")


def test_numbers_are_uniform_and_those_of_a_token_at_its_position():
    ids, positions = torch.arange(2000)[None] % 50, torch.arange(2000)[None]
    found = uniform(3, 7, positions, ids, 64)
    assert found.shape == (1, 2000, 64) and -1 <= found.min() < -0.999 and 0.999 < found.max() < 1
    # Of 128,000 uniform numbers in [-1, 1): the standard errors of mean and variance are 0.0016 and 0.0008.
    assert abs(found.mean()) < 0.007 and abs(found.var() - 1 / 3) < 0.004
    assert torch.equal(uniform(3, 7, positions[:, 5:9], ids[:, 5:9], 64), found[:, 5:9])
    for other in (uniform(4, 7, positions, ids, 64), uniform(3, 8, positions, ids, 64), uniform(3, 7, positions + 1, ids, 64)):
        assert abs((found * other).mean()) < 0.007


def test_noise_has_the_size_of_the_paper_and_is_there_only_while_it_is_on(configured, tokenizer):
    model = model_of(configured(), tokenizer)
    noise = EmbeddingNoise(model, 5.0, seed=0)
    ids, embedding = torch.arange(5, 25)[None], model.get_input_embeddings()
    plain = embedding(ids)
    # Sequences of five and six tokens.
    with noise.on(3, [MicroBatch.of(list(iterate_examples(PROMPTS)), TokenBudget(10**6, 10**6))]):
        added = embedding(ids) - plain
    limit = 5 / math.sqrt(6 * plain.shape[-1])
    assert 0.9 * limit < added.abs().max() <= limit * 1.0001
    assert torch.equal(embedding(ids), plain)


def test_tries_and_rows_have_the_same_noise(configured, tokenizer):
    scores = []
    for sharing in ("on", "off"):
        trainer = trainer_of(configured(*NOISY, f"prefix_sharing={sharing}"), tokenizer)
        with torch.no_grad(), trainer.step.noise.on(2, [MicroBatch.of(list(iterate_examples(PROMPTS)), TokenBudget(99, 99))]):
            scores.append(response_scores(trainer.models.policy, BATCH))
        with torch.no_grad():
            assert not torch.allclose(response_scores(trainer.models.policy, BATCH), scores[-1], atol=1e-2)
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-4)


def gradients(trainer, cuts: int) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of a first step on eight pairs: whole, or in several micro-batches of packs of at most 12 tokens."""
    examples = list(iterate_examples(PROMPTS))[:8]
    size, budget = 8 // cuts, TokenBudget(12, 12) if cuts > 1 else TokenBudget(10**6, 10**6)
    parts = [MicroBatch.of(examples[start : start + size], budget) for start in range(0, 8, size)]
    with trainer.step.noise.on(0, parts):
        result = trainer.step.backward(parts)
    return float(result.sums["loss/train"][0]), [weight.grad.clone() for weight in trainer.models.policy.parameters()]


def test_the_gradient_does_not_depend_on_packs_and_evaluation_has_no_noise(configured, tokenizer):
    whole, cut, plain = (trainer_of(configured(*given), tokenizer) for given in (NOISY, NOISY, ("loss=simpo",)))
    (loss, expected), (of_cut, found), (quiet, _) = gradients(whole, 1), gradients(cut, 4), gradients(plain, 1)
    assert loss != quiet
    assert of_cut == pytest.approx(loss, rel=1e-6)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(response_scores(whole.models.policy, BATCH), response_scores(plain.models.policy, BATCH))


def test_a_resumed_run_has_the_noise_of_one_that_never_stopped(configured, tokenizer, tmp_path):
    config = configured(*NOISY)
    finished(config, tokenizer, tmp_path / "run")
    resumed, whole = trainer_of(config, tokenizer), trainer_of(config, tokenizer)
    resumed.continue_from(Checkpoint.read(tmp_path / "run" / "step-4"))
    for trainer in (resumed, whole):
        trainer.train()
    for name, weight in weights_of(whole).items():
        assert torch.equal(weight, weights_of(resumed)[name]), name


def test_noise_is_refused_where_a_reference_would_be_without_it(configured):
    with pytest.raises(UserError, match="model.neftune_alpha: found 5, and loss=dpo compares the policy with its reference"):
        check_noise(configured("loss=dpo", "model.neftune_alpha=5"), needs_reference=True)
    check_noise(configured(*NOISY), needs_reference=False)
