"""How likely the labels of given pairs are wrong, by a run: by its halves where it has any, else by its margin ledger.

python scripts/flip_probabilities.py RUN PAIRS.jsonl TO.jsonl

PAIRS has rows of an id, a prompt and its responses, as records have them. They are tokenized as the run's data was, and matched
with the run's pairs by their token ids. TO gets a row {id, probability} for each that is matched: of its pairs the likeliest.
A run with data.weights=ledger has probabilities by models that have not seen the pair; of any other, the ledger is read.
The labeling app calls this for `score --ledger RUN`.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from itertools import combinations
from pathlib import Path

from preference_training.checkpointing.checkpoint import Checkpoint, list_checkpoints
from preference_training.core.errors import UserError
from preference_training.core.files import write_atomically
from preference_training.data.entries import read_entries
from preference_training.data.files import read_whole_file
from preference_training.data.pairs.weights import pair_key
from preference_training.data.prompt_table import PromptTable
from preference_training.data.records.record import PreferenceRecord, Prompt, Response, Turn, response_of
from preference_training.data.records.report import DataReport
from preference_training.data.rows.answers import listed_answer
from preference_training.data.rows.conversations import RowError
from preference_training.data.rows.field_maps import FieldMap
from preference_training.data.tokenization import TokenizedPrompt, tokenize_records
from preference_training.evaluation.runs import load_run_config
from preference_training.losses.registry import build_loss
from preference_training.modeling.tokenizer import load_tokenizer
from preference_training.reporting.flagged_pairs import Pairs, wrong_label_probability
from preference_training.tracking.label_weights import read_label_numbers
from preference_training.tracking.ledger import Observations, read_ledger
from preference_training.training.preparation import fit_templates, prepare_data, token_settings, with_label_weights

# A prompt and two of its responses, in no order, as token ids.
Key = tuple[tuple[int, ...], frozenset[tuple[int, ...]]]


def probabilities_of_run(table: PromptTable, seen: Observations) -> dict[Key, float]:
    """The probability that the label of each pair in a ledger is wrong; the larger one of a pair with both labels."""
    pairs, found = Pairs.of(seen), {}
    for preferred, other, value in zip(pairs.preferred, pairs.other, wrong_label_probability(pairs, seen), strict=True):
        prompt = table[table.prompt_index(int(preferred))]
        two = frozenset(tuple(prompt.responses[int(row) - prompt.first_row]) for row in (preferred, other))
        key = tuple(prompt.prompt_ids), two
        found[key] = max(float(value), found.get(key, 0.0))
    return found


def pairs_of_halves(run: Path) -> Callable[[TokenizedPrompt, tuple[int, int]], float | None] | None:
    """The probability that the label of a pair is wrong, by the run's halves, or None; None for a run without halves."""
    known = read_label_numbers(run, "probability")

    def probability(prompt: TokenizedPrompt, pair: tuple[int, int]) -> float | None:
        keys = [pair_key(prompt.prompt_ids, prompt.responses[i], prompt.responses[j]) for i, j in (pair, pair[::-1])]
        return max((known[key] for key in keys if key in known), default=None)

    return probability if known else None


def pairs_of_ledger(run: Path, table: PromptTable) -> Callable[[TokenizedPrompt, tuple[int, int]], float | None]:
    """The same by the run's ledger, whose pairs are in a table."""
    known = probabilities_of_run(table, read_ledger(run))

    def probability(prompt: TokenizedPrompt, pair: tuple[int, int]) -> float | None:
        return known.get((tuple(prompt.prompt_ids), frozenset(tuple(prompt.responses[k]) for k in pair)))

    return probability


def prompt_and_responses(row: dict) -> tuple[Prompt, list[Response]]:
    """The prompt and the responses of a row of PAIRS. Raises RowError where it lacks something."""
    if missing := [name for name in ("id", "prompt", "responses") if row.get(name) is None]:
        raise RowError(f"no {', '.join(missing)}. Expected an id, a prompt and a list of responses.")
    if not isinstance(row["id"], str | int):
        raise RowError(f"field 'id' is {row['id']!r:.60}, expected a text or a whole number.")
    if not isinstance(row["responses"], list) or not row["responses"]:
        raise RowError(f"field 'responses' is {row['responses']!r:.60}, expected a list of responses.")
    prompt = "" if row["prompt"] == "" else FieldMap().prompts.read(row)
    answers = [listed_answer(answer, "responses", k) for k, answer in enumerate(row["responses"])]
    return prompt, [response_of(answer) if isinstance(answer, tuple) else answer for answer in answers]


