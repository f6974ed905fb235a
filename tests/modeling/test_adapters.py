"""LoRA adapters: what they change and what they leave, quantized weights under them, checkpoints that hold them alone."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from preference_training.batching.iterator import BatchIterator
from preference_training.batching.micro_batches import evaluation_batches
from preference_training.batching.schedule import RunLength, Schedule
from preference_training.checkpointing.checkpoint import Checkpoint
from preference_training.checkpointing.snapshot import Snapshot
from preference_training.checkpointing.writer import CheckpointWriter, SaveOptions
from preference_training.configuration.schema import RunConfig
from preference_training.core.errors import UserError
from preference_training.core.random_streams import seed_everything
from preference_training.data.prompt_table import PromptTable, Selection
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.distributed.placement import OneProcess
from preference_training.losses.registry import build_loss
from preference_training.modeling.adapters.merging import merge_adapter
from preference_training.modeling.adapters.weights import reference_mode, weights_to_save
from preference_training.modeling.loading import check_model, load_model, load_with_adapter, merge_and_cast
from preference_training.modeling.logprobs import response_scores
from preference_training.modeling.prefix_sharing.proof import random_tries
from preference_training.modeling.prefix_sharing.sharing import share_prefixes
from preference_training.modeling.reference_cache import ReferencePlan, cache_key
from preference_training.modeling.state import weights_hash
from preference_training.tracking.tracker import NoTracker, Tracker
from preference_training.training.optimizers.building import check_optimizer
from tests.support.building import build_trainer, weights_of
from tests.support.files import GOLDEN
from trainers import Trainer

LENGTHS = ("max_length=32", "max_prompt_length=16")
KINDS = {
    "lora": ["+adapter=lora"],
    "lora with dropout": ["+adapter=lora", "model.lora.dropout=0.1"],
    "qlora": ["+adapter=qlora"],
    "qlora, single quantization": ["+adapter=qlora", "model.double_quantization=false"],
}
PROMPTS = [TokenizedPrompt([5 + n, 6, 7], [[10 + n, 11, 0], [12 + n, 0]], [(0, 1)]) for n in range(12)]
BATCH = random_tries(378)


def load_merged(checkpoint: Path, model_config, tokenizer, dtype: torch.dtype | None = None):
    """The model with a checkpoint's adapter merged into it, rounded once to a dtype; None is the configured one."""
    model = load_with_adapter(checkpoint, model_config, tokenizer)
    return merge_and_cast(model, dtype or getattr(torch, model_config.policy_dtype))


@pytest.fixture
def configured(compose):
    """A configuration of the golden Llama with further overrides."""

    def configured(*overrides):
        sizes = (
            "batch_size=4",
            "eval_every=4",
            "warmup_steps=0",
            *LENGTHS,
            "lr=1e-2",
            "optimizer=AdamW",
        )
        model = (
            "model=blank_model",
            f"model.name_or_path={GOLDEN / 'llama'}",
            f"model.tokenizer_name_or_path={GOLDEN / 'tokenizer'}",
        )
        loss = [] if any(text.startswith("loss=") for text in overrides) else ["loss=dpo"]
        return compose(*model, *sizes, *loss, *overrides)

    return configured


def model_of(config, tokenizer) -> nn.Module:
    seed_everything(config.seed)
    return load_model(config.model, tokenizer)


def trainer_of(config, tokenizer, run_dir=None, n_examples=12) -> Trainer:
    """A trainer as the command line would put it together; with a directory it writes checkpoints."""
    seed_everything(config.seed)
    placement = OneProcess(config, tokenizer)
    policy = placement.load_policy()
    table = PromptTable.of(PROMPTS)
    batches = (
        BatchIterator(Schedule(table, 4, length=RunLength(n_examples=n_examples))),
        evaluation_batches(table, 4, 4, seed=0),
    )
    about = {"config": config.as_dict(), "data": ["a"], "began_with": placement.began_with}
    writer = run_dir and CheckpointWriter(run_dir, policy, tokenizer, options=SaveOptions(run=about | {"wandb_id": "0" * 32}))
    tracker = Tracker(run_dir, n_examples) if run_dir else NoTracker()
    loss = build_loss(**config.loss.given())
    models, batches = (policy, loss, placement.reference(policy)), {"train": batches[0], "held_out": batches[1]}
    return build_trainer(config, *models, placement=placement, tracker=tracker, writer=writer, **batches)


