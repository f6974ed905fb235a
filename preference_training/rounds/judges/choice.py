"""Which judges `rounds.judge` names: functions of the user's, KINDS with what follows their colon, or a list of these."""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from preference_training.configuration.checks.evaluation import KEY_VARIABLE, RULE
from preference_training.configuration.keys import listed
from preference_training.configuration.schema import RunConfig
from preference_training.configuration.sections import JudgingConfig
from preference_training.core.errors import UserError, nearest
from preference_training.rounds.judges import chat, reward, rules
from preference_training.rounds.judges.base import Judge, JudgedInput
from preference_training.rounds.judges.ensemble import EnsembleJudge, Member
from preference_training.rounds.judges.functions import FunctionJudge, ToyJudge
from preference_training.rounds.judges.people import PeopleJudge
from preference_training.rounds.judges.unit_tests import TestsJudge
from preference_training.rounds.judges.verdicts import Verdicts
from preference_training.rounds.loop import VERDICTS
from preference_training.rounds.prompts import LoopPrompt

KEY, SECOND_KEY = "rounds.judge", "rounds.second_judge"
# The folder of the files that people's verdicts are exchanged in.
PEOPLE = "people"


class Asked(NamedTuple):
    """A judge as it was asked for: what follows the colon of its kind ("" for nothing), its own options, and the loop's."""

    kind: str
    argument: str
    options: JudgingConfig
    config: RunConfig

    @property
    def directory(self) -> Path:
        """The loop's directory."""
        return Path(self.config.local_run_dir)

    @property
    def name(self) -> str:
        """As it was written."""
        return f"{self.kind}:{self.argument}" if self.argument else self.kind


class Kind(NamedTuple):
    """A kind of judge, KIND or KIND:ARGUMENT.

    build: makes it; it may load a model. check: raises UserError where build would fail, loading nothing heavy: it is called
    before the loop begins. argument: what follows the colon, in capitals; "" for nothing. reads: the options that it reads.
    check_row: raises UserError for a prompt whose row lacks what the judge needs.
    """

    build: Callable[[Asked], Judge]
    check: Callable[[Asked], object]
    argument: str = ""
    reads: tuple[str, ...] = ()
    check_row: Callable[[Asked, JudgedInput], object] = lambda _asked, _sample: None


def _chat_judge(asked: Asked) -> Judge:
    model = chat.identified(chat.connected(asked.kind, asked.argument, asked.options, asked.config))
    asking = chat.Asking(model, asked.config)
    if asked.options.rubric is None:
        path = asked.directory / chat.COMPARISONS
        return chat.PairwiseJudge(model, asked.options.max_comparisons, path, asking)
    return chat.RubricJudge(model, chat.rubric_text(asked.options.rubric), asked.options.rubric_scale, asking)


def _check_chat(asked: Asked) -> None:
    url = asked.options.url or asked.config.evaluation.judge_url
    if url is not None and not re.match("https?://[^/]", url):
        raise UserError(f"rounds.judging.url: found {url!r}, expected http://... or https://..., or null.")
    if asked.kind == "openai" and url is None and not os.environ.get(KEY_VARIABLE):
        raise UserError(f"{KEY}: openai needs a key in the environment, {KEY_VARIABLE}, or rounds.judging.url.")
    if asked.options.rubric is not None:
        chat.rubric_text(asked.options.rubric)
    chat.connected(asked.kind, asked.argument, asked.options, asked.config)


def _rules_judge(asked: Asked) -> Judge:
    if asked.kind == "regex":
        found = [f"matches {asked.argument}"]
    else:
        found = [asked.argument] if asked.kind == "length" else listed(asked.options.rules)
    if not found:
        raise UserError(f"rounds.judging.rules: found none, and the judge is rules. Expected {rules.EXPECTED}.")
    where = "rounds.judging.rules" if asked.kind == "rules" else KEY
    return rules.RulesJudge(asked.name, [rules.read_rule(text, where) for text in found])


def _reward_judge(asked: Asked) -> Judge:
    return reward.RewardJudge(asked.argument, asked.config)


def _people_judge(asked: Asked) -> Judge:
    return PeopleJudge(asked.directory / PEOPLE, asked.directory, asked.options.max_comparisons)