def records_of(rows: Iterable[tuple[int, dict]], place: str) -> Iterator[tuple[str, PreferenceRecord]]:
    """(id, record) of rows, with all pairs of responses; texts also as `lc` has them, which reads them as conversations.

    Raises UserError, with the place and the row, where one cannot be read.
    """
    number = 0
    for row_number, row in rows:
        try:
            prompt, responses = prompt_and_responses(row)
        except RowError as error:
            raise UserError(f"{place}, row {row_number}: {error}") from None
        forms = [(prompt, responses)]
        if isinstance(prompt, str) and prompt.strip() and all(isinstance(text, str) for text in responses):
            forms.append(((Turn("user", prompt.strip()),), [text.strip() for text in responses]))
        for of_form, texts in forms:
            number += 1
            pairs = list(combinations(range(len(texts)), 2))
            yield row["id"], PreferenceRecord(of_form, texts, pairs, texts[0], number, "a comparison")


def load_run(run: Path):
    """A run's tokenizer, the training prompts that its ledger numbers, and the settings of each of its data sets.

    Raises UserError for another directory, and where its data has changed.
    """
    config = load_run_config(run, [])
    checkpoint = Checkpoint.read(list_checkpoints(run)[0])
    loss = build_loss(**config.loss.given(), seed=config.seed)
    tokenizer = load_tokenizer(config.with_head(loss.model_head).model, config.cache_dir)
    config, entries = fit_templates(config, read_entries(config), tokenizer, checkpoint)
    version = checkpoint.data_version
    train, _ = prepare_data(with_label_weights(config, run), entries, tokenizer, loss, ("train", "test"), version)
    if checkpoint.run["data"][0] != train.fingerprint:
        raise UserError(f"{run}: its data has changed, so that its ledger names other pairs. Expected the data of the run.")
    settings = token_settings(config, loss, version)
    return tokenizer, train.table, list(dict.fromkeys(map(settings, entries)))


def flip_probabilities(run: Path, rows: Iterable[tuple[int, dict]], place: str = "PAIRS") -> dict[str, float]:
    """The probability that a label of each row's pairs is wrong: id -> probability, of the rows that the run has seen.

    Raises UserError for a row that cannot be read, and for a directory that is no run with a ledger, or halves.
    """
    # Before the run's data is prepared, which takes longer.
    given = list(records_of(rows, place))
    probability = pairs_of_halves(run)
    if probability is None and not len(read_ledger(run)):
        raise UserError(f"{run}: no ledger. Expected the directory of a run of a preference loss with ledger=true.")
    tokenizer, table, settings = load_run(run)
    probability = probability or pairs_of_ledger(run, table)
    ids, found = {record.number: id for id, record in given}, {}
    for each in settings:
        report = DataReport(skip_bad_rows=True)
        for prompt in tokenize_records((record for _, record in given), tokenizer, each, report):
            for pair in prompt.pairs:
                if (value := probability(prompt, pair)) is not None:
                    id = ids[prompt.number]
                    found[id] = max(value, found.get(id, 0.0))
    return found


def write(to: Path, text: str) -> None:
    """Write a file that the user named. Raises UserError where that fails."""
    try:
        write_atomically(to, text)
    except OSError as error:
        raise UserError(f"TO: cannot write {to}: {error.strerror}. Expected a writable file.") from error


def main() -> None:
    """Write the file. A user's mistake is reported as one message, with exit status 2."""
    import json

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("pairs", type=Path, help="JSON lines of id, prompt and responses")
    parser.add_argument("to", type=Path, help="the file to write, as JSON lines")
    options = parser.parse_args()
    try:
        if not os.access(options.to.absolute().parent, os.W_OK):
            raise UserError(f"TO: cannot write {options.to}. Expected a file in a writable folder that is there.")
        with redirect_stdout(sys.stderr):
            found = flip_probabilities(options.run, read_whole_file(str(options.pairs), "PAIRS"), f"PAIRS: {options.pairs}")
        lines = (json.dumps({"id": id, "probability": round(value, 6)}) + "\n" for id, value in found.items())
        write(options.to, "".join(lines))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