def finished(config, tokenizer, run_dir) -> Path:
    """The last checkpoint of a run in a directory."""
    run_dir.mkdir()
    trainer_of(config, tokenizer, run_dir).train()
    return run_dir / "LATEST"


# ---- what an adapter changes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_no_output_and_the_step_0_loss_is_ln_2(configured, tokenizer, kind):
    trainer = trainer_of(configured(*KINDS[kind]), tokenizer)
    metrics = trainer.train_step(next(iter(trainer.batches.train)))
    assert metrics["rewards_train/margins"] == 0.0
    assert metrics["loss/train"] == pytest.approx(math.log(2), abs=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_adapter_is_trained(configured, tokenizer, kind):
    trainer = trainer_of(configured(*KINDS[kind]), tokenizer)
    before = {name: weight.detach().clone() for name, weight in trainer.models.policy.named_parameters()}
    trainer.train()
    changed = {name for name, weight in trainer.models.policy.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if ".lora_" in name}
    assert sum(len(group["params"]) for group in trainer.step.updater.optimizer.param_groups) == len(changed)


def test_with_the_adapter_off_a_trained_model_is_the_initial_one_bit_for_bit(configured, tokenizer):
    whole = model_of(configured(), tokenizer)
    share_prefixes(whole, "on")
    trainer = trainer_of(configured("+adapter=lora"), tokenizer)
    trainer.train()
    with torch.no_grad():
        began = response_scores(whole, BATCH)
        assert torch.equal(trainer.models.reference(BATCH), began)
        assert not torch.equal(response_scores(trainer.models.policy, BATCH), began)


def test_the_reference_of_a_quantized_run_has_no_weights_of_its_own(configured, tokenizer):
    trainer = trainer_of(configured("+adapter=qlora"), tokenizer)
    assert trainer.models.reference.model is trainer.models.policy
    few = [weight for weight in trainer.models.policy.parameters() if weight.dtype == torch.uint8]
    # Seven matrices in each of the two blocks, at half a byte a weight.
    assert len(few) == 14
    config = trainer.models.policy.config
    hidden, key_width = config.hidden_size, config.num_key_value_heads * config.head_dim
    matrices = 2 * hidden**2 + 2 * hidden * key_width + 3 * hidden * config.intermediate_size
    assert sum(weight.numel() for weight in few) == 2 * matrices / 2


def test_adapters_share_prompts_between_responses(configured, tokenizer):
    for overrides in KINDS.values():
        assert share_prefixes(model_of(configured(*overrides), tokenizer), "on")


def test_activation_checkpointing_gives_the_same_step(configured, tokenizer):
    found = []
    for kind in ("false", "true", "selective"):
        trainer = trainer_of(configured("+adapter=qlora", f"activation_checkpointing={kind}"), tokenizer)
        trainer.train()
        found.append({name: weight for name, weight in weights_of(trainer).items()})
    for name, weight in found[0].items():
        for other in found[1:]:
            torch.testing.assert_close(weight, other[name], rtol=1e-5, atol=1e-7)


def test_adapters_train_on_int8_weights_too(configured, tokenizer):
    trainer = trainer_of(configured("+adapter=lora", "model.quantization=int8"), tokenizer, n_examples=4)
    metrics = trainer.train_step(next(iter(trainer.batches.train)))
    assert metrics["rewards_train/margins"] == 0.0
    assert metrics["grad_norm"] > 0


# ---- on disk ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora with dropout", "qlora"])
def test_a_resumed_run_ends_bit_for_bit_as_one_that_never_stopped(configured, tokenizer, tmp_path, kind):
    config = configured(*KINDS[kind])
    finished(config, tokenizer, tmp_path / "run")
    resumed = trainer_of(config, tokenizer)
    resumed.continue_from(Checkpoint.read(tmp_path / "run" / "step-4"))
    resumed.train()
    whole = trainer_of(config, tokenizer)
    whole.train()
    assert weights_of(whole).keys() == weights_of(resumed).keys()
    for name, weight in weights_of(whole).items():
        assert torch.equal(weight, weights_of(resumed)[name]), name


def test_a_checkpoint_holds_the_adapter_alone_and_loads_with_from_pretrained(configured, tokenizer, tmp_path):
    config = configured("+adapter=lora")
    checkpoint = finished(config, tokenizer, tmp_path / "run")
    assert not (checkpoint / "model.safetensors").exists()
    assert not (checkpoint / "policy.pt").exists()
    assert json.loads((checkpoint / "adapter_config.json").read_text())["base_model_name_or_path"] == str(GOLDEN / "llama")
    found = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    trained = trainer_of(config, tokenizer)
    trained.continue_from(Checkpoint.read(checkpoint))
    for text in ("a b", "what is it"):
        ids = torch.tensor([tokenizer(text).input_ids])
        torch.testing.assert_close(found(ids).logits, trained.models.policy.eval()(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("overrides", [["+adapter=lora"], ["+adapter=qlora"]])
def test_a_merged_model_gives_the_log_probs_of_the_adapter(configured, tokenizer, tmp_path, overrides):
    config = configured(*overrides)
    checkpoint = finished(config, tokenizer, tmp_path / "run")
    merged = load_merged(checkpoint, RunConfig.of(Checkpoint.read(checkpoint).config).model, tokenizer).eval()
    trained = trainer_of(config, tokenizer)
    trained.continue_from(Checkpoint.read(checkpoint))
    assert not [name for name, _ in merged.named_parameters() if "lora" in name or "base_layer" in name]
    with torch.no_grad():
        torch.testing.assert_close(
            response_scores(merged, BATCH), response_scores(trained.models.policy, BATCH), rtol=1e-5, atol=1e-4
        )
    merged.save_pretrained(tmp_path / "whole")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), merged.state_dict().values(), strict=True))


