"""Keys that are given and that nothing reads, as the run is configured."""

import pytest

from preference_training.configuration.checks.unread import NEEDS, unread_keys
from preference_training.configuration.composition import known_keys
from preference_training.configuration.validation import configured
from preference_training.core.errors import UserError
from preference_training.core.values import dotted


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("decay_share=0.3", "decay_share: without effect, since lr_schedule is constant"),
        ("final_lr_share=0.1", "final_lr_share: without effect, since lr_schedule is constant"),
        ("loss=f_dpo loss.f_alpha=0.3", "loss.f_alpha: without effect, since loss.f_divergence is js"),
        ("pruner_kwargs.n_startup_trials=3", "pruner_kwargs: without effect, since pruner is null"),
        ("model.double_quantization=true", "model.double_quantization: without effect, since model.quantization is null"),
        (
            "model.quantized_compute_dtype=bfloat16",
            "model.quantized_compute_dtype: without effect, since model.quantization is null",
        ),
        ("model.fsdp_policy_mp=bfloat16", "model.fsdp_policy_mp: without effect, since trainer is BasicTrainer"),
        (
            "sample_during_eval=false max_sample_length=9",
            "max_sample_length: without effect, since sample_during_eval is false",
        ),
        ("save_strategy=epoch save_every=64", "save_every: without effect, since save_strategy is epoch"),
        (
            "sample_during_eval=false n_eval_model_samples=4",
            "n_eval_model_samples: without effect, since sample_during_eval is false",
        ),
        ("save_strategy=no keep_last=2", "keep_last: without effect, since save_strategy is no"),
        ("wandb.enabled=false wandb.project=mine", "wandb.project: without effect, since wandb.enabled is false"),
        ("evaluation.to=results.json", "evaluation.to: without effect, since eval_only is false"),
        (
            "loss=dpo loss.mode_loss=DPO loss.mode_weight=0.5",
            "loss.mode_weight: without effect, since loss.mode_loss is DPO",
        ),
    ],
)
def test_a_key_that_nothing_reads_is_said_in_a_line(given, said):
    assert unread_keys(configured(*given.split())) == [said]


@pytest.mark.parametrize(
    "given",
    [
        "lr_schedule=wsd decay_share=0.3 final_lr_share=0.1",
        "loss=f_dpo loss.f_divergence=alpha loss.f_alpha=0.3",
        "loss=beta_DPO loss.mode_weight=0.5 loss.a=0.9",
        "loss=dpo loss.mode_loss=beta_DPO loss.mode_weight=0.2 loss.a=0.6",
        "+adapter=qlora model.double_quantization=false model.lora.alpha=8",
        "model.quantized_compute_dtype=null",
        "trainer=FSDPTrainer model.fsdp_policy_mp=bfloat16",
        "model=tiny",
        "model=smollm2-135m +adapter=lora",
        "+experiment=dialogues_beta_dpo",
        "+experiment=dialogues_sft",
    ],
)
def test_what_is_read_and_what_presets_and_recipes_set_is_not_said(given):
    assert unread_keys(configured(*given.split())) == []


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            "loss=dpo loss.mode_weight=0.5 loss.a=0.9",
            "loss.mode_weight: found 0.5, without effect, since loss.mode_loss is DPO. Set loss.mode_loss=beta_DPO, or leave "
            "it out.",
        ),
        (
            "model.lora.alpha=32",
            "model.lora.alpha: found 32, without effect, since model.lora.r is null. All weights would be trained. Add "
            "+adapter=lora, or leave it out.",
        ),
        (
            "warmup_steps=10 warmup_share=0.1",
            "warmup_steps: found 10 beside warmup_share=0.1, which sets the same. Expected one of them.",
        ),
        (
            "model=smollm2-135m warmup_steps=10 warmup_share=0.1",
            "warmup_steps: found 10 beside warmup_share=0.1, which sets the same. Expected one of them.",
        ),
    ],
)
def test_a_key_without_effect_that_misleads_is_refused(given, told):
    with pytest.raises(UserError) as refusal:
        configured(*given.split())
    assert str(refusal.value) == told


def test_a_job_of_a_sweep_may_be_one_that_does_not_read_what_the_others_do():
    config = configured("loss=dpo", "loss.mode_weight=0.5", "sweep_dir=multirun/1")
    assert unread_keys(config) == ["loss.mode_weight: without effect, since loss.mode_loss is DPO"]


def test_a_warm_up_that_is_given_replaces_that_of_a_recipe():
    recipe = ["+experiment=dialogues_sft", "model=tiny"]
    config = configured(*recipe, "warmup_steps=7")
    assert (config.warmup_steps, config.warmup_share) == (7, None)
    assert configured(*recipe).warmup_share == 0.1


def test_every_key_of_the_table_is_one_with_a_value_that_it_needs():
    needed = {need.other for need in NEEDS.values()}
    assert NEEDS.keys() | needed - {"trainer.name"} <= known_keys() | {"pruner_kwargs"}
    found = dotted(configured("loss=f_dpo").as_dict()) | dotted(configured("loss=dpo").as_dict())
    assert all(need.other in found for need in NEEDS.values())
