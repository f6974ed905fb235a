"""The tokenizer of a `model` configuration."""

from pathlib import Path

from preference_training.configuration.sections import ModelConfig
from preference_training.core.errors import UserError, first_line
from preference_training.data.toy_preferences import toy_records
from preference_training.modeling.sources.configurations import loading_errors
from preference_training.modeling.tuning.added_tokens import add_to_tokenizer
from preference_training.modeling.value_head import pad_beside_end

# The value of `model.tokenizer_name_or_path` for the tokenizer that is built in code.
BYTE_LEVEL = "byte_level"
END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"


def load_tokenizer(model_config: ModelConfig, cache_dir: str | None = None):
    """The tokenizer of a `model` configuration, with an end-of-sequence and a padding token; a reward model's are different.

    Raises UserError where it cannot be loaded, or has no end-of-sequence token.
    """
    name = model_config.tokenizer_name_or_path or model_config.name_or_path
    tokenizer = byte_level_tokenizer() if name == BYTE_LEVEL else _pretrained(model_config, name, cache_dir)
    add_to_tokenizer(tokenizer, model_config)
    if model_config.chat_template:
        tokenizer.chat_template = _read_chat_template(model_config.chat_template)
    return tokenizer


def _read_chat_template(path: str) -> str:
    """The text of a chat template in a file. Raises UserError."""
    try:
        return Path(path).expanduser().read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"model.chat_template: {path} could not be read: {first_line(error)}. Expected a chat template in Jinja."
        ) from error


def _pretrained(model_config: ModelConfig, name: str, cache_dir: str | None):
    from transformers import AutoTokenizer

    key = "model.tokenizer_name_or_path" if model_config.tokenizer_name_or_path else "model.name_or_path"
    with loading_errors(key, name):
        tokenizer = AutoTokenizer.from_pretrained(name, cache_dir=cache_dir, trust_remote_code=model_config.trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model.tokenizer_name_or_path: {name} has no end-of-sequence token. Set eos_token in its tokenizer_config.json."
        )
    if model_config.head == "value":
        pad_beside_end(tokenizer)
    elif tokenizer.pad_token_id is None:
        # Padding is masked by length, never by its id, so that an existing token can serve.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def byte_level_tokenizer():
    """A byte-level BPE tokenizer built in code: 256 bytes, and enough merges to make most words of the toy data one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=640, initial_alphabet=alphabet, special_tokens=[END_OF_TEXT, PAD], show_progress=False
    )
    records = toy_records("train")
    texts = [text for prompt, record in records.items() for text in (prompt, *record["responses"])]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=PAD)