def test_training_that_starts_from_an_adapter_has_that_adapter_as_its_reference(configured, tokenizer, tmp_path):
    config = configured("+adapter=lora")
    first = finished(config, tokenizer, tmp_path / "first")
    on = trainer_of(configured("+adapter=lora", f"model.archive={first}"), tokenizer)
    trained = trainer_of(config, tokenizer)
    trained.continue_from(Checkpoint.read(first))
    with torch.no_grad():
        expected = response_scores(trained.models.policy, BATCH)
        assert torch.equal(response_scores(on.models.policy, BATCH), expected)
    on.train()
    with torch.no_grad():
        assert torch.equal(on.models.reference(BATCH), expected)
        assert not torch.equal(response_scores(on.models.policy, BATCH), expected)


def test_an_adapter_of_an_adapter_of_an_adapter_finds_its_weights(configured, tokenizer, tmp_path):
    archive, overrides = None, []
    for number in range(3):
        archive = finished(configured("+adapter=lora", *overrides), tokenizer, tmp_path / str(number))
        overrides = [f"model.archive={archive}"]
    check_model(configured("+adapter=lora", *overrides).model, tokenizer)


def test_an_adapter_on_a_trained_model_finds_it_again(configured, tokenizer, tmp_path):
    whole = finished(configured(), tokenizer, tmp_path / "whole")
    adapter = finished(configured("+adapter=lora", f"model.archive={whole}"), tokenizer, tmp_path / "adapter")
    config = configured("+adapter=lora", f"model.archive={adapter}")
    with reference_mode(model := model_of(config, tokenizer)):
        pass
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(whole.resolve())
    began = dict(model_of(configured(f"model.archive={whole}"), tokenizer).named_parameters())
    for name, weight in model.named_parameters():
        if ".lora_" not in name:
            assert torch.equal(weight, began[name.replace(".base_layer.", ".")])


# ---- the reference's log-probs, kept --------------------------------------------------------------------------------------


def test_cached_reference_log_probs_do_not_depend_on_the_trained_adapter(configured, tokenizer):
    prompts = Selection(PromptTable.of(PROMPTS), torch.arange(4).numpy())
    plan = ReferencePlan(prompts, prompts)
    keys = set()
    for overrides in (["seed=0"], ["seed=1"], ["model.lora.r=3"]):
        model = model_of(configured("+adapter=lora", *overrides), tokenizer)
        keys.add(cache_key(model, plan))
    assert len(keys) == 1
    assert weights_hash(model) == weights_hash(model_of(configured(), tokenizer))


