"""Models to talk to: prompts as in training, answers that do not depend on the cache, and what is no such model."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from preference_training.core.errors import UserError
from preference_training.data.records.record import PreferenceRecord, Turn
from preference_training.data.rendering.settings import TokenSettings
from preference_training.data.tokenization import tokenize_records
from preference_training.generation.chat import (
    ChatModel,
    LoadOptions,
    load_before_training,
    load_for_chat,
    newest_of,
    open_responders,
)
from preference_training.generation.chat_format import ChatFormat, with_system
from preference_training.generation.settings import GenerationSettings
from preference_training.generation.streaming import PrefixCache, TextStream, is_croppable
from preference_training.modeling.adapters import adding
from tests.architectures.tiny_models import make
from tests.support import forked
from tests.support.chat_templates import LLAMA_3, PHI
from tests.support.files import GOLDEN, ROOT

TRAIN = (
    *("loss=dpo", "model.from_config.num_hidden_layers=1", "n_examples=32", "n_eval_examples=8", "do_first_eval=false"),
    *("eval_every=16", "sample_during_eval=false", "wandb.enabled=false", "lr=0.01", "warmup_steps=0"),
)


def quiet(_text: str) -> None:
    """Nobody listens."""


def trained(folder: Path, *overrides: str) -> Path:
    done = forked.run([ROOT / "train.py", *TRAIN, *overrides], folder)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "it"


@pytest.fixture(scope="module")
def full_run(tmp_path_factory) -> Path:
    """A run of all weights, from scratch, on dialogues: step-16 and step-32."""
    return trained(tmp_path_factory.mktemp("full"), "local_run_dir=runs/it")


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory) -> Path:
    """A run of an adapter."""
    return trained(tmp_path_factory.mktemp("lora"), "local_run_dir=runs/it", "+adapter=lora")


@pytest.fixture
def model_directory(tmp_path) -> Path:
    """A tiny model with a chat template, in a directory that no run has left."""
    make("llama", tmp_path / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tiny")
    tokenizer.chat_template = PHI
    tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


QUESTIONS = ["How do I remove an ink stain?", "And from wool, please?", "Thanks. Anything else?"]


def talked(chat: ChatModel, questions: list[str], **changes) -> list[str]:
    """The answers to questions, one after another, in one conversation."""
    turns, answers = [], []
    for question in questions:
        turns.append(Turn("user", question))
        answers.append(chat.respond(turns, changes, quiet).text)
        turns.append(Turn("assistant", answers[-1]))
    return answers


# ---- prompts ----------------------------------------------------------------------------------------------------------------

CONVERSATION = (
    Turn("system", "Be brief."),
    Turn("user", "Why is it wet?"),
    Turn("assistant", "Rain."),
    Turn("user", "Is it over?\n"),
)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("name", ["raw", "hh", "chatml", "chat"])
@pytest.mark.parametrize("turns", [CONVERSATION[1:2], CONVERSATION[1:], CONVERSATION], ids=["question", "turns", "system"])
def test_prompts_are_the_token_ids_of_training(name, bos, turns):
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")
    tokenizer.chat_template = LLAMA_3
    if bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.bos_token = tokenizer.convert_ids_to_tokens(5)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, 5)]
        )
    # A text that is alone stays as it is under raw; rows of such texts are what it is for.
    prompt = turns[0].content if name == "raw" and len(turns) == 1 else turns
    record = PreferenceRecord(prompt, [" Yes."], [], " Yes.", 1, "here")
    [expected] = tokenize_records([record], tokenizer, TokenSettings("targets", 512, 256, template=name))
    assert ChatFormat(name, tokenizer).prompt_ids(turns) == expected.prompt_ids


def test_a_system_prompt_precedes_what_has_none():
    assert with_system("Why?", "Be brief.") == (Turn("system", "Be brief."), Turn("user", "Why?"))
    assert with_system("\n\nHuman: Why?\n\nAssistant:", "Be brief.")[1:] == (Turn("user", "Why?"),)
    assert with_system(CONVERSATION, "Be long.") == CONVERSATION and with_system("Why?", None) == "Why?"


# ---- answers and the cache --------------------------------------------------------------------------------------------------


def noted_lengths(model, monkeypatch) -> list[int]:
    """The number of tokens of each forward pass from now on."""
    lengths, forward = [], model.forward

    def noting(*args, **inputs):
        lengths.append(inputs["input_ids"].shape[1])
        return forward(*args, **inputs)

    monkeypatch.setattr(model, "forward", noting)
    return lengths


# Full attention, learned positions, windows of 16 tokens, windows beside full attention, states, states beside attention.
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma3_text", "mamba2", "qwen3_next", "minimax"])
@pytest.mark.parametrize("temperature", [0, 1])
def test_answers_do_not_depend_on_the_kept_cache(name, temperature, tmp_path, monkeypatch):
    make(name, tmp_path)
    chat = load_for_chat(str(tmp_path), LoadOptions(template="hh"))
    changes = {"max_new_tokens": 8, "temperature": temperature}
    lengths = noted_lengths(chat.model, monkeypatch)
    with_cache = talked(chat, QUESTIONS, **changes)
    computed = sum(lengths)
    lengths.clear()
    monkeypatch.setattr(PrefixCache, "take", lambda *_: {})
    assert talked(chat, QUESTIONS, **changes) == with_cache
    if name in ("llama", "gpt2"):
        assert computed < sum(lengths)


def test_a_turn_computes_new_tokens_only(full_run, monkeypatch):
    chat = load_for_chat(str(full_run))
    lengths = noted_lengths(chat.model, monkeypatch)
    turns = [Turn("user", QUESTIONS[0])]
    answer = chat.respond(turns, {"max_new_tokens": 6}, quiet)
    first = len(chat.prompt_ids(tuple(turns)))
    assert lengths[0] == first and set(lengths[1:]) == {1}
    turns += [Turn("assistant", answer.text), Turn("user", QUESTIONS[1])]
    known, prompt = list(chat.cache.ids), chat.prompt_ids(tuple(turns))
    lengths.clear()
    chat.respond(turns, {"max_new_tokens": 6}, quiet)
    shared = next(place for place, (one, other) in enumerate(zip(known, prompt, strict=False)) if one != other)
    # Less than the whole prompt: what differs begins in the last answer at the earliest.
    assert shared >= first and lengths[0] == len(prompt) - shared
    # Taken back: the same question again needs its last token only.
    lengths.clear()
    chat.respond(turns, {"max_new_tokens": 6}, quiet)
    assert lengths[0] == 1


def test_an_interrupted_answer_leaves_a_cache_that_is_right(full_run):
    chat = load_for_chat(str(full_run))
    expected = talked(chat, QUESTIONS, temperature=1, max_new_tokens=12)
    heard = []

    def stopping(text: str) -> None:
        heard.append(text)
        if len(heard) == 4:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        chat.respond([Turn("user", QUESTIONS[0])], {"temperature": 1, "max_new_tokens": 12}, stopping)
    assert chat.cache.ids and len(chat.cache.ids) == chat.cache.cache.get_seq_length()
    assert talked(chat, QUESTIONS, temperature=1, max_new_tokens=12) == expected


def test_full_windows_and_states_are_not_kept(tmp_path):
    for name, kept in {"llama": True, "mistral": False, "qwen3_next": False, "mamba2": False}.items():
        make(name, tmp_path / name)
        chat = load_for_chat(str(tmp_path / name), LoadOptions(template="hh"))
        chat.respond([Turn("user", QUESTIONS[0])], {"max_new_tokens": 20}, quiet)
        assert bool(chat.cache.ids) == kept, name
    # A window of 16 tokens that is not full yet holds everything.
    chat = load_for_chat(str(tmp_path / "mistral"), LoadOptions(template="raw"))
    chat.respond([Turn("user", "Why?")], {"max_new_tokens": 4}, quiet)
    assert is_croppable(chat.cache.cache)


def test_answers_are_those_of_plain_transformers(model_directory):
    chat = load_for_chat(str(model_directory))
    model, tokenizer = (
        kind.from_pretrained(model_directory, **more)
        for kind, more in ((AutoModelForCausalLM, {"dtype": torch.float32}), (AutoTokenizer, {}))
    )
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    expected = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert talked(chat, QUESTIONS[:1], max_new_tokens=20) == [tokenizer.decode(expected, skip_special_tokens=True)]


@pytest.mark.parametrize("changes", [{}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.8, "top_p": 0.9, "top_k": 40}])
def test_answers_in_batches_are_those_of_a_conversation(changes, full_run):
    chat = load_for_chat(str(full_run))
    changes = {"max_new_tokens": 10, "repetition_penalty": 1.3, **changes}
    alone = [chat.respond([Turn("user", question)], changes, quiet).text for question in QUESTIONS]
    assert chat.responses([(Turn("user", question),) for question in QUESTIONS], changes) == alone
    assert chat.responses(list(reversed([(Turn("user", question),) for question in QUESTIONS])), changes) == alone[::-1]


def test_settings_shape_what_is_sampled(full_run):
    chat = load_for_chat(str(full_run))
    greedy = talked(chat, QUESTIONS[:1], max_new_tokens=10)
    assert talked(chat, QUESTIONS[:1], max_new_tokens=10, temperature=1, top_k=1) == greedy
    assert talked(chat, QUESTIONS[:1], max_new_tokens=10, temperature=1e-4) == greedy
    seeds = {tuple(talked(chat, QUESTIONS[:1], max_new_tokens=10, temperature=2, seed=seed)) for seed in range(4)}
    assert len(seeds) == 4
    assert talked(chat, QUESTIONS[:1], max_new_tokens=10, temperature=2, seed=1) == talked(
        chat, QUESTIONS[:1], max_new_tokens=10, temperature=2, seed=1
    )


def test_a_reply_says_why_it_ended(full_run):
    chat = load_for_chat(str(full_run))
    cut = chat.respond([Turn("user", "Why?")], {"max_new_tokens": 3}, quiet)
    assert (cut.ended, cut.tokens, cut.prompt_tokens) == ("length", 3, len(chat.prompt_ids((Turn("user", "Why?"),))))
    all_tokens = replace(chat, ends=chat.ends._replace(tokens=frozenset(range(700))), cache=PrefixCache())
    assert all_tokens.respond([Turn("user", "Why?")], {}, quiet).ended == "stop"
    stopped = chat.respond([Turn("user", "Why?")], {"max_new_tokens": 30}, quiet, [cut.text])
    assert (stopped.ended, stopped.text) == ("stop", "")


def test_the_settings_that_a_model_advises_are_its_defaults(model_directory):
    assert load_for_chat(str(model_directory)).settings == GenerationSettings()
    advised = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "repetition_penalty": 1.05, "eos_token_id": [0, 7]}
    (model_directory / "generation_config.json").write_text(json.dumps(advised))
    chat = load_for_chat(str(model_directory))
    assert chat.settings == GenerationSettings(0.6, 0.95, 50, 1.05) and chat.ends.tokens == {0, 7}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("temperature", "-1", "at least 0"),
        ("top_p", "0", "above 0"),
        ("top_k", "x", "whole number"),
        ("tempo", "1", "temperature"),
    ],
)
def test_a_wrong_setting_is_one_message(name, value, said):
    with pytest.raises(UserError, match=said):
        GenerationSettings().changed({name: value})


def test_a_conversation_that_is_too_long_is_one_message(model_directory):
    chat = load_for_chat(str(model_directory))
    with pytest.raises(UserError, match=r"tokens, and tiny reads at most 512"):
        chat.respond([Turn("user", "word " * 600)], {}, quiet)
    # With room for less than max_new_tokens it is answered as far as there is room.
    long = [Turn("user", "a" * 480)]
    reply = chat.respond(long, {"max_new_tokens": 400}, quiet)
    assert reply.prompt_tokens + reply.tokens <= 512


# ---- text as it grows -------------------------------------------------------------------------------------------------------


def test_text_comes_in_whole_characters_and_without_what_ends_it(tokenizer):
    ids = tokenizer("É 你好 — done.\n\nHuman: more", add_special_tokens=False).input_ids
    heard = []
    stream = TextStream(tokenizer, heard.append, ["\n\nHuman:"])
    went_on = [stream.add(token) for token in ids]
    assert "".join(heard) == stream.end() == "É 你好 — done." and "\ufffd" not in "".join(heard)
    assert not went_on[-1] and len(heard) > 5


def test_what_only_looks_like_an_end_is_said_in_the_end(tokenizer):
    heard = []
    stream = TextStream(tokenizer, heard.append, ["\n\nHuman:"])
    for token in tokenizer("Fine.\n\nHum", add_special_tokens=False).input_ids:
        assert stream.add(token)
    assert "".join(heard) == "Fine." and stream.end() == "".join(heard) == "Fine.\n\nHum"


# ---- what can be talked to --------------------------------------------------------------------------------------------------


def test_a_run_is_its_newest_complete_checkpoint_in_the_format_of_its_training(full_run):
    chat = load_for_chat(str(full_run))
    assert chat.name == "it step-32" and chat.format.name == "hh" and chat.format.stops == ("\n\nHuman:",)
    assert load_for_chat(str(full_run / "step-16")).name == "it step-16"
    plain = AutoModelForCausalLM.from_pretrained(full_run / "LATEST")
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(chat.model.parameters(), plain.parameters(), strict=True))


def test_a_checkpoint_that_is_being_written_is_not_taken(full_run, tmp_path):
    run = tmp_path / "moved"
    run.mkdir()
    (run / "step-32").symlink_to(full_run / "step-32")
    (run / "step-48").mkdir()
    assert load_for_chat(str(run)).name.endswith("step-32")


@pytest.mark.parametrize("kind", ["full_run", "lora_run"])
def test_a_run_is_compared_with_what_it_was_before_training(kind, request):
    """The model from scratch is built again from the run's seed, and an adapter is switched off."""
    run = request.getfixturevalue(kind)
    before, chat = open_responders(str(run), "reference", None, LoadOptions())
    assert before.name == "before training" and (before.model is chat.model) == (kind == "lora_run")
    ids = torch.tensor([chat.prompt_ids((Turn("user", "Why?"),))])
    with torch.no_grad():
        trained = chat.model(ids).logits
        with before.weights():
            reference = before.model(ids).logits
        assert torch.equal(chat.model(ids).logits, trained) and not torch.allclose(reference, trained)
    if kind == "lora_run":
        base = AutoModelForCausalLM.from_pretrained(run / "base")
        with torch.no_grad():
            assert torch.equal(base(ids).logits, reference)
    # Each goes on from its own cache, whoever was asked before.
    alone = talked(load_before_training(load_for_chat(str(run))), QUESTIONS, max_new_tokens=8)
    for question, expected in zip(QUESTIONS[:1], alone, strict=False):
        chat.respond([Turn("user", question)], {"max_new_tokens": 8}, quiet)
        assert before.respond([Turn("user", question)], {"max_new_tokens": 8}, quiet).text == expected


