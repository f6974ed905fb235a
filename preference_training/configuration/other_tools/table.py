"""What the options of other tools are called here: of TRL and the Trainer of transformers, LLaMA-Factory, axolotl, torchtune.

A table of names. Each has the overrides that do the same, with {} where the user's value goes, and a value that it is shown
with where the user gave none; or a sentence where nothing is to be set.
"""

from preference_training.configuration.other_tools.answers import OFF, Answer, Given

# ---- values that follow from others -----------------------------------------------------------------------------------------


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None


def _product(*factors: float | None) -> str | None:
    """A product of whole numbers; None where one is not known, or no whole number."""
    result = 1.0
    for each in factors:
        if each is None or each < 1 or each % 1:
            return None
        result *= each
    return str(int(result))


def _in_examples(steps: str, given: Given) -> str | None:
    """Steps as examples, where it is known how many a step has."""
    size, each = given.get("batch_size"), given.get("per_device_batch_size")
    if size is None and each is not None and "trainer" not in given:
        # One device.
        return _product(_number(steps), _number(each), _number(given.get("gradient_accumulation_steps", "1")))
    return _product(_number(steps), _number(size))


def _in_all_epochs(of_an_epoch: str, given: Given) -> str | None:
    return _product(_number(of_an_epoch), _number(given.get("n_epochs")))


def _in_one_epoch(examples: str, given: Given) -> str | None:
    return examples if _number(given.get("n_epochs")) == 1 else None


def _both_betas(_: str, given: Given) -> str:
    return f"[{given.get('adam_beta1', '0.9')},{given.get('adam_beta2', '0.999')}]"


def _in_minutes(seconds: str, _: Given) -> str | None:
    found = _number(seconds)
    return f"{found / 60:.6g}" if found else None


def _as_multiple_of_lr(rate: str, given: Given) -> str | None:
    own, lr = _number(rate), _number(given.get("lr"))
    return f"{own / lr:.6g}" if own and lr else None


# ---- the table --------------------------------------------------------------------------------------------------------------

