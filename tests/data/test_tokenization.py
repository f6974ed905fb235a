"""Token ids over tokenizers of every kind: exact ends and boundaries, lengths; and files that hold token ids already."""

import itertools
import os
import pickle
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from preference_training.core.errors import UserError
from preference_training.data.records.record import PreferenceRecord, Turn
from preference_training.data.records.report import SAME_TEXT, DataReport
from preference_training.data.rendering.records import NO_TURNS, OWN_SYSTEM_TURN
from preference_training.data.rendering.settings import TokenSettings
from preference_training.data.rows.examples import NO_PAIR_TO_COMPARE
from preference_training.data.rows.templates import build_template
from preference_training.data.token_files import NO_END, TOKEN_FIELDS, Vocabulary, read_tokenized, write_tokenized
from preference_training.data.tokenization import (
    NOTHING_LEFT,
    PROMPT_CUT,
    RESPONSE_CUT,
    SAME_IDS,
    TokenizedPrompt,
    tokenize_records,
)
from preference_training.modeling.tokenizer import END_OF_TEXT, byte_level_tokenizer

# ---- tokenizers -----------------------------------------------------------------------------------------------------------

WORDS = ("▁the", "▁yes", "▁no", "ask", "▁INST", "user", "assistant", "▁Assistant:")
CHARACTERS = ("▁", *map(chr, range(33, 127)))
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
LLAMA_2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def with_bos(backend: Tokenizer, chat_template: str) -> PreTrainedTokenizerFast:
    """A tokenizer that begins every text with <s> and decodes as SentencePiece's do."""
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))])
    blanks = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(blanks)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = chat_template
    return tokenizer


def merged_words() -> models.BPE:
    """Byte-pair encoding with the pieces of WORDS, each grown character by character, and bytes for all else."""
    merges = dict.fromkeys((word[:end], word[end]) for word in WORDS for end in range(1, len(word)))
    pieces = dict.fromkeys(["<unk>", "<s>", "</s>", *BYTES, *CHARACTERS, *(left + right for left, right in merges)])
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    return models.BPE(vocabulary, list(merges), byte_fallback=True, unk_token="<unk>")


@cache
def llama() -> PreTrainedTokenizerFast:
    """As Llama 2's: a blank before the first word of a text, as "▁", from the pre-tokenizer; bytes where it has no piece."""
    backend = Tokenizer(merged_words())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return with_bos(backend, LLAMA_2)


@cache
def legacy_llama() -> PreTrainedTokenizerFast:
    """As older files of it: the blank comes from the normalizer, behind every special token too."""
    backend = Tokenizer(merged_words())
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return with_bos(backend, LLAMA_2)


@cache
def unigram() -> PreTrainedTokenizerFast:
    """As T5's kind of SentencePiece: the likeliest pieces, a blank before every text."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((word, -2.0) for word in WORDS)]
    pieces += [*((character, -5.0) for character in CHARACTERS), *((byte, -20.0) for byte in BYTES)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    return with_bos(backend, LLAMA_2)


@cache
def gpt2() -> PreTrainedTokenizerFast:
    """As GPT-2's: bytes and merges of them, one token for both ends, and none of them added by itself."""
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"bos_token": END_OF_TEXT})
    return tokenizer


@cache
def roberta() -> PreTrainedTokenizerFast:
    """Byte-level too, but with a blank put before every text."""
    tokenizer = byte_level_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


@cache
def chat(eos: str = "<|im_end|>") -> PreTrainedTokenizerFast:
    """As Qwen's: ChatML, whose marker of a turn's end is the end-of-sequence token of chat models, and not of base models."""
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "eos_token": eos})
    tokenizer.chat_template = CHATML
    return tokenizer


def chat_base() -> PreTrainedTokenizerFast:
    """A chat tokenizer that ends sequences with another token than a turn."""
    return chat(END_OF_TEXT)


TOKENIZERS = (llama, legacy_llama, unigram, gpt2, roberta, chat, chat_base)
WITH_CHAT_TEMPLATE = (llama, unigram, chat, chat_base)
# Legacy tokenizers put a blank behind each special token, so that a text with some inside is not decoded to itself.
CASES = [(make, template) for make in TOKENIZERS for template in (None, "raw", "hh", "chatml")]
CASES += [(make, "chat") for make in WITH_CHAT_TEMPLATE]


def name_of(value) -> str:
    return getattr(value, "__name__", str(value))


def record(prompt="ask", responses=(" yes", " no"), pairs=((0, 1),), target=0) -> PreferenceRecord:
    return PreferenceRecord(prompt, list(responses), list(pairs), responses[target], 1, "set, train prompt 1")


def tokenized(records, tokenizer, report=None, examples="pairs", max_length=10**6, max_prompt_length=10**5, **options):
    settings = TokenSettings(examples, max_length, max_prompt_length, **options)
    return list(tokenize_records(records, tokenizer, settings, report))


def decoded(tokenizer, ids: list[int]) -> str:
    """The text of ids with its special tokens."""
    return tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)


def spellings(tokenizer, text: str) -> tuple[str, str]:
    """How a text may be decoded: behind the beginning of the sequence, some tokenizers put a blank before it."""
    bos = tokenizer.bos_token if adds_bos(tokenizer) else ""
    text = text.removeprefix(bos)
    return f"{bos}{text}", f"{bos} {text}"


def adds_bos(tokenizer) -> bool:
    return tokenizer.bos_token == "<s>"


# ---- ends and boundaries --------------------------------------------------------------------------------------------------

# Text that stands for itself: no special token, nor how SentencePiece writes blanks and bytes.
SPELLED = ("<s>", "</s>", "<unk>", "▁", "<0x", "<|")
texts = (
    st.text(max_size=20) | st.lists(st.sampled_from([" yes", " no", "the", " ", "\n", "é", "漢", "🙂"])).map("".join)
).filter(lambda text: not any(token in text for token in SPELLED))