def test_a_model_that_has_changed_since_is_no_reference(full_run, tmp_path):
    import shutil

    shutil.copytree(full_run / "step-32", tmp_path / "step-32")
    state = tmp_path / "step-32" / "state.json"
    state.write_text(re.sub(r'"began_with": ?"\w', '"began_with": "z', state.read_text()))
    with pytest.raises(UserError, match="no longer what it was then"):
        open_responders(str(tmp_path / "step-32"), "reference", None, LoadOptions())


def test_exports_are_what_their_runs_are(lora_run, tmp_path):
    for name, more in {"merged": ["--merge"], "adapter": []}.items():
        done = forked.run([ROOT / "scripts/export.py", lora_run, "--to", tmp_path / name, *more], tmp_path)
        assert done.returncode == 0, done.stderr
    expected = talked(load_for_chat(str(lora_run)), QUESTIONS, max_new_tokens=12)
    for name in ("merged", "adapter"):
        chat = load_for_chat(str(tmp_path / name))
        assert (chat.name, chat.format.name) == (name, "chat")
        # Their chat template is that of the training; the space before an answer, and the text that ends it, are no part of it.
        assert talked(chat, QUESTIONS[:1], max_new_tokens=12)[0].removeprefix(" ").startswith(expected[0]) and expected[0]
    with pytest.raises(UserError, match="is not a run of this project"):
        load_before_training(load_for_chat(str(tmp_path / "merged")))


