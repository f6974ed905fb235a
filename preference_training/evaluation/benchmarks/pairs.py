"""Pair accuracy, as RewardBench: how often a model scores the preferred response higher.

    file -> pairs with categories -> scores of both responses, in several ways -> accuracies

Ways to score a response: the implicit reward of DPO (the log-ratio to a reference; beta changes no order), the log-prob alone,
each as a sum and as a mean over its tokens, and the reward of a reward model.
"""

import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy

from preference_training.batching.micro_batches import split_into_batches
from preference_training.batching.packing import iterate_examples
from preference_training.core.errors import UserError
from preference_training.data.files import faults_of, read_whole_file
from preference_training.data.records.record import PreferenceRecord, prompt_text
from preference_training.data.records.report import DataReport
from preference_training.data.rendering.settings import TokenSettings
from preference_training.data.rows.field_maps import FieldMap
from preference_training.data.rows.grouping import Row, group_rows
from preference_training.data.tokenization import TokenizedPrompt, tokenize_records
from preference_training.evaluation.held_out import Scores, score_responses
from preference_training.evaluation.reward_models import RewardModel
from preference_training.generation.chat import ChatModel
from preference_training.modeling.token_budget import token_budget

# The columns that name a pair's category, in the order in which they are looked for.
CATEGORY_COLUMNS = ("subset", "category", "source", "dataset")
PAIRS_AT_ONCE = 16


class Pairs(NamedTuple):
    """The pairs of a file, and the category of each record ("" for none) by its number.

    There is one record for each row, or for all rows of a prompt and a category that have one scored response each. left_out:
    what has no pair, by reason.
    """

    records: list[PreferenceRecord]
    categories: dict[int, str]
    column: str | None
    left_out: dict[str, int]


NO_PAIR = "a row compares nothing"
NO_DIFFERENT_SCORES = "a prompt has no two responses with different scores"


def read_pairs(path: str, column: str | None = None) -> Pairs:
    """The pairs of a file in any format that training reads. column: with their categories; None looks for one.

    Raises UserError where there are none.
    """
    report = DataReport()
    rows = list(read_whole_file(path, "pairs"))
    if column is not None and not any(column in row for _, row in rows):
        raise UserError(f"--by: no row of {path} has a column {column!r}. Expected one of {', '.join(rows[0][1])}.")
    column = column or next((name for name in CATEGORY_COLUMNS if any(name in row for _, row in rows)), None)
    given = {number: str(row[column]) for number, row in rows if column is not None and row.get(column) is not None}
    together: dict[object, list[Row]] = {}
    with faults_of("pairs"):
        for row in FieldMap().map_rows(rows, path, report):
            key = (row.prompt, row.tools, given.get(row.number, "")) if row.forms_pairs else row.number
            together.setdefault(key, []).append(row)
    records, categories = [], {}
    for of_record in together.values():
        first = of_record[0]
        for prompt, record in group_rows(of_record, report):
            if not record["pairs"]:
                report.skip(NO_DIFFERENT_SCORES if first.forms_pairs else NO_PAIR)
                continue
            number, source = len(records), f"{path}, row {first.number}"
            texts = record["responses"], record["pairs"], record["sft_target"]
            records.append(PreferenceRecord(prompt, *texts, number, source, tools=first.tools))
            categories[number] = given.get(first.number, "")
    if not records:
        found = "; ".join(f"{count} x {reason}" for reason, count in report.left_out.items()) or "it has none"
        raise UserError(
            f"pairs: {path} has no pair of two different responses ({found}). Expected rows with chosen and rejected."
        )
    return Pairs(records, categories, column, report.left_out)


class Scored(NamedTuple):
    """Pairs in one order: by how much the preferred response scores higher, [E], for each way to score.

    records: the record of each pair, by its number. left_out: records without a pair that can be scored, by reason.
    """

    margins: dict[str, numpy.ndarray]
    records: list[int]
    left_out: dict[str, int]

    def outcomes(self, name: str) -> numpy.ndarray:
        """1 for a pair in the right order, 0 for one in the wrong order, 0.5 for equal scores: [E]."""
        return (1 + numpy.sign(self.margins[name])) / 2


def score_by_language_model(pairs: Pairs, policy: ChatModel, reference: ChatModel | None) -> Scored:
    """Margins of log-probs, and, with a reference, of implicit rewards; as sums, and as means per token."""
    report = DataReport(skip_bad_rows=True)
    prompts = tokenized(pairs, policy, report)
    examples = list(iterate_examples(prompts))
    batches = split_into_batches(examples, PAIRS_AT_ONCE, token_budget(policy.model))
    found = _scores(policy, batches)
    members, lengths = found.examples.members, found.examples.lengths.double()
    values = {"log-prob": found.policy}
    if reference is not None:
        values = {"reward": found.policy - _scores(reference, batches).policy} | values
    values |= {f"{name} per token": each / lengths for name, each in list(values.items())}
    margins = {name: (each[members[:, 0]] - each[members[:, 1]]).numpy() for name, each in values.items()}
    bad = {f"a row such as {report.bad_rows[0].removeprefix('datasets: ')}": report.num_bad_rows} if report.bad_rows else {}
    left_out = report.left_out | bad
    return Scored(margins, [prompt.number for prompt, _ in examples], left_out)


def tokenized(pairs: Pairs, model: ChatModel, report: DataReport) -> list[TokenizedPrompt]:
    """The token ids of pairs, in the format of a model. Raises UserError where none can be read."""
    name = model.format.name
    system = model.system_prompt if name != "raw" else None
    room = min(model.context, sys.maxsize)
    settings = TokenSettings("pairs", room, room - 1, template=name, system_prompt=system)
    found = list(tokenize_records(pairs.records, model.tokenizer, settings, report))
    if not found:
        first = next(iter([*report.bad_rows, *report.left_out]), "no pair is left")
        raise UserError(
            f"pairs: {model.name} can read none of them: {first}. Expected prompts in the format {name}: --template."
        )
    return found


def same_vocabulary(tokenizer, other) -> bool:
    """Whether two tokenizers have the same tokens, so that log-probs are of the same."""
    return tokenizer.get_vocab() == other.get_vocab()


def _scores(model: ChatModel, batches: Sequence) -> Scores:
    with model.weights():
        return score_responses(model.model, None, batches)


def score_by_reward_model(pairs: Pairs, model: RewardModel) -> Scored:
    """Margins of rewards."""
    asked = [(record, pair) for record in pairs.records for pair in record.pairs]
    texts = [(record.prompt, record.responses[k]) for record, pair in asked for k in pair]
    if unread := next((response for _, response in texts if not isinstance(response, str)), None):
        raise UserError(f"pairs: a reward model reads responses of one turn, found {unread!r:.60}.")
    rewards = model.rewards(texts)
    both = list(zip(rewards[::2], rewards[1::2], strict=True))
    known = [k for k, (one, other) in enumerate(both) if one is not None and other is not None]
    margins = numpy.array([both[k][0] - both[k][1] for k in known])
    left_out = (
        {"the reward model cannot read the prompt or a response": len(both) - len(known)} if len(known) < len(both) else {}
    )
    return Scored({"reward": margins}, [asked[k][0].number for k in known], left_out)


def prompts_of(pairs: Pairs, scored: Scored) -> list[str]:
    """The prompt of each scored pair as text: pairs of one prompt are not independent."""
    return [prompt_text(pairs.records[number].prompt) for number in scored.records]
