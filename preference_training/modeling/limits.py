"""Check that a run's data fits its model: token ids within its embedding, rows within its position table.

Both are looked up in tables; beyond their ends a run would stop with an IndexError or, on a GPU, with a device-side assertion.
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn

from preference_training.core.errors import UserError
from preference_training.data.entries import Entry
from preference_training.data.prompt_table import PromptTable
from preference_training.data.records.record import Turn
from preference_training.data.rendering.chat_rendering import ConversationError
from preference_training.data.rows.templates import build_template
from preference_training.modeling.sources.configurations import model_configuration
from preference_training.modeling.value_head import auto_class

# Configuration keys for the number of positions that a model was built for.
POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len")
# Names of buffers with an entry for each position (GPT-J, CodeGen, CTRL).
POSITION_BUFFERS = ("embed_positions", "pos_encoding")
# The most tokens that a message lists.
MAX_LISTED = 3


@dataclass(frozen=True)
class Limits:
    """What a model can take; None is no limit.

    vocabulary: rows of its embedding. declared_positions: the positions that its configuration names. positions: entries of its
    position table, looked up only where rows may be longer than `declared_positions`.
    """

    vocabulary: int | None
    positions: int | None
    declared_positions: int | None


def model_limits(config, tokenizer) -> Limits:
    """The limits of a configuration's model, without loading its weights."""
    model = model_configuration(config.model, tokenizer, config.cache_dir)
    text = model.get_text_config()
    declared = next((value for key in POSITION_KEYS if isinstance(value := getattr(text, key, None), int)), None)
    # The table is looked up only where rows may be longer.
    exceeded = declared is not None and config.max_length > declared
    table = _position_table_size(model, text, config.model.head, config.model.trust_remote_code) if exceeded else None
    return Limits(getattr(text, "vocab_size", None), table, declared)


def _position_table_size(model_config, text_config, head: str, trust_remote_code: bool) -> int | None:
    """The number of entries of a model's position table; None where it computes positions, as rotary embeddings do."""
    if text_config.model_type == "mpt":
        # Its ALiBi biases are built for this many positions.
        return text_config.max_seq_len
    with torch.device("meta"):
        model = auto_class(head).from_config(model_config, trust_remote_code=trust_remote_code)
    tokens = model.get_input_embeddings()
    learned = [
        _num_positions(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module is not tokens and _is_position_embedding(name)
    ]
    fixed = [len(buffer) for name, buffer in model.named_buffers() if name.rpartition(".")[2] in POSITION_BUFFERS]
    return min([*learned, *fixed], default=None)


def _is_position_embedding(name: str) -> bool:
    leaf = name.rpartition(".")[2]
    return leaf == "wpe" or "position" in leaf or leaf.startswith("pos_")


def _num_positions(table: nn.Embedding) -> int:
    """The positions of an embedding table, of which OPT skips the first entries, and RoBERTa those up to padding."""
    padding = -1 if table.padding_idx is None else table.padding_idx
    return table.num_embeddings - (getattr(table, "offset", None) or padding + 1)


# ---- before the data is prepared ------------------------------------------------------------------------------------------


def check_limits(config, entries: Iterable[Entry], tokenizer, limits: Limits) -> None:
    """Raise UserError where max_length exceeds a model's position table, or templates write tokens without an embedding.

    A resumed run keeps its max_length; its rows are checked once they are prepared. Prints a line where rows may be longer than
    the model was built for, or the tokenizer has tokens without an embedding that no template writes.
    """
    name = config.model.name_or_path or config.model.from_config.get("model_type")
    if limits.positions is not None and config.max_length > limits.positions and config.resume is None:
        raise UserError(_too_long(f"found {config.max_length}", limits.positions))
    if limits.positions is None and limits.declared_positions is not None and config.max_length > limits.declared_positions:
        print(
            f"max_length: {config.max_length} tokens are more than the {limits.declared_positions} positions that {name} was "
            "trained for (its max_position_embeddings); it accepts longer rows, but may model them poorly",
            flush=True,
        )
    unknown = tokens_without_embedding(tokenizer, limits.vocabulary)
    if not unknown:
        return
    template_ids = template_token_ids(entries, tokenizer)
    if written := {token: number for token, number in unknown.items() if number in template_ids}:
        where = f"which {_templates(entries)} or the end of a response writes"
        raise UserError(_no_embedding(config, written, limits.vocabulary, where))
    print(
        f"model.tokenizer_name_or_path: {len(unknown)} tokens have no row in the model's embedding of {limits.vocabulary:,}: "
        f"{_named(unknown)}. Rows of data with one of them will be refused",
        flush=True,
    )


def tokens_without_embedding(tokenizer, vocabulary: int | None) -> dict[str, int]:
    """The tokens of a tokenizer whose ids lie beyond an embedding of `vocabulary` rows, with their ids in ascending order."""
    if vocabulary is None:
        return {}
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= vocabulary}
    return dict(sorted(beyond.items(), key=lambda pair: pair[1]))


