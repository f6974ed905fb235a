"""Layers split over two shards of a CPU by the package tensor_parallel: the numbers, weights and states of one process."""

import copy
import math
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from preference_training.batching.iterator import BatchIterator
from preference_training.batching.micro_batches import MicroBatch, evaluation_batches
from preference_training.batching.packing import iterate_examples
from preference_training.batching.schedule import RunLength, Schedule
from preference_training.checkpointing.checkpoint import Checkpoint
from preference_training.checkpointing.writer import CheckpointWriter
from preference_training.core.errors import UserError
from preference_training.data.prompt_table import PromptTable
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.distributed.launching import needs_processes
from preference_training.distributed.layer_splitting import copy_split_model, load_split, split_layers, splits_in_one_process
from preference_training.distributed.placement import OneProcess, Sharded, SplitLayers, TensorParallel
from preference_training.evaluation.held_out import evaluate_held_out
from preference_training.generation.sampling import Sampler
from preference_training.losses.registry import build_loss
from preference_training.modeling.loading import disable_dropout
from preference_training.modeling.logprobs import LiveReference, response_scores
from preference_training.modeling.prefix_sharing.proof import TOLERANCES, random_tries
from preference_training.modeling.prefix_sharing.sharing import share_prefixes
from tests.support.building import build_trainer, take_steps, weights_of
from trainers import placement_for

VOCABULARY = 90
SIZES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "opt": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
}
CPUS = [torch.device("cpu")] * 2


def whole_model(model_type: str):
    """A small model none of whose weights is 0, so that a bias that counts twice shows; it shares prefixes if it can."""
    torch.manual_seed(0)
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **tokens, **SIZES[model_type]))
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    disable_dropout(model)
    share_prefixes(model, "auto")
    return model.train()


def prompts() -> list[TokenizedPrompt]:
    """Twenty-four prompts of random tokens with two responses or three, one or two pairs each."""
    draw = torch.Generator().manual_seed(1)
    tokens = lambda count: torch.randint(1, VOCABULARY, (count,), generator=draw).tolist()  # noqa: E731
    shapes = [(3 + n % 5, (2 + n % 7, 9 - n % 4, 4)[: 2 + n % 2]) for n in range(24)]
    return [TokenizedPrompt(tokens(p), [tokens(r) for r in rs], [(0, k) for k in range(1, len(rs))]) for p, rs in shapes]


@pytest.fixture
def build(compose, tokenizer):
    """Build a trainer of a placement on a model, `build(OneProcess, model)`; the reference is the model as it is now, moved."""

    def built(placement_class, model, *overrides: str, batches=None):
        # A key's bias has no gradient but rounding; beside this eps it is none.
        settings = "optimizer=AdamW", "++optimizer_kwargs.eps=1e-5", "lr=1e-3", "warmup_steps=2", "max_grad_norm=1.0"
        config = compose(*settings, *overrides)
        reference = copy.deepcopy(model)
        with torch.no_grad():
            next(reference.parameters()).mul_(0.9)
        model = copy.deepcopy(model)
        if placement_class is SplitLayers:
            model, reference = split_layers(model, CPUS), split_layers(reference, CPUS)
        models = model, build_loss("dpo", beta=0.5), LiveReference(reference)
        return build_trainer(config, *models, placement=placement_class(config, tokenizer), train=batches)

    return built