# ---- what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.lora.r=0"], "model.lora.r: found 0, expected a whole number from 1 or null"),
        (["+adapter=lora", "model.lora.alpha=0"], "model.lora.alpha"),
        (["+adapter=lora", "model.lora.dropout=1"], "model.lora.dropout"),
        (["+adapter=lora", "model.lora.target_modules=[]"], "model.lora.target_modules"),
        (["+adapter=lora", "model.reference_dtype=bfloat16"], "the reference is the same weights"),
        (["model.quantization=nf4"], r"cannot be trained themselves. Add \+adapter=lora"),
        (["+adapter=lora", "model.quantization=int3"], "model.quantization: found 'int3', expected nf4, int8 or null"),
        (["+adapter=lora", "model.quantization=int8", "trainer=FSDPTrainer"], "FSDPTrainer cannot check int8 .* Use nf4"),
        (["+adapter=qlora", "trainer=TensorParallelTrainer"], "model.quantization: TensorParallelTrainer splits the rows"),
        (["+adapter=lora", "loss=tr_dpo"], "loss=tr_dpo moves the reference"),
        (["+adapter=lora", "trainer=TensorParallelTrainer"], "TensorParallelTrainer splits the layers"),
    ],
)
def test_what_cannot_work_is_refused_with_the_key(configured, overrides, message):
    with pytest.raises(UserError, match=message):
        configured(*overrides)


def test_unknown_target_modules_are_refused_with_the_models_linear_layers(configured, tokenizer):
    config = configured("+adapter=lora", "model.lora.target_modules=[query]")
    with pytest.raises(UserError, match="model.lora.target_modules: found .*query.*down_proj, gate_proj, k_proj"):
        check_model(config.model, tokenizer)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "is an adapter, and model.lora.r is not given"),
        (["+adapter=lora", "model.lora.r=4"], "model.lora.r: found 4, expected 16: the adapter .* was trained with that"),
        (
            ["+adapter=lora", "model.lora.target_modules=[q_proj]"],
            "does not fit Llama.* as configured; 24 tensors differ",
        ),
        (["+adapter=lora", f"model.name_or_path={GOLDEN / 'gpt_neox'}"], "was trained on .*llama, and model.name_or_path is"),
        (["+adapter=qlora"], "was trained on other weights than those of the model as configured"),
    ],
)
def test_an_adapter_that_does_not_belong_to_the_model_is_refused(configured, tokenizer, tmp_path, overrides, message):
    checkpoint = finished(configured("+adapter=lora"), tokenizer, tmp_path / "run")
    if overrides and "gpt_neox" in overrides[-1]:
        settings = json.loads((checkpoint / "adapter_config.json").read_text())
        settings["base_model_name_or_path"] = "org/llama"
        (checkpoint / "adapter_config.json").write_text(json.dumps(settings))
        message = "was trained on org/llama, and model.name_or_path is"
    config = configured(*overrides, f"model.archive={checkpoint}")
    with pytest.raises(UserError, match=message):
        check_model(config.model, tokenizer)
        load_model(config.model, tokenizer)


@pytest.mark.parametrize("damage", ["{", "{}", "[]"])
def test_a_damaged_adapter_config_is_a_user_error(configured, tokenizer, tmp_path, damage):
    checkpoint = finished(configured("+adapter=lora"), tokenizer, tmp_path / "run").resolve()
    (checkpoint / "adapter_config.json").write_text(damage)
    with pytest.raises(UserError, match=r"its adapter_config.json is damaged"):
        check_model(configured("+adapter=lora", f"model.archive={checkpoint}").model, tokenizer)
    shutil.rmtree(checkpoint)


# ---- any layer, any architecture ------------------------------------------------------------------------------------------


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SMALL = {
    "llama": SIZES,
    "tied llama": SIZES | {"model_type": "llama", "tie_word_embeddings": True},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "mixtral": SIZES | EXPERTS,
    "gpt_oss": SIZES | EXPERTS | {"head_dim": 8},
    "llama4_text": SIZES | EXPERTS | {"head_dim": 8, "num_experts_per_tok": 1, "intermediate_size_mlp": 64},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
}


@pytest.fixture(scope="module")
def small(tokenizer, tmp_path_factory):
    """The directory of a small model of an architecture, by the names of SMALL."""
    folder = tmp_path_factory.mktemp("small")

    def small(name: str) -> Path:
        if not (folder / name).exists():
            values = {"model_type": name, "vocab_size": 378, "eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 0} | SMALL[
                name
            ]
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
            for weight in model.parameters():
                # So that models differ clearly.
                weight.data.mul_(2.0)
            model.save_pretrained(folder / name)
        return folder / name

    return small