@pytest.mark.parametrize(("make", "template"), CASES, ids=name_of)
@settings(deadline=None, max_examples=40)
@given(prompt=texts, responses=st.lists(texts, min_size=2, max_size=3, unique=True))
def test_decoding_prompt_and_response_gives_the_rendered_text_between_one_bos_and_one_eos(make, template, prompt, responses):
    tokenizer = make()
    # A prompt needs one token where nothing is put before it.
    assume(prompt or adds_bos(tokenizer))
    pairs = [(0, index) for index in range(1, len(responses))]
    text, endings = build_template(template, None, tokenizer)(prompt, responses)
    # Pairs of the same token ids are left out.
    assume(len(set(endings)) == len(endings))
    [found] = tokenized([record(prompt, responses, pairs)], tokenizer, template=template)
    if adds_bos(tokenizer):
        assert found.prompt_ids[0] == tokenizer.bos_token_id and found.prompt_ids.count(tokenizer.bos_token_id) == 1
    for response, ending in zip(found.responses, endings, strict=True):
        assert response.count(tokenizer.eos_token_id) == 1 and response[-1] == tokenizer.eos_token_id
        assert not adds_bos(tokenizer) or tokenizer.bos_token_id not in response
        rendered = text + ending + tokenizer.eos_token
        assert decoded(tokenizer, found.prompt_ids + response) in spellings(tokenizer, rendered)
        assert decoded(tokenizer, found.prompt_ids) in spellings(tokenizer, text)


@pytest.mark.parametrize("make", WITH_CHAT_TEMPLATE, ids=name_of)
@settings(deadline=None, max_examples=40)
@given(turns=st.lists(texts, min_size=4, max_size=4), answer=texts)
def test_a_conversation_is_decoded_to_what_the_chat_template_writes_of_it_with_one_end(make, turns, answer):
    tokenizer = make()
    roles = itertools.cycle(["user", "assistant"])
    prompt = tuple(Turn(role, text) for role, text in zip(roles, turns[:3], strict=False))
    assume(answer.strip() != turns[3].strip())
    [found] = tokenized([record(prompt, [answer, turns[3]])], tokenizer, template="chat")
    messages = [turn._asdict() for turn in (*prompt, Turn("assistant", answer))]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    if make is chat_base:
        whole += END_OF_TEXT
    # ChatML goes on with a line break; what is trained on ends with the end.
    whole = whole[: whole.rindex(tokenizer.eos_token) + len(tokenizer.eos_token)]
    ids = found.prompt_ids + found.responses[0]
    text = decoded(tokenizer, ids)
    # Where every text begins with a blank, so does every text behind a special token.
    assert text.replace("<s> [INST]", "<s>[INST]") == whole
    assert found.responses[0].count(tokenizer.eos_token_id) == 1
    if adds_bos(tokenizer):
        # One at the very beginning, and one before the second question: the template's own.
        assert ids[:2].count(tokenizer.bos_token_id) == 1 and ids.count(tokenizer.bos_token_id) == 2


@pytest.mark.parametrize("make", [llama, legacy_llama, unigram], ids=name_of)
def test_a_response_continues_where_its_prompt_ends(make):
    tokenizer = make()
    [found] = tokenized([record("ask the", [" yes", "yes"])], tokenizer)
    for response, text in zip(found.responses, (" yes", "yes"), strict=True):
        assert decoded(tokenizer, found.prompt_ids + response) == f"<s> ask the{text}</s>"
    # Words begin with their blank, so that joined ids are those of the joined text.
    assert found.prompt_ids + found.responses[0] == [*tokenizer("ask the yes").input_ids, tokenizer.eos_token_id]
    assert tokenizer.convert_ids_to_tokens(found.responses[0]) == ["▁yes", "</s>"]
    assert "▁" not in "".join(tokenizer.convert_ids_to_tokens(found.responses[1]))


@pytest.mark.parametrize("prompt", ["ask", "<s>ask"])
@pytest.mark.parametrize("make", [llama, legacy_llama, unigram], ids=name_of)
def test_a_prompt_that_starts_with_its_bos_gets_no_second_one(make, prompt):
    tokenizer = make()
    [found] = tokenized([record(prompt)], tokenizer)
    own = tokenizer("ask").input_ids if prompt == "ask" else tokenizer(prompt, add_special_tokens=False).input_ids
    assert found.prompt_ids == own
    assert own[0] == tokenizer.bos_token_id and own.count(tokenizer.bos_token_id) == 1


def test_a_bos_that_the_tokenizer_does_not_add_is_not_added():
    assert tokenized([record()], gpt2())[0].prompt_ids == gpt2()("ask").input_ids
    assert gpt2().bos_token_id not in gpt2()("ask").input_ids


