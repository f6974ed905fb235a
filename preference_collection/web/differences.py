"""Differences of answers as safe HTML: words of prose, lines of code with the words that changed inside them.

Every character of both texts is in the result, once where they agree. <del> and <ins> are marked by more than color, and
spoken.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from markupsafe import Markup
from rapidfuzz.distance import LCSseq

from preference_collection.web.characters import one_kind_of_line, shown

# Longer texts are compared up to here: time and memory grow with the product of both lengths. Unit: characters, words or lines.
MOST_CHARACTERS, MOST_PARTS = 100_000, 20_000
# Lines of code that share fewer of their words are another line, not a changed one.
ALIKE = 0.5
# In larger blocks of changed lines nobody looks for pairs, and their words are not compared. Unit: lines.
MOST_LINES = 40
# Prose that shares fewer of its words is not compared: all of it would be struck out.
IN_COMMON = 0.1
# Fewer equal words between two changes would make a patchwork. They count as changed.
ISLAND = 3
# Of more equal lines, these are shown at both ends, and the rest is folded.
CONTEXT = 3
# A word with the whitespace behind it; scripts without spaces by character; no part is endless.
WORD = re.compile(r"[\u2e80-\u9fff\uac00-\ud7af]\s*|[^\s\u2e80-\u9fff\uac00-\ud7af]{1,60}\s*|\s+")
# In code, names, numbers, signs and whitespace.
CODE_WORD = re.compile(r"\w{1,60}|\s+|[^\w\s]")


@dataclass(frozen=True)
class Change:
    """A part of both texts: equal if `same`, else what stands in the first and in the second in one place."""

    same: bool
    before: Sequence[str]
    after: Sequence[str]


def differences(texts: Sequence[str], code: bool) -> list[Markup]:
    """Each text but the first, compared with the first: one item for each, in their order."""
    return [compare(texts[0], text, code) for text in texts[1:]]


def compare(first: str, second: str, code: bool) -> Markup:
    """What changes from the first text to the second, as HTML. Identical texts are said to be."""
    first, second = one_kind_of_line(first), one_kind_of_line(second)
    if first == second:
        return Markup('<p class="summary">The answers are identical.</p>')
    heads = [text[:MOST_CHARACTERS] for text in (first, second)]
    changes, body = (_code_changes if code else _prose_changes)(*heads)
    if not code and shared(changes) < IN_COMMON * max(len(first), len(second)):
        return Markup('<p class="summary">The answers share too little, or are too long, to compare their words.</p>')
    cut = max(len(first), len(second)) - MOST_CHARACTERS
    note = f" Compared up to character {MOST_CHARACTERS:,}; {cut:,} follow." if cut > 0 else ""
    summary = Markup('<p class="summary">{}{}</p>').format(_summary(changes, "line" if code else "word"), note)
    return summary + Markup('<div class="{} difference">{}</div>').format("lines" if code else "words", body)


def _prose_changes(first: str, second: str) -> tuple[list[Change], Markup]:
    changes = _without_islands(changes_of(WORD.findall(first), WORD.findall(second)))
    return changes, _marked(changes)


def _code_changes(first: str, second: str) -> tuple[list[Change], Markup]:
    changes = changes_of(first.split("\n"), second.split("\n"))
    last = len(changes) - 1
    parts = [
        _equal_lines(change.before, first=at == 0, last=at == last) if change.same else _changed_lines(change)
        for at, change in enumerate(changes)
    ]
    return changes, Markup().join(parts)


def changes_of(first: Sequence[str], second: Sequence[str]) -> list[Change]:
    """The parts of two sequences, by their longest common subsequence; joined, they give back both.

    What exceeds `MOST_PARTS` between a common beginning and a common end is one change.
    """
    begin = next((at for at, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
    room = min(len(first), len(second)) - begin
    pairs = zip(reversed(first), reversed(second), strict=False)
    end = min(room, next((at for at, (a, b) in enumerate(pairs) if a != b), room))
    inner = first[begin : len(first) - end], second[begin : len(second) - end]
    if max(map(len, inner)) > MOST_PARTS:
        middle = [Change(False, *inner)]
    else:
        codes = LCSseq.opcodes(*inner)
        middle = [
            Change(c.tag == "equal", inner[0][c.src_start : c.src_end], inner[1][c.dest_start : c.dest_end]) for c in codes
        ]
    ends = [Change(True, part, part) for part in (first[:begin], first[len(first) - end :])]
    return _merged(ends[:1] + middle + ends[1:])


def _merged(changes: Sequence[Change]) -> list[Change]:
    """Neighbors of one kind as one; none that is empty."""
    merged = []
    for same, group in groupby((c for c in changes if c.before or c.after), key=lambda change: change.same):
        parts = list(group)
        before, after = ([item for part in parts for item in side(part)] for side in (lambda c: c.before, lambda c: c.after))
        merged.append(Change(same, before, after))
    return merged


def _without_islands(changes: list[Change]) -> list[Change]:
    """Few equal words between two larger changes become part of them."""

    def drowns(at: int) -> bool:
        if not changes[at].same or not 0 < at < len(changes) - 1 or len(changes[at].before) >= ISLAND:
            return False
        around = (changes[at - 1], changes[at + 1])
        return all(max(len(change.before), len(change.after)) >= len(changes[at].before) for change in around)

    return _merged([Change(change.same and not drowns(at), change.before, change.after) for at, change in enumerate(changes)])


# ---- HTML -------------------------------------------------------------------------------------------------------------------


def _summary(changes: Sequence[Change], unit: str) -> str:
    changed = [change for change in changes if not change.same]
    counts = {"removed": sum(len(change.before) for change in changed), "added": sum(len(change.after) for change in changed)}
    said = [f"{count:,} {unit}{'s' * (count != 1)} {name}" for name, count in counts.items() if count]
    return f"{len(changed):,} difference{'s' * (len(changed) != 1)}: {' and '.join(said)}."


def _marked(changes: Sequence[Change]) -> Markup:
    """The changes in their order, within one text."""
    parts = []
    for change in changes:
        if change.same:
            parts.append(shown("".join(change.before)))
        else:
            parts += [_mark(name, "".join(words)) for name, words in (("del", change.before), ("ins", change.after)) if words]
    return Markup().join(parts)


def _mark(name: str, text: str) -> Markup:
    """<del> or <ins>, with words for screen readers, which rarely speak the elements themselves."""
    return Markup('<{0}><span class="unseen"> {1}: </span>{2}<span class="unseen"> end. </span></{0}>').format(
        name, {"del": "removed", "ins": "added"}[name], shown(text)
    )


def _line(sign: str, kind: str, html: Markup) -> Markup:
    said = f'<span class="unseen">{kind} line: </span>' if kind != "same" else ""
    return Markup(f'<span class="line {kind}"><span class="sign" aria-hidden="true">{sign} </span>{said}{html}\n</span>')


def _equal_lines(lines: Sequence[str], first: bool, last: bool) -> Markup:
    """Equal lines; the middle of many is folded."""
    html = [_line(" ", "same", shown(line)) for line in lines]
    begin, end = 0 if first else CONTEXT, len(html) - (0 if last else CONTEXT)
    if end - begin <= CONTEXT:
        return Markup().join(html)
    fold = Markup('<details class="fold"><summary>{} equal lines</summary>{}</details>')
    return Markup().join([*html[:begin], fold.format(end - begin, Markup().join(html[begin:end])), *html[end:]])


def _changed_lines(change: Change) -> Markup:
    """Removed lines, then added ones; a line and its changed form show which words changed."""
    before = [shown(line) for line in change.before]
    after = [shown(line) for line in change.after]
    for old, new, inside in _alike(change) if max(len(before), len(after)) <= MOST_LINES else ():
        before[old] = _words(inside, "del", lambda part: part.before)
        after[new] = _words(inside, "ins", lambda part: part.after)
    lines = [_line("-", "removed", html) for html in before] + [_line("+", "added", html) for html in after]
    return Markup().join(lines)


def _alike(change: Change) -> Iterator[tuple[int, int, list[Change]]]:
    """Lines and their changed forms, in order: the index of each, and the words that changed. The first alike counts."""
    begin = 0
    for at, old in enumerate(change.before):
        for place in range(begin, len(change.after)):
            new = change.after[place]
            inside = changes_of(CODE_WORD.findall(old), CODE_WORD.findall(new))
            if shared(inside) >= ALIKE * max(1, len(old.strip()), len(new.strip())):
                yield at, place, inside
                begin = place + 1
                break


def shared(changes: Sequence[Change]) -> int:
    """How much two texts have in common. Unit: characters without whitespace."""
    return sum(len("".join(part).strip()) for change in changes if change.same for part in change.before)


def _words(changes: Sequence[Change], name: str, side: Callable[[Change], Sequence[str]]) -> Markup:
    """One side of a changed line. The line is spoken as removed or added; its words are marked by sight only."""
    mark = Markup("<{0}>{1}</{0}>")
    parts = [(change.same, shown("".join(side(change)))) for change in changes if side(change)]
    return Markup().join(text if same else mark.format(name, text) for same, text in parts)