_CHAT = Kind(_chat_judge, _check_chat, "MODEL", ("url", "rubric", "rubric_scale", "max_comparisons"))
_TESTS = ("tests_column", "tests_seconds", "tests_memory_mb", "tests_workers", "prefer_fast")
KINDS: Mapping[str, Kind] = {
    "toy": Kind(lambda _: ToyJudge(), lambda _: None),
    "tests": Kind(
        lambda asked: TestsJudge(asked.options),
        lambda asked: TestsJudge(asked.options).check(),
        reads=_TESTS,
        check_row=lambda asked, sample: TestsJudge(asked.options).tests_of(sample),
    ),
    "reward_model": Kind(_reward_judge, lambda asked: reward.check_reward_model(asked.argument), "NAME_OR_RUN"),
    "openai": _CHAT,
    "ollama": _CHAT,
    "regex": Kind(_rules_judge, _rules_judge, "PATTERN"),
    "length": Kind(_rules_judge, _rules_judge, "UNIT<=N"),
    "rules": Kind(_rules_judge, _rules_judge, reads=("rules",)),
    "person": Kind(_people_judge, lambda _: None, reads=("max_comparisons",)),
}
_FUNCTION = Kind(lambda asked: FunctionJudge(asked.argument), lambda asked: FunctionJudge(asked.argument))
# Of judges in a list.
_OF_MEMBERS = ("weight", "normalize")


def _asked(entry: str | Mapping[str, Any], config: RunConfig, in_list: bool) -> tuple[Kind, Asked]:
    """The kind of a judge, and what was asked of it. Raises UserError."""
    own = {} if isinstance(entry, str) else {name: value for name, value in entry.items() if name != "judge"}
    name = entry if isinstance(entry, str) else entry["judge"]
    options = replace(config.rounds.judging, **own)
    kind, asked = _FUNCTION, Asked(name, name, options, config)
    if not RULE.search(name):
        word, colon, argument = name.partition(":")
        if word.endswith(".py"):
            raise UserError(f"{KEY}: found {name!r}, expected FILE.py:NAME, with the name of a function.")
        if word not in KINDS:
            raise UserError(f"{KEY}: no judge {name!r}; {nearest(word, KINDS)} A function of your own is FILE.py:NAME.")
        kind, asked = KINDS[word], Asked(word, argument, options, config)
        if bool(argument) != bool(kind.argument) or bool(colon) != bool(kind.argument):
            raise UserError(f"{KEY}: found {name!r}, expected {word}{f':{kind.argument}' * bool(kind.argument)}.")
    known = (*kind.reads, *_OF_MEMBERS * in_list)
    if unread := [option for option in own if option not in known]:
        alone = " A judge that is not in a list has no weight." if unread[0] in _OF_MEMBERS else ""
        takes = f"It has: {', '.join(known)}." if known else "It has no options."
        raise UserError(f"{KEY}: {name} does not read {unread[0]}.{alone} {takes}")
    return kind, asked


def check_judge(config: RunConfig) -> None:
    """Raise UserError where a judge that the configuration names cannot work; loads nothing heavy."""
    for key, judge in (KEY, config.rounds.judge), (SECOND_KEY, config.rounds.second_judge):
        try:
            for kind, asked in _asked_for(judge, config):
                kind.check(asked)
        except UserError as error:
            text = str(error)
            raise UserError(key + text.removeprefix(KEY) if text.startswith(f"{KEY}:") else text) from error


def check_rows(config: RunConfig, prompts: Iterable[LoopPrompt]) -> None:
    """Raise UserError for the first prompt whose row lacks what a judge needs."""
    judges = [*_asked_for(config.rounds.judge, config), *_asked_for(config.rounds.second_judge, config)]
    for prompt in prompts:
        for kind, asked in judges:
            kind.check_row(asked, JudgedInput(prompt.prompt, "", prompt.row))


def _asked_for(judge: Any, config: RunConfig) -> list[tuple[Kind, Asked]]:
    return [] if judge is None else [_asked(entry, config, isinstance(judge, list)) for entry in listed(judge)]


def build_judge(config: RunConfig) -> Judge:
    """The judge that the configuration names. Raises UserError."""
    return _built(config.rounds.judge, config)


def build_second_judge(config: RunConfig) -> Judge | None:
    """The judge of held-out responses alone; None where there is none. Raises UserError."""
    return None if config.rounds.second_judge is None else _built(config.rounds.second_judge, config)


def _built(given: Any, config: RunConfig) -> Judge:
    if not isinstance(given, list):
        kind, asked = _asked(given, config, in_list=False)
        return kind.build(asked)
    members = []
    for entry in given:
        kind, asked = _asked(entry, config, in_list=True)
        members.append(Member(kind.build(asked), asked.options.weight, asked.options.normalize == "z_score"))
    # What a member could not judge is asked again when the ensemble is: not for a response that it has a score of.
    return EnsembleJudge(members, Verdicts(Path(config.local_run_dir) / VERDICTS, unjudged_again=True))