_LOSSES = {
    "sigmoid": "dpo", "rm": "reward", "pt": "sft", "rlhf": "dpo", "robust": "robust", "kto_pair": "kto", "exo_pair": "exo_pair",
    "nca_pair": "nca_pair", "bco_pair": "bco", "sppo_hard": "sppo_hard", "aot_pair": "aot_unpaired", "discopop": "discopop",
    "apo_zero": "apo_zero", "apo_down": "apo_down",
}  # fmt: skip
_OPTIMIZERS = {
    "adamw": "AdamW", "adamw_torch": "AdamW", "adamw_torch_fused": "AdamW", "sgd": "SGD", "rmsprop": "RMSprop",
    "adamw_hf": "AdamW", "adamw_8bit": "AdamW8bit", "adamw_bnb_8bit": "AdamW8bit", "lion_8bit": "Lion8bit",
    "paged_adamw_8bit": "PagedAdamW8bit", "paged_adamw": "PagedAdamW", "paged_adamw_32bit": "PagedAdamW", "muon": "Muon",
    "adafactor": "Adafactor", "schedule_free_adamw": "AdamWScheduleFree", "schedule_free_sgd": "SGDScheduleFree",
    "galore_adamw": "GaLore",
}  # fmt: skip
_SCHEDULES = {
    "constant_with_warmup": "constant", "rex": "linear", "cosine_with_restarts": "cosine lr_restarts=1", "polynomial": "linear",
    "warmup_stable_decay": "wsd",
}  # fmt: skip
_DTYPES = {"auto": "bfloat16", "bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
_ATTENTIONS = {"fa2": "flash_attention_2", "fa3": "flash_attention_3", "true": "flash_attention_2", "disabled": "eager"}
_PACKED = "responses are always packed without padding, and what they share is computed once: nothing to set"


def _every(key: str) -> str:
    return f"{key} counts examples, not steps: steps times batch_size"


def _each(names: str, *answer: object, **more: object) -> dict[str, Answer]:
    return {name: Answer(*answer, **more) for name in names.split()}  # type: ignore[arg-type]


# By their names in lower case, with underscores for dashes.
OTHER_NAMES: dict[str, Answer] = {
    # The model and its adapter.
    **_each(
        "model_name_or_path model_name model_id model_path base_model base_model_name_or_path pretrained_model_name_or_path "
        "hf_model model_name_or_id",
        *("model={}", "Qwen/Qwen3-0.6B"),
    ),
    **_each(
        "tokenizer tokenizer_name tokenizer_path tokenizer_name_or_path tokenizer_config",
        *("model.tokenizer_name_or_path={}", "Qwen/Qwen3-0.6B"),
    ),
    **_each("torch_dtype dtype model_dtype", "model.policy_dtype={}", "bfloat16", _DTYPES),
    **_each("router_aux_loss_coef output_router_logits", "model.router_aux_loss={}", "0.001", {"true": "0.001"}),
    **_each("trust_remote_code", "model.trust_remote_code={}", "true"),
    **_each(
        "attn_implementation flash_attention flash_attn use_flash_attention_2 use_flash_attn",
        *("model.attn_implementation={}", "flash_attention_2", _ATTENTIONS),
        off=OFF,
    ),
    **_each("use_liger_kernel use_liger enable_liger_kernel liger_kernel", "model.liger_kernels={}", "true"),
    **_each("load_in_4bit qlora bnb_4bit use_qlora", "+adapter=qlora"),
    **_each("load_in_8bit", "+adapter=lora model.quantization=int8"),
    **_each("quantization_bit", "+adapter=lora model.quantization={}", "nf4", {"4": "nf4", "8": "int8"}),
    **_each("bnb_4bit_compute_dtype", "+adapter=qlora model.quantized_compute_dtype={}", "bfloat16", _DTYPES),
    **_each("use_peft use_lora peft lora peft_config", "+adapter=lora"),
    **_each(
        "finetuning_type", "+adapter={}", "lora", off=("full", "none"), note="without +adapter=lora all weights are trained"
    ),
    **_each("lora_r lora_rank lora_config_r model.lora_rank", "+adapter=lora model.lora.r={}", "16"),
    **_each("lora_alpha model.lora_alpha", "+adapter=lora model.lora.alpha={}", "32"),
    **_each("lora_dropout model.lora_dropout", "+adapter=lora model.lora.dropout={}", "0.05"),
    **_each("use_dora lora_use_dora peft_use_dora", "+adapter=lora model.lora.use_dora={}", "true"),
    **_each("use_rslora lora_use_rslora peft_use_rslora", "+adapter=lora model.lora.use_rslora={}", "true"),
    **_each("loraplus_lr_ratio lora_plus_lr_ratio", "+adapter=lora model.lora.loraplus_lr_ratio={}", "16"),
    **_each("init_lora_weights peft_init_lora_weights init_weights", "+adapter=lora model.lora.init={}", "pissa_niter_16"),
    **_each("pissa_init", "+adapter=pissa"),
    **_each(
        "layers_to_transform lora_layers_to_transform peft_layers_to_transform", "+adapter=lora model.lora.layers={}", "[0,1]"
    ),
    **_each(
        "lora_target_parameters target_parameters", "+adapter=lora model.lora.target_parameters={}", "[mlp.experts.down_proj]"
    ),
    **_each(
        "modules_to_save lora_modules_to_save additional_target",
        *("+adapter=lora model.lora.modules_to_save={}", "[embed_tokens,lm_head]"),
    ),
    **_each(
        "lora_bias lora_train_bias peft_bias bias",
        note="biases are trained in place, so that the model under the adapter would no longer be the reference. Leave it none",
    ),
    **_each("unfrozen_parameters trainable_parameters", "model.trainable={}", "[norm]"),
    **_each("freeze_parameters", "model.freeze={}", "[embed_tokens]"),
    **_each("neftune_noise_alpha noisy_embedding_alpha neftune_alpha", "model.neftune_alpha={}", "5"),
    **_each("add_tokens new_tokens", "model.add_tokens={}", "['<plan>']"),
    **_each("add_special_tokens new_special_tokens", "model.add_special_tokens={}", "['<tool>']"),
    **_each(
        "lora_target_modules lora_target lora_target_linear model.lora_attn_modules",
        *("+adapter=lora model.lora.target_modules={}", "[q_proj,v_proj]"),
        values=dict.fromkeys(("all", "all-linear", "true"), "null"),
    ),
    **_each("adapter_name_or_path lora_model_dir", "model={}", "Qwen/Qwen3-0.6B", note="a directory of an adapter is a model"),
    **_each(
        "ref_model ref_model_name_or_path reference_model",
        note="the reference is the model that training starts from, or the weights in model.reference_archive: a checkpoint "
        "directory or a policy.pt",
    ),
    # The data.
    **_each(
        "dataset dataset_name dataset_path dataset_name_or_path dataset_mixer train_file train_dataset data_path data_files",
        *("datasets={}", "mine.jsonl"),
    ),
    **_each(
        "eval_dataset eval_file test_file validation_file val_file dataset_test eval_datasets",
        note="a file's entry in datasets has its held-out file: 'datasets=[{path: mine.jsonl, test_path: held_out.jsonl}]'",
    ),
    **_each("val_set_size val_size test_size eval_split_ratio validation_split", "held_out_share={}", "0.1"),
    **_each(
        "max_samples max_train_samples",
        *("n_examples={}", "1000"),
        computed=_in_one_epoch,
        note="n_examples counts the examples of all epochs together; several epochs of the same rows need a file of these rows",
    ),
    **_each(
        "dataset_text_field prompt_column dataset_prompt_field",
        note="columns are found by their names, or named in an entry: 'datasets=[{path: mine.jsonl, prompt: COLUMN}]'",
    ),
    **_each("dataset_dir", note="datasets takes paths: datasets=FOLDER/mine.jsonl"),
    **_each(
        "dataset_split train_split",
        note="an entry of datasets can name it: 'datasets=[{path: ORGANIZATION/NAME, split: train}]'",
    ),
    **_each(
        "remove_unused_columns", note="columns that are not read are listed, and change nothing: nothing to set", is_done=True
    ),
    **_each(
        "overwrite_cache",
        note="prepared data are kept by what they depend on, and prepared anew where that changes: nothing to set",
        is_done=True,
    ),
    **_each(
        "preprocessing_num_workers dataset_num_proc num_proc dataloader_num_workers dataloader_pin_memory "
        "dataloader_prefetch_factor",
        note="data are prepared once and mapped into memory, and batches are built beside the training: nothing to set",
        is_done=True,
    ),
    **_each("max_eval_samples", "n_eval_examples={}", "200"),
    **_each("chat_template conversation_template prompt_template", "template={}", "chat", {"tokenizer_default": "chat"}),
    **_each("system_message default_system", "system_prompt={}", "'Answer briefly.'"),
    **_each(
        "cutoff_len sequence_len max_seq_length max_seq_len seq_len model_max_length tokenizer.max_seq_len max_sequence_length",
        *("max_length={}", "1024"),
    ),
    **_each(
        "max_completion_length max_target_length max_response_length", note="max_length counts prompt and response together"
    ),
    **_each(
        "packing sample_packing neat_packing padding_free pad_to_sequence_len group_by_length",
        note=_PACKED,
        is_done=True,
    ),
    **_each(
        "train_on_inputs assistant_only_loss completion_only_loss train_on_prompt mask_prompt dataset.train_on_input",
        note="prompts are never trained on; train_on=last_turn trains on the last turn of a conversation alone",
    ),
    # The loss.
    **_each("stage training_type trainer_type alignment", "loss={}", "dpo", _LOSSES, is_general=True),
    **_each("rl loss_type pref_loss rl_loss", "loss={}", "dpo", _LOSSES),
    **_each("beta pref_beta dpo_beta rl_beta loss_beta", "loss=dpo loss.beta={}", "0.1"),
    **_each("kto_beta", "loss=kto loss.beta={}", "0.1"),
    **_each("orpo_beta", "loss=orpo loss.beta={}", "0.1"),
    **_each("simpo_gamma gamma", "loss=simpo loss.gamma={}", "1.0"),
    **_each("pref_ftx rpo_alpha dpo_ftx", "loss=rpo loss.alpha={}", "1.0"),
    **_each("label_smoothing dpo_label_smoothing", "loss=dpo loss.label_smoothing={}", "0.1"),
    **_each("label_smoothing_factor", note="it smooths tokens, which no loss here does; loss.label_smoothing is of pairs"),
    **_each("kto_chosen_weight desirable_weight", "loss=kto loss.desirable_weight={}", "1.0"),
    **_each("kto_rejected_weight undesirable_weight", "loss=kto loss.undesirable_weight={}", "1.0"),
    **_each("reference_free", "loss=dpo loss.reference_free={}", "true"),
    **_each("precompute_ref_log_probs precompute_ref_logps precompute_ref_log_prob", "reference_logps=cached"),
    **_each("sync_ref_model", "loss=tr_dpo"),
    # The optimizer and the length of a run.
    **_each("learning_rate learningrate peak_lr optimizer.lr", "lr={}", "1e-5"),
    **_each("optim optimizer_type optimizer_name", "optimizer={}", "AdamW", _OPTIMIZERS),
    **_each("adam_epsilon adam_eps", "optimizer=AdamW optimizer_kwargs.eps={}", "1e-8"),
    **_each("adam_beta1 adam_beta2", "optimizer=AdamW optimizer_kwargs.betas={}", "[0.9,0.95]", computed=_both_betas),
    **_each("wd optimizer.weight_decay", "weight_decay={}", "0.01"),
    **_each("gradient_clip_val gradient_clipping clip_grad_norm max_norm", "max_grad_norm={}", "1.0"),
    **_each("lr_scheduler_type lr_scheduler scheduler", "lr_schedule={}", "cosine", _SCHEDULES),
    **_each("cosine_min_lr_ratio min_lr_ratio", "lr_schedule=cosine final_lr_share={}", "0.1"),
    **_each("warmup_ratio warmup_fraction", "warmup_share={}", "0.1"),
    **_each("num_warmup_steps lr_warmup_steps", "warmup_steps={}", "10"),
    **_each("num_train_epochs num_epochs epochs max_epochs", "n_epochs={}", "3"),
    # -1 is no limit there.
    **_each("max_steps max_train_steps num_steps total_steps train_steps", "n_steps={}", "100", off=("-1", *OFF)),
    **_each(
        "max_steps_per_epoch",
        *("n_steps={}", "100"),
        computed=_in_all_epochs,
        note="n_steps counts the steps of all epochs together: steps times n_epochs",
    ),
    **_each(
        "per_device_train_batch_size micro_batch_size micro_train_batch_size device_train_batch_size train_micro_batch_size",
        *("per_device_batch_size={}", "4"),
    ),
    **_each("train_batch_size global_batch_size total_batch_size effective_batch_size", "batch_size={}", "32"),
    **_each("per_device_eval_batch_size eval_micro_batch_size val_batch_size", "eval_batch_size={}", "8"),
    **_each("gradient_accumulation accumulation_steps grad_accum", "gradient_accumulation_steps={}", "4"),
    **_each("early_stopping patience", "early_stopping_patience={}", "3"),
    # Memory, speed and devices.
    **_each("fp16 half_precision", "model.autocast_dtype=float16"),
    **_each("mixed_precision", "model.autocast_dtype={}", "bfloat16", {**_DTYPES, "no": "null"}),
    **_each(
        "gradient_checkpointing enable_activation_checkpointing use_gradient_checkpointing",
        *("activation_checkpointing={}", "true"),
        values={"unsloth": "true"},
    ),
    **_each("torch_compile use_torch_compile", "compile={}", "true"),
    **_each(
        "deepspeed deepspeed_config ds_config fsdp fsdp_config use_fsdp accelerate_config",
        *("trainer=FSDPTrainer",),
        note="trainer.sharding: full is ZeRO stage 3, grad_op stage 2, optimizer stage 1",
    ),
    **_each(
        "zero_stage",
        *("trainer=FSDPTrainer trainer.sharding={}", "full"),
        values={"0": "none", "1": "optimizer", "2": "grad_op", "3": "full"},
    ),
    **_each("tensor_parallel", "trainer=TensorParallelTrainer"),
    **_each(
        "tensor_parallel_size tp_size", "trainer=TensorParallelTrainer trainer.tensor_parallel_size={}", "2", off=("1", *OFF)
    ),
    **_each("num_gpus n_gpus num_processes nproc_per_node", "trainer=FSDPTrainer trainer.nproc_per_node={}", "2"),
    **_each("ddp data_parallel", "trainer=FSDPTrainer trainer.sharding=none"),
    **_each(
        "ddp_timeout",
        *("trainer=FSDPTrainer trainer.distributed_timeout_minutes={}", "30"),
        computed=_in_minutes,
    ),
    **_each(
        "use_cpu no_cuda",
        note="the environment chooses devices: with CUDA_VISIBLE_DEVICES= before the command it trains on the CPU",
    ),
    **_each(
        "local_rank ddp_find_unused_parameters ddp_backend", note="processes find each other: nothing to set", is_done=True
    ),
    # Files, evaluation and logging.
    **_each("output_dir output_path out_dir save_dir checkpoint_dir", "local_run_dir={}", "runs/mine"),
    **_each("run_name wandb_name wandb_run_name wandb_run_id experiment_name name", "exp_name={}", "mine"),
    **_each(
        "report_to log_with logger logging_backend metric_logger", "tracking={}", "wandb", {"none": "jsonl", "all": "wandb"}
    ),
    **_each("use_wandb wandb", "tracking=[jsonl,wandb]"),
    **_each("wandb_project", "wandb.project={}", "mine"),
    **_each("wandb_entity", "wandb.entity={}", "mine"),
    **_each(
        "logging_steps log_every_n_steps log_interval logging_strategy log_steps",
        note="minimum_log_interval_secs counts seconds between two lines, not steps; metrics.jsonl has every step",
    ),
    **_each(
        "eval_steps evaluation_steps eval_interval val_steps",
        *("eval_every={}", "2000"),
        computed=_in_examples,
        note=_every("eval_every"),
    ),
    **_each("evals_per_epoch", note="eval_every counts examples: those of an epoch, divided by the number of evaluations"),
    **_each(
        "eval_strategy evaluation_strategy",
        note="eval_every counts the examples from one evaluation to the next; those of an epoch are one an epoch",
        notes={"no": "nothing is evaluated where nothing is held out: held_out_share=0"},
    ),
    **_each("do_train", note="that is what the command does; eval_only=true evaluates and trains nothing", is_done=True),
    **_each("do_eval", note="held-out rows are always evaluated; held_out_share=0 holds out none", is_done=True),
    **_each("plot_loss", note="report.html in the run's directory has the curves: nothing to set", is_done=True),
    **_each("overwrite_output_dir", note="a directory that holds another run is set aside whole: nothing to set", is_done=True),
    **_each("save_safetensors", note="checkpoints are safetensors always: nothing to set", is_done=True),
    **_each("disable_tqdm logging_first_step", note="a line is printed now and then: nothing to set", is_done=True),
    **_each("eval_on_start", "do_first_eval={}", "true"),
    **_each(
        "save_steps save_interval checkpoint_every",
        *("save_every={}", "2000"),
        computed=_in_examples,
        note=_every("save_every"),
    ),
    **_each(
        "saves_per_epoch",
        note="save_every counts examples: those of an epoch, divided by the number of checkpoints; save_strategy=epoch is one",
    ),
    **_each("save_total_limit max_checkpoints", "keep_last={}", "2"),
    **_each("load_best_model_at_end", "load_best={}", "true"),
    **_each("save_best", "keep_best=1"),
    **_each("ema_alpha ema_rate use_ema model_ema", "ema_decay={}", "0.99", {"true": "0.99"}),
    **_each("embedding_lr_scale", "lr_groups={{embed:{}}}", "0.1"),
    **_each(
        "embedding_lr embedding_learning_rate",
        *("lr_groups={{embed:{}}}", "0.1"),
        computed=_as_multiple_of_lr,
        note="lr_groups={embed: 0.1} is in multiples of lr",
    ),
    **_each("metric_for_best_model", "objective={}", "loss/eval"),
    **_each("generate_during_eval", "sample_during_eval={}", "true"),
    **_each(
        "resume_from_checkpoint resume_from auto_resume_from_checkpoints",
        *("resume={}", "auto"),
        values=dict.fromkeys(("true", "latest"), "auto") | {"false": "null"},
    ),
    **_each("random_seed data_seed", "seed={}", "0"),
    **_each("hub_model_id push_to_hub hf_repo", note="python scripts/export.py RUN --to DIRECTORY --push ORGANIZATION/NAME"),
    **_each("merge_lora export_dir", note="python scripts/export.py RUN --to DIRECTORY --merge"),
}
