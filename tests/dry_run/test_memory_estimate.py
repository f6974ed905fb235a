"""The memory of a step, counted on fake tensors, is that of the same step on real ones."""

import pytest
import torch

from preference_training.batching.micro_batches import MicroBatch
from preference_training.batching.packing import iterate_examples, pack_examples
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.distributed.placement import OneProcess
from preference_training.dry_run.memory_estimate import StorageCounter, fake_tensors, step_memory
from preference_training.losses.rankings import PlackettLuceLoss
from preference_training.losses.registry import build_loss
from preference_training.modeling.kernels import enable_activation_checkpointing
from preference_training.modeling.loading import build_untrained
from preference_training.modeling.logprobs import LiveReference
from preference_training.modeling.prefix_sharing.sharing import share_prefixes
from preference_training.modeling.prefix_sharing.tree_attention import causal_mask
from preference_training.modeling.tokenizer import load_tokenizer
from tests.support.building import build_trainer

FLOAT32 = 4


@pytest.fixture
def compose(compose):
    """Configurations of a model with two layers."""
    return lambda *overrides: compose("model.from_config.num_hidden_layers=2", *overrides)


def prompts(count: int) -> list[TokenizedPrompt]:
    return [TokenizedPrompt(list(range(2, 60)), [list(range(2, 30)), list(range(2, 40))], [(0, 1)]) for _ in range(count)]


def pack(count: int = 4):
    return pack_examples(list(iterate_examples(prompts(count))))


def weight_bytes(config, tokenizer) -> int:
    return sum(weight.numel() for weight in build_untrained(config.model, tokenizer).parameters()) * FLOAT32


@pytest.mark.parametrize(
    "override",
    [
        *("optimizer=AdamW", "optimizer=RMSprop", "optimizer=AdamW8bit"),
        *("optimizer=Muon", "optimizer=Adafactor", "optimizer=GaLore", "optimizer=AdamWScheduleFree", "ema_decay=0.9"),
        *("activation_checkpointing=true", "activation_checkpointing=selective"),
        "+model.from_config.num_local_experts=4 model.from_config.model_type=mixtral",
    ],
)
def test_the_estimate_on_fake_tensors_is_what_a_real_step_allocates(compose, override):
    config = compose("loss=dpo", "model.from_config.hidden_size=64", *override.split())
    tokenizer = load_tokenizer(config.model)
    estimated = step_memory(OneProcess(config, tokenizer), build_loss("dpo"), True, [pack()])
    policy, reference = build_untrained(config.model, tokenizer), build_untrained(config.model, tokenizer)
    assert share_prefixes(policy, "on") and share_prefixes(reference, "on")
    with StorageCounter(policy.config.vocab_size) as counter:
        for weight in [*policy.parameters(), *reference.parameters()]:
            weight.view(-1)
        if config.activation_checkpointing:
            enable_activation_checkpointing(policy, config.activation_checkpointing)
        trainer = build_trainer(config, policy, build_loss("dpo"), LiveReference(reference), tokenizer=tokenizer)
        batch = [MicroBatch.of(list(iterate_examples(prompts(4))))]
        trainer.train_step(batch)
        counter.restart()
        trainer.train_step(batch)
    assert sum(estimated.values()) == pytest.approx(counter.most().total(), rel=0.01)


def test_each_kind_is_as_large_as_it_must_be(compose):
    config = compose("loss=dpo", "optimizer=AdamW")
    tokenizer = load_tokenizer(config.model)
    weights = weight_bytes(config, tokenizer)
    kinds = step_memory(OneProcess(config, tokenizer), build_loss("dpo"), True, [pack()])
    # AdamW keeps two moments a weight, and a step count a tensor. The last piece's forward comes before any gradient.
    assert kinds["parameters"] == kinds["reference"] == pytest.approx(weights, rel=0.01)
    assert kinds["optimizer"] == pytest.approx(2 * weights, rel=0.01)
    without = step_memory(OneProcess(config, tokenizer), build_loss("dpo"), False, [pack()])
    assert "reference" not in without


@pytest.mark.parametrize(("loss", "reference"), [("simpo", False), ("orpo", False), ("bco", True), ("tr_dpo", True)])
def test_a_loss_without_a_reference_takes_no_memory_for_one(loss, reference, compose):
    config = compose(f"loss={loss}", "optimizer=SGD")
    built = build_loss(**config.loss.given())
    assert built.needs_reference is reference
    kinds = step_memory(OneProcess(config, load_tokenizer(config.model)), built, built.needs_reference, [pack()])
    assert ("reference" in kinds) is reference and kinds["activations"] > 0


