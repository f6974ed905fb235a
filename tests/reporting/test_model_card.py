"""Model cards: hub metadata, changed settings, metrics and curves, and no private information."""

import pytest
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from preference_training.core.secrets import without_secrets
from preference_training.reporting.model_card import CardFacts, changed_settings, hub_datasets, is_hub_id, model_card

TOKEN = "hf_" + "abcdefgh" * 4


@pytest.fixture
def config(plain):
    """A run's whole configuration in plain values, as a checkpoint holds it."""
    return lambda *overrides: plain("local_run_dir=/home/me/runs/x", *overrides)


def facts(config: dict | None, **values) -> CardFacts:
    known = {"name": "me/my_model", "architecture": "LlamaForCausalLM", "dtype": "bfloat16", "parameters": 1234567}
    return CardFacts(**known, config=config, **{"base": config and config["model"]["name_or_path"], **values})


def test_the_metadata_use_the_terms_of_the_hub(config):
    run = config("model=pythia28", "loss=dpo", "datasets=[hh,shp,{path: Intel/orca_dpo_pairs, prompt: question}]")
    card = ModelCard(model_card(facts(run, examples=5000)))
    assert card.data.to_dict() == {
        "base_model": "EleutherAI/pythia-2.8b",
        "base_model_relation": "finetune",
        "datasets": ["Anthropic/hh-rlhf", "Intel/orca_dpo_pairs", "stanfordnlp/SHP"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dpo"],
    }
    assert "1,234,567 parameters in bfloat16" in card.text and "5,000 examples" in card.text


@pytest.mark.parametrize(
    ("values", "relation", "library"),
    [
        ({}, "finetune", "transformers"),
        ({"adapter": True}, "adapter", "peft"),
        ({"quantized": "int8"}, "quantized", "transformers"),
    ],
)
def test_the_relation_to_the_base_model_is_named(values, relation, library, config):
    data = ModelCard(model_card(facts(config("model=pythia28"), **values))).data
    assert (data.base_model_relation, data.library_name) == (relation, library)


def test_a_new_model_and_local_files_have_no_hub_ids(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local" / "model").mkdir(parents=True)
    run = config("datasets=[/home/me/private/mine.jsonl,other/rows.csv,code.py:mine,local/model]")
    data = ModelCard(model_card(facts(run))).data.to_dict()
    assert not {"base_model", "datasets"} & data.keys()
    assert not is_hub_id("local/model") and is_hub_id("gpt2-large") and not is_hub_id("../x") and not is_hub_id("/a/b")


@pytest.mark.parametrize("name", ["lc", "leetcode", "se", "ultrafeedback", "orca", "nectar", "hh-helpful-base"])
def test_named_sets_have_hub_ids(name):
    [found] = hub_datasets({"datasets": [{"name": name}]})
    assert found.count("/") == 1


def test_only_settings_that_differ_from_the_defaults_are_shown(config):
    run = config("loss=dpo", "loss.beta=0.3", "trainer=FSDPTrainer", "model=pythia28", "lr=1e-6", "model.policy_dtype=bfloat16")
    changed = changed_settings(run)
    assert changed == {
        "loss.beta": (0.3, 0.1),
        "lr": (1e-6, 5e-7),
        "model.block_name": ("GPTNeoXLayer", None),
        "model.policy_dtype": ("bfloat16", "float32"),
    }
    assert changed_settings(config("model=pythia28", "model.block_name=null")) == {}
    assert "| `loss.beta` | `0.3` | `0.1` |" in model_card(facts(run))


def test_names_in_a_configuration_are_not_used_as_paths(config):
    run = config("loss=dpo")
    run["loss"]["name"] = run["trainer"]["name"] = "../config"
    assert "loss.beta" in changed_settings(run)


def test_a_card_contains_no_local_path_and_no_secret(config, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "the-key-of-mine")
    run = config(
        "loss=dpo", "datasets=[{path: /home/me/private/mine.csv, test_path: /home/me/test.csv, prompt: q}]",
        "system_prompt=say the-key-of-mine", f"exp_name={TOKEN}", "wandb.entity=my_team", "cache_dir=/home/me/cache",
        "model.archive=/home/me/runs/sft/LATEST/policy.pt", "++optimizer_kwargs.eps=1e-6",
    )  # fmt: skip
    run["datasets"][0]["where"] = {"source": TOKEN}
    text = model_card(facts(run, notes=[f"from {TOKEN}"]))
    for hidden in ("/home/me", "the-key-of-mine", TOKEN, "my_team"):
        assert hidden not in text
    assert "mine.csv" in text and "`optimizer_kwargs.eps`" in text and "say (a secret)" in text


@settings(deadline=None)
@given(st.text())
def test_a_text_without_secrets_is_unchanged(text):
    assert without_secrets(text) == text


def test_a_user_defined_loss_is_named_without_its_path(config):
    run = config("loss=own", "loss.function=/home/me/my_losses.py:CappedDPO", "++loss.options.cap=10")
    card = model_card(facts(run))
    assert "trained by a user-defined loss, `my_losses.py:CappedDPO`, with cap 10" in card
    assert "/home/me" not in card and "| `loss.options.cap` | `10` |" in card
    assert "own" not in (ModelCard(card).data.tags or [])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["loss=dpo"], "with beta 0.1 on"),
        (["loss=dpo", "loss.label_smoothing=0.1"], "with beta 0.1, label_smoothing 0.1 on"),
        (["loss=beta_DPO"], "with beta 0.1, mode_weight 0.2, a 0.6, threshold running_mean on"),
    ],
)
def test_only_values_that_the_loss_computes_with_are_named(overrides, expected, config):
    assert expected in model_card(facts(config(*overrides), examples=10))