def test_of_several_runs_the_newest_is_taken(full_run, lora_run):
    assert newest_of([str(full_run)]) == str(full_run)
    times = {str(run): run.stat().st_mtime for run in (full_run, lora_run)}
    assert newest_of(list(times)) == max(times, key=times.get)
    with pytest.raises(UserError, match="expected one model"):
        newest_of([str(full_run), "gone"])


def test_what_is_no_model_is_one_message(full_run, tmp_path):
    with pytest.raises(UserError, match="holds no model: none of config.json"):
        load_for_chat(str(tmp_path))
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(UserError, match="this run has no checkpoint yet"):
        load_for_chat(str(tmp_path))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="this file is no model"):
        load_for_chat(str(tmp_path / "notes.txt"))
    with pytest.raises(UserError, match=r"no such directory.*did you mean.*/it\?"):
        load_for_chat(str(full_run.parent / "itt"))
    with pytest.raises(UserError, match=rf"no such directory. Beside it: there are .*{full_run.name}\b"):
        load_for_chat(str(full_run.parent / ("z" * 200)))
    with pytest.raises(UserError, match=r"nobody/nothing could not be loaded.*hub id"):
        load_for_chat("nobody/nothing")
    (tmp_path / "step-8").mkdir()
    (tmp_path / "step-8" / "state.json").write_text("{")
    with pytest.raises(UserError, match="state.json is damaged"):
        load_for_chat(str(tmp_path / "step-8"))