def test_padding_and_truncation_that_a_tokenizers_file_asks_for_do_not_reach_the_ids():
    tokenizer = byte_level_tokenizer()
    expected = tokenized([record(prompt="a long prompt, longer than four tokens")], tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    assert tokenized([record(prompt="a long prompt, longer than four tokens")], tokenizer) == expected


def test_a_tokenizer_that_is_all_python_gives_the_same_ids():
    class Slow:
        """What the code uses of a tokenizer that has no fast form."""

        is_fast, backend_tokenizer = False, None
        eos_token, eos_token_id, bos_token_id, chat_template = END_OF_TEXT, gpt2().eos_token_id, None, None

        def __call__(self, text, **options):
            return gpt2()(text, **options)

    assert tokenized([record(), record("the")], Slow()) == tokenized([record(), record("the")], gpt2())


def test_records_come_out_in_order_however_many_there_are():
    # More than are tokenized at once.
    found = tokenized(
        (PreferenceRecord(f"ask {n}", ["yes", "no"], [(0, 1)], "yes", n, f"row {n}") for n in range(2100)), gpt2()
    )
    assert [prompt.number for prompt in found] == list(range(2100))
    assert [gpt2().decode(prompt.prompt_ids) for prompt in found] == [f"ask {n}" for n in range(2100)]


# ---- the marker of the end ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", TOKENIZERS, ids=name_of)
@pytest.mark.parametrize("place", ["prompt", "turn", "response", "target"])
def test_a_text_with_the_end_of_sequence_token_is_refused_with_its_source(make, place):
    eos = make().eos_token
    rows = {
        "prompt": record(f"ask{eos}"),
        "turn": record((Turn("user", f"a{eos}b"),)),
        "response": record(responses=[" yes", f" n{eos}o"]),
        "target": record(responses=[f"{eos} yes", " no"]),
    }
    with pytest.raises(UserError, match="datasets: set, train prompt 1: the text contains .* marks the end of a response"):
        tokenized([rows[place]], make(), examples="targets" if place == "target" else "pairs")


def test_a_text_with_the_end_of_sequence_token_is_counted_where_bad_rows_are_skipped():
    report = DataReport(skip_bad_rows=True)
    found = tokenized([record(), record(f"ask{END_OF_TEXT}"), record("again")], gpt2(), report)
    assert [gpt2().decode(prompt.prompt_ids) for prompt in found] == ["ask", "again"]
    assert report.num_bad_rows == 1 and "set, train prompt 1: the text contains '<|endoftext|>'" in report.bad_rows[0]


def test_a_response_that_becomes_the_end_only_when_it_is_normalised_is_refused_too():
    tokenizer = byte_level_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_special_tokens({"eos_token": AddedToken("<end>", normalized=True, special=True)})
    assert tokenizer("<END>", add_special_tokens=False).input_ids == [tokenizer.eos_token_id]
    with pytest.raises(UserError, match="datasets: set, train prompt 1: the text contains '<end>'"):
        tokenized([record(responses=[" yes", " <END>"])], tokenizer)


def test_a_response_of_no_pair_may_hold_anything():
    [found] = tokenized([record(responses=[" yes", f" x{END_OF_TEXT}", " no"], pairs=[(0, 2)])], gpt2())
    assert [gpt2().decode(response) for response in found.responses] == [f" yes{END_OF_TEXT}", f" no{END_OF_TEXT}"]


def test_a_conversation_whose_turns_end_with_the_end_of_sequence_token_is_accepted():
    prompt = (Turn("user", "the"), Turn("assistant", "yes"), Turn("user", "ask"))
    for make, template, ends in ((llama, "chat", 1), (chat, "chat", 3), (chat, "chatml", 3)):
        [found] = tokenized([record(prompt)], make(), template=template)
        assert found.prompt_ids.count(make().eos_token_id) == ends
        assert [response.count(make().eos_token_id) for response in found.responses] == [1, 1]


@pytest.mark.parametrize("template", [None, "hh", "chatml", "raw"])
def test_responses_without_a_prompt_stand_behind_the_beginning_of_the_sequence_alone(template):
    [found] = tokenized([record("")], gpt2(), template=template)
    assert found.prompt_ids == [gpt2().bos_token_id]
    assert [gpt2().decode(ids) for ids in found.responses] == [f" yes{END_OF_TEXT}", f" no{END_OF_TEXT}"]
    assert tokenized([record("")], llama(), template=template)[0].prompt_ids == [llama().bos_token_id]


def test_without_a_beginning_of_the_sequence_the_first_token_or_the_end_before_is_what_a_text_is_conditioned_on():
    assert chat().bos_token_id is None
    text = record("", ["the yes no", "the no"])
    [pair] = tokenized([text], chat())
    assert pair.prompt_ids == [chat().eos_token_id]
    [found] = tokenized([text], chat(), examples="targets")
    ids = chat()("the yes no").input_ids
    assert (found.prompt_ids, found.responses) == (ids[:1], [[*ids[1:], chat().eos_token_id]])


def test_a_prompt_of_which_the_tokenizer_keeps_nothing_is_refused():
    tokenizer = byte_level_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("ask", "")
    with pytest.raises(UserError, match="datasets: set, train prompt 1: the prompt is empty"):
        tokenized([record()], tokenizer)


def test_a_conversation_that_the_chat_template_refuses_is_named_or_counted():
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = "{% if messages[0]['content'] == 'ask' %}{{ raise_exception('Not that.') }}{% endif %}" + CHATML
    rows = [record("the"), record("ask"), record("why")]
    with pytest.raises(
        UserError, match="datasets: set, train prompt 1: .*chat template refuses a conversation of user: Not that"
    ):
        tokenized(rows, tokenizer, template="chat")
    report = DataReport(skip_bad_rows=True)
    assert len(tokenized(rows, tokenizer, report, template="chat")) == 2 and report.num_bad_rows == 1


# ---- what is kept ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [None, "hh", "chatml"])
def test_sft_keeps_the_target_alone(template):
    [found] = tokenized([record(target=1)], gpt2(), examples="targets", template=template)
    text, [response] = build_template(template, None, gpt2())("ask", [" no"])
    assert (gpt2().decode(found.prompt_ids), found.pairs) == (text, [])
    assert [gpt2().decode(ids) for ids in found.responses] == [response + END_OF_TEXT]


def test_sft_keeps_every_target_of_a_record_each_by_itself():
    several = replace(record(responses=[" yes", " no", " why"]), sft_targets=(" yes", " why", " yes"))
    found = tokenized([several, record("the")], gpt2(), examples="targets")
    assert [gpt2().decode(prompt.prompt_ids) for prompt in found] == ["ask"] * 3 + ["the"]
    texts = [[gpt2().decode(ids) for ids in prompt.responses] for prompt in found]
    assert texts == [[f"{text}{END_OF_TEXT}"] for text in (" yes", " why", " yes", several.sft_target)]
    assert {prompt.number for prompt in found} == {1} and not any(prompt.pairs for prompt in found)
    # A run that began with the first version goes on with the data that it had.
    [one] = tokenized([several], gpt2(), examples="targets", version=1)
    assert [gpt2().decode(ids) for ids in one.responses] == [f"{several.sft_target}{END_OF_TEXT}"]


@pytest.mark.parametrize(("template", "changed"), [(None, {NO_TURNS: 1, OWN_SYSTEM_TURN: 1}), ("hh", {OWN_SYSTEM_TURN: 1})])
def test_prompts_that_do_without_the_system_prompt_are_counted(template, changed):
    conversation = (Turn("user", "ask"),)
    rows = [record("ask"), record(conversation), record((Turn("system", "the"), *conversation))]
    report = DataReport()
    tokenized(rows, gpt2(), report, template=template, system_prompt="why")
    assert report.changed == changed
    report = DataReport()
    tokenized(rows, gpt2(), report, template=template)
    assert report.changed == {}


def test_a_chat_template_that_does_not_begin_responses_is_noted():
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = CHATML.split("{% if add")[0]
    report = DataReport()
    [found] = tokenized([record()], tokenizer, report, template="chat")
    assert tokenizer.decode(found.prompt_ids).endswith("<|im_start|>assistant\n")
    assert "'<|im_start|>assistant\\n', which it writes before responses, is appended to prompts" in report.notes[0]


def test_a_record_without_pairs_is_for_sft_alone_and_counted_elsewhere():
    rows = [record(responses=[" yes"], pairs=[])]
    report = DataReport()
    assert tokenized(rows, gpt2(), report) == []
    assert report.left_out == {NO_PAIR_TO_COMPARE: 1}
    assert len(tokenized(rows, gpt2(), examples="targets")) == 1


# The toy data, of which the merges were learnt, has no word in capitals: each of those is a token.
LONG = {"max_length": 10, "max_prompt_length": 6}


@pytest.mark.parametrize(
    ("mode", "prompt"), [("keep_start", "ABCDEF"), ("keep_end", "CDEFGH")], ids=["the start stays", "the end stays"]
)
def test_a_prompt_that_is_too_long_is_cut_and_counted_once(mode, prompt):
    report = DataReport()
    # 8 tokens and 1 with its end fit into 10, 8 and 2 with their end do not.
    rows = [record("QQQQQQQQ", ["X", "Q"]), record("ABCDEFGH", ["XQ", "Q"])]
    whole, cut = tokenized(rows, gpt2(), report, **LONG, truncation_mode=mode)
    assert gpt2().decode(whole.prompt_ids) == "QQQQQQQQ"
    assert gpt2().decode(cut.prompt_ids) == prompt
    assert (report.changed, report.left_out) == ({PROMPT_CUT: 1}, {})


@pytest.mark.parametrize(("mode", "prompt"), [("keep_start", "<s> BCDE"), ("keep_end", "<s>EFGHJ")])
def test_a_prompt_that_is_cut_still_starts_with_its_bos(mode, prompt):
    # <s>, the blank and 8 letters are 10 tokens, of which 6 stay.
    [cut] = tokenized([record("BCDEFGHJ", ["X", "Q"])], llama(), **LONG, truncation_mode=mode)
    assert decoded(llama(), cut.prompt_ids) == prompt and len(cut.prompt_ids) == 6


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_responses_that_are_too_long_are_cut_to_the_room_beside_the_longest_prompt_and_counted_each(mode):
    report = DataReport()
    # 2 + 9 > 10: responses get 10 - 6 = 4 tokens. "XQX" and its end are 4, the others are longer.
    [found] = tokenized(
        [record("AB", ["XQXQXQXQ", "XQX", "QXQXQ"], [(0, 1), (0, 2)])], gpt2(), report, **LONG, truncation_mode=mode
    )
    assert [gpt2().decode(ids) for ids in found.responses] == ["XQXQ", f"XQX{END_OF_TEXT}", "QXQX"]
    assert (report.changed, report.left_out) == ({RESPONSE_CUT: 2}, {})


def test_drop_skips_what_does_not_fit_and_counts_its_pairs():
    report = DataReport()
    rows = [
        record("AB", ["XQXQXQXQ", "XQX", "QXQXQ"], [(0, 1), (2, 1)]),
        record("AB", ["XQXQXQXQ", "Q"]),
        record("AB", ["X", "Q"]),
    ]
    first, last = tokenized(rows, gpt2(), report, **LONG, truncation_mode="drop")
    assert [gpt2().decode(ids[:-1]) for ids in first.responses] == ["XQX", "QXQXQ"] and first.pairs == [(1, 0)]
    assert [gpt2().decode(ids[:-1]) for ids in last.responses] == ["X", "Q"]
    assert (report.changed, report.left_out) == ({}, {"longer than max_length, 10 tokens": 2})


def test_drop_counts_the_targets_of_sft():
    report = DataReport()
    rows = [record("AB", ["XQXQXQXQ", "Q"]), record("AB", ["X", "Q"])]
    assert len(tokenized(rows, gpt2(), report, examples="targets", **LONG, truncation_mode="drop")) == 1
    assert report.left_out == {"longer than max_length, 10 tokens": 1}


@pytest.mark.parametrize("make", [gpt2, llama, unigram], ids=name_of)
@settings(deadline=None, max_examples=50)
@given(
    prompt=texts,
    responses=st.lists(texts, min_size=2, max_size=4, unique=True),
    mode=st.sampled_from(["keep_start", "keep_end", "drop"]),
    most=st.integers(1, 12),
    room=st.integers(1, 12),
)
def test_whatever_is_cut_fits_keeps_a_token_of_every_response_and_is_counted(make, prompt, responses, mode, most, room):
    tokenizer, report = make(), DataReport()
    assume(prompt or adds_bos(tokenizer))
    pairs = list(itertools.combinations(range(len(responses)), 2))
    row, lengths = record(prompt, responses, pairs), {"max_length": most + room, "max_prompt_length": most}
    [whole] = tokenized([row], tokenizer)
    found = tokenized([row], tokenizer, report, truncation_mode=mode, **lengths)
    left = sum(report.left_out.values())
    assert sum(prompt.num_examples for prompt in found) + left == len(pairs)
    for kept in found:
        assert all(len(ids) >= 1 and len(kept.prompt_ids) + len(ids) <= most + room for ids in kept.responses)
        assert report.changed.get(PROMPT_CUT, 0) == (kept.prompt_ids != whole.prompt_ids)
        assert report.changed.get(RESPONSE_CUT, 0) == sum(ids[-1] != tokenizer.eos_token_id for ids in kept.responses)
        # The beginning of the sequence stays, whichever end does.
        bos = whole.prompt_ids[: adds_bos(tokenizer)]
        end = whole.prompt_ids[len(bos) :][len(whole.prompt_ids) - most :]
        expected = {"keep_end": bos + end, "keep_start": whole.prompt_ids[:most]}
        assert kept.prompt_ids in (whole.prompt_ids, expected.get(mode))
        assert all(kept.responses[i] != kept.responses[j] for i, j in kept.pairs)
    bos = whole.prompt_ids[: adds_bos(tokenizer)]
    reasons = {SAME_IDS, f"longer than max_length, {most + room} tokens" if mode == "drop" else NOTHING_LEFT}
    assert report.left_out.keys() <= reasons
    # A prompt of which the beginning of the sequence alone would be left, and it had more.
    if NOTHING_LEFT in report.left_out:
        assert most == len(bos) == 1 < len(whole.prompt_ids)


# ---- pairs that have become the same, and prompts that have been cut ---------------------------------------------------------

TRIMMED = (
    "{{ bos_token }}{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'].strip() }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


@cache
def trimming():
    """A byte-level tokenizer whose chat template trims every turn, and alone writes the beginning of the sequence."""
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<begin>"})
    tokenizer.chat_template = TRIMMED
    return tokenizer


@cache
def one_token_for_both():
    """The same with one token for beginning and end."""
    tokenizer = byte_level_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token
    tokenizer.chat_template = TRIMMED
    return tokenizer


@cache
def before_each_question():
    """The same with a template that writes the beginning before each question."""
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<begin>"})
    tokenizer.chat_template = LLAMA_2
    return tokenizer


def test_pairs_of_the_same_ids_are_skipped_and_counted_with_the_responses_that_only_they_use():
    report = DataReport()
    rows = [
        record("ask", ["yes", "yes ", "no"], [(0, 1), (0, 2), (1, 2)]),
        # Nothing is left of it.
        record("ask", ["yes", " yes\n"], [(0, 1), (1, 0)]),
        record("ask", ["yes", " yes\n", "no", " no"], [(0, 1), (3, 2), (1, 3)]),
    ]
    first, last = tokenized(rows, trimming(), report, template="chat")
    assert [trimming().decode(ids) for ids in first.responses] == ["yes<|endoftext|>", "no<|endoftext|>"]
    # The same pair twice: the data says it twice.
    assert (first.pairs, last.pairs, first.responses) == ([(0, 1), (0, 1)], [(0, 1)], last.responses)
    assert report.left_out == {SAME_IDS: 1 + 2 + 2}


def test_for_sft_a_target_stays_whatever_the_other_responses_are():
    report = DataReport()
    [found] = tokenized([record("ask", ["yes", "yes\n"])], trimming(), report, examples="targets", template="chat")
    assert (trimming().decode(found.responses[0]), report.left_out) == ("yes<|endoftext|>", {})


answers = st.text("ab \n", min_size=1, max_size=8)


@settings(deadline=None, max_examples=60)
@given(
    responses=st.lists(answers, min_size=2, max_size=5, unique=True),
    template=st.sampled_from(["chat", "chatml", None]),
    mode=st.sampled_from(["keep_start", "keep_end", "drop"]),
    room=st.integers(1, 12),
    data=st.data(),
)
def test_no_pair_that_is_trained_on_has_the_same_ids_and_the_others_are_counted(responses, template, mode, room, data):
    index = st.integers(0, len(responses) - 1)
    pairs = data.draw(st.lists(st.tuples(index, index).filter(lambda pair: pair[0] != pair[1]), min_size=1, max_size=6))
    lengths = {"max_length": 8 + room, "max_prompt_length": 8, "truncation_mode": mode}
    report = DataReport()
    found = tokenized([record("ask it", responses, pairs)], trimming(), report, template=template, **lengths)
    for prompt in found:
        assert all(prompt.responses[i] != prompt.responses[j] for i, j in prompt.pairs) and prompt.pairs
        assert len(set(map(tuple, prompt.responses))) == len(prompt.responses)
    assert sum(prompt.num_examples for prompt in found) + sum(report.left_out.values()) == len(pairs)
    if mode != "drop":
        # Told apart by what is left of their texts.
        _, endings = build_template(template, None, trimming())("ask it", responses)
        whole = len(trimming()(build_template(template, None, trimming())("ask it", [])[0]).input_ids)
        ids = [[*trimming()(ending, add_special_tokens=False).input_ids, trimming().eos_token_id] for ending in endings]
        used = [ids[k] for pair in pairs for k in pair]
        if min(whole, 8) + max(map(len, used)) > 8 + room:
            ids = [response[:room] for response in ids]
        assert report.left_out.get(SAME_IDS, 0) == sum(ids[i] == ids[j] for i, j in pairs)


MAKES_WITH_BOS = [trimming, one_token_for_both, before_each_question, llama, legacy_llama]


@pytest.mark.parametrize("make", MAKES_WITH_BOS, ids=name_of)
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("most", range(2, 30))
def test_a_beginning_that_the_chat_template_writes_stays_in_front_of_a_prompt_that_is_cut(make, mode, most):
    tokenizer = make()
    turns = (Turn("user", "one"), Turn("assistant", "two"), Turn("user", "three"))
    [whole] = tokenized([record(turns, ["a", "b"])], tokenizer, template="chat")
    lengths = {"max_length": most + 2, "max_prompt_length": most, "truncation_mode": mode}
    found = tokenized([record(turns, ["a", "b"])], tokenizer, template="chat", **lengths)
    ids, bos = found[0].prompt_ids, tokenizer.bos_token_id
    assert whole.prompt_ids[0] == ids[0] == bos != ids[1]
    if len(whole.prompt_ids) > most:
        kept = whole.prompt_ids[: len(ids)] if mode == "keep_start" else [bos, *whole.prompt_ids[1 - len(ids) :]]
        assert ids == kept and most - len(ids) in (0, 1)
        # One shorter only where the end that is kept begins with another one.
        assert len(ids) == most or (mode == "keep_end" and whole.prompt_ids[1 - most] == bos)


def test_a_prompt_that_is_cut_down_to_its_beginning_is_skipped_and_counted():
    report = DataReport()
    lengths = {"max_length": 3, "max_prompt_length": 1, "truncation_mode": "keep_end"}
    assert tokenized([record("ask", ["a", "b"])], trimming(), report, template="chat", **lengths) == []
    assert (report.left_out, report.changed) == ({NOTHING_LEFT: 1}, {})


# ---- files of token ids ---------------------------------------------------------------------------------------------------

EOS, VOCABULARY = 2, 1000
# Hypothesis runs one function many times; each example writes its own file, so that sharing tmp_path is harmless.
SHARES_FOLDER = [HealthCheck.function_scoped_fixture]


def read(path: Path, split="train", share=0.0, report=None, examples="pairs", max_length=512, max_prompt_length=256):
    """The prompts of a file, of a vocabulary of 1000 whose end-of-sequence token is 2."""
    settings = TokenSettings(examples, max_length, max_prompt_length)
    report = report if report is not None else DataReport()
    return list(read_tokenized(path, split, share, Vocabulary(VOCABULARY, EOS), settings, report))


def test_rows_that_are_cut_to_the_same_ids_are_skipped_and_counted(tmp_path):
    rows = [row(chosen=(7, 7, 7, 7, 2), rejected=(7, 7, 7, 8, 2)), row(prompt=(4,), chosen=(7, 2), rejected=(8, 2))]
    torch.save(rows, tmp_path / "ids.pt")
    report = DataReport()
    [left] = read(tmp_path / "ids.pt", report=report, max_length=5, max_prompt_length=2)
    assert (left.prompt_ids, report.left_out, report.changed) == ([4], {SAME_IDS: 1}, {})
    assert len(read(tmp_path / "ids.pt", examples="targets", max_length=5, max_prompt_length=2)) == 2


def test_a_prompt_of_token_ids_that_is_cut_keeps_the_beginning_that_it_has(tmp_path):
    torch.save([row(prompt=(1, 5, 6, 7, 8)), row(prompt=(4, 5, 6, 7, 8))], tmp_path / "ids.pt")
    settings = TokenSettings("pairs", 6, 3, "keep_end")
    with_bos, without = read_tokenized(
        tmp_path / "ids.pt", "train", 0.0, Vocabulary(VOCABULARY, EOS, 1), settings, DataReport()
    )
    assert (with_bos.prompt_ids, without.prompt_ids) == ([1, 7, 8], [6, 7, 8])


def row(prompt=(5, 6), chosen=(7, 2), rejected=(8, 9, 2), padding=0, kind=torch.tensor, mask=int) -> dict:
    """A row as a user's script would write it."""
    made = {}
    for side, response in (("chosen", chosen), ("rejected", rejected)):
        made[f"prompt_{side}_tokens"] = kind([*prompt, *response, *[0] * padding])
        made[f"{side}_loss_mask"] = kind([mask(n) for n in [0] * len(prompt) + [1] * len(response) + [0] * padding])
    return made


def saved(folder: Path, rows) -> Path:
    """A file of rows, as torch writes it."""
    path = folder / "rows.pt"
    torch.save(rows, path)
    return path


def as_rows(prompts: list[TokenizedPrompt]) -> list[tuple]:
    """Prompt, preferred and other ids of every pair."""
    return [(p.prompt_ids, p.responses[i], p.responses[j]) for p in prompts for i, j in p.pairs]


ids = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=5)
few_ids = st.lists(st.integers(0, 2), min_size=1, max_size=2)


@st.composite
def tokenized_prompts(draw) -> TokenizedPrompt:
    """Prompts with different responses and pairs of them; prompts are alike often enough to stand side by side."""
    responses = draw(st.lists(ids, min_size=2, max_size=4, unique_by=tuple))
    pairs = draw(st.lists(st.sampled_from(list(itertools.permutations(range(len(responses)), 2))), min_size=1, max_size=4))
    return TokenizedPrompt(draw(few_ids), responses, pairs)


@settings(deadline=None, suppress_health_check=SHARES_FOLDER, max_examples=60)
@given(prompts=st.lists(tokenized_prompts(), min_size=1, max_size=6))
def test_what_is_written_is_read_again(tmp_path, prompts):
    path = tmp_path / "rows.pt"
    assert write_tokenized(path, prompts) == sum(len(prompt.pairs) for prompt in prompts)
    report = DataReport()
    found = read(path, report=report)
    assert as_rows(found) == as_rows(prompts)
    assert (report.rows_read, report.num_bad_rows, report.left_out) == (len(as_rows(prompts)), 0, {})
    # Rows of one prompt that stand side by side are one prompt, with each response once.
    assert all(one.prompt_ids != other.prompt_ids for one, other in itertools.pairwise(found))
    assert all(len(set(map(tuple, prompt.responses))) == len(prompt.responses) for prompt in found)


def test_what_a_tokenizer_makes_of_records_is_read_again_as_the_same_prompts(tmp_path):
    records = [record("ask", [" yes", " no", " well"], [(0, 1), (0, 2)]), record("the", [" b", " a"], [(1, 0)])]
    made = tokenized(records, llama())
    write_tokenized(tmp_path / "rows.pt", made)
    found = read(tmp_path / "rows.pt")
    assert [(p.prompt_ids, p.responses, p.pairs) for p in found[:1]] == [(p.prompt_ids, p.responses, p.pairs) for p in made[:1]]
    # Responses are numbered as they come in the pairs.
    assert (found[1].responses, found[1].pairs) == (made[1].responses[::-1], [(0, 1)])
    assert [prompt.number for prompt in found] == [1, 3]


def test_rows_of_one_prompt_side_by_side_become_one_and_others_do_not(tmp_path):
    rows = [row(chosen=(7, 2), rejected=(8, 2)), row(chosen=(7, 2), rejected=(9, 2)), row((4,)), row()]
    first, second, third = read(saved(tmp_path, rows))
    assert (first.prompt_ids, first.responses, first.pairs) == ([5, 6], [[7, 2], [8, 2], [9, 2]], [(0, 1), (0, 2)])
    assert (second.prompt_ids, second.responses, second.pairs) == ([4], [[7, 2], [8, 9, 2]], [(0, 1)])
    assert (third.prompt_ids, third.number) == ([5, 6], 4)


def test_sft_learns_the_preferred_response_of_each_row(tmp_path):
    rows = [row(chosen=(7, 2), rejected=(8, 2)), row(chosen=(7, 2), rejected=(9, 2)), row(chosen=(8, 2), rejected=(9, 2))]
    found = read(saved(tmp_path, rows), examples="targets")
    assert [(prompt.prompt_ids, prompt.responses, prompt.pairs) for prompt in found] == [
        ([5, 6], [[7, 2]], []),
        ([5, 6], [[7, 2]], []),
        ([5, 6], [[8, 2]], []),
    ]


@pytest.mark.parametrize("kind", [list, torch.tensor], ids=["lists", "tensors"])
@pytest.mark.parametrize("mask", [int, bool, float], ids=["0 and 1", "false and true", "0.0 and 1.0"])
@pytest.mark.parametrize("padding", [0, 3], ids=["no padding", "padding behind the response"])
def test_rows_may_be_lists_or_tensors_with_any_kind_of_mask_and_padding(tmp_path, kind, mask, padding):
    [found] = read(saved(tmp_path, [row(kind=kind, mask=mask, padding=padding)]))
    assert (found.prompt_ids, found.responses, found.pairs) == ([5, 6], [[7, 2], [8, 9, 2]], [(0, 1)])
    assert found.source == f"{tmp_path / 'rows.pt'}, row 1"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.float16, torch.bfloat16, torch.float64])
