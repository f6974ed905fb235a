"""The named data sets: loaders of prompts, responses, pairs and SFT targets, all text, by name.

A loader is a function `(split, silent=False, cache_dir=None)` registered under a name. It returns a dict from prompt to

    {"responses": list[str], "pairs": list[tuple[int, int]], "sft_target": str}

where a pair holds the indices of the preferred and of the dispreferred response, or yields `(prompt, record)` items where the
data does not fit in memory. What a record may have besides is in `preference_training/data/records/record.py`: several targets,
scores and labels of responses, weights and margins of pairs. To add a data set, write the function, here or in a file of your
own:

    @register("my_data")
    def get_my_data(split, silent=False, cache_dir=None): ...

Further keyword parameters of a loader are keys that its entry may have: `datasets=[{name: my_data, language: en}]`; one called
`report` receives the `DataReport` that counts what is skipped, one called `text_of` a function from a prompt to the text that
the model reads of it, for a split by hash. Import heavy libraries where they are used, so that names can be checked before
anything is loaded.
"""

from collections.abc import Iterator
from numbers import Real
from typing import Literal

from preference_training.core.processes import map_in_processes
from preference_training.data.hub_sets import WHOLE_SET, HubSet, hub_set, valid_rows
from preference_training.data.records.held_out import prompt_hash
from preference_training.data.records.record import Items, NumberedRows, Prompt, Records, Turn
from preference_training.data.records.report import EMPTY_TEXT, SAME_TEXT, DataReport
from preference_training.data.registry import register
from preference_training.data.rows.field_maps import FieldMap
from preference_training.data.rows.grouping import (
    Row,
    add_responses,
    group_rows,
    new_record,
    pairs_by_score,
    scored_record,
)
from preference_training.data.rows.templates import ASSISTANT, HUMAN, parse_dialogue
from preference_training.data.sources.filters import RowFilter
from preference_training.data.sources.html_text import html_to_text
from preference_training.data.toy_preferences import toy_records

HH = HubSet(
    "Anthropic/hh-rlhf",
    ("chosen", "rejected"),
    test="test",
    folders=("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled"),
)


LAST_ROW = (
    "loss=sft learns one response to each prompt, its last row's, as in the original code (a file of the same rows gives all)"
)


@hub_set("hh", HH, "dialogues", truncation_mode="keep_end", sft_note=LAST_ROW)
def hh_records(rows: NumberedRows, report: DataReport) -> Items:
    """Anthropic's helpful and harmless dialogues. Subsets: harmless-base, helpful-base, helpful-online, ...

    SFT learns one response to a prompt, its last row's, as in the original code, so that runs are comparable with it.
    """
    for prompt, record in group_rows(FieldMap().map_rows(rows, "hh", report, known=True), report, WHOLE_SET):
        record.pop("sft_targets", None)
        yield prompt, record


SHP = HubSet("stanfordnlp/SHP", ("history", "human_ref_A", "human_ref_B", "labels", "score_A", "score_B"), test="test")
SHP_KINDS = {"history": str, "human_ref_A": str, "human_ref_B": str, "score_A": Real, "score_B": Real}


@hub_set("shp", SHP, "dialogues")
def shp_records(rows: NumberedRows, report: DataReport, *, min_score_ratio: float = 2.0) -> Records:
    """Stanford human preferences: pairs whose better score is at least `min_score_ratio` times the other.

    Scores below 1 count as 1, so that a comment without votes is neither a division by zero nor infinitely worse. The SFT
    target is the response with the highest score.
    """
    records: Records = {}
    best: dict[str, int] = {}
    for row in valid_rows(rows, "shp", report, SHP_KINDS):
        scores = [max(1, row["score_A"]), max(1, row["score_B"])]
        if max(scores) / min(scores) < min_score_ratio:
            report.skip(f"the scores' ratio is below {min_score_ratio:g}")
            continue
        if not (row["human_ref_A"].strip() and row["human_ref_B"].strip()):
            report.skip(EMPTY_TEXT)
            continue
        responses = (f" {row['human_ref_A']}", f" {row['human_ref_B']}")
        if responses[0] == responses[1]:
            report.skip(SAME_TEXT)
            continue
        prompt = f"{HUMAN} {row['history']}{ASSISTANT}"
        record = records.setdefault(prompt, new_record())
        add_responses(record, responses, [(0, 1) if row["labels"] == 1 else (1, 0)])
        for response, score in zip(responses, scores, strict=True):
            if score > best.get(prompt, 0):
                best[prompt], record["sft_target"] = score, response
    return records