def test_a_chat_model_is_shown_with_messages_and_its_rendered_prompt(config):
    prompt = "<|im_start|>user\nWhat is ``` in Markdown?<|im_end|>\n"
    text = model_card(facts(config(), prompt=prompt))
    assert "apply_chat_template(messages, **options)" in text and f"````text\n{prompt}\n````" in text
    plain = model_card(facts(config()))
    assert "apply_chat_template" not in plain and "not trained on conversations" in plain


def test_the_card_has_a_sample_the_command_the_license_and_no_path(config):
    overrides = {"model": "/home/me/base", "datasets": [{"path": "/home/me/mine.jsonl", "held_out_share": 0.1}], "loss": "dpo"}
    overrides |= {"adapter": "lora", "optimizer_kwargs.eps": 1e-6, "wandb.entity": "my_team", "lr": 1e-4}
    card = model_card(facts(config(), overrides=overrides, sample=("Why?", "Because."), license="apache-2.0"))
    words = "loss=dpo +adapter=lora optimizer_kwargs.eps=1e-06 lr=0.0001"
    assert f"python train.py model=base 'datasets=[{{path: mine.jsonl, held_out_share: 0.1}}]' {words}\n" in card
    assert "```text\nWhy?\n```" in card and "```text\nBecause.\n```" in card and "/home/me" not in card
    assert ModelCard(card).data.license == "apache-2.0"


def test_held_out_means_state_their_number_of_examples_and_the_missing_intervals(config):
    text = model_card(facts(config("n_eval_examples=64"), held_out={"loss/eval": 0.51234, "rewards_eval/accuracies": 0.75}))
    assert "| loss/eval | 0.5123 |" in text and "| rewards_eval/accuracies | 0.75 |" in text
    assert "Means over the held-out examples, at most 64 of them." in text and "no intervals" in text
    for prompts, expected in ((8, "the examples of 8 held-out prompts."), (900, "900 held-out prompts, at most 64 of them.")):
        assert expected in model_card(
            facts(config("n_eval_examples=64"), held_out={"loss/eval": 0.5}, held_out_prompts=prompts)
        )


def test_the_results_of_an_evaluation_have_intervals(config):
    evaluation = {
        "examples": 1200, "prompts": 900, "loss/eval": {"mean": 0.5, "low": 0.45, "high": 0.55},
        "rewards_eval/margins": {"mean": 1.0, "low": None, "high": None},
    }  # fmt: skip
    text = model_card(facts(config(), held_out={"loss/eval": 0.5}, evaluation=evaluation))
    assert "| loss/eval | 0.5 | 0.45 to 0.55 |" in text and "1,200 examples of 900 held-out prompts" in text
    assert "no intervals" not in text and "| rewards_eval/margins" not in text and "too few" not in text
    few = model_card(facts(config(), held_out={"loss/eval": 0.5}, evaluation=evaluation | {"prompts": 9}))
    assert "Held-out metrics: 9 prompts, too few to decide anything by" in few


def test_the_curves_are_means_of_steps_and_the_last_evaluation():
    rows = [{"loss/eval": 0.7, "counters/examples": 0}]
    rows += [{"loss/train": float(number), "counters/examples": 10 * number} for number in range(1, 25)]
    rows.insert(13, {"loss/eval": 0.6, "counters/examples": 120})
    text = model_card(facts(None, rows=rows))
    table = [line for line in text.splitlines() if line.startswith("| ") and line.count("|") == 4]
    # 240 examples in 12 rows: two steps each, 1 and 2 have the mean 1.5.
    assert table[0] == "| examples | loss/train | loss/eval |"
    assert table[1] == "| 20 | 1.5 | 0.7 |" and table[6] == "| 120 | 11.5 | 0.6 |" and table[12] == "| 240 | 23.5 |  |"
    assert len(table) == 13


def test_unknown_sections_of_a_card_are_omitted():
    text = model_card(facts(None, base="EleutherAI/pythia-2.8b", notes=["Converted."]))
    assert "Converted." in text and "Training data" not in text and "Configuration" not in text and "Held-out" not in text


@settings(deadline=None)
@given(value=st.text(), name=st.text(min_size=1))
def test_no_value_breaks_the_table_or_the_metadata(value, name):
    run = {
        "model": {"name_or_path": name}, "loss": {"name": "dpo"}, "trainer": {"name": "BasicTrainer"},
        "datasets": [{"path": name, "prompt": value}], "system_prompt": value, "template": None,
    }  # fmt: skip
    text = model_card(facts(run))
    card = ModelCard(text)
    assert card.data.library_name == "transformers"
    if value:
        [row] = [line for line in text.splitlines() if line.startswith("| `system_prompt` |")]
        assert row.replace("\\|", "").count("|") == 4
