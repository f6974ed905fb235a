"""How a model is loaded to talk to, how the tokens of its responses are chosen, and how many there may be."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from preference_training.configuration.schema import TEMPLATES
from preference_training.configuration.sections import DTYPES
from preference_training.core.errors import UserError, nearest

# Where neither the user nor the model's generation_config.json says how long a response may be. Unit: tokens.
MAX_NEW_TOKENS = 512


class Setting(NamedTuple):
    """The type of a setting, which values it may have, and these in words."""

    kind: Callable[[str], Any]
    is_valid: Callable[[Any], bool]
    expected: str


KNOWN = {
    "temperature": Setting(float, lambda value: 0 <= value < float("inf"), "a number of at least 0; 0 is greedy"),
    "top_p": Setting(float, lambda value: 0 < value <= 1, "a number above 0 and up to 1; 1 keeps all tokens"),
    "top_k": Setting(int, lambda value: value >= 0, "a whole number; 0 keeps all tokens"),
    "repetition_penalty": Setting(float, lambda value: 0 < value < float("inf"), "a number above 0; 1 is none"),
    "max_new_tokens": Setting(int, lambda value: value >= 1, "a whole number of at least 1"),
    "seed": Setting(int, lambda value: value >= 0, "a whole number of at least 0"),
}


@dataclass(frozen=True)
class GenerationSettings:
    """How tokens are chosen: at temperature 0 the most likely one, else by chance among the `top_k` and `top_p` likeliest."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_new_tokens: int = MAX_NEW_TOKENS
    seed: int = 0

    @classmethod
    def of(cls, generation_config) -> "GenerationSettings":
        """Those that a model's generation_config.json advises; without any, greedy."""
        found = generation_config
        advised = {"repetition_penalty": found.repetition_penalty, "max_new_tokens": found.max_new_tokens}
        if found.do_sample:
            # transformers keeps 50 tokens where a model says that it samples, and nothing of how many.
            top_k = 50 if found.top_k is None else found.top_k
            temperature = 1.0 if found.temperature is None else found.temperature
            advised |= {"temperature": temperature, "top_p": found.top_p, "top_k": top_k}
        return cls(**{name: value for name, value in advised.items() if value is not None})

    def changed(self, values: dict[str, Any]) -> "GenerationSettings":
        """These settings with other values, given as numbers or texts. Raises UserError."""
        return replace(self, **{name: _checked(name, value) for name, value in values.items()})

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken, so that the seed has no effect."""
        return self.temperature == 0

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `generate` that choose tokens."""
        penalty = {"repetition_penalty": self.repetition_penalty} if self.repetition_penalty != 1 else {}
        if self.is_greedy:
            return penalty
        # Noise on the scores samples, so that `generate` has only to shape them.
        return penalty | {"do_sample": True, "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}

    def text(self) -> str:
        """The settings in one line."""
        limit = f"at most {self.max_new_tokens:,} tokens"
        penalty = f", repetition_penalty {self.repetition_penalty:g}" if self.repetition_penalty != 1 else ""
        if self.is_greedy:
            return f"greedy{penalty}, {limit}"
        top_p = f", top_p {self.top_p:g}" if self.top_p < 1 else ""
        top_k = f", top_k {self.top_k}" if self.top_k else ""
        return f"temperature {self.temperature:g}{top_p}{top_k}{penalty}, seed {self.seed}, {limit}"


def _checked(name: str, value: Any) -> Any:
    """The value of a setting, of its type. Raises UserError for unknown names and invalid values."""
    if name not in KNOWN:
        raise UserError(f"{name}: no such setting; {nearest(name, KNOWN)}")
    kind, is_valid, expected = KNOWN[name]
    try:
        found = kind(value)
    except ValueError:
        found = None
    if found is None or not is_valid(found):
        raise UserError(f"{name}: found {value}, expected {expected}.")
    return found


@dataclass(frozen=True)
class LoadOptions:
    """How to load a model: None is what fits. template: the prompt format, if the run does not record it."""

    template: str | None = None
    device: str | None = None
    dtype: str | None = None
    trust_remote_code: bool = False

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        """Add these options to a command line."""
        parser.add_argument("--template", choices=TEMPLATES, help="format of the prompts, if the run does not record it")
        parser.add_argument("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")
        parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: as stored; float32 on CPUs)")
        parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")

    @classmethod
    def of(cls, given: Namespace) -> "LoadOptions":
        """The options of a parsed command line."""
        return cls(given.template, given.device, given.dtype, given.trust_remote_code)
