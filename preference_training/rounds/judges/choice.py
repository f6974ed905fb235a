"""Which judge `rounds.judge` names: a function of the user's, or one of KINDS, with what follows its colon."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from preference_training.configuration.schema import RunConfig
from preference_training.configuration.validation import RULE
from preference_training.core.errors import UserError, nearest
from preference_training.rounds.judges.base import Judge
from preference_training.rounds.judges.functions import FunctionJudge, ToyJudge


class Kind(NamedTuple):
    """A kind of judge, KIND or KIND:ARGUMENT.

    build: makes it, from the argument ("" for none) and the configuration; it may load a model. check: raises UserError where
    build would fail, loading nothing heavy: it is called before the loop begins.
    """

    build: Callable[[str, RunConfig], Judge]
    check: Callable[[str, RunConfig], object]
    takes_argument: bool = True


KINDS: Mapping[str, Kind] = {
    "toy": Kind(lambda _argument, _config: ToyJudge(), lambda _argument, _config: None, takes_argument=False),
}


def _find(name: str) -> tuple[Kind, str]:
    """The kind of a judge, and its argument. Raises UserError."""
    if RULE.search(name):
        return Kind(lambda argument, _config: FunctionJudge(argument), lambda argument, _config: FunctionJudge(argument)), name
    kind, _, argument = name.partition(":")
    if kind.endswith(".py"):
        raise UserError(f"rounds.judge: found {name!r}, expected FILE.py:NAME, with the name of a function.")
    if kind not in KINDS:
        raise UserError(f"rounds.judge: no judge {name!r}; {nearest(kind, KINDS)} A function of your own is FILE.py:NAME.")
    if bool(argument) != KINDS[kind].takes_argument:
        raise UserError(f"rounds.judge: found {name!r}, expected {kind}{':NAME' * KINDS[kind].takes_argument}.")
    return KINDS[kind], argument


def check_judge(config: RunConfig) -> None:
    """Raise UserError where the judge that the configuration names cannot work; loads nothing heavy."""
    kind, argument = _find(config.rounds.judge)
    kind.check(argument, config)


def build_judge(config: RunConfig) -> Judge:
    """The judge that the configuration names. Raises UserError."""
    kind, argument = _find(config.rounds.judge)
    return kind.build(argument, config)