def template_token_ids(entries: Iterable[Entry], tokenizer) -> set[int]:
    """The token ids that the templates of a run write around every conversation, and of the end of a response."""
    ids = {tokenizer.eos_token_id}
    for name, system in {(entry.template, entry.system_prompt) for entry in entries}:
        template = build_template(name, system, tokenizer)
        with suppress(ConversationError):
            prompt, responses = template((Turn("user", "a"),), ["b"])
            ids.update(*(tokenizer(text).input_ids for text in (prompt, *responses)))
    return ids


def _templates(entries: Iterable[Entry]) -> str:
    names = sorted({str(entry.template) for entry in entries if entry.template})
    return f"template={','.join(names)}" if names else "the data's template"


# ---- after the data is prepared -------------------------------------------------------------------------------------------


def check_rows(config, tokenizer, limits: Limits, tables: Iterable[PromptTable]) -> None:
    """Raise UserError where prepared rows are longer than a model's position table, or contain ids without an embedding."""
    for table in tables:
        if limits.positions is not None and (longest := table.longest_row) > limits.positions:
            raise UserError(_too_long(f"the data has a row of {longest} tokens", limits.positions))
        if limits.vocabulary is not None and table.largest_id >= limits.vocabulary:
            largest = table.largest_id
            unknown = {str(tokenizer.convert_ids_to_tokens(largest)): largest}
            raise UserError(_no_embedding(config, unknown, limits.vocabulary, f"which {_first_with(table, largest)} has"))


def _first_with(table: PromptTable, token: int) -> str:
    """The name of the first prompt that has a token id, in itself or in a response."""
    return next(prompt.source for prompt in table if token in {*prompt.prompt_ids, *chain.from_iterable(prompt.responses)})


def _too_long(found: str, positions: int) -> str:
    return (
        f"max_length: {found}, expected at most {positions}: the model's position table has {positions} entries. Set "
        f"max_length={positions} (and max_prompt_length below it), or choose a model with more positions."
    )


def _no_embedding(config, unknown: dict[str, int], vocabulary: int, where: str) -> str:
    name = config.model.tokenizer_name_or_path or config.model.name_or_path
    return (
        f"model.tokenizer_name_or_path: {name} has tokens that the model's embedding of {vocabulary:,} rows lacks: "
        f"{_named(unknown)}, {where}. Use the model's own tokenizer or another template, or resize the embedding first: "
        "model.resize_token_embeddings(len(tokenizer)), then model.save_pretrained and tokenizer.save_pretrained."
    )


def _named(tokens: dict[str, int]) -> str:
    shown = [f"{token} ({number})" for token, number in list(tokens.items())[:MAX_LISTED]]
    return ", ".join(shown) + (", ..." if len(tokens) > MAX_LISTED else "")
