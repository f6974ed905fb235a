"""Which of two answers is better, as a column says it."""

from collections.abc import Iterable

from preference_training.data.rows.conversations import RowError
from preference_training.data.rows.unread_columns import is_empty
from preference_training.data.rows.values import comparable, condition, field_value

TIE = "the verdict is a tie"
NO_VERDICT = "there is no verdict"

TIES = {"tie", "ties", "tied", "draw", "both", "neither", "none", "equal", "same", "bothbad", "bothgood", "tiebothbad", "na"}


def _word(value) -> str:
    return "".join(character for character in comparable(value).lower() if character.isalnum())


def verdict_values(values: Iterable, answers: list[str]) -> list[list] | None:
    """The values that mean the first and the second answer; None where that is not evident.

    Evident are the names of the columns, their last letters or numbers, and 0 and 1, or 1 and 2, where both occur.
    """
    seen = {_word(value) for value in values if not is_empty(value)} - TIES
    if not seen:
        return None
    words = [_words_for(name, place) for place, name in enumerate(answers)]
    if seen <= words[0] | words[1]:
        return [sorted(found) for found in words]
    numbered = any(answer[-1:].isdigit() for answer in answers)
    for pair in (("0", "1"), ("1", "2")):
        if seen == set(pair) and not numbered:
            return [[int(number)] for number in pair]
    return None


def _words_for(answer: str, place: int) -> set[str]:
    suffix = _word(answer[-1:])
    stems = ("model", "response", "answer", "assistant", "output", "completion", "conversation", "option")
    return {suffix, _word(answer), ("first", "second")[place], ("left", "right")[place], *(stem + suffix for stem in stems)}


def better_answer(row: dict, better: str | dict, place_names: str) -> int | None:
    """The index of the better of two answers; None for a tie. Raises RowError where the verdict cannot be read."""
    if isinstance(better, str):
        raise RowError(
            f"field {better!r} is {field_value(row, better)!r}, and it is not evident which of {place_names} that means. Write "
            f"better: {{{better}: [VALUE, VALUE]}} with the values for the first and the second, such as [0, 1], "
            "[model_a, model_b] or ['< 0', '> 0']."
        )
    ((column, wanted),) = better.items()
    value = field_value(row, column)
    for index, values in enumerate(wanted):
        if _means(value, values, column):
            return index
    if is_empty(value) or isinstance(value, int | float) or _word(value) in TIES or _word(value).lstrip("0") == "":
        return None
    raise RowError(f"field {column!r} is {value!r}, expected a value for one of {place_names}, or a tie.")


def _means(value, wanted, column: str) -> bool:
    if isinstance(wanted, list):
        return _word(value) in {_word(one) for one in wanted}
    if isinstance(wanted, str) and not wanted.startswith(("<", ">", "=", "!")):
        return _word(value) == _word(wanted)
    return not is_empty(value) and condition(wanted, column)(value)
