"""Data cards of exports: what the rows are, how many there are, and how well labelers agreed."""

from collections import Counter
from datetime import datetime

from preference_collection.store.statistics import Agreement

EDITED = "better answer was written by a labeler", "better answers were written by labelers"
CARD_MARK = "<!-- written by preference_collection -->"


def code_card(counts: Counter, agreement: Agreement) -> str:
    """The card of judgments of programming problems, in the columns that `lc` reads."""
    return f"""---
pretty_name: Preferences on code
language:
- code
- en
tags:
- preference
- dpo
- code
task_categories:
- text-generation
---
{CARD_MARK}
# Preferences on code

People compared model-written solutions of a programming problem, with their test results.

- {counts["preferences"]} preferences in `data`, one row per judgment of two solutions.
{_apart(counts, ("ties", "bad", "skips", "overruled", "disputed"))}{_agreed(agreement)}
- Written {datetime.now():%Y-%m-%d}.

| field | meaning |
|---|---|
| `id`, `title`, `difficulty` | the problem |
| `description`, `prompt` | the prompt given to the models |
| `version1`, `version2` | the replies; `model1`, `model2`: the models that wrote them |
| `preference` | 0: version1 is better, 1: version2; null for ties and skips |
| `chosen`, `rejected` | the better version and the other one |
| `votes_version1`, `votes_version2`, `votes_tie`, `votes_skip` | number of labelers with each choice on this pair |
| `labeller`, `seconds`, `shown_left` | the labeler (a number), the time taken, the version on the left (0: version1) |
| `reasons`, `comment`, `judged`, `judgement` | the labeler's reasons and comment, the time, and the id of the judgment |

Train on it with `python train.py loss=dpo 'datasets=[DIRECTORY/]'`.
"""


def text_card(counts: Counter, agreement: Agreement) -> str:
    """The card of judgments of any text, as records."""
    return f"""---
pretty_name: Preferences
tags:
- preference
- dpo
- rlhf
task_categories:
- text-generation
---
{CARD_MARK}
# Preferences

People compared two to five answers to a prompt.

- {_counted(counts["preferences"], "judgment prefers", "judgments prefer")} an answer: rows of `data`.
- {_counted(counts["bad"], "judgment finds", "judgments find")} all answers bad: rows of `data` without a pair.
- {_counted(counts["edited"], EDITED[0], EDITED[1])}: the `sft_target` of a row of `data`, whatever else was said.
{_apart(counts, ("ties", "skips", "overruled", "disputed"))}{_agreed(agreement)}
- Written {datetime.now():%Y-%m-%d}.

| field | meaning |
|---|---|
| `prompt` | the prompt: a text, or the JSON of a list of messages |
| `responses` | the answers, each a text, or the JSON of a list of messages |
| `pairs` | every two answers of which one is preferred, as indices: the preferred one first |
| `sft_target` | the better answer that the labeler wrote, else the best one; null if all are bad |
| `labels` | of each answer: true for the best, false for the worst, null for those between |
| `ranks` | of each answer, 1 is the best; null where several judgments of the prompt are to be joined |
| `chosen`, `rejected` | the best and the worst answer |
| `tools` | the tools that the prompt offers, as JSON |
| `models` | the models that wrote the answers |
| `votes`, `votes_tie`, `votes_bad`, `votes_skip` | how many labelers rank each answer first, or chose otherwise |
| `labeller`, `seconds`, `shown` | the labeler (a number), the time taken, the order in which the answers were shown |
| `reasons`, `comment`, `judged`, `judgement` | the labeler's reasons and comment, the time, and the id of the judgment |
| `settles` | whether the judgment settles a disagreement, and alone stands for its comparison |
| `id`, `title`, `difficulty`, `task_kind` | the task; its kind is text or code |
| `model1`, `model2`, `votes_version1`, `votes_version2`, `shown_left` | of two answers, as in data sets of code |

Train on it with `python train.py loss=dpo 'datasets=[DIRECTORY/]'`; also with `loss=sft`, `loss=kto`, `loss=plackett_luce`.
"""


def _counted(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


WORDS = {
    "bad": "judgments that find both bad",
    "overruled": "judgments that a later one settled",
    "disputed": "judgments that others disagree with",
}


def _apart(counts: Counter, kinds: tuple[str, ...]) -> str:
    """A line about what is stored apart."""
    some = [f"{counts[kind]} {WORDS.get(kind, kind)}" for kind in kinds if counts[kind] or kind in ("ties", "skips")]
    return f"- {', '.join(some[:-1])} and {some[-1]} in `apart`.\n"


def _agreed(agreement: Agreement) -> str:
    """A line about the agreement of labelers."""
    alpha = "not defined" if agreement.alpha is None else f"{agreement.alpha:.2f}"
    agreed = "Nothing was judged by several labelers."
    if agreement.compared:
        agreed = (
            f"Two labelers of the same two answers agreed {agreement.agreed} of {agreement.compared} times (alpha: {alpha})."
        )
    return f"- {agreed} Alpha is Krippendorff's: 1 is perfect agreement, 0 is chance."
