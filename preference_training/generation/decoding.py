"""Decoding of rows that share their prompts: a prompt is computed once, and its cache repeated for each of its samples.

Shapes: B prompts of a batch, R rows decoded together, L tokens so far, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from preference_training.modeling.state import compute_device

# By how much scores of a row may differ, relative to their spread, when it is computed in two ways: in float32, and in 16 bits.
# Rounding alone makes 2e-4 of a SmolLM2 that DPO has moved far; rows of another prompt differ by about their spread.
TOLERANCE, TOLERANCE_16_BIT = 1e-2, 0.1
# Rows that have ended leave the batch once they are this share of it: each time, the cache is copied.
SHARE_OF_ENDED = 0.25
# What `generate` prepares for a decoding, but not for the model.
OF_DECODING = ("logits_processor", "stopping_criteria", "generation_config")


class Sampled(NamedTuple):
    """A response: its token ids, and the sum of their log-probs (float) under the model itself, at temperature 1.

    The last token is one that ends a response, unless the response is truncated.
    """

    token_ids: list[int]
    logp: float


class Ends(NamedTuple):
    """The ids of the tokens that end a response, and of padding, which exist in the embedding."""

    tokens: frozenset[int]
    padding: int


def generate(model: nn.Module, prompts: Sequence[Sequence[int]], ends: Ends, limit: int, decoding: Callable, **settings) -> Any:
    """Have `decoding` continue prompts, padded on the left, by at most `limit` tokens; returns what it returns.

    settings: further keyword arguments of `generate`, such as temperature or a cache.
    """
    width, device = max(map(len, prompts)), compute_device(model)
    ids = torch.full((len(prompts), width), ends.padding)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=limit,
        custom_generate=decoding,
        pad_token_id=ends.padding,
        eos_token_id=sorted(ends.tokens),
        **({"do_sample": False} | settings),
    )


class PreallocatedLayer(DynamicLayer):
    """A layer's keys and values in memory with room for more tokens. A DynamicLayer copies all of them for each new token."""

    keys: Tensor
    values: Tensor
    key_memory: Tensor
    value_memory: Tensor

    def __init__(self, layer: DynamicLayer, room: int):
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.room = room
        self._reserve(layer.keys, layer.values)

    def update(self, key_states: Tensor, value_states: Tensor, *_args, **_kwargs) -> tuple[Tensor, Tensor]:
        """Append keys and values; returns all so far."""
        start, end = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        self.key_memory[..., start:end, :] = key_states
        self.value_memory[..., start:end, :] = value_states
        self.keys, self.values = self.key_memory[..., :end, :], self.value_memory[..., :end, :]
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the given rows, in this order; a row may be repeated."""
        rows = beam_idx.to(self.keys.device)
        self._reserve(self.keys, self.values, rows)

    def _reserve(self, keys: Tensor, values: Tensor, rows: Tensor | None = None) -> None:
        """Copy the given rows (None: all) of keys and values to memory with room."""
        self.key_memory, self.keys = _with_room(keys, rows, self.room)
        self.value_memory, self.values = _with_room(values, rows, self.room)


def _with_room(states: Tensor, rows: Tensor | None, room: int) -> tuple[Tensor, Tensor]:
    """Memory for `room` tokens that begins with the given rows of `states`, and its part with these."""
    memory = states.new_empty(len(states) if rows is None else len(rows), states.shape[1], room, states.shape[-1])
    filled = memory[..., : states.shape[-2], :]
    filled.copy_(states if rows is None else states.index_select(0, rows))
    return memory, filled


class DecodedRows:
    """Rows that a model decodes together: their ids [R, L], and the scores of their next tokens [R, V].

    arguments: what `generate` hands to a decoding, among it the model's keyword arguments and cache. room: tokens of a row at
    most.
    """

    scores: Tensor

    def __init__(self, model: nn.Module, ids: Tensor, arguments: dict, room: int):
        self.model, self.ids, self.room = model, ids, room
        self.process = arguments["logits_processor"]
        self.arguments = {name: value for name, value in arguments.items() if name not in OF_DECODING}
        cached = arguments["past_key_values"].get_seq_length() if arguments.get("past_key_values") is not None else 0
        if cached:
            self.preallocate()
        self._forward(is_first_iteration=True, next_sequence_length=ids.shape[1] - cached if cached else None)

    def processed_scores(self) -> Tensor:
        """The scores after the temperature, the penalties and the like that `generate` was asked for."""
        # Some work in place, and the log-probs of what is chosen are the model's own.
        return self.process(self.ids, self.scores.clone()) if self.process else self.scores

    def select(self, places: Sequence[int]) -> None:
        """Keep the rows at the given places, in this order; a row may be repeated. Raises TypeError where state has no rows."""
        rows = torch.tensor(places, device=self.ids.device)
        for processor in self.process:
            # The length of each row's prompt, which a repetition penalty ignores.
            of_rows = {name: value for name, value in vars(processor).items() if isinstance(value, Tensor) and value.dim()}
            vars(processor).update({name: value[rows] for name, value in of_rows.items() if len(value) == len(self.ids)})
        self.arguments = {name: _select(name, value, rows) for name, value in self.arguments.items()}
        self.ids, self.scores = self.ids[rows], self.scores[rows]

    def preallocate(self) -> None:
        """Give plain layers of the cache room for all tokens to come."""
        layers = getattr(self.arguments.get("past_key_values"), "layers", [])
        for number, layer in enumerate(layers):
            is_short = type(layer) is DynamicLayer or (type(layer) is PreallocatedLayer and layer.room < self.room)
            if is_short and layer.get_seq_length():
                layers[number] = PreallocatedLayer(layer, self.room)

    def append(self, tokens: Sequence[int]) -> None:
        """Append a token to each row."""
        self.ids = torch.cat([self.ids, torch.tensor(tokens, device=self.ids.device)[:, None]], dim=-1)

    def step(self) -> None:
        """Compute the scores after the last appended tokens."""
        self._forward(next_sequence_length=1 if self.arguments["use_cache"] else None)

    def _forward(self, **how) -> None:
        inputs = self.model.prepare_inputs_for_generation(self.ids, **how, **self.arguments)
        outputs = self.model(**inputs, return_dict=True)
        self.arguments = self.model._update_model_kwargs_for_generation(outputs, self.arguments)
        self.scores = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=self.ids.device)


def _select(name: str, value, rows: Tensor):
    """The given rows of a keyword argument of a model."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "reorder_cache"):
        value.reorder_cache(rows)
        return value
    if isinstance(value, Tensor):
        # Positions in several dimensions, [dimensions, R, L].
        return value.index_select(-2 if name == "position_ids" else 0, rows.to(value.device))
    raise TypeError(f"{name} is a {type(value).__name__}, which has no rows to select")