def steps(size: int = 8):
    """Batches of a few examples, in two micro-batches each."""
    examples = list(iterate_examples(prompts()))
    return [
        [MicroBatch.of(part) for part in (examples[k : k + size // 2], examples[k + size // 2 : k + size])]
        for k in range(0, len(examples) - size + 1, size)
    ]


def assert_same_weights(found: dict, expected: dict) -> None:
    """The same names, and weights within a relative 1e-4."""
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert (found[name] - weight).norm() <= 1e-4 * weight.norm(), name


@pytest.mark.parametrize(("model_type", "count"), [("gpt2", 8), ("opt", 3), ("bloom", 3)])
def test_training_on_two_shards_follows_one_process(model_type, count, build):
    model = whole_model(model_type)
    split, single = build(SplitLayers, model), build(OneProcess, model)
    batches = (steps() * 3)[:count]
    assert len(batches) == count
    for batch in batches:
        found, expected = split.train_step(batch), single.train_step(batch)
        for name in ("loss/train", "grad_norm"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4), name
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    moved = weights_of(split)
    assert_same_weights(moved, weights_of(single))
    assert all(not torch.equal(moved[name], weight) for name, weight in model.named_parameters())


def test_a_reference_that_follows_the_policy_does_so_in_shards_too(build):
    model = whole_model("gpt2")
    split, single = build(SplitLayers, model), build(OneProcess, model)
    for trainer in (split, single):
        trainer.models.loss = build_loss("tr_dpo", beta=0.5, reference_update_every=1, reference_update_share=0.5)
        trainer.train_step(steps()[0])
    moved = split.moving_reference_weights()
    assert_same_weights(moved, single.moving_reference_weights())
    split.placement.set_weights(
        split.models.reference.model, {name: torch.zeros_like(weight) for name, weight in moved.items()}
    )
    assert not any(weight.any() for weight in split.moving_reference_weights().values())


def test_each_shard_holds_half_of_every_large_weight_and_no_number_is_trained_twice():
    model = whole_model("gpt2")
    split = split_layers(model, CPUS)
    count = lambda module: sum(weight.numel() for weight in module.parameters())  # noqa: E731
    matrices = sum(weight.numel() for weight in model.parameters() if weight.dim() == 2)
    assert count(split) == count(model)
    assert count(split.other_shards[0]) >= matrices // 2


@pytest.mark.parametrize("model_type", SIZES)
def test_gpt2_and_opt_compute_prompts_once_and_bloom_on_padded_rows(model_type):
    model = whole_model(model_type)
    split, batch = split_layers(model, CPUS), random_tries(VOCABULARY)
    with torch.no_grad():
        torch.testing.assert_close(response_scores(split, batch), response_scores(model, batch), rtol=1e-5, atol=1e-4)
    assert batch.layout.seen is (model_type != "bloom")


@pytest.mark.parametrize(
    "classes",
    [(SplitLayers,) * 2, (SplitLayers, OneProcess), (OneProcess, SplitLayers)],
    ids=["split", "split, then whole", "whole, then split"],
)
def test_a_checkpoint_is_whole_and_continued_exactly(classes, build, tmp_path):
    def make(placement_class, model):
        return build(
            placement_class, model, batches=BatchIterator(Schedule(PromptTable.of(prompts()), 6, length=RunLength(n_epochs=1)))
        )

    model = whole_model("gpt2")
    whole, first = make(classes[0], model), make(classes[0], model)
    take_steps(whole)
    take_steps(first, until=3)
    with CheckpointWriter(tmp_path, first.models.policy, first.placement.tokenizer) as writer:
        writer.write(first.snapshot())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "LATEST", dtype=torch.float32)
    assert type(loaded).__name__ == "GPT2LMHeadModel" and loaded.lm_head.weight is loaded.transformer.wte.weight
    assert all(torch.equal(weights_of(first)[name], weight) for name, weight in loaded.state_dict().items())
    moments = {name: entry["exp_avg"].shape for name, entry in first.step.updater.optimizer_state()["state"].items()}
    assert moments == {name: weight.shape for name, weight in model.named_parameters()}
    second = make(classes[1], model)
    second.continue_from(Checkpoint.read(tmp_path / "LATEST"))
    take_steps(second)
    assert (second.state.updates, second.state.examples) == (
        whole.state.updates,
        whole.state.examples,
    ) and whole.state.updates > 4
    if classes[0] is classes[1]:
        assert all(torch.equal(weights_of(second)[name], weight) for name, weight in weights_of(whole).items())
    assert_same_weights(weights_of(second), weights_of(whole))


def test_master_weights_are_joined_in_a_checkpoint_and_split_again(build, tmp_path):
    def make(placement_class):
        batches = BatchIterator(Schedule(PromptTable.of(prompts()), 6, length=RunLength(n_epochs=1)))
        settings = "model.policy_dtype=bfloat16", "lr=1e-5", "weight_decay=0.1"
        return build(placement_class, whole_model("gpt2").bfloat16(), *settings, batches=batches)

    first, single = make(SplitLayers), make(OneProcess)
    for trainer in (first, single):
        take_steps(trainer, until=3)
    with CheckpointWriter(tmp_path, first.models.policy, first.placement.tokenizer) as writer:
        writer.write(first.snapshot())
    expected = {name: state["master"] for name, state in single.step.updater.optimizer_state()["state"].items()}
    found = {name: state["master"] for name, state in first.step.updater.optimizer_state()["state"].items()}
    assert {str(master.dtype) for master in found.values()} == {"torch.float32"}
    assert_same_weights(found, expected)
    for placement_class in (SplitLayers, OneProcess):
        second = make(placement_class)
        second.continue_from(Checkpoint.read(tmp_path / "LATEST"))
        again = {name: state["master"] for name, state in second.step.updater.optimizer_state()["state"].items()}
        assert again.keys() == found.keys() and all(torch.equal(again[name], master) for name, master in found.items())
        assert all(torch.equal(weights_of(second)[name], weight) for name, weight in weights_of(first).items())


def test_an_average_of_the_weights_is_that_of_one_process_and_is_saved_whole_and_continued_exactly(build, tmp_path):
    def make(placement_class):
        batches = BatchIterator(Schedule(PromptTable.of(prompts()), 6, length=RunLength(n_epochs=1)))
        return build(placement_class, whole_model("gpt2"), "ema_decay=0.5", batches=batches)

    split, single, second = make(SplitLayers), make(OneProcess), make(SplitLayers)
    for trainer in (split, single):
        take_steps(trainer, until=3)
    trained = {name: weight.clone() for name, weight in weights_of(split).items()}
    for trainer, folder in ((split, tmp_path / "split"), (single, tmp_path / "single")):
        folder.mkdir()
        writer = CheckpointWriter(folder, trainer.models.policy, trainer.placement.tokenizer)
        with writer, trainer.step.updater.averages_in_place():
            writer.write(trainer.snapshot())
    loaded, expected = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "LATEST", dtype=torch.float32).state_dict()
        for name in ("split", "single")
    )
    assert_same_weights(loaded, expected)
    assert not all(torch.equal(trained[name], weight) for name, weight in loaded.items())
    assert all(torch.equal(trained[name], weight) for name, weight in weights_of(split).items())
    second.continue_from(Checkpoint.read(tmp_path / "split" / "LATEST"))
    for trainer in (split, second):
        take_steps(trainer, until=4)
    assert all(torch.equal(weights_of(second)[name], weight) for name, weight in weights_of(split).items())