def test_tensors_may_have_any_type_of_number(tmp_path, dtype):
    [found] = read(saved(tmp_path, [{name: value.to(dtype) for name, value in row().items()}]))
    assert (found.prompt_ids, found.responses) == ([5, 6], [[7, 2], [8, 9, 2]])


def test_a_mask_of_several_spans_is_a_response_of_which_these_are_scored(tmp_path):
    """As of a conversation: ids 60 and 61 are the user's, 0 is padding."""
    mask = [0, 0, 1, 1, 0, 0, 1, 1, 0]
    pair = {
        "prompt_chosen_tokens": [40, 41, 50, 51, 60, 61, 70, 2, 0],
        "prompt_rejected_tokens": [40, 41, 50, 51, 60, 61, 90, 2, 0],
        "chosen_loss_mask": mask,
        "rejected_loss_mask": mask,
    }
    path = saved(tmp_path, [pair])
    [found] = read(path)
    assert (found.prompt_ids, found.responses) == ([40, 41], [[50, 51, 60, 61, 70, 2], [50, 51, 60, 61, 90, 2]])
    assert found.spans == [[(0, 2), (4, 6)]] * 2
    # Written again, the file says the same.
    write_tokenized(tmp_path / "again.pt", [found])
    [again] = read(tmp_path / "again.pt")
    assert (again.prompt_ids, again.responses, again.spans) == (found.prompt_ids, found.responses, found.spans)


