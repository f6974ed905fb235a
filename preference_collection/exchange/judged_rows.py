"""Judgments as rows of training data: records of any text, and the columns that `lc` reads of programming problems.

    judgments in the store -> (kind, row)

Each current judgment is one row, or one for each pair in the columns of `lc`. Where one settles a disagreement, it alone is
training data. Labelers are numbered unless their names are requested. Shapes: n answers of a comparison.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from itertools import combinations

import pyarrow

from preference_collection.store.model import Answer, Judged
from preference_collection.store.store import Store
from preference_training.data.records.record import Prompt, Response, Turn, prompt_text
from preference_training.data.records.validation import response_error
from preference_training.data.rows.conversations import RowError, parse_serialized_turns

# Kinds of rows. Rankings, answers that are all bad, and better answers that labelers wrote are training data. What was
# overruled by a judgment that settles the comparison, what is disputed, ties and skips are stored apart. Unusable are rankings
# whose answers are empty, or all the same.
KINDS = {"ranked": "preferences", "bad": "bad", "tie": "ties", "skip": "skips"}
OVERRULED, DISPUTED, UNUSABLE, EDITED = "overruled", "disputed", "unusable", "edited"
ALL_KINDS = (*KINDS.values(), OVERRULED, DISPUTED, UNUSABLE, EDITED)

TEXT, COUNT = pyarrow.string(), pyarrow.int64()
TEXTS, COUNTS = pyarrow.list_(TEXT), pyarrow.list_(COUNT)
# The first columns are those of the public data set that `lc` reads, and the last those that are read without a name.
LC_SCHEMA = pyarrow.schema(
    {
        "id": TEXT, "difficulty": TEXT, "title": TEXT, "description": TEXT, "version1": TEXT, "version2": TEXT,
        "preference": COUNT, "model1": TEXT, "model2": TEXT, "votes_version1": COUNT, "votes_version2": COUNT,
        "votes_tie": COUNT, "votes_skip": COUNT, "labeller": TEXT, "seconds": pyarrow.float64(), "shown_left": COUNT,
        "reasons": TEXTS, "comment": TEXT, "judged": TEXT, "judgement": TEXT, "prompt": TEXT, "chosen": TEXT, "rejected": TEXT,
    }
)  # fmt: skip
OF_THE_RECORD = ("description", "version1", "version2", "preference", "prompt", "chosen", "rejected")
RECORD_SCHEMA = pyarrow.schema(
    [
        ("prompt", TEXT), ("responses", TEXTS), ("pairs", pyarrow.list_(COUNTS)), ("sft_target", TEXT),
        ("labels", pyarrow.list_(pyarrow.bool_())), ("ranks", COUNTS), ("tools", TEXT), ("chosen", TEXT), ("rejected", TEXT),
        *[LC_SCHEMA.field(name) for name in LC_SCHEMA.names if name not in OF_THE_RECORD],
        ("task_kind", TEXT), ("models", TEXTS), ("votes", COUNTS), ("votes_bad", COUNT), ("shown", COUNTS),
        ("settles", pyarrow.bool_()),
    ]
)  # fmt: skip


def task_kinds(store: Store) -> set[str]:
    """The kinds of all tasks that were judged."""
    return {judged.task.kind for judged in store.judgments()}


def has_edited(judged: Judged) -> bool:
    """Whether the labeler wrote a better answer."""
    return not response_error(judged.judgment.edited)


def _judgments(store: Store, names: bool, agreed: bool, only: str | None) -> Iterator[tuple[str, str, Judged]]:
    """(kind of the row, labeler, what was judged) of every current judgment of a kind of task."""
    numbers: dict[str, int] = {}
    disputed = set(store.disagreements()) if agreed else set()
    for judged in store.judgments():
        said = judged.judgment
        number = numbers.setdefault(said.labeler, len(numbers) + 1)
        if only in (None, judged.task.kind):
            kind = KINDS[said.choice] if judged.settled in (None, said.id) else OVERRULED
            kind = DISPUTED if kind in ("preferences", "bad") and said.comparison in disputed else kind
            yield kind, said.labeler if names else f"labeller {number}", judged


def _described(judged: Judged, labeler: str) -> dict:
    """The columns that both forms of rows have."""
    said, task = judged.judgment, judged.task
    return {
        "id": task.id, "difficulty": task.difficulty, "title": task.title, "votes_tie": judged.votes.ties,
        "votes_skip": judged.votes.skips, "labeller": labeler, "seconds": said.seconds, "reasons": list(said.reasons),
        "comment": said.comment, "judged": judged.moment.isoformat(timespec="seconds"), "judgement": said.id,
    }  # fmt: skip


def _of_two(judged: Judged, i: int, j: int) -> dict:
    """The columns of two of the answers."""
    answers, best, order = judged.comparison.answers, judged.votes.best, judged.judgment.order
    return {
        "model1": answers[i].model, "model2": answers[j].model, "votes_version1": best[i], "votes_version2": best[j],
        "shown_left": 0 if order.index(i) < order.index(j) else 1,
    }  # fmt: skip


def given_prompt(judged: Judged) -> Prompt:
    """The prompt that the answers are trained to follow: what the models were given, if that is the same for all.

    A programming problem alone does not ask for code, so that its answers keep the first one's.
    """
    prompts = [answer.prompt for answer in judged.comparison.answers]
    return prompts[0] if judged.task.kind == "code" or len(set(prompts)) == 1 else judged.task.prompt


# ---- the columns of `lc` ----------------------------------------------------------------------------------------------------


def lc_rows(store: Store, names: bool = False, agreed: bool = False) -> Iterator[tuple[str, dict]]:
    """(kind, row) of every two answers of every judgment of a problem, in LC_SCHEMA.

    preference is 0 or 1, and None for ties and skips. Of more than two answers, those of equal rank are ties. agreed: as in
    `record_rows`.
    """
    for kind, labeler, judged in _judgments(store, names, agreed, "code"):
        ranks, answers = judged.judgment.ranks, judged.comparison.answers
        prompt = given_prompt(judged)
        for i, j in combinations(range(len(answers)), 2):
            tied = not ranks or ranks[i] == ranks[j]
            better = None if tied else int(ranks[i] > ranks[j])
            texts = answers[i].text, answers[j].text
            best, worst = (None, None) if tied else (texts[better].strip(), texts[1 - better].strip())
            row = {
                **_described(judged, labeler), "description": prompt if isinstance(prompt, str) else prompt_text(prompt),
                "version1": texts[0], "version2": texts[1], "preference": better, **_of_two(judged, i, j),
                "prompt": _serialized(prompt, "user"), "chosen": best and _serialized(best, "assistant"),
                "rejected": worst and _serialized(worst, "assistant"),
            }  # fmt: skip
            yield "ties" if tied and kind == "preferences" else kind, {name: row[name] for name in LC_SCHEMA.names}


# ---- records ----------------------------------------------------------------------------------------------------------------


def record_rows(store: Store, names: bool = False, agreed: bool = False, only: str | None = None) -> list[tuple[str, dict]]:
    """(kind, row) of every judgment, or of those of one kind of task: records, with prompts and responses as training has them.

    A better answer that a labeler wrote is always training data: where the judgment is none, it has a row of its own. agreed:
    what labelers disagree on, and nobody has settled, is disputed. Ranks are given where nothing else was said of the prompt:
    training joins the judgments of a prompt, and would order the answers of several comparisons by their ranks.
    """
    rows, said = [], defaultdict(set)
    for kind, labeler, judged in _judgments(store, names, agreed, only):
        row = _record(judged, labeler)
        usable = not any(map(response_error, row["responses"])) and (row["pairs"] or kind != "preferences")
        kind = kind if usable else UNUSABLE
        rows.append((kind, row))
        if kind not in ("preferences", "bad") and has_edited(judged):
            rows.append((EDITED, _edited_alone(row)))
        if kind == "preferences":
            said[row["prompt"], row["tools"]].add((judged.comparison.id, judged.judgment.ranks))
    for _, row in rows:
        if len(said[row["prompt"], row["tools"]]) > 1:
            row["ranks"] = None
    return rows


def _edited_alone(row: dict) -> dict:
    """The record of an answer that a labeler wrote, which is the target, beside answers that nothing is said of."""
    responses = [text for text in dict.fromkeys(row["responses"]) if not response_error(text)] or [row["sft_target"]]
    nothing = dict.fromkeys(("ranks", "chosen", "rejected"))
    return row | nothing | {"responses": responses, "pairs": [], "labels": [None] * len(responses)}


def _record(judged: Judged, labeler: str) -> dict:
    said, answers = judged.judgment, judged.comparison.answers
    n = len(answers)
    # The loader of `lc` strips the versions of a problem too.
    responses = [response_in(answer) for answer in answers]
    responses = [text.strip() if judged.task.kind == "code" and isinstance(text, str) else text for text in responses]
    ranks = said.ranks if said.choice == "ranked" else (1,) * n if said.choice == "tie" else ()
    pairs = sorted(
        ([i, j] for i in range(n) for j in range(n) if ranks and ranks[i] < ranks[j] and responses[i] != responses[j]),
    )
    best, worst = (ranks.index(1), ranks.index(max(ranks))) if pairs else (None, None)
    edited = "" if response_error(said.edited) else said.edited
    target = edited or (responses[best if best is not None else 0] if said.choice != "bad" else None)
    row = {
        "prompt": given_prompt(judged), "responses": responses, "pairs": pairs, "sft_target": target,
        "labels": _labels(said.choice, ranks, n), "ranks": list(ranks) if pairs else None,
        "tools": next((answer.parameters["tools"] for answer in answers if answer.parameters.get("tools")), None),
        "chosen": None if best is None else responses[best], "rejected": None if worst is None else responses[worst],
        **dict.fromkeys(("model1", "model2", "votes_version1", "votes_version2", "shown_left")),
        **(_of_two(judged, 0, 1) if n == 2 else {}), **_described(judged, labeler),
        "task_kind": judged.task.kind, "models": [answer.model for answer in answers], "votes": list(judged.votes.best),
        "votes_bad": judged.votes.bad, "shown": list(said.order), "settles": said.settles,
    }  # fmt: skip
    return {name: row[name] for name in RECORD_SCHEMA.names}


def response_in(answer: Answer) -> Response:
    """The response that an answer is: its text, or the turns that it was imported with."""
    turns = answer.parameters.get("turns")
    return tuple(Turn(*turn) for turn in turns) if turns else answer.text


def _labels(choice: str, ranks: tuple[int, ...], n: int) -> list[bool | None] | None:
    """Whether each answer is desirable: the best are, the worst are not, and those between are neither."""
    if choice == "skip":
        return None
    if choice == "bad":
        return [False] * n
    return [True if rank == 1 else False if rank == max(ranks) else None for rank in ranks]


# ---- as files have them -----------------------------------------------------------------------------------------------------


def as_written(row: dict, as_text: bool) -> dict:
    """A record with prompts and responses as files have them: texts, or lists of messages.

    as_text: the column of a table has texts only, and conversations as their JSON.
    """
    write = _serialized if as_text else _messages
    texts = {name: row[name] and write(row[name], "assistant") for name in ("sft_target", "chosen", "rejected")}
    responses = [write(response, "assistant") for response in row["responses"]]
    return row | {"prompt": write(row["prompt"], "user"), "responses": responses, **texts}


def _messages(text: Prompt | Response, role: str) -> str | list[dict]:
    """A text, or the messages of a conversation; a text that would be read as a conversation is the only message of one."""
    if not isinstance(text, str):
        return [{"role": turn.role, "content": turn.content, **(json.loads(turn.rest) if turn.rest else {})} for turn in text]
    try:
        is_plain = parse_serialized_turns(text, "") is text
    except RowError:
        is_plain = False
    return text if is_plain else [{"role": role, "content": text}]


def _serialized(text: Prompt | Response, role: str) -> str:
    written = _messages(text, role)
    return written if isinstance(written, str) else json.dumps(written, ensure_ascii=False)