def test_held_out_metrics_and_sampled_answers_are_those_of_one_process(build, tokenizer):
    model = whole_model("bloom")
    batches = evaluation_batches(PromptTable.of(prompts()), 8, None, seed=0)
    split, single = build(SplitLayers, model), build(OneProcess, model)
    found, expected = (
        evaluate_held_out(each.models.policy, each.models.reference, each.models.loss, batches).means()
        for each in (split, single)
    )
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)
    asked = [prompt.prompt_ids for prompt in prompts()[:3]]
    answers = [Sampler(tokenizer, 24, seed=0).texts(each.models.policy, asked) for each in (split, single)]
    assert answers[0] == answers[1]


def test_a_step_after_an_evaluation_trains_every_weight(build):
    trainer = build(SplitLayers, whole_model("gpt2"))
    before = {name: weight.clone() for name, weight in weights_of(trainer).items()}
    batches = evaluation_batches(PromptTable.of(prompts()), 8, None, seed=0)
    evaluate_held_out(trainer.models.policy, trainer.models.reference, trainer.models.loss, batches)
    trainer.train_step(steps()[0])
    assert not [name for name, weight in weights_of(trainer).items() if torch.equal(weight, before[name])]


def test_a_frozen_copy_stays_as_it_was(build):
    trainer = build(SplitLayers, whole_model("gpt2"))
    frozen, batch = copy_split_model(trainer.models.policy, torch.float32), random_tries(VOCABULARY)
    with torch.no_grad():
        before = response_scores(trainer.models.policy, batch)
        assert torch.equal(response_scores(frozen, batch), before)
    trainer.train_step(steps()[0])
    with torch.no_grad():
        assert torch.equal(response_scores(frozen, batch), before)
        assert not torch.equal(response_scores(trainer.models.policy, batch), before)
    assert not any(weight.requires_grad for weight in frozen.parameters())


def test_every_shard_computes_in_the_dtype_of_autocast():
    model, batch = whole_model("gpt2"), random_tries(VOCABULARY)
    split = split_layers(model, CPUS)
    dtypes = set()
    for shard in (split, split.other_shards[0]):
        shard.transformer.h[0].mlp.c_fc.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    split.autocast_dtype = torch.bfloat16
    with torch.no_grad():
        error = (response_scores(split, batch) - response_scores(model, batch)).abs() / batch.response_lengths
    assert dtypes == {torch.bfloat16} and 0 < error.max() < TOLERANCES[torch.bfloat16]


def test_what_autocast_rounds_is_not_taken_for_a_wrong_split(compose, tokenizer):
    small = [f"++model.from_config.{key}={value}" for key, value in SIZES["opt"].items()]
    settings = "trainer=TensorParallelTrainer", "model.from_config.model_type=opt", "model.autocast_dtype=bfloat16"
    policy, _ = load_split(compose(*settings, *small), tokenizer)
    assert policy.autocast_dtype == torch.bfloat16 and policy.dtype == torch.float32


def test_an_error_of_one_shard_is_raised_though_the_others_wait_for_it():
    split = split_layers(whole_model("gpt2"), CPUS)
    split.other_shards[0].transformer.h[1].mlp.c_proj.forward = lambda hidden: 1 / 0
    with pytest.raises(ZeroDivisionError):
        response_scores(split, random_tries(VOCABULARY))