NOT_A_MASK = "chosen_loss_mask is not zeros (the prompt), ones and zeros (the response), zeros (padding)."
NO_NUMBERS = "prompt_chosen_tokens is no list or 1-D tensor of whole numbers."
FAULTS = {
    "no response": ({"chosen_loss_mask": [0, 0, 0, 0]}, NOT_A_MASK),
    "no prompt": ({"chosen_loss_mask": [1, 1, 1, 1]}, NOT_A_MASK),
    "a hole in the prompt": ({"chosen_loss_mask": [0, 1, 0, 1]}, "chosen and rejected follow different prompt tokens."),
    "a two": ({"chosen_loss_mask": [0, 0, 2, 1]}, NOT_A_MASK),
    "a two that sums up": ({"chosen_loss_mask": [0, 1, 2, 0]}, NOT_A_MASK),
    "below zero": ({"chosen_loss_mask": [0, 0, 1, -1]}, NOT_A_MASK),
    "a number that would fill memory": ({"chosen_loss_mask": [0, 0, 1, 10**12]}, NOT_A_MASK),
    "a shorter mask": ({"chosen_loss_mask": [0, 0, 1]}, "chosen_loss_mask has 3 entries for 4 tokens."),
    "an id below": (
        {"prompt_chosen_tokens": [5, 6, 7, -1]},
        "prompt_chosen_tokens holds ids outside the tokenizer's 0 to 999.",
    ),
    "an id above": ({"prompt_rejected_tokens": [5, 6, 8, 9, 1000]}, "prompt_rejected_tokens holds ids outside"),
    "another prompt": ({"prompt_chosen_tokens": [5, 5, 7, 2]}, "chosen and rejected follow different prompt tokens."),
    "a longer prompt": ({"chosen_loss_mask": [0, 0, 0, 1]}, "chosen and rejected follow different prompt tokens."),
    "halves": ({"prompt_chosen_tokens": [5, 6, 7.5, 2]}, NO_NUMBERS),
    "not a number": ({"prompt_chosen_tokens": [5, 6, float("nan"), 2]}, NO_NUMBERS),
    "infinity": ({"prompt_chosen_tokens": [5, 6, float("inf"), 2]}, NO_NUMBERS),
    "a text": ({"prompt_chosen_tokens": "5672"}, NO_NUMBERS),
    "texts": ({"prompt_chosen_tokens": ["5", "6", "7", "2"]}, NO_NUMBERS),
    "nothing": ({"prompt_chosen_tokens": None}, NO_NUMBERS),
    "an empty list": ({"prompt_chosen_tokens": []}, NO_NUMBERS),
    "lists in a list": ({"prompt_chosen_tokens": [[5, 6, 7, 2]]}, NO_NUMBERS),
    "a tensor of two dimensions": ({"prompt_chosen_tokens": torch.tensor([[5, 6, 7, 2]])}, NO_NUMBERS),
    "a tensor of none": ({"prompt_chosen_tokens": torch.tensor(5)}, NO_NUMBERS),
    "a complex tensor": ({"prompt_chosen_tokens": torch.tensor([5j])}, NO_NUMBERS),
    "a sparse tensor": ({"prompt_chosen_tokens": torch.tensor([5, 6, 7, 2]).to_sparse()}, NO_NUMBERS),
    "a tensor without content": ({"prompt_chosen_tokens": torch.empty(4, device="meta")}, NO_NUMBERS),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_row_that_makes_no_sense_is_refused_with_its_number_or_counted(tmp_path, fault):
    changed, told = FAULTS[fault]
    path = saved(tmp_path, [row(kind=list), row(kind=list, chosen=(7, 2), rejected=(8, 9, 2)) | changed, row((9,), kind=list)])
    with pytest.raises(UserError) as refusal:
        read(path)
    assert str(refusal.value).startswith(f"datasets: {path}, row 2: {told}")
    report = DataReport(skip_bad_rows=True)
    assert [prompt.number for prompt in read(path, report=report)] == [1, 3]
    assert (report.rows_read, report.num_bad_rows) == (3, 1)


@pytest.mark.parametrize("wrong", [None, 3, "row", [1, 2], {}, {"prompt_chosen_tokens": [1]}])
def test_a_row_that_is_no_dict_of_the_four_fields_is_refused_with_what_it_lacks(tmp_path, wrong):
    with pytest.raises(
        UserError, match=r"rows\.pt, row 1: no .*rejected_loss_mask\. Expected a dict with prompt_chosen_tokens"
    ):
        read(saved(tmp_path, [wrong]))


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([], "an empty list"),
        ({"a": 1}, "dict"),
        (None, "NoneType"),
        ("rows", "str"),
        (torch.zeros(3), "Tensor"),
        (row(), "dict"),
    ],
)
def test_a_file_that_holds_no_list_is_refused_with_what_it_holds(tmp_path, content, found):
    with pytest.raises(UserError, match=rf"datasets: .*rows\.pt: found {found}, expected a list of dicts with prompt_chosen_"):
        read(saved(tmp_path, content))


