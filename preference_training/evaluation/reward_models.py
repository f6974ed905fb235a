"""Rewards of responses under a reward model: one of loss=reward, or any sequence classifier with one output."""

import sys
from collections.abc import Sequence

from preference_training.core.errors import UserError, first_line
from preference_training.core.values import hash_values
from preference_training.data.records.record import PreferenceRecord, Prompt, Turn, message_of
from preference_training.data.records.report import DataReport
from preference_training.data.rendering.settings import TokenSettings
from preference_training.data.rows.templates import BUILT_IN, parse_dialogue
from preference_training.data.tokenization import tokenize_records
from preference_training.modeling.adapters.files import is_adapter
from preference_training.modeling.kernels import refuse_kernels
from preference_training.modeling.state import weights_hash
from preference_training.modeling.value_head import ROW_END

# Rows that a model reads at once.
ROWS_AT_ONCE = 16

# The token ids of a prompt with a response.
Row = tuple[int, ...]
# A prompt, as a text or as the turns of a conversation, and a response.
Text = tuple[Prompt, str]


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
        self.known: dict[Row, float] = {}
        self._rows: dict[Text, Row | None] = {}

    def rewards(self, texts: Sequence[Text]) -> list[float | None]:
        """The rewards of responses, each after its prompt; None for what it cannot read."""
        rows = self.rows(texts)
        new = set(rows) - self.known.keys() - {None}
        # Batches of similar length waste little computation on padding.
        new = sorted(new, key=lambda row: (len(row), row))
        padding = self.tokenizer.pad_token_id
        # A row is read at its last token that is not padding.
        size = ROWS_AT_ONCE if padding is not None and self.model.config.pad_token_id == padding else 1
        for start in range(0, len(new), size):
            batch = new[start : start + size]
            self.known |= dict(zip(batch, self._compute(batch), strict=True))
        return [None if row is None else self.known[row] for row in rows]

    def _compute(self, rows: Sequence[Row]) -> list[float]:
        import torch

        inputs = {"input_ids": [list(row) for row in rows], "attention_mask": [[1] * len(row) for row in rows]}
        if len(rows) > 1:
            inputs = self.tokenizer.pad(inputs, padding_side="right")
        tensors = {name: torch.tensor(values, device=self.model.device) for name, values in inputs.items()}
        with torch.no_grad():
            return self.model(**tensors).logits[:, 0].float().tolist()

    def rows(self, texts: Sequence[Text]) -> list[Row | None]:
        """The token ids of prompts with a response each, of long ones without their beginning; None for unreadable texts."""
        new = [text for text in dict.fromkeys(texts) if text not in self._rows]
        self._rows |= self._as_trained(new) if self.reads_as_trained else {text: self._by_template(*text) for text in new}
        return [self._rows[text] for text in texts]

    def _as_trained(self, texts: Sequence[Text]) -> dict[Text, Row | None]:
        """Rows as loss=reward reads them; all are tokenized at once, since a tokenizer is slow to prepare."""
        records: dict[str, list[PreferenceRecord]] = {}
        for number, (prompt, response) in enumerate(texts):
            turns = _turns(prompt) if self.tokenizer.chat_template else None
            record = PreferenceRecord(turns or prompt, [response], [], response, number, "evaluation.judge")
            # Without a chat template conversations are rendered as HH dialogues.
            records.setdefault("chat" if turns else "raw" if isinstance(prompt, str) else "hh", []).append(record)
        rows: dict[Text, Row | None] = dict.fromkeys(texts)
        for template, some in records.items():
            settings = TokenSettings("targets", sys.maxsize, sys.maxsize, template=template)
            for read in tokenize_records(some, self.tokenizer, settings, DataReport(skip_bad_rows=True)):
                rows[texts[read.number]] = self._end(read.prompt_ids + read.responses[0])
        return rows

    def _end(self, ids: list[int]) -> Row:
        """As many of the last token ids as the model takes, behind the beginning-of-sequence token if they have one."""
        cut = max(len(ids) - self.tokenizer.model_max_length, 0)
        kept = int(ids[0] == self.tokenizer.bos_token_id)
        return (*ids[:kept], *ids[kept + cut :])

    def _by_template(self, prompt: Prompt, response: str) -> Row:
        """A row by the model's own chat template, or, without one, as one text."""
        if not self.tokenizer.chat_template:
            if not isinstance(prompt, str):
                prompt, [response] = BUILT_IN["hh"].of(self.tokenizer)(prompt, [response], "")
            return tuple(self.tokenizer(prompt + response, truncation=True).input_ids)
        messages = [message_of(turn) for turn in _turns(prompt) or [Turn("user", str(prompt))]]
        messages.append({"role": "assistant", "content": response.strip()})
        text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        return tuple(self.tokenizer(text, truncation=True, add_special_tokens=False).input_ids)


def _turns(prompt: Prompt) -> tuple[Turn, ...] | None:
    """The turns of a conversation or of an HH dialogue; None of any other text."""
    return parse_dialogue(prompt) if isinstance(prompt, str) else prompt


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
        is_language_model = any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in config.architectures or ())
        found = "is a language model" if is_language_model else f"has {config.num_labels} outputs{missing}"
        raise UserError(
            f"evaluation.judge: reward_model:{name} {found}. Expected a trained reward "
            "model: a sequence classifier with one output."
        )
    return model.eval(), tokenizer