# ---- refusals -----------------------------------------------------------------------------------------------------------


def test_a_model_with_a_plan_of_transformers_is_not_for_the_package(compose):
    assert not splits_in_one_process(compose("trainer=TensorParallelTrainer"))
    assert splits_in_one_process(compose("trainer=TensorParallelTrainer", "model.from_config.model_type=gpt2"))


def test_one_function_says_where_weights_live_and_those_of_one_process_need_no_other(compose):
    found = {
        "trainer=BasicTrainer": OneProcess,
        "trainer=FSDPTrainer": Sharded,
        "trainer=TensorParallelTrainer": TensorParallel,
        "trainer=TensorParallelTrainer model.from_config.model_type=gpt2": SplitLayers,
    }
    for overrides, placement in found.items():
        config = compose(*overrides.split())
        assert placement_for(config) is placement
        assert needs_processes(config) is issubclass(placement, Sharded)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.tensor_parallel_size=3", "trainer.tensor_parallel_size: found 3, which does not divide the model's 4"),
        ("trainer.tensor_parallel_size=1", "trainer.tensor_parallel_size: found 1, expected at least 2"),
        ("trainer.nproc_per_node=2", "trainer.nproc_per_node: found 2, which is not for GPT2LMHeadModel"),
        ("trainer.cpu_offload=true", "trainer.cpu_offload: found True"),
        ("trainer.param_dtype=bfloat16", "trainer.param_dtype: found bfloat16"),
        ("trainer.output_dtype=bfloat16", "trainer.output_dtype: found bfloat16"),
        ("model.fsdp_policy_mp=bfloat16", "model.fsdp_policy_mp: found bfloat16.* set model.policy_dtype or"),
        ("activation_checkpointing=true", "activation_checkpointing: found True.*lower max_tokens_per_microbatch"),
    ],
)  # fmt: skip
def test_what_one_process_cannot_do_is_refused_before_anything_is_loaded(override, message, compose):
    with pytest.raises(UserError, match=f"^{message}"):
        splits_in_one_process(compose("trainer=TensorParallelTrainer", "model.from_config.model_type=gpt2", override))


def test_several_ranks_are_refused_with_the_remedy(compose, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="no plan for GPT2LMHeadModel, and .* Start python train.py without torchrun, or use"):
        splits_in_one_process(compose("trainer=TensorParallelTrainer", "model.from_config.model_type=gpt2"))


def test_a_package_that_is_not_installed_is_asked_for(compose, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensor_parallel", None)
    with pytest.raises(UserError, match=r"no plan for GPT2LMHeadModel, .* pip install -r requirements/tensor-parallel\.txt"):
        splits_in_one_process(compose("trainer=TensorParallelTrainer", "model.from_config.model_type=gpt2"))


def test_a_model_that_the_package_cannot_split_is_refused_with_the_reason(compose, tokenizer):
    small = [f"++model.from_config.{key}={value}" for key, value in (SIZES["gpt2"] | {"rotary_dim": 4}).items()]
    config = compose("trainer=TensorParallelTrainer", "model.from_config.model_type=codegen", *small)
    with pytest.raises(
        UserError, match="the package tensor_parallel cannot split CodeGenForCausalLM: RuntimeError: mat1 and mat2"
    ):
        load_split(config, tokenizer)


def test_a_split_that_computes_something_else_is_refused_with_its_error(compose, tokenizer, monkeypatch):
    from tensor_parallel.slicing_configs import PREDEFINED_CONFIGS, get_gpt2_config

    def plan_without_one_sum(config, devices):
        plan = get_gpt2_config(config, devices)
        plan.output_rules = {pattern: rule for pattern, rule in plan.output_rules.items() if pattern.pattern != ".*mlp$"}
        return plan

    config = compose("trainer=TensorParallelTrainer", "model.from_config.model_type=gpt2")
    monkeypatch.setitem(PREDEFINED_CONFIGS, "gpt2", plan_without_one_sum)
    with pytest.raises(UserError, match="cannot split GPT2LMHeadModel: its log-probs would be wrong by"):
        load_split(config, tokenizer)


def test_loss_of_a_split_policy_and_its_frozen_copy_is_ln_2(compose, tokenizer):
    config = compose("trainer=TensorParallelTrainer", "model.from_config.model_type=gpt2")
    policy, _ = load_split(config, tokenizer)
    reference = LiveReference(copy_split_model(policy, torch.float32))
    [batch] = evaluation_batches(PromptTable.of(prompts()), 99, None, seed=0)
    assert evaluate_held_out(policy, reference, build_loss("dpo"), [batch]).means()["loss/eval"] == pytest.approx(
        math.log(2), abs=1e-6
    )