STACK_EXCHANGE = HubSet("HuggingFaceH4/stack-exchange-preferences", ("question", "answers"))
STACK_EXCHANGE_KINDS = {"question": str, "answers": list, "answers.text": str, "answers.pm_score": Real}


@hub_set("se", STACK_EXCHANGE, "dialogues")
def stack_exchange_records(rows: NumberedRows, report: DataReport) -> Items:
    """StackExchange: all pairs of answers to a question with different scores, as plain text. The best is the SFT target.

    Answers with equal scores form no pair, and a question without any pair is skipped; both are counted. Nothing is kept
    between questions, so millions of them stream through; their HTML is read by as many processes as there are cores.
    """
    valid = valid_rows(rows, "se", report, STACK_EXCHANGE_KINDS)
    for question, texts, scores in map_in_processes(_question_texts, valid):
        kept = [(f" {text}", score) for text, score in zip(texts, scores, strict=True) if text]
        report.skip(EMPTY_TEXT, len(texts) - len(kept))
        record = scored_record([text for text, _ in kept], [score for _, score in kept], report)
        if record:
            yield f"{HUMAN} {question}{ASSISTANT}", record


def _question_texts(row: dict) -> tuple[str, list[str], list[int]]:
    """A question and its answers as plain text, and the answers' scores."""
    texts = [html_to_text(answer["text"]) for answer in row["answers"]]
    return html_to_text(row["question"]), texts, [answer["pm_score"] for answer in row["answers"]]


LEETCODE = HubSet("minfeng-ai/leetcode_preference", ("description", "version1", "version2", "preference"))


@hub_set("leetcode", LEETCODE, "conversations")
@hub_set("lc", LEETCODE, "conversations")
def leetcode_records(rows: NumberedRows, report: DataReport) -> Items:
    """LeetCode problems with two solutions, of which a person preferred one: `preference` 0 is version1, 1 is version2.

    Problems that nobody has labeled are skipped and counted.
    """

    def usable() -> Iterator[Row]:
        for _, row in rows:
            report.rows_read += 1
            # A CSV file with missing labels has floats, or text.
            label = {"0": 0, "0.0": 0, "1": 1, "1.0": 1}.get(str(row["preference"]).strip())
            texts = [str(row[name] or "").strip() for name in ("description", "version1", "version2")]
            if label is None:
                report.skip("nobody has labeled the row")
            elif not all(texts):
                report.skip(EMPTY_TEXT)
            else:
                yield Row((Turn("user", texts[0]),), texts[1:], [(label, 1 - label)], label)

    return group_rows(usable(), report, WHOLE_SET)


ULTRAFEEDBACK = HubSet(
    "HuggingFaceH4/ultrafeedback_binarized", ("prompt", "chosen", "rejected"), train="train_prefs", test="test_prefs"
)


@hub_set("ultrafeedback", ULTRAFEEDBACK, "conversations")
def ultrafeedback_records(rows: NumberedRows, report: DataReport, *, min_score_gap: float = 0.0) -> Items:
    """UltraFeedback, binarized: conversations whose preferred response GPT-4 scored higher, by `min_score_gap` at least.

    At 0 its ties are kept too.
    """
    kept = _with_score_gap(rows, report, min_score_gap) if min_score_gap else rows
    return group_rows(FieldMap().map_rows(kept, "ultrafeedback", report, known=True), report, WHOLE_SET)


def _with_score_gap(rows: NumberedRows, report: DataReport, least: float) -> NumberedRows:
    condition = f"score_chosen - score_rejected >= {least:g}"
    return RowFilter(condition, counts_all=False).apply(rows, "ultrafeedback", report)


ORCA = HubSet("Intel/orca_dpo_pairs", ("system", "question", "chosen", "rejected"))


@hub_set("orca", ORCA, "conversations")
def orca_records(rows: NumberedRows, report: DataReport) -> Items:
    """Orca's questions with a system prompt: a larger model's response against a smaller one's."""
    return group_rows(
        FieldMap(prompt="question", system="system").map_rows(rows, "orca", report, known=True), report, WHOLE_SET
    )


NECTAR = HubSet("berkeley-nest/Nectar", ("prompt", "answers"))


@hub_set("nectar", NECTAR, "conversations", truncation_mode="keep_end")
def nectar_records(
    rows: NumberedRows,
    report: DataReport,
    *,
    top_k: int | None = None,
    pairs: Literal["all", "best_against_one"] = "all",
) -> Items:
    """Nectar: seven ranked responses to each dialogue, and all 21 pairs between them.

    top_k: only the pairs among the best so many. pairs=best_against_one: one pair, of the best and another, which is drawn by a
    hash of the prompt.
    """
    fields_of = FieldMap(responses="answers.answer", ranks="answers.rank")
    mapped = fields_of.map_rows(rows, "nectar", report, known=True)
    mapped = (row._replace(prompt=_as_turns(row.prompt)) for row in mapped)
    return group_rows((_best_responses(row, top_k, pairs == "best_against_one") for row in mapped), report)


