"""Read and write files of token ids (`.pt`): pairs with loss masks."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from preference_training.core.errors import UserError
from preference_training.core.files import load_tensors
from preference_training.data.records.held_out import is_held_out
from preference_training.data.records.record import PreferenceRecord
from preference_training.data.records.report import SAME_TEXT, DataReport
from preference_training.data.rendering.settings import TokenSettings
from preference_training.data.rows.examples import select
from preference_training.data.rows.grouping import add_responses, new_record
from preference_training.data.tokenization import TokenizedPrompt, trainable_part

NO_END = "responses that do not end with the end-of-sequence token"
TOKEN_FIELDS = ("prompt_chosen_tokens", "prompt_rejected_tokens", "chosen_loss_mask", "rejected_loss_mask")


@dataclass(frozen=True)
class Vocabulary:
    """What a file of token ids is validated against: the number of ids, and those of the special tokens."""

    size: int
    eos_token_id: int
    bos_token_id: int | None = None

    @classmethod
    def of(cls, tokenizer) -> "Vocabulary":
        """The vocabulary of a tokenizer."""
        return cls(len(tokenizer), tokenizer.eos_token_id, tokenizer.bos_token_id)


def read_tokenized(
    path: Path, split: str, held_out_share: float, vocabulary: Vocabulary, settings: TokenSettings, report: DataReport
) -> Iterator[TokenizedPrompt]:
    """Yield the prompts of a `.pt` file: a list of dicts with the TOKEN_FIELDS, each a list or 1-D tensor of whole numbers.

    A mask is 1 for the scored tokens of the response, perhaps in several spans: what precedes the first is the prompt, what
    follows the last is padding. Adjacent rows of one prompt are merged; for SFT, into one for each chosen response. The
    held-out share is chosen by a hash of the prompt's ids. Responses that do not end with the end-of-sequence token are
    counted; for what is skipped see `trainable_part`. Bad rows go to the report; raises UserError for other files. Only tensors
    and plain values are unpickled.
    """
    counts = report if split == "train" else DataReport(report.skip_bad_rows)
    for prompt_ids, rows in groupby(_valid_rows(path, vocabulary.size, counts), key=itemgetter(1)):
        record, places, first = new_record(), {}, None
        for number, _, chosen, rejected in rows:
            first = first or number
            counts.skip(SAME_TEXT, add_responses(record, (chosen, rejected), [(0, 1)], places))
        if not record["pairs"] or is_held_out(repr(prompt_ids), held_out_share) != (split == "test"):
            continue
        learned = [record["responses"][chosen] for chosen, _ in record["pairs"]]
        if settings.version == 1:
            learned = list(dict.fromkeys(learned))
        source = f"{path}, row {first}"
        ids = PreferenceRecord(prompt_ids, record["responses"], record["pairs"], learned[-1], first, source, tuple(learned))
        for part in select(ids, settings.examples, settings.margins, report):
            report.change(NO_END, sum(ids[-1] != vocabulary.eos_token_id for ids, _ in part.responses))
            ids, spans = ([list(values) for values in of] for of in zip(*part.responses, strict=True))
            # Most responses are scored as a whole.
            several = any(len(of) > 1 for of in spans)
            prompt = TokenizedPrompt(
                prompt_ids, ids, part.examples, source, first, spans=spans if several else None, **part.numbers
            )
            always_kept = int(settings.version > 1 and prompt_ids[0] == vocabulary.bos_token_id)
            left = trainable_part(prompt, settings, always_kept, report)
            if left is not None:
                yield left


class ScoredResponse(NamedTuple):
    """The ids of a response, and the [start, end) spans of it that are scored."""

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


def _valid_rows(
    path: Path, vocabulary: int, report: DataReport
) -> Iterator[tuple[int, list[int], ScoredResponse, ScoredResponse]]:
    """Number, prompt ids, chosen and rejected response of every valid row."""
    for number, row in enumerate(_load_rows(path), start=1):
        report.rows_read += 1
        try:
            ids = _split_row(row, vocabulary)
        except ValueError as error:
            report.bad_row(UserError(f"datasets: {path}, row {number}: {error}"))
        else:
            yield number, *ids


def _load_rows(path: Path) -> list:
    try:
        rows = load_tensors(path)
    except ValueError as error:
        raise UserError(
            f"datasets: {path}: cannot be read as tensors and plain values ({error}). "
            f"Expected a list of dicts with {', '.join(TOKEN_FIELDS)}."
        ) from error
    if not isinstance(rows, list) or not rows:
        raise UserError(
            f"datasets: {path}: found {'an empty list' if rows == [] else type(rows).__name__}, "
            f"expected a list of dicts with {', '.join(TOKEN_FIELDS)}."
        )
    return rows


def _split_row(row, vocabulary: int) -> tuple[list[int], ScoredResponse, ScoredResponse]:
    """Prompt ids, chosen and rejected response of a row. Raises ValueError with the reason."""
    missing = [name for name in TOKEN_FIELDS if not isinstance(row, dict) or name not in row]
    if missing:
        raise ValueError(f"no {', '.join(missing)}. Expected a dict with {', '.join(TOKEN_FIELDS)}.")
    values = {name: _whole_numbers(row[name], name) for name in TOKEN_FIELDS}
    parts = []
    for side in ("chosen", "rejected"):
        ids, mask = values[f"prompt_{side}_tokens"], values[f"{side}_loss_mask"]
        if len(ids) != len(mask):
            raise ValueError(f"{side}_loss_mask has {len(mask)} entries for {len(ids)} tokens. Expected one for each.")
        if not all(0 <= token < vocabulary for token in ids):
            raise ValueError(f"prompt_{side}_tokens holds ids outside the tokenizer's 0 to {vocabulary - 1}.")
        if mask[0] or 1 not in mask or not {0, 1}.issuperset(mask):
            raise ValueError(f"{side}_loss_mask is not zeros (the prompt), ones and zeros (the response), zeros (padding).")
        cuts = [k for k in range(1, len(mask)) if mask[k] != mask[k - 1]] + [len(mask)] * mask[-1]
        start, end = cuts[0], cuts[-1]
        places = [cut - start for cut in cuts]
        spans = tuple(zip(places[::2], places[1::2], strict=True))
        parts.append((ids[:start], ScoredResponse(tuple(ids[start:end]), spans)))
    (prompt, chosen), (other_prompt, rejected) = parts
    if prompt != other_prompt:
        raise ValueError("chosen and rejected follow different prompt tokens. Expected the same ids before both responses.")
    return prompt, chosen, rejected


def _whole_numbers(value, name: str) -> list[int]:
    try:
        numbers = value.tolist() if hasattr(value, "tolist") else value
    except RuntimeError:  # of sparse and of meta tensors
        numbers = None
    # Masks may be booleans or floats.
    if not isinstance(numbers, list) or not numbers or not all(isinstance(n, int | float) and n % 1 == 0 for n in numbers):
        raise ValueError(f"{name} is no list or 1-D tensor of whole numbers.")
    return [int(n) for n in numbers]


def write_tokenized(path: Path, prompts: Iterable[TokenizedPrompt]) -> int:
    """Write every pair of `prompts` as a row that `read_tokenized` reads; returns how many."""
    import torch

    rows = []
    for prompt in prompts:
        for pair in prompt.pairs:
            row = {}
            for side, index in zip(("chosen", "rejected"), pair, strict=True):
                response = prompt.responses[index]
                scored = {*chain(*(range(*span) for span in prompt.spans[index]))} if prompt.spans else range(len(response))
                mask = [int(k in scored) for k in range(len(response))]
                row[f"prompt_{side}_tokens"] = torch.tensor(prompt.prompt_ids + response)
                row[f"{side}_loss_mask"] = torch.tensor([0] * len(prompt.prompt_ids) + mask)
            rows.append(row)
    torch.save(rows, path)
    return len(rows)
