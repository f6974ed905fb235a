"""Rewards of responses under a reward model: one of loss=reward, or any sequence classifier with one output."""

import sys
from collections.abc import Sequence

from preference_training.core.errors import UserError, first_line
from preference_training.core.values import hash_values
from preference_training.data.rows.records import PreferenceRecord
from preference_training.data.rows.templates import parse_dialogue
from preference_training.data.tokenization import TokenSettings, tokenize_records
from preference_training.modeling.adapters import is_adapter
from preference_training.modeling.kernels import refuse_kernels
from preference_training.modeling.state import weights_hash
from preference_training.modeling.value_head import ROW_END

# Rows that a model reads at once.
ROWS_AT_ONCE = 16


class RewardModel:
    """A sequence classifier with one output. identity: a hash of its weights, and of what else its rewards depend on.

    A model of loss=reward reads rows as in training; any other reads conversations by its tokenizer's chat template.
    """

    def __init__(self, name: str, cache_dir: str | None, device):
        self.model, self.tokenizer = load_reward_model(name, cache_dir)
        reads = [self.model.config.to_json_string(), str(self.tokenizer.chat_template), self.tokenizer.get_vocab()]
        self.identity = f"{weights_hash(self.model)} {hash_values(reads)}"
        self.model.to(device)
        self.reads_as_trained = getattr(self.model.config, ROW_END, None) == self.tokenizer.eos_token_id is not None
        # By token ids, so that texts which the model reads alike are a tie, whatever they were padded with.
        self.known: dict[tuple[int, ...], float] = {}

    def rewards(self, texts: Sequence[tuple[str, str]]) -> list[float]:
        """The rewards of responses, each after its prompt."""
        rows = [self.row(prompt, response) for prompt, response in texts]
        # Batches of similar length waste little computation on padding.
        new = sorted(set(rows) - self.known.keys(), key=lambda row: (len(row), row))
        padding = self.tokenizer.pad_token_id
        # A row is read at its last token that is not padding.
        size = ROWS_AT_ONCE if padding is not None and self.model.config.pad_token_id == padding else 1
        for start in range(0, len(new), size):
            batch = new[start : start + size]
            self.known |= dict(zip(batch, self._compute(batch), strict=True))
        return [self.known[row] for row in rows]

    def _compute(self, rows: Sequence[tuple[int, ...]]) -> list[float]:
        import torch

        inputs = {"input_ids": [list(row) for row in rows], "attention_mask": [[1] * len(row) for row in rows]}
        if len(rows) > 1:
            inputs = self.tokenizer.pad(inputs, padding_side="right")
        tensors = {name: torch.tensor(values, device=self.model.device) for name, values in inputs.items()}
        with torch.no_grad():
            return self.model(**tensors).logits[:, 0].float().tolist()

    def row(self, prompt: str, response: str) -> tuple[int, ...]:
        """The token ids of a prompt with a response; a long text is truncated on the left."""
        turns = parse_dialogue(prompt) if self.tokenizer.chat_template else None
        if self.reads_as_trained:
            longest = min(self.tokenizer.model_max_length, sys.maxsize)
            settings = TokenSettings("targets", longest, longest - 1, "keep_end", "chat" if turns else "raw")
            record = PreferenceRecord(turns or prompt, [response], [], response, 1, "evaluation.judge")
            [row] = tokenize_records([record], self.tokenizer, settings)
            return (*row.prompt_ids, *row.responses[0])
        if not self.tokenizer.chat_template:
            return tuple(self.tokenizer(prompt + response, truncation=True).input_ids)
        messages = [{"role": role, "content": content} for role, content, *_ in turns or [("user", prompt)]]
        messages.append({"role": "assistant", "content": response.strip()})
        text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        return tuple(self.tokenizer(text, truncation=True, add_special_tokens=False).input_ids)


def load_reward_model(name: str, cache_dir: str | None = None):
    """Load a reward model and its tokenizer from the hub or a directory. Raises UserError for other models."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    if is_adapter(name):
        raise UserError(
            f"evaluation.judge: {name} is an adapter. Merge it: python scripts/export.py {name} --merge --to FOLDER"
        )
    where = {"cache_dir": cache_dir, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(name, **where)
        refuse_kernels(config)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name, config=config, dtype="auto", output_loading_info=True, use_safetensors=True, **where
        )
        tokenizer = AutoTokenizer.from_pretrained(name, truncation_side="left", **where)
    except Exception as error:  # a dozen types: network errors and damaged files
        raise UserError(
            f"evaluation.judge: cannot load reward_model:{name}: {first_line(error)}. Expected a sequence classifier with its "
            "tokenizer: a hub id, or a local directory with safetensors."
        ) from error
    if config.num_labels != 1 or info["missing_keys"]:
        missing = f", and no {sorted(info['missing_keys'])[0]}" if info["missing_keys"] else ""
        raise UserError(
            f"evaluation.judge: reward_model:{name} has {config.num_labels} outputs{missing}. Expected a trained reward "
            "model: a sequence classifier with one output."
        )
    return model.eval(), tokenizer
