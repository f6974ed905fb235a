"""Tokens that a run adds to a model's vocabulary: in the tokenizer, and as rows of the embedding and of the head.

A new row is the mean of the rows of the tokens that its text was before, in the embedding and in the head, so that a new token
begins as about what it replaces.
"""

import json
from pathlib import Path

import torch
from torch import nn

from preference_training.configuration.sections import ModelConfig
from preference_training.core.errors import UserError
from preference_training.modeling.archives import archive_shapes

# Last parts of the names of input embeddings.
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")


def add_to_tokenizer(tokenizer, model_config: ModelConfig) -> None:
    """Add the tokens of a `model` configuration to a tokenizer, which remembers what their texts were before."""
    tokens = model_config.added_tokens
    if not tokens:
        return
    previous = {token: tokenizer(token, add_special_tokens=False).input_ids for token in tokens}
    if unknown := next((token for token, ids in previous.items() if not ids), None):
        raise UserError(f"model.add_tokens: {unknown!r} has no text. Expected tokens of at least one character.")
    tokenizer.add_tokens(list(model_config.add_tokens))
    tokenizer.add_tokens(list(model_config.add_special_tokens), special_tokens=True)
    tokenizer.previous_ids = previous


@torch.no_grad()
def add_rows(model: nn.Module, model_config: ModelConfig, tokenizer, archive: Path | None = None) -> None:
    """Give a model rows for the added tokens of its configuration, in place. archive: where its weights come from.

    Rows that are there already, for tokens that an archive's tokenizer has, stay.
    """
    known = _tokens_of(archive)
    previous = getattr(tokenizer, "previous_ids", {}) if model_config.added_tokens else {}
    ids = {tokenizer.convert_tokens_to_ids(token): before for token, before in previous.items() if token not in known}
    new = {number: before for number, before in ids.items() if before != [number]}
    if not new:
        return
    if max(new) >= len(model.get_input_embeddings().weight):
        model.resize_token_embeddings(max(new) + 1, mean_resizing=False)
    head = model.get_output_embeddings()
    weights = [model.get_input_embeddings().weight, *([] if head is None else [head.weight, getattr(head, "bias", None)])]
    for weight in {id(weight): weight for weight in weights if weight is not None and not weight.is_meta}.values():
        for number, before in new.items():
            weight[number] = weight[before].float().mean(0).to(weight.dtype)


def fit_vocabulary(config, model_config: ModelConfig, archive: Path | None) -> None:
    """Set the vocabulary of a transformers configuration to that of an archive whose run has added tokens, in place."""
    if archive is None or not model_config.added_tokens:
        return
    rows = [shape[0] for name, shape in archive_shapes(archive).items() if name.endswith(EMBEDDINGS)]
    if rows:
        config.get_text_config().vocab_size = rows[0]


def _tokens_of(archive: Path | None) -> set[str]:
    """The added tokens of the tokenizer beside an archive."""
    if archive is None:
        return set()
    file = (archive if archive.is_dir() else archive.parent) / "tokenizer.json"
    try:
        return {each["content"] for each in json.loads(file.read_text(encoding="utf-8"))["added_tokens"]}
    except (OSError, ValueError, LookupError, TypeError):
        return set()
