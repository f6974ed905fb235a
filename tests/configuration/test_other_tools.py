"""Options as other tools call them, and the answers: what each is called here."""

import shlex

import pytest

from preference_training.configuration.command_line import prepare_arguments
from preference_training.configuration.composition import compose_overrides, known_keys
from preference_training.configuration.other_tools.lookup import answer, translated
from preference_training.configuration.other_tools.table import OTHER_NAMES
from preference_training.core.errors import UserError

# What people type on their first day, by tool.
TRL = (
    "learning_rate per_device_train_batch_size num_train_epochs output_dir model_name_or_path load_in_4bit lora_r lora_alpha "
    "gradient_checkpointing warmup_ratio lr_scheduler_type logging_steps save_steps eval_steps dataset_name max_seq_length "
    "report_to deepspeed max_steps beta loss_type torch_dtype attn_implementation precompute_ref_log_probs optim "
    "max_completion_length"
)
LLAMA_FACTORY = (
    "cutoff_len finetuning_type stage pref_beta pref_loss lora_rank lora_target dataset val_size quantization_bit flash_attn "
    "num_train_epochs neat_packing export_dir adapter_name_or_path"
)
AXOLOTL = "base_model micro_batch_size num_epochs sequence_len chat_template rl val_set_size lr_scheduler sample_packing"
TORCHTUNE = "epochs optimizer.lr tokenizer.max_seq_len model.lora_rank enable_activation_checkpointing metric_logger dtype"


def refusal(*arguments):
    with pytest.raises(UserError) as error:
        prepare_arguments(list(arguments))
    return str(error.value)


def texts_of(name):
    """The overrides that an option is answered with: for its example, and for its values that have another name here."""
    found = OTHER_NAMES[name]
    return {found.text(value) for value in (None, *found.values)} - {None}


def command_lines():
    """All of them, each once, in as few command lines as they fit in without two of the same section."""
    lines = []
    for text in sorted({text for name in OTHER_NAMES for text in texts_of(name)}):
        words = shlex.split(text)
        fits = (line for line in lines if {*map(section, line)}.isdisjoint(map(section, words)))
        line = next(fits, None)
        lines.append(words) if line is None else line.extend(words)
    return lines


def section(override):
    return override.lstrip("+").partition("=")[0].partition(".")[0]


@pytest.mark.parametrize("line", command_lines(), ids=" ".join)
def test_every_answer_composes_with_every_value_that_is_translated(line):
    compose_overrides(*line)


def test_every_answer_with_an_override_shows_one():
    assert all(texts_of(name) for name, found in OTHER_NAMES.items() if found.overrides)


def test_no_key_of_ours_is_taken_for_another_tools():
    assert not OTHER_NAMES.keys() & known_keys()


@pytest.mark.parametrize("name", [*TRL.split(), *LLAMA_FACTORY.split(), *AXOLOTL.split(), *TORCHTUNE.split()])
def test_the_names_that_people_bring_are_answered_in_a_line(name):
    assert "\n" not in answer(name)


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("learning_rate=3e-4", "learning_rate: in this project: lr=3e-4"),
        ("+learning_rate=3e-4", "learning_rate: in this project: lr=3e-4"),
        (
            "learning_rate=1e-5,3e-5",
            "learning_rate: in this project: lr=1e-5,3e-5\nlr: found several values, 1e-5,3e-5. Add -m for a sweep over them.",
        ),
        ("loss_type=sigmoid", "loss_type: in this project: loss=dpo"),
        ("stage=rm", "stage: in this project: loss=reward"),
        ("optim=adamw_torch", "optim: in this project: optimizer=AdamW"),
        ("load_in_4bit=true", "load_in_4bit: in this project: +adapter=qlora"),
        ("load_in_4bit=false", "load_in_4bit: leave it out"),
        ("lora_target=q_proj,v_proj", "lora_target: in this project: +adapter=lora model.lora.target_modules=[q_proj,v_proj]"),
        ("lora_target=all", "lora_target: in this project: +adapter=lora model.lora.target_modules=null"),
        ("finetuning_type=full", "finetuning_type: without +adapter=lora all weights are trained"),
        (
            "save_steps=500",
            "save_steps: save_every counts examples, not steps: steps times batch_size",
        ),
        ("model_name_or_path=a/b", "model_name_or_path: in this project: model=a/b"),
        ("--lr=1e-5", "--lr: written without dashes here: lr=1e-5"),
        ("--save-async", "--save-async: written without dashes here: save_async=true"),
        ("--learning-rate=1e-5", "learning_rate: in this project: lr=1e-5"),
        ("--learninrate=1", "learninrate: no such key; did you mean lr?"),
    ],
)  # fmt: skip
def test_the_answer_has_the_users_value(argument, told):
    if "did you mean" in told:
        assert refusal(argument).startswith(told.split(";")[0])
    else:
        assert refusal(argument) == told