def test_a_reward_model_writes_no_text(tmp_path):
    run = trained(tmp_path, "local_run_dir=runs/it", "loss=reward")
    with pytest.raises(UserError, match="reward model, which scores responses and writes none"):
        load_for_chat(str(run))


def test_an_adapter_without_peft_says_what_to_install(lora_run, monkeypatch):
    monkeypatch.setattr(adding, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package peft.*requirements/lora\.txt"):
        load_for_chat(str(lora_run))


@pytest.mark.long
def test_a_real_model_answers_as_plain_transformers_does():
    """SmolLM2, of several turns: the same greedy tokens, with the kept cache and in a batch."""
    chat = load_for_chat("smollm2-135m")
    directory = chat.model.config._name_or_path
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    questions = ["What is the capital of France?", "And of Italy?", "Name three colors."]
    answers, messages = talked(chat, questions, max_new_tokens=24), []
    assert "Paris" in answers[0]
    for question, answer in zip(questions, answers, strict=True):
        messages.append({"role": "user", "content": question})
        inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        assert inputs["input_ids"][0].tolist() == chat.prompt_ids([Turn(*message.values()) for message in messages])
        found = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert tokenizer.decode(found, skip_special_tokens=True) == answer
        messages.append({"role": "assistant", "content": answer})
    assert (
        chat.responses([questions[0], tuple(Turn(*message.values()) for message in messages[:3])], {"max_new_tokens": 24})
        == (answers[:2])
    )