def with_trained_adapter(model: nn.Module) -> nn.Module:
    """A model whose adapter is no longer fresh."""
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if ".lora_" in name and ".starting" not in name:
            weight.data.normal_(0, 0.1)
    return model.eval()


def checkpoint_of(model: nn.Module, tokenizer, folder: Path, **settings) -> Path:
    """A checkpoint of a model's adapter alone."""
    weights = weights_to_save(model.state_dict(keep_vars=True))
    with CheckpointWriter(folder, model, tokenizer, options=SaveOptions(**settings), log_message=lambda _: None) as writer:
        writer.write(Snapshot.of(4, weights, {}, {"examples": 4}))
    return folder / "LATEST"


def answers(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return response_scores(model.eval(), BATCH)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", "[embed_tokens,q_proj]"),
        ("tied llama", "[embed_tokens,q_proj]"),
        ("tied llama", "[lm_head,q_proj]"),
        ("tied llama", "[lm_head,embed_tokens]"),
        ("gpt2", "null"),
        ("gpt2", "[wte,c_fc]"),
        ("mixtral", "null"),
        ("llama4_text", "null"),
        ("mamba", "null"),
    ],
)
def test_a_merged_model_equals_the_checkpoint_in_plain_peft(name, targets, small, configured, tokenizer, tmp_path):
    """Experts, embeddings, tied heads, transposed layers: merged, saved and loaded again."""
    config = configured("+adapter=lora", f"model.name_or_path={small(name)}", f"model.lora.target_modules={targets}")
    trained = with_trained_adapter(load_model(config.model, tokenizer))
    checkpoint = checkpoint_of(trained, tokenizer, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(small(name), dtype=torch.float32)
    expected = answers(PeftModel.from_pretrained(base, str(checkpoint)).get_base_model())
    whole = load_merged(checkpoint, config.model, tokenizer)
    assert not [name for name in whole.state_dict() if "lora_" in name or "base_layer" in name]
    whole.save_pretrained(tmp_path / "whole")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    for model in (trained, whole, loaded):
        torch.testing.assert_close(answers(model), expected, rtol=1e-5, atol=1e-4)
    assert (answers(AutoModelForCausalLM.from_pretrained(small(name), dtype=torch.float32)) - expected).abs().max() > 0.01


def test_a_merge_into_a_shared_weight_is_refused(small, configured, tokenizer):
    """As in Zamba, whose layers share one attention: each has an adapter of its own."""
    config = configured("+adapter=lora", f"model.name_or_path={small('llama')}", "model.lora.target_modules=[q_proj]")
    model = with_trained_adapter(load_model(config.model, tokenizer))
    first, second = (layer.self_attn.q_proj for layer in model.model.layers[:2])
    second.base_layer.weight = first.base_layer.weight
    with pytest.raises(
        UserError, match=r"--merge: in \w+ model\.layers\.0.*q_proj and model\.layers\.1.*q_proj share their weights"
    ):
        merge_adapter(model, torch.float32)


def test_a_merge_is_computed_in_float32_and_rounded_once(small, configured, tokenizer, tmp_path):
    config = configured("+adapter=lora", f"model.name_or_path={small('llama')}", "model.policy_dtype=bfloat16")
    checkpoint = checkpoint_of(with_trained_adapter(load_model(config.model, tokenizer)), tokenizer, tmp_path)
    adapter, name = load_file(checkpoint / "adapter_model.safetensors"), "model.layers.1.mlp.up_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    base = load_file(small("llama") / "model.safetensors")[f"{name}.weight"].bfloat16().float()
    # alpha / r is 32 / 16.
    expected = base + 2.0 * (b @ a)
    in_full = load_merged(checkpoint, config.model, tokenizer, dtype=torch.float32)
    torch.testing.assert_close(in_full.get_submodule(name).weight, expected, rtol=0, atol=1e-7)
    assert {weight.dtype for weight in in_full.parameters()} == {torch.float32}
    rounded = load_merged(checkpoint, config.model, tokenizer).get_submodule(name).weight
    assert torch.equal(rounded, in_full.get_submodule(name).weight.bfloat16())


def test_all_options_of_an_adapter_are_read_from_its_file(small, configured, tokenizer, tmp_path):
    """Those that a configuration here has no key for: ranks of single layers, another scale, experts."""
    config = configured("+adapter=lora", f"model.name_or_path={small('mixtral')}")
    patterns = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 5}, "use_rslora": True}
    wanted = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], **patterns)
    wanted.target_parameters = ["mlp.experts.down_proj"]
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(small("mixtral"), dtype=torch.float32), wanted)
    with_trained_adapter(model).save_pretrained(tmp_path / "peft")
    expected = answers(model.get_base_model())
    torch.testing.assert_close(answers(load_merged(tmp_path / "peft", config.model, tokenizer)), expected, rtol=1e-5, atol=1e-4)
    on = load_model(
        configured("+adapter=lora", f"model.name_or_path={small('mixtral')}", f"model.archive={tmp_path / 'peft'}").model,
        tokenizer,
    )
    torch.testing.assert_close(answers(on), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(("settings", "what"), [({"bias": "all"}, "bias 'all'"), ({"bias": "lora_only"}, "bias 'lora_only'")])
def test_an_adapter_that_is_not_plain_lora_is_refused(settings, what, small, configured, tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(small("llama"), dtype=torch.float32)
    get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj"], **settings)).save_pretrained(
        tmp_path / "peft"
    )
    config = configured("+adapter=lora", f"model.name_or_path={small('llama')}", f"model.archive={tmp_path / 'peft'}")
    with pytest.raises(UserError, match=f"an adapter with {what} is not supported"):
        check_model(config.model, tokenizer)


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("llama", []),
        ("gpt_oss", ["the routed experts of GptOssForCausalLM stay frozen (model.layers.*.mlp.experts)"]),
        (
            "llama4_text",
            ["router returns more than one tensor (Llama4Router)", "the routed experts of Llama4ForCausalLM stay frozen"],
        ),
        ("mamba", ["MambaMixer reads the weight of dt_proj directly, bypassing an adapter", "peft refuses out_proj for mamba"]),
    ],
)
def test_layers_that_stay_frozen_are_named(name, lines, small, configured, tokenizer):
    config = configured("+adapter=lora", f"model.name_or_path={small(name)}")
    said = [line for line in check_model(config.model, tokenizer) if line.startswith("adapter: ")]
    assert len(said) == len(lines)
    assert all(expected in line for expected, line in zip(lines, said, strict=True))