@pytest.mark.parametrize(
    ("arguments", "mistakes", "rest"),
    [
        (
            "--template qwen --learning_rate 1e-5",
            ["template: found 'qwen', expected "],
            "without template: python train.py lr=1e-5",
        ),
        ("bf16=auto --beta 0.1", ["bf16: found 'auto', expected "], "without bf16: python train.py loss=dpo loss.beta=0.1"),
        (
            "dpo --lr=1",
            ["dpo: found a word by itself, expected KEY=VALUE; did you mean loss=dpo?"],
            "without dpo: python train.py lr=1",
        ),
        (
            "tokenizer.path=x model._component_=y optimizer.lr=1e-3",
            ["tokenizer.path: no such key; ", "model._component_: no such key; "],
            "without tokenizer.path, model._component_: python train.py lr=1e-3",
        ),
        (
            "--loss_type sigmoid,sft --lr=1",
            ["loss: found several values, sigmoid,sft. Add -m"],
            "without loss: python train.py lr=1",
        ),
    ],
)
def test_what_the_whole_command_would_refuse_is_told_and_left_out_of_it(arguments, mistakes, rest):
    told = refusal(*arguments.split()).splitlines()
    assert told[-1] == f"Together, {rest}"
    found = told[-1 - len(mistakes) : -1]
    assert all(line.startswith(text) for line, text in zip(found, mistakes, strict=True)), told


def test_a_sweep_is_copied_as_it_is():
    told = refusal("-m", "--beta", "0.1,0.2", "--learning_rate", "1e-5,2e-5").splitlines()
    assert told[-1] == "Together: python train.py -m loss=dpo loss.beta=0.1,0.2 lr=1e-5,2e-5"


def test_several_are_answered_together_with_the_whole_command():
    arguments = [
        "--model_name_or_path",
        "a/b",
        "loss=dpo",
        "--learning_rate",
        "1e-5",
        "--per_device_train_batch_size=2",
        "--fp16",
    ]
    assert refusal(*arguments).splitlines() == [
        "model_name_or_path: in this project: model=a/b",
        "learning_rate: in this project: lr=1e-5",
        "per_device_train_batch_size: in this project: per_device_batch_size=2",
        "fp16: in this project: model.autocast_dtype=float16",
        "Together: python train.py model=a/b loss=dpo lr=1e-5 per_device_batch_size=2 model.autocast_dtype=float16",
    ]


@pytest.mark.parametrize(
    ("given", "together"),
    [
        (["loss=dpo", "+adapter=lora", "lora_r=8", "beta=0.2"], "loss=dpo +adapter=lora model.lora.r=8 loss.beta=0.2"),
        (["load_in_4bit=true", "lora_r=8"], "+adapter=qlora model.lora.r=8"),
        (["lora_r=8", "load_in_4bit=true"], "+adapter=qlora model.lora.r=8"),
    ],
)
def test_the_whole_command_sets_each_key_once_and_can_be_typed(given, together, plain):
    shown = refusal(*given).splitlines()[-1].removeprefix("Together: python train.py ")
    assert shown == together
    plain(*shown.split())


@pytest.mark.parametrize(
    ("given", "together"),
    [
        ("--loss_type ipo --beta 0.1", "loss=ipo loss.beta=0.1"),
        ("--beta 0.1 --loss_type ipo", "loss=ipo loss.beta=0.1"),
        ("--rl kto --rl_beta 0.1", "loss=kto loss.beta=0.1"),
        ("--pref_loss orpo --pref_beta 0.1", "loss=orpo loss.beta=0.1"),
        ("--rl simpo --beta 2.0 --simpo_gamma 1.0", "loss=simpo loss.beta=2.0 loss.gamma=1.0"),
        ("loss=ipo --beta 0.1 --lr 1e-5", "loss=ipo loss.beta=0.1 lr=1e-5"),
        ("--pref_loss simpo --stage dpo", "loss=simpo"),
        ("--loss_type sigmoid --rpo_alpha 1.0", "loss=rpo loss.alpha=1.0"),
        ("--sync_ref_model true --loss_type sigmoid", "loss=tr_dpo"),
        ("--optim adamw_8bit --adam_epsilon 1e-8", "optimizer=AdamW8bit optimizer_kwargs.eps=1e-8"),
        ("--lr_scheduler_type linear --min_lr_ratio 0.1", "lr_schedule=linear final_lr_share=0.1"),
        ("adapter=dora --lora_r 8 --lora_alpha 16", "adapter=dora model.lora.r=8 model.lora.alpha=16"),
        ("--bnb_4bit_compute_dtype bf16 --load_in_4bit", "+adapter=qlora model.quantized_compute_dtype=bfloat16"),
        ("--tensor_parallel --num_gpus 4", "trainer=TensorParallelTrainer trainer.nproc_per_node=4"),
    ],
)
def test_a_choice_that_an_answer_carries_along_replaces_none_that_is_given(given, together, plain):
    shown = refusal(*given.split()).splitlines()[-1].removeprefix("Together: python train.py ")
    assert shown == together
    plain(*shlex.split(shown))


