"""Whether a run's rows fit its model: token ids within its embedding, rows within its positions.

A model looks both up in tables, and what lies beyond them ends a run with an IndexError, on a GPU with worse.
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import nn

from preference_training.core.errors import UserError
from preference_training.data.entries import read_entries
from preference_training.data.prompt_table import PromptTable
from preference_training.data.rows.records import Turn
from preference_training.data.rows.templates import ConversationError, build_template
from preference_training.modeling.loading import model_configuration

# How configurations call the positions that a model was made for.
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
# Buffers that hold an entry for each position (GPT-J, CodeGen, CTRL).
POSITION_BUFFERS = ("embed_positions", "pos_encoding")
# Tokens that a message names.
NAMED = 3


@dataclass(frozen=True)
class Limits:
    """What a model has room for; None is no limit. vocabulary: rows of its embedding. named_positions: what its configuration
    says. positions: entries of its table of positions, where rows may be longer than it.
    """

    vocabulary: int | None
    positions: int | None
    named_positions: int | None


def limits_of(config, tokenizer) -> Limits:
    """The limits of a configuration's model, found without its weights."""
    model = model_configuration(config.model, tokenizer, config.cache_dir)
    text = model.get_text_config()
    named = next((value for key in POSITIONS if isinstance(value := getattr(text, key, None), int)), None)
    # A table is looked for only where rows may be longer.
    exceeded = named is not None and config.max_length > named
    table = _table_of(model, text, config.model.trust_remote_code) if exceeded else None
    return Limits(getattr(text, "vocab_size", None), table, named)


def _table_of(model_config, text_config, trust_remote_code: bool) -> int | None:
    """How many positions a model has a table for; None where it computes positions from their number."""
    from transformers import AutoModelForCausalLM

    if text_config.model_type == "mpt":
        # Its distances are made for so many.
        return text_config.max_seq_len
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=trust_remote_code)
    tokens = model.get_input_embeddings()
    learned = [
        _entries(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module is not tokens and _is_of_positions(name)
    ]
    fixed = [len(buffer) for name, buffer in model.named_buffers() if name.rpartition(".")[2] in POSITION_BUFFERS]
    return min([*learned, *fixed], default=None)


def _is_of_positions(name: str) -> bool:
    leaf = name.rpartition(".")[2]
    return leaf == "wpe" or "position" in leaf or leaf.startswith("pos_")


def _entries(table: nn.Embedding) -> int:
    """How many positions an embedding has: OPT and its kind leave the first entries out, RoBERTa those up to padding."""
    padding = -1 if table.padding_idx is None else table.padding_idx
    return table.num_embeddings - (getattr(table, "offset", None) or padding + 1)


# ---- before data is prepared ----------------------------------------------------------------------------------------------


def check_limits(config, tokenizer, limits: Limits) -> None:
    """Raise UserError for rows longer than a model's positions, and for tokens of the templates that it has no embedding of.

    A run that goes on keeps its max_length: its rows are looked at when they are there. What is no error is said.
    """
    name = config.model.name_or_path or config.model.from_config.get("model_type")
    if limits.positions is not None and config.max_length > limits.positions and config.resume is None:
        raise UserError(_too_long(f"found {config.max_length}", limits.positions))
    if limits.positions is None and limits.named_positions is not None and config.max_length > limits.named_positions:
        print(
            f"max_length: {config.max_length} tokens are more than the {limits.named_positions} positions that {name} was "
            "made for (its max_position_embeddings); it computes longer rows, but may do so badly",
            flush=True,
        )
    unknown = tokens_beyond(tokenizer, limits.vocabulary)
    if not unknown:
        return
    written = ids_of_templates(config, tokenizer)
    emitted = {token: number for token, number in unknown.items() if number in written}
    if emitted:
        where = f"which {_templates(config)} or the end of a response writes"
        raise UserError(_no_embedding(config, emitted, limits.vocabulary, where))
    print(
        f"model.tokenizer_name_or_path: {len(unknown)} tokens have no row in the model's embedding of {limits.vocabulary:,}: "
        f"{_named(unknown)}. A row of data with one of them would be refused",
        flush=True,
    )


def tokens_beyond(tokenizer, vocabulary: int | None) -> dict[str, int]:
    """The tokens of a tokenizer, by id, that lie behind the end of an embedding with so many rows."""
    if vocabulary is None:
        return {}
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= vocabulary}
    return dict(sorted(beyond.items(), key=lambda pair: pair[1]))


def ids_of_templates(config, tokenizer) -> set[int]:
    """The ids of what the templates of a run's data sets write around every conversation, and of the end of a response."""
    ids = {tokenizer.eos_token_id}
    for name, system in {(entry.template, entry.system_prompt) for entry in read_entries(config)}:
        template = build_template(name, system, tokenizer)
        with suppress(ConversationError):
            prompt, responses = template((Turn("user", "a"),), ["b"])
            ids.update(*(tokenizer(text).input_ids for text in (prompt, *responses)))
    return ids


def _templates(config) -> str:
    names = sorted({str(entry.template) for entry in read_entries(config) if entry.template})
    return f"template={','.join(names)}" if names else "the data's template"


# ---- when it is prepared --------------------------------------------------------------------------------------------------


def check_rows(config, tokenizer, limits: Limits, tables: Iterable[PromptTable]) -> None:
    """Raise UserError where prepared rows are longer than a model's positions, or hold ids that its embedding lacks."""
    for table in tables:
        if limits.positions is not None and (longest := table.longest_row) > limits.positions:
            raise UserError(_too_long(f"the data has a row of {longest} tokens", limits.positions))
        if limits.vocabulary is not None and table.largest_id >= limits.vocabulary:
            largest = table.largest_id
            unknown = {str(tokenizer.convert_ids_to_tokens(largest)): largest}
            raise UserError(_no_embedding(config, unknown, limits.vocabulary, f"which {table.source_of(largest)} has"))


def _too_long(found: str, positions: int) -> str:
    return (
        f"max_length: {found}, expected at most {positions}: the model has a table of {positions} positions, and none for "
        f"longer rows. Set max_length={positions} (and max_prompt_length below it), or take a model with more positions."
    )


def _no_embedding(config, unknown: dict[str, int], vocabulary: int, where: str) -> str:
    name = config.model.tokenizer_name_or_path or config.model.name_or_path
    return (
        f"model.tokenizer_name_or_path: {name} has tokens that the model's embedding of {vocabulary:,} rows lacks: "
        f"{_named(unknown)}, {where}. Take the model's own tokenizer or another template, or enlarge the embedding first: "
        "model.resize_token_embeddings(len(tokenizer)), then model.save_pretrained and tokenizer.save_pretrained."
    )


def _named(tokens: dict[str, int]) -> str:
    shown = [f"{token} ({number})" for token, number in list(tokens.items())[:NAMED]]
    return ", ".join(shown) + (", ..." if len(tokens) > NAMED else "")