def test_a_router_loss_coefficient_without_effect_is_named(small, configured, tokenizer):
    [line] = check_model(configured(f"model.name_or_path={small('mixtral')}").model, tokenizer)
    assert (
        line
        == "model: router_aux_loss_coef (0.001) has no effect by itself: model.router_aux_loss adds the load-balancing loss"
    )


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        (
            "mixtral",
            ["model.router_aux_loss: 0.01 times the load-balancing loss of 4 experts, 2 a token, over the whole batch"],
        ),
        ("llama4_text", ["model.router_aux_loss: 0.01 times the load-balancing loss of 4 experts, 1 a token"]),
    ],
)
def test_the_load_balancing_loss_is_said_where_it_is_on(name, lines, small, configured, tokenizer):
    config = configured(f"model.name_or_path={small(name)}", "model.router_aux_loss=0.01")
    said = check_model(config.model, tokenizer)
    assert len(said) == len(lines) and all(found.startswith(line) for found, line in zip(said, lines, strict=True))


def test_the_load_balancing_loss_of_a_dense_model_is_refused(small, configured, tokenizer):
    config = configured(f"model.name_or_path={small('llama')}", "model.router_aux_loss=0.01")
    with pytest.raises(
        UserError, match=r"model.router_aux_loss: found 0.01, but llama has no experts to balance. Set it to null."
    ):
        check_model(config.model, tokenizer)


def test_target_modules_on_which_an_adapter_has_no_effect_are_refused(small, configured, tokenizer):
    config = configured("+adapter=lora", f"model.name_or_path={small('mamba')}", "model.lora.target_modules=[dt_proj,in_proj]")
    with pytest.raises(UserError, match="model.lora.target_modules: found .*MambaMixer reads the weight of dt_proj directly"):
        check_model(config.model, tokenizer)


