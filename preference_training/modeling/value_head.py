"""Reward models: a language model's body with a value head, one number a response, read at the response's last token.

They are the sequence classifiers of transformers with one label. Their own forward finds the last token by the id of padding,
and reads one number a row; here positions say where to read, so that the responses of a packed batch share their prompts, and
that a response may hold any token.
"""

import re
from functools import cache, wraps

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from preference_training.core.errors import UserError

# The name of the head in all sequence classifiers of causal language models.
VALUE_HEAD = "score"
# The key of a reward model's config.json for the token that ended every row in training.
ROW_END = "row_end_token_id"


def auto_class(head: str):
    """The class of transformers that builds models with a head: lm or value."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if head == "value" else AutoModelForCausalLM


def is_classifier(architecture: object) -> bool:
    """Whether the name of a model's class, or what a configuration has for it, is that of a sequence classifier."""
    return isinstance(architecture, str) and architecture.endswith("ForSequenceClassification")


def check_head(config, head: str, name: str) -> None:
    """Raise UserError where a transformers configuration cannot be that of a model with a head: lm or value.

    name: of the model, for the message.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    classifies = any(map(is_classifier, config.architectures or ()))
    if head == "lm" and classifies:
        raise UserError(
            f"model.name_or_path: {name} is a sequence classifier, and this loss trains a language model. Choose a language "
            "model, or loss=reward."
        )
    own = getattr(config, "auto_map", None) or {}
    generates = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in own
    if head == "lm" and (not generates or any(str(each).endswith("ForMaskedLM") for each in config.architectures or ())):
        found = ", ".join(config.architectures or [config.model_type])
        raise UserError(
            f"model.name_or_path: {name} is no causal language model, but {found}. Expected one that writes text from "
            "left to right, such as llama, qwen3, gemma3 or gpt2."
        )
    if head == "value" and classifies and config.num_labels != 1:
        raise UserError(
            f"model.name_or_path: {name} is a classifier with {config.num_labels} labels. Expected a reward model, which has "
            "one, or a language model."
        )
    known = type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    if head == "value" and not known and "AutoModelForSequenceClassification" not in (getattr(config, "auto_map", None) or {}):
        raise _no_reward_model(name, f"transformers has no sequence classifier for {config.model_type}")


def _no_reward_model(name: str, reason: str) -> UserError:
    return UserError(
        f"model.name_or_path: {name} cannot become a reward model: {reason}. Expected an architecture with a sequence "
        "classifier for causal models, such as llama, qwen3, gemma2, mistral, phi3, gpt2 or gpt_neox."
    )


# ---- models -----------------------------------------------------------------------------------------------------------------


def add_values(model: nn.Module) -> None:
    """Let a sequence classifier of transformers compute values at given positions. Raises UserError where its head is another.

    Its class becomes a subclass of the same name, which leaves weights, names and files as they are.
    """
    head = getattr(model, VALUE_HEAD, None)
    if not isinstance(head, nn.Linear) or model.base_model is model:
        reason = f"{type(model).__name__} has no linear layer {VALUE_HEAD} behind its body"
        raise _no_reward_model(model.config.name_or_path or model.config.model_type, reason)
    head.__class__ = ValueHead
    model.__class__ = _value_class(type(model))


class ValueHead(nn.Linear):
    """A value head that computes in float32, whatever the dtypes of states and weights: bfloat16 would round margins to 8 bits.

    A head becomes one by a change of class, which leaves weights and names as they are.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [..., H] to values [..., 1]."""
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return F.linear(hidden.float(), self.weight.float(), bias)


@cache
def _value_class(model_class: type[nn.Module]) -> type:
    """A subclass of a sequence classifier's class whose forward takes `values_at`."""

    class ValueModel(model_class):
        has_value_head = True

        @wraps(model_class.forward)
        def forward(self, *args, values_at: Tensor | None = None, **inputs):
            """The class's own forward; with values_at [R], indices of tokens counted row by row: their values, [R] float32."""
            if values_at is None:
                return super().forward(*args, **inputs)
            hidden = self.base_model(*args, **inputs).last_hidden_state
            values = getattr(self, VALUE_HEAD)(hidden.flatten(0, 1)[values_at.to(hidden.device)])
            # A copy: FSDP registers a hook on the model's output, which a view modified in place would lose.
            return values[:, 0].clone()

    ValueModel.__name__, ValueModel.__qualname__ = model_class.__name__, model_class.__qualname__
    ValueModel.__module__ = model_class.__module__
    return ValueModel


def has_value_head(model: nn.Module) -> bool:
    """Whether a model computes values of responses; else their log-probs."""
    return getattr(model, "has_value_head", False)


def output_head(model: nn.Module) -> nn.Module | None:
    """The last layer of a model: the value head, or that over the vocabulary."""
    return getattr(model, VALUE_HEAD) if has_value_head(model) else model.get_output_embeddings()


def is_head_weight(name: str) -> bool:
    """Whether the name of a weight is that of a value head's."""
    return name.rpartition(".")[0] == VALUE_HEAD


# ---- padding ----------------------------------------------------------------------------------------------------------------


def pad_beside_end(tokenizer) -> None:
    """Set the padding token of a reward model's tokenizer, where it is the token that ends every response.

    transformers reads a row at its last token that is not padding, and would miss the end.
    """
    if tokenizer.pad_token_id not in (None, tokenizer.eos_token_id):
        return
    added = sorted(tokenizer.get_added_vocab(), key=tokenizer.get_added_vocab().get)
    padding = [token for token in added if re.search("pad", token, re.IGNORECASE)]
    last = max(tokenizer.get_vocab().items(), key=lambda pair: (pair[1] != tokenizer.eos_token_id, pair[1]))[0]
    candidates = [*padding, tokenizer.unk_token, tokenizer.bos_token, *added, last]
    tokenizer.pad_token = next(token for token in candidates if token not in (None, tokenizer.eos_token))
    print(
        f"model: the reward model pads with {tokenizer.pad_token!r}: transformers, which reads a reward at the last token that "
        f"is not padding, would not see {tokenizer.eos_token!r} at the end of a response",
        flush=True,
    )