def test_a_mix_with_statistics_is_estimated_with_the_tokens_that_it_reads(compose):
    config = compose("loss=dpo", "optimizer=SGD")
    placement = OneProcess(config, load_tokenizer(config.model))
    # Long, so that the peak is at the logits.
    long = pack_examples([(TokenizedPrompt([2, 3], [[4] * 900, [5] * 900], [(0, 1)]), 0)])

    def total(*names: str) -> int:
        return sum(step_memory(placement, build_loss("mix", parts=[{"name": name} for name in names]), True, [long]).values())

    # The collision of each token needs the probabilities of the vocabulary once more.
    assert total("wpo", "bco") == pytest.approx(total("wpo", "dpo"), rel=0.01)
    assert total("wpo", "bco") > 1.05 * total("dpo", "bco")


def test_rankings_with_statistics_are_estimated(compose):
    class Surveyed(PlackettLuceLoss):
        needs_batch_statistics = True

    prompt = TokenizedPrompt(list(range(2, 60)), [list(range(2, 30 + k)) for k in range(3)], [(0, 1, 2), (2, 1)])
    rankings = pack_examples(list(iterate_examples([prompt])))
    config = compose("loss=dpo", "optimizer=SGD")
    kinds = step_memory(OneProcess(config, load_tokenizer(config.model)), Surveyed(0.1), True, [rankings])
    assert kinds["activations"] > 0


@pytest.mark.parametrize("coefficient", ["null", "0.1"])
def test_routers_are_read_on_fake_tensors(coefficient, compose, recwarn):
    experts = ("model.from_config.model_type=mixtral", "+model.from_config.num_local_experts=4")
    # Grouped products have a fake form in bfloat16 only.
    config = compose(
        "loss=simpo", "optimizer=SGD", *experts, "model.policy_dtype=bfloat16", f"model.router_aux_loss={coefficient}"
    )
    placement, loss = OneProcess(config, load_tokenizer(config.model)), build_loss(**config.loss.given())
    assert step_memory(placement, loss, False, [pack(2), pack(2)])["activations"] > 0
    assert not [warning for warning in recwarn if "FakeTensor" in str(warning.message)]


def test_a_second_pack_finds_the_gradients_of_the_first(compose):
    config = compose("loss=sft", "optimizer=SGD")
    tokenizer = load_tokenizer(config.model)
    sft = pack_examples([(TokenizedPrompt(list(range(2, 200)), [list(range(2, 100))], []), 0)])
    one, two = (step_memory(OneProcess(config, tokenizer), build_loss("sft"), False, [sft] * count) for count in (1, 2))
    assert two["gradients"] == pytest.approx(weight_bytes(config, tokenizer), rel=0.01)
    assert sum(two.values()) > sum(one.values())


def test_no_fake_tensor_stays_behind():
    with fake_tensors(10):
        causal_mask(8, None, None, torch.float32, torch.device("cpu"))
    assert causal_mask(8, None, None, torch.float32, torch.device("cpu"))[7].tolist() == [0.0] * 8


def test_a_storage_that_grows_and_shrinks_is_counted_as_it_is():
    with StorageCounter(0) as counter:
        storage = torch.empty(10, dtype=torch.uint8).untyped_storage()
        storage.resize_(50)
        storage.resize_(0)
        other = torch.empty(30, dtype=torch.uint8)
    # Most was held while the first had 50 bytes; it is a gathered weight, since nothing else changes its size.
    assert counter.most() == {"gathered weights": 50} and len(other) == 30


def test_a_kind_that_is_found_out_later_holds_from_the_creation_on():
    with StorageCounter(0) as counter:
        counter.kind = "activations"
        tensor = torch.empty(10, dtype=torch.uint8)
        counter.recount(tensor, "gradients")
    assert counter.most() == {"gradients": 10}


def test_master_weights_and_the_state_beside_them_are_counted(compose):
    def kinds(*overrides):
        config = compose("loss=sft", "optimizer=AdamW", "lr=1e-5", "model.policy_dtype=bfloat16", *overrides)
        tokenizer = load_tokenizer(config.model)
        return weight_bytes(config, tokenizer) / 2, step_memory(
            OneProcess(config, tokenizer), build_loss("sft"), False, [pack()]
        )

    weights, without = kinds("master_weights=false")
    _, kept = kinds()
    assert without["parameters"] == kept["parameters"] == pytest.approx(weights, rel=0.01)
    # Of two bytes each: two states; in float32 these take twice as much, and so does the copy.
    assert without["optimizer"] == pytest.approx(2 * weights, rel=0.01)
    assert kept["optimizer"] == pytest.approx(2 * 2 * weights + 2 * weights, rel=0.01)


def test_float16_needs_no_numbers(compose):
    config = compose("loss=sft", "model.autocast_dtype=float16")
    assert step_memory(OneProcess(config, load_tokenizer(config.model)), build_loss("sft"), False, [pack()])["activations"] > 0