def test_a_file_that_is_cut_short_or_not_there_is_refused(tmp_path):
    path = saved(tmp_path, [row()] * 50)
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"datasets: .*rows\.pt: cannot be read as tensors and plain values"):
            read(path)
    path.unlink()
    with pytest.raises(UserError, match="cannot be read as tensors and plain values"):
        read(path)


# Of bytes, what looks like a zip or a pickle is the interesting part.
junk_bytes = st.binary(max_size=200) | st.binary(max_size=40).map(b"PK\x03\x04".__add__)
junk_bytes |= st.binary().map(lambda content: pickle.dumps(content, 2))


@settings(deadline=None, suppress_health_check=SHARES_FOLDER, max_examples=60)
@given(content=junk_bytes)
def test_a_file_of_any_bytes_is_refused(tmp_path, content):
    path = tmp_path / "junk.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match="datasets: .*junk"):
        read(path)


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
values = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
)
masks = st.lists(st.integers(-1, 2) | st.booleans() | st.sampled_from([0.0, 1.0, 0.5]), max_size=5)
junk_rows = values | st.fixed_dictionaries(dict.fromkeys(TOKEN_FIELDS, values | masks | ids))


@settings(deadline=None, suppress_health_check=SHARES_FOLDER, max_examples=150)
@given(rows=st.lists(junk_rows | st.just(row(kind=list)), min_size=1, max_size=4))
@example(rows=[{name: [10**400] for name in TOKEN_FIELDS}])
@example(rows=[{name: [1e300] for name in TOKEN_FIELDS}])
def test_rows_of_anything_are_read_or_counted_and_never_break(tmp_path, rows):
    report = DataReport(skip_bad_rows=True)
    try:
        found = read(saved(tmp_path, rows), report=report)
    except UserError as error:
        # A number too long for the reader spoils the whole file.
        assert "cannot be read as tensors and plain values" in str(error)
        return
    assert report.rows_read == len(rows) == len(as_rows(found)) + report.num_bad_rows + report.left_out.get(SAME_TEXT, 0)