class Decoding:
    """The decoding of a batch, as `generate` calls it: samples from each row until its limit or the end-of-sequence token.

    noise: adds noise to scores [R, V], for the given rows. limits: the largest number of new tokens of each row, [R]. samples:
    rows that share a prompt; where there are several, rows that have ended leave the batch. With one row for each prompt the
    batch stays whole, so that responses are, to the last bit, those of earlier versions.
    """

    def __init__(self, noise: Callable, limits: Sequence[int], ends: Ends, samples: int = 1):
        self.noise, self.limits, self.ends, self.samples = noise, limits, ends, samples
        self.found: list[list[int]] = [[] for _ in limits]
        # Sums over the tokens of each row, in double precision.
        self.logps = [0.0 for _ in limits]

    def __call__(self, model: nn.Module, input_ids: Tensor, **arguments) -> list[Sampled]:
        """The response of each row, [R]."""
        rows = DecodedRows(model, input_ids, arguments, input_ids.shape[1] + max(self.limits))
        if self.samples > 1:
            rows.select([place for place in range(len(input_ids)) for _ in range(self.samples)])
        rows.preallocate()
        with model._optimize_model_for_decode():
            self._decode(rows)
        return [Sampled(*response) for response in zip(self.found, self.logps, strict=True)]

    def _decode(self, rows: DecodedRows) -> None:
        """Sample until all rows have ended."""
        # The number of each row in the batch; None once it has ended.
        numbers: list[int | None] = list(range(len(self.limits)))
        while True:
            drawn = self._draw(rows, numbers)
            rows.append([self.ends.padding if number is None else token for number, token in zip(numbers, drawn, strict=True)])
            numbers = [self._after(number, token) for number, token in zip(numbers, drawn, strict=True)]
            left = [place for place, number in enumerate(numbers) if number is not None]
            if not left:
                return
            if self.samples > 1 and len(left) <= (1 - SHARE_OF_ENDED) * len(numbers):
                rows.select(left)
                numbers = [numbers[place] for place in left]
            rows.step()

    def _draw(self, rows: DecodedRows, numbers: Sequence[int | None]) -> list[int]:
        """The next token of each row; the log-probs of those that have not ended are added to `logps`."""
        tokens = self.noise(rows.processed_scores(), numbers).argmax(-1)
        logps = rows.scores.gather(-1, tokens[:, None]).squeeze(-1) - rows.scores.logsumexp(-1)
        # Token ids are exact in float64: one wait for the device instead of two.
        drawn, added = torch.stack([tokens.double(), logps.double()]).tolist()
        for number, logp in zip(numbers, added, strict=True):
            if number is not None:
                self.logps[number] += logp
        return [int(token) for token in drawn]

    def _after(self, number: int | None, token: int) -> int | None:
        """Note a token of a row; its number unless it has ended."""
        if number is None:
            return None
        response = self.found[number]
        response.append(token)
        return None if token in self.ends.tokens or len(response) >= self.limits[number] else number