def _best_responses(row: Row, top_k: int | None, against_one: bool) -> Row:
    """A row of ranked responses with fewer of them."""
    order = sorted(range(len(row.responses)), key=row.scores.__getitem__, reverse=True)[:top_k]
    if against_one and len(order) > 1:
        others = [k for k in order[1:] if row.scores[k] < row.scores[order[0]]] or order[1:]
        order = [order[0], others[int(prompt_hash(row.prompt) * len(others))]]
    kept = sorted(order)
    if len(kept) == len(row.responses):
        return row
    scores = [row.scores[k] for k in kept]
    responses = [row.responses[k] for k in kept]
    return row._replace(
        responses=responses, scores=scores, pairs=pairs_by_score(scores), target=max(range(len(kept)), key=scores.__getitem__)
    )


def _as_turns(prompt: Prompt) -> tuple[Turn, ...]:
    return (parse_dialogue(prompt) or (Turn("user", prompt),)) if isinstance(prompt, str) else prompt


CAPYBARA = HubSet("argilla/distilabel-capybara-dpo-7k-binarized", ("chosen", "rejected"))


@hub_set("capybara", CAPYBARA, "conversations", truncation_mode="keep_end")
def capybara_records(rows: NumberedRows, report: DataReport) -> Items:
    """Capybara: conversations of several turns, whose last response was rated higher or lower than that of another model."""
    return _pairs_of_conversations(rows, "capybara", report)


OPEN_HERMES = HubSet("argilla/OpenHermesPreferences", ("chosen", "rejected"))


@hub_set("open_hermes_preferences", OPEN_HERMES, "conversations")
def open_hermes_records(rows: NumberedRows, report: DataReport) -> Items:
    """OpenHermesPreferences: a million questions; the best and the worst of three models' responses, by a model's ranking."""
    return _pairs_of_conversations(rows, "open_hermes_preferences", report, window=20_000)


TULU3 = HubSet("allenai/llama-3.1-tulu-3-8b-preference-mixture", ("chosen", "rejected"))


@hub_set("tulu3", TULU3, "conversations", truncation_mode="keep_end")
def tulu3_records(rows: NumberedRows, report: DataReport) -> Items:
    """Tulu 3's preference mixture, of its 8B model: 270,000 conversations from many sources."""
    return _pairs_of_conversations(rows, "tulu3", report)


def _pairs_of_conversations(rows: NumberedRows, name: str, report: DataReport, window: int = WHOLE_SET) -> Items:
    """The pairs of chosen and rejected conversations that begin alike; the prompt's own column repeats their first turn."""
    turns = ((number, {key: row[key] for key in ("chosen", "rejected")}) for number, row in rows)
    return group_rows(FieldMap().map_rows(turns, name, report, known=True), report, window)


HELPSTEER3 = HubSet(
    "nvidia/HelpSteer3",
    ("context", "response1", "response2", "overall_preference"),
    test="validation",
    subset="preference",
)
NO_PREFERENCE = "both responses are about as good (overall_preference is 0)"


@hub_set("helpsteer3", HELPSTEER3, "conversations", truncation_mode="keep_end")
def helpsteer3_records(rows: NumberedRows, report: DataReport, *, min_preference: float = 1.0) -> Items:
    """HelpSteer3: two responses to a conversation, which people compared, from -3 (the first is much better) to 3.

    min_preference: how clear the preference is at least, 1 to 3. It is the pair's margin too.
    """

    def compared() -> Iterator[tuple[int, dict]]:
        for number, row in rows:
            preference = row["overall_preference"] or 0
            if abs(preference) < max(min_preference, 1):
                report.rows_read += 1
                report.skip(NO_PREFERENCE if preference == 0 else f"the preference is below {min_preference:g}")
                continue
            chosen, rejected = ("response1", "response2") if preference < 0 else ("response2", "response1")
            texts = {"prompt": row["context"], "chosen": row[chosen], "rejected": row[rejected]}
            yield number, texts | {"margin": abs(preference)}

    return group_rows(FieldMap(margin="margin").map_rows(compared(), "helpsteer3", report, known=True), report, WHOLE_SET)


@register("toy", prompts="dialogues")
def get_toy(split: str, silent: bool = False, cache_dir: str | None = None) -> Records:
    """Generated preferences: `preference_training/data/toy_preferences.py`. No test prompt is in the train split."""
    return toy_records(split)