def test_the_two_betas_of_an_optimizer_are_one_list(plain):
    shown = refusal("--adam_beta1", "0.95", "--adam_beta2=0.98").splitlines()[-1]
    assert shown == "Together: python train.py optimizer=AdamW 'optimizer_kwargs.betas=[0.95,0.98]'"
    assert translated("adam_beta2", "0.98")[1].text == "optimizer_kwargs.betas=[0.9,0.98]"


def test_keys_that_the_given_loss_lacks_are_left_out_in_words():
    assert refusal("--loss_type", "ipo", "--simpo_gamma", "1.0").splitlines()[2:] == [
        "loss.gamma=1.0: left out, since loss=ipo has no such key",
        "Together: python train.py loss=ipo",
    ]


@pytest.mark.parametrize(
    ("given", "together"),
    [
        ("batch_size=8 --eval_steps 100 --save_steps 50", "batch_size=8 eval_every=800 save_every=400"),
        ("--per_device_train_batch_size 4 --gradient_accumulation 2 --eval_steps 100", "per_device_batch_size=4 "
         "gradient_accumulation_steps=2 eval_every=800"),
        ("--num_train_epochs 1 --max_samples 1000", "n_epochs=1 n_examples=1000"),
        ("--epochs 3 --max_steps_per_epoch 100", "n_epochs=3 n_steps=300"),
        ("--learning_rate 1e-4 --embedding_lr 1e-5", "lr=1e-4 'lr_groups={embed:0.1}'"),
    ],
)  # fmt: skip
def test_values_that_mean_something_else_here_are_computed_from_what_else_is_given(given, together):
    assert refusal(*given.split()).splitlines()[-1] == f"Together: python train.py {together}"


@pytest.mark.parametrize(
    ("given", "end"),
    [
        ("--eval_steps 100 --fp16", ", without eval_steps: python train.py model.autocast_dtype=float16"),
        ("--eval_steps 0.1 batch_size=8", ""),
        ("--trainer FSDPTrainer --per_device_train_batch_size 4 --save_steps 9", ", without save_steps: python train.py "
         "trainer=FSDPTrainer per_device_batch_size=4"),
        ("--num_train_epochs 3 --max_samples 1000", ", without max_samples: python train.py n_epochs=3"),
        ("--ref_model a/b --learning_rate 1e-5", ", without ref_model: python train.py lr=1e-5"),
        ("--learninrate 1 --fp16", ", without learninrate: python train.py model.autocast_dtype=float16"),
        ("--packing true --fp16", ": python train.py model.autocast_dtype=float16"),
    ],
)  # fmt: skip
def test_a_command_that_lacks_what_was_given_says_so(given, end):
    whole = refusal(*given.split()).splitlines()[-1]
    assert whole == f"Together{end}" if end else "Together" not in whole


def test_no_evaluation_is_answered_with_how_there_is_none():
    assert refusal("--eval_strategy", "no") == (
        "eval_strategy: nothing is evaluated where nothing is held out: held_out_share=0"
    )


def test_a_value_with_a_space_stays_one_argument(plain):
    shown = refusal("--output_dir", "out dir", "--exp-name=my run").splitlines()
    assert shown[0] == "output_dir: in this project: 'local_run_dir=out dir'"
    words = shlex.split(shown[-1].removeprefix("Together: python train.py "))
    assert words == ["local_run_dir=out dir", "exp_name=my run"]
    assert plain(*words)["local_run_dir"] == "out dir"


@pytest.mark.parametrize(
    "arguments", [["--cfg", "job"], ["-m", "loss.beta=0.1,0.2", "loss=dpo"], ["--multirun"], ["--hydra-help"]]
)
def test_the_options_of_hydra_stay_what_they_are(arguments):
    assert prepare_arguments(arguments) == arguments


def test_an_adapter_needs_no_plus(plain):
    assert plain("adapter=lora") | {"local_run_dir": 0} == plain("+adapter=lora") | {"local_run_dir": 0}
    assert plain("adapter=lora")["model"]["lora"]["r"] == 16
    assert prepare_arguments(["adapter=lora,qlora", "-m"]) == ["-m", "+adapter=lora,qlora"]
    with pytest.raises(UserError, match="adapter=lorra: there is no such adapter; did you mean lora?"):
        compose_overrides("adapter=lorra")


def test_a_name_of_no_tool_has_no_answer():
    assert answer("zzz") is None
    assert translated("zzz", "1") is None