# ---- proof -------------------------------------------------------------------------------------------------------------------

_REPEATS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
# Two prompts with two samples each, of which the second one leaves after a step. In eighths of the vocabulary: its first tokens
# are special ones, after which some models round much more.
TRIED_PROMPTS, TRIED_TOKENS, TRIED_LEFT = [[2, 3, 4], [1, 5]], ([4, 5, 6, 7], [6, 7, 3, 2]), [0, 2, 3]


def repeats_prompts(model: nn.Module, ends: Ends) -> bool:
    """Whether a model can repeat the cache of a prompt, and drop rows. It is tried once; a model that cannot is printed."""
    if model not in _REPEATS:
        failure = _repeating_failure(model, ends)
        _REPEATS[model] = failure is None
        if failure is not None:
            print(f"sampling: {type(model).__name__} computes a prompt for each of its samples anew: {failure}", flush=True)
    return _REPEATS[model]


def _repeating_failure(model: nn.Module, ends: Ends) -> str | None:
    """Why a model cannot repeat the cache of a prompt; None where it can."""
    prompts = [_tried_ids(model, prompt) for prompt in TRIED_PROMPTS]
    expected = generate(model, [prompt for prompt in prompts for _ in range(2)], ends, 3, _tried_alone)
    try:
        found = generate(model, prompts, ends, 3, _tried_sharing)
    # Each kind of cache has its own way to fail.
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    tolerance = TOLERANCE if model.dtype.itemsize >= 4 else TOLERANCE_16_BIT
    spread = (expected - expected.mean(-1, keepdim=True)).norm()
    return None if (found - expected).norm() <= tolerance * spread else "repeated rows of its cache give other scores"


def _tried_ids(model: nn.Module, eighths: Sequence[int]) -> list[int]:
    """Token ids that so many eighths of a model's vocabulary are below."""
    return [eighth * model.config.get_text_config().vocab_size // 8 for eighth in eighths]


def _tried_sharing(model: nn.Module, input_ids: Tensor, **arguments) -> Tensor:
    """Scores of the rows that are left, whose prompts are computed once, [3, V]."""
    rows = DecodedRows(model, input_ids, arguments, input_ids.shape[1] + len(TRIED_TOKENS))
    rows.select([0, 0, 1, 1])
    rows.preallocate()
    first, second = (_tried_ids(model, tokens) for tokens in TRIED_TOKENS)
    rows.append(first)
    rows.step()
    rows.select(TRIED_LEFT)
    rows.append([second[row] for row in TRIED_LEFT])
    rows.step()
    return rows.scores


def _tried_alone(model: nn.Module, input_ids: Tensor, **arguments) -> Tensor:
    """The same scores, of rows with prompts of their own, [3, V]."""
    rows = DecodedRows(model, input_ids, arguments, 0)
    for tokens in TRIED_TOKENS:
        rows.append(_tried_ids(model, tokens))
        rows.step()
    return rows.scores[TRIED_LEFT]