# ---- the model under an adapter, kept --------------------------------------------------------------------------------------


MADE = {"model_type": "llama"} | SIZES
SCRATCH = ("model.name_or_path=null", *(f"+model.from_config.{key}={value}" for key, value in MADE.items()))


def test_a_base_model_from_scratch_is_saved_beside_its_adapter_for_other_libraries(configured, tokenizer, tmp_path):
    config = configured("+adapter=lora", *SCRATCH)
    trained = with_trained_adapter(load_model(config.model, tokenizer, base_dir=tmp_path / "base"))
    expected, checkpoint = answers(trained), checkpoint_of(trained, tokenizer, tmp_path)
    torch.manual_seed(5)
    torch.testing.assert_close(answers(load_merged(checkpoint, config.model, tokenizer)), expected, rtol=1e-5, atol=1e-4)
    assert json.loads((checkpoint / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tmp_path / "base")
    torch.testing.assert_close(answers(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)), expected)
    # Read again, and not made again, where a run goes on.
    assert weights_hash(load_model(config.model, tokenizer, base_dir=tmp_path / "base")) == weights_hash(trained)
    tmp_path.joinpath("moved").mkdir()
    for name in ("base", "step-4"):
        shutil.move(tmp_path / name, tmp_path / "moved" / name)
    moved = load_merged(tmp_path / "moved" / "step-4", config.model, tokenizer)
    torch.testing.assert_close(answers(moved), expected, rtol=1e-5, atol=1e-4)


def test_an_adapter_keeps_its_base_model_when_the_run_that_trained_that_is_deleted(configured, tokenizer, tmp_path):
    first = tmp_path / "first"
    first.mkdir()
    base = checkpoint_of(load_model(configured().model, tokenizer), tokenizer, first)
    config = configured("+adapter=lora", f"model.archive={base}")
    model = with_trained_adapter(load_model(config.model, tokenizer, base_dir=tmp_path / "base"))
    expected = answers(model)
    assert not (tmp_path / "base" / "state.json").exists(), "it is a model, no checkpoint"
    assert (tmp_path / "base" / "model.safetensors").stat().st_nlink == 2, "it takes no room"
    checkpoint = checkpoint_of(model, tokenizer, tmp_path)
    shutil.rmtree(first)
    torch.testing.assert_close(answers(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)), expected)
    torch.testing.assert_close(answers(load_merged(checkpoint, config.model, tokenizer)), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("overrides", "kept"),
    [
        ([], False),
        (["+model.from_config.rms_norm_eps=0.1"], True),
        (["model.archive={whole}"], True),
        (["model.archive={whole}/policy.pt"], True),
        (["model.archive={whole}", "+model.from_config.rms_norm_eps=0.1"], True),
    ],
)
def test_a_base_model_that_others_cannot_load_elsewhere_is_saved(overrides, kept, configured, tokenizer, tmp_path):
    whole = finished(configured(), tokenizer, tmp_path / "whole")
    config = configured(
        "+adapter=lora", *(text.format(whole=whole.resolve()) if "{whole}" in text else text for text in overrides)
    )
    model = with_trained_adapter(load_model(config.model, tokenizer, base_dir=tmp_path / "base"))
    assert (tmp_path / "base").is_dir() == kept
    checkpoint = checkpoint_of(model, tokenizer, tmp_path)
    torch.testing.assert_close(answers(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)), answers(model))


def test_a_base_model_that_an_older_run_did_not_save_is_rebuilt_from_its_seed(configured, tokenizer, tmp_path):
    config = configured("+adapter=lora", *SCRATCH, "seed=3")
    # As `run` in train.py does before it makes a model.
    seed_everything(config.seed)
    check_optimizer(config)
    trained = with_trained_adapter(load_model(config.model, tokenizer))
    about = {"config": config.as_dict(), "began_with": weights_hash(trained)}
    checkpoint = checkpoint_of(trained, tokenizer, tmp_path, run=about)
    assert json.loads((checkpoint / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    torch.manual_seed(5)
    drawn = torch.get_rng_state()
    found = answers(load_merged(checkpoint, config.model, tokenizer))
    torch.testing.assert_close(found, answers(trained), rtol=1e-5, atol=1e-4)
    assert torch.equal(torch.get_rng_state(), drawn)