class WritesAFile:
    """Leaves a file behind when it is unpickled by a reader that runs what pickles ask for."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.parametrize("place", ["the whole file", "a row", "a value", "a plain pickle"])
def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path, place):
    trace = tmp_path / "trace"
    bad = WritesAFile(trace)
    content = {"a row": [row(), bad], "a value": [row(), row() | {"chosen_loss_mask": bad}]}.get(place, bad)
    path = tmp_path / "rows.pt"
    if place == "a plain pickle":
        path.write_bytes(pickle.dumps(content, 2))
        pickle.loads(path.read_bytes())
    else:
        torch.save(content, path)
        torch.load(path, weights_only=False)
    # It does run, for a reader that lets it.
    assert trace.exists()
    trace.unlink()
    for report in (DataReport(), DataReport(skip_bad_rows=True)):
        with pytest.raises(
            UserError, match=r"rows\.pt: cannot be read as tensors .* nothing but tensors and plain values is ever unpickled"
        ):
            read(path, report=report)
    assert not trace.exists()


def test_pairs_of_the_same_response_are_skipped_and_counted(tmp_path):
    report = DataReport()
    found = read(
        saved(tmp_path, [row(), row(chosen=(7, 2), rejected=(7, 2)), row((4,), chosen=(3,), rejected=(3,))]), report=report
    )
    assert (as_rows(found), report.left_out) == ([([5, 6], [7, 2], [8, 9, 2])], {SAME_TEXT: 2})


def test_responses_that_do_not_end_with_the_end_of_sequence_token_are_counted_each_once(tmp_path):
    report = DataReport()
    rows = [row(chosen=(7,), rejected=(8, 2)), row(chosen=(7,), rejected=(9,)), row((4,), chosen=(2,), rejected=(2, 3))]
    read(saved(tmp_path, rows), report=report)
    # (7) and (9) of the first prompt, (2, 3) of the second.
    assert report.changed == {NO_END: 3}


@settings(deadline=None, suppress_health_check=SHARES_FOLDER, max_examples=40)
@given(prompts=st.lists(ids, min_size=1, max_size=12), share=st.floats(0, 0.999))
def test_each_row_is_in_one_split_chosen_by_its_prompt_alone(tmp_path, prompts, share):
    path = saved(tmp_path, [row(prompt, kind=list) for prompt in prompts])
    reports = {split: DataReport() for split in ("train", "test")}
    found = {split: read(path, split, share, report) for split, report in reports.items()}
    held_out = {tuple(prompt.prompt_ids) for prompt in found["test"]}
    assert held_out.isdisjoint(tuple(prompt.prompt_ids) for prompt in found["train"])
    assert held_out | {tuple(prompt.prompt_ids) for prompt in found["train"]} == set(map(tuple, prompts))
    # Both splits read all rows; they are counted once.
    assert (reports["train"].rows_read, reports["test"].rows_read) == (len(prompts), 0)


def test_rows_that_are_too_long_are_fitted_as_texts_are(tmp_path):
    path = saved(tmp_path, [row(prompt=range(100, 120), chosen=(7, 2), rejected=(8,) * 9 + (2,))])
    report = DataReport()
    [found] = read(path, report=report, max_length=10, max_prompt_length=4)
    assert (found.prompt_ids, found.responses) == ([100, 101, 102, 103], [[7, 2], [8] * 6])
    assert report.changed == {PROMPT_CUT: 1, RESPONSE_CUT: 1}
