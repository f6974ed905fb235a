"""The step that samples: responses of the policy that a round begins with, to its prompts and to those held out.

Responses are written in parts, of a few prompts each, that become one table at the end; a step that was killed goes on behind
its last part, with the same responses.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from preference_training.batching.micro_batches import split_into_batches
from preference_training.batching.packing import iterate_examples
from preference_training.configuration.schema import RunConfig
from preference_training.core.errors import UserError
from preference_training.core.machine import pick_device, quiet_libraries, release_memory, said_while_slow
from preference_training.core.processes import usable_cores
from preference_training.core.values import counted
from preference_training.data.records.record import Prompt
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.generation.chat_format import ChatFormat, with_system
from preference_training.generation.decoding import Ends
from preference_training.generation.sampling import Sampler, advised_generation, ends_of, named_ends
from preference_training.generation.settings import GenerationSettings
from preference_training.modeling.loading import load_model
from preference_training.modeling.logprobs import response_scores
from preference_training.modeling.sources.gguf import with_converted_model
from preference_training.modeling.state import compute_device, move_to_devices, weights_hash
from preference_training.modeling.token_budget import token_budget
from preference_training.modeling.tokenizer import load_tokenizer
from preference_training.rounds.loop import Loop, RoundFiles
from preference_training.rounds.processes import run_together
from preference_training.rounds.prompts import LoopPrompt, prompts_of_round
from preference_training.rounds.served.choice import is_policy_served, is_served, served_source
from preference_training.rounds.tables import SAMPLES, join_tables, save_table, save_text, write_table
from preference_training.tracking.run_files import STATE, read_run_info
from preference_training.training.defaults import fit_dtypes

# Prompts whose responses are sampled before they are written.
PROMPTS_PER_PART = 32
# Gives the rows of so many responses to each prompt; of a round by its name, for a table of samples.
Source = Callable[[Sequence[LoopPrompt], int, str, Path], Iterable[dict]]


class Share(NamedTuple):
    """The share of one of several processes: its number from 0, and how many there are."""

    number: int
    size: int


ALL_PARTS = Share(0, 1)


@dataclass(frozen=True)
class Policy:
    """A policy that is loaded to sample from. identity: a hash of its weights."""

    model: nn.Module
    tokenizer: Any
    format: ChatFormat
    ends: Ends
    config: RunConfig
    identity: str

    @classmethod
    def of(cls, config: RunConfig, prompts: Sequence[LoopPrompt], template: str | None = None) -> "Policy":
        """Load the model of a configuration. template: None is that of its training, or what fits it."""
        config = with_converted_model(fit_dtypes(config))
        tokenizer = load_tokenizer(config.model, config.cache_dir)
        chat_format = ChatFormat(template or find_template(config, tokenizer, prompts), tokenizer)
        model = load_model(config.model, tokenizer, config.cache_dir)
        identity = weights_hash(model)
        archive = config.model.archive
        named = named_ends(advised_generation(model, Path(archive) if archive else None))
        ends = ends_of(model, tokenizer, frozenset([tokenizer.eos_token_id, *chat_format.end_tokens, *named]))
        return cls(move_to_devices(model, pick_device()).eval(), tokenizer, chat_format, ends, config, identity)

    @property
    def context(self) -> int | None:
        """How many tokens it can read; None where it does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def prompt_ids(self, prompt: LoopPrompt) -> list[int]:
        """The token ids of a prompt as training renders it. Raises UserError where it leaves no room for a response."""
        return prompt_ids(prompt, self.format, self.config, self.context)

    def text(self, ids: list[int]) -> tuple[str, bool]:
        """The text of a response, without what stands behind its end; and whether it has ended by itself."""
        text, cut = self.cut(self.format.response(self.tokenizer.decode(ids, skip_special_tokens=True)))
        return text, cut or ids[-1] in self.ends.tokens

    def cut(self, text: str) -> tuple[str, bool]:
        """A text up to the first one that ends a response, and whether there is one."""
        ends = [place for stop in self.format.stops if (place := text.find(stop)) >= 0]
        return (text[: min(ends)], True) if ends else (text, False)


def prompt_ids(prompt: LoopPrompt, chat_format: ChatFormat, config: RunConfig, context: int | None = None) -> list[int]:
    """The token ids of a prompt. context: how many the model can read. Raises UserError where a response has no room."""
    given: Prompt = prompt.prompt
    if not (isinstance(given, str) and chat_format.name == "raw"):
        given = with_system(given, config.system_prompt)
    ids = chat_format.prompt_ids(given)
    longest = min(context or config.max_length, config.max_length)
    if len(ids) >= longest:
        limit, remedy = "max_length", "Remove it, or raise max_length."
        if longest < config.max_length:
            limit, remedy = "the model's context", "Remove it."
        raise UserError(
            f"rounds.prompts: prompt {prompt.prompt_id} has {len(ids):,} tokens, and {limit} leaves no room for a response "
            f"behind {longest - 1:,}. {remedy}"
        )
    return ids


def check_room(config: RunConfig, prompts: Sequence[LoopPrompt]) -> None:
    """Raise UserError for a prompt that leaves no room for a response; loads the tokenizer alone."""
    config = with_converted_model(fit_dtypes(config))
    tokenizer = load_tokenizer(config.model, config.cache_dir)
    chat_format = ChatFormat(find_template(config, tokenizer, prompts), tokenizer)
    for prompt in prompts:
        prompt_ids(prompt, chat_format, config)


def find_template(config: RunConfig, tokenizer, prompts: Sequence[LoopPrompt]) -> str:
    """The template of a loop: the configured one, that of the model's own training here, or what fits the tokenizer."""
    directories = [Path(name) for name in (config.model.archive, config.model.name_or_path) if name]
    recorded = next((read_run_info(path).get("prompt_format") for path in directories if (path / STATE).is_file()), None)
    plain = "hh" if any(not isinstance(prompt.prompt, str) for prompt in prompts) else "raw"
    return config.template or recorded or ("chat" if tokenizer.chat_template else plain)


# ---- the step -----------------------------------------------------------------------------------------------------------


def sample(loop: Loop, number: int, share: Share | None = None) -> None:
    """Sample what a round needs: responses to its prompts, and to those held out. Raises UserError.

    share: only that of the parts, as one of several processes; those that are missing are otherwise sampled by as many as the
    configuration says.
    """
    files = loop.round(number)
    if files.is_done("sample"):
        return
    quiet_libraries()
    config = loop.config_before(number)
    if share is None and number == 1:
        check_room(config, loop.prompts)
    if share is None and not is_served(config):
        _sample_in_processes(loop, number)
    policy = Policy.of(config, loop.prompts)
    if number == 1 and policy.context is not None and policy.context < config.max_length:
        for prompt in loop.prompts:
            policy.prompt_ids(prompt)
    files.directory.mkdir(parents=True, exist_ok=True)
    if share is not None:
        for path, prompts, count in _tables(loop, number):
            _sample_parts(partial(_responses, policy), prompts, count, files, path, share)
        return
    local = partial(_responses, policy)
    source, facts = served_source(loop, number, policy) if is_served(config) else (local, {})
    known = {"template": policy.format.name, "model": policy.identity, "archive": config.model.archive} | facts
    save_text(files.sampling, json.dumps(known, indent=1) + "\n")
    for path, prompts, count in _tables(loop, number):
        if path == files.samples:
            _finish(path, join_tables(_sample_parts(source, prompts, count, files, path), SAMPLES))
    if files.held_out_samples.is_file():
        return
    [(path, held_out, count)] = _tables(loop, number)
    # Where another model samples, it is still the policy that is compared from round to round.
    source = source if is_policy_served(config) else local
    rows = join_tables(_sample_parts(source, held_out, count, files, path), SAMPLES).to_pylist()
    own = first = _logps(policy, rows, held_out)
    if rows and number > 1:
        # Its memory is free before the other model takes its own.
        del policy, source, local
        release_memory()
        first = _logps(Policy.of(loop.config, loop.prompts, known["template"]), rows, held_out)
    rows = [row | {"logp": one, "logp_first": other} for row, one, other in zip(rows, own, first, strict=True)]
    write_table(files.held_out_samples, rows, SAMPLES)
    shutil.rmtree(_parts_of(files.held_out_samples), ignore_errors=True)


def _tables(loop: Loop, number: int) -> Iterator[tuple[Path, list[LoopPrompt], int]]:
    """The tables of samples that a round lacks: path, prompts, and responses to each."""
    files, rounds = loop.round(number), loop.config.rounds
    if files.number is not None and not files.samples.is_file():
        chosen = prompts_of_round(loop.prompts, number, rounds.prompts_per_round, loop.config.seed)
        yield files.samples, chosen, rounds.n_samples
    if not files.held_out_samples.is_file():
        yield files.held_out_samples, loop.held_out, rounds.n_held_out_samples


def _sample_in_processes(loop: Loop, number: int) -> None:
    """Have the missing parts sampled by several processes, if they are to be. Raises StoppedError, StepFailedError."""
    gpus = torch.cuda.device_count()
    wanted = loop.config.rounds.sampler_processes or gpus or 1
    missing = [part for path, prompts, _ in _tables(loop, number) for part, _ in _parts(path, prompts) if not part.is_file()]
    size = min(wanted, len(missing))
    if size <= 1:
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
    environments = [{"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, usable_cores() // size)))}] * size
    if gpus:
        environments = [{"CUDA_VISIBLE_DEVICES": visible.split(",")[each % gpus]} for each in range(size)]
    print(f"{loop.round(number).name}: sampling in {size} processes", flush=True)
    command = [sys.executable, "-m", "preference_training.rounds", "sample", str(loop.directory), "--round", str(number)]
    run_together([([*command, "--share", f"{each}/{size}"], environments[each]) for each in range(size)], "sampling")


def _finish(path: Path, table) -> None:
    save_table(path, table)
    shutil.rmtree(_parts_of(path), ignore_errors=True)


def _parts_of(path: Path) -> Path:
    return path.with_suffix(".parts")


def _parts(path: Path, prompts: Sequence[LoopPrompt]) -> list[tuple[Path, Sequence[LoopPrompt]]]:
    """The parts of a table, each with its prompts: the same whoever samples them."""
    starts = range(0, len(prompts), PROMPTS_PER_PART)
    return [
        (_parts_of(path) / f"{number:06d}.parquet", prompts[start : start + PROMPTS_PER_PART])
        for number, start in enumerate(starts)
    ]


def _sample_parts(
    source: Source, prompts: Sequence[LoopPrompt], count: int, files: RoundFiles, path: Path, share: Share = ALL_PARTS
) -> list[Path]:
    """Sample the parts of a table that are not there yet, or a share of them; the paths of all."""
    parts, what = _parts(path, prompts), "held-out prompt" if path == files.held_out_samples else "prompt"
    if share.number == 0 and not all(part.is_file() for part, _ in parts):
        print(f"{files.name}: sampling {counted(count, 'response')} to each of {counted(len(prompts), what)}", flush=True)
    for part, some in parts[share.number :: share.size]:
        if part.is_file():
            continue
        with said_while_slow("still sampling"):
            write_table(part, source(some, count, files.name, path), SAMPLES)
        done = sum(len(others) for other, others in parts if other.is_file())
        print(f"{files.name}: {done:,} of {len(prompts):,} prompts sampled", flush=True)
    return [part for part, _ in parts]


def _responses(policy: Policy, prompts: Sequence[LoopPrompt], count: int, stream: str, _table: Path) -> Iterator[dict]:
    """The rows of `count` responses to each prompt. stream: the name of their noise, another one in each round."""
    rounds, config = policy.config.rounds, policy.config
    settings = GenerationSettings(rounds.temperature, rounds.top_p, max_new_tokens=rounds.max_new_tokens)
    ids = [policy.prompt_ids(prompt) for prompt in prompts]
    room = min(policy.context or config.max_length, config.max_length, max(map(len, ids)) + rounds.max_new_tokens)
    sampler = Sampler(policy.tokenizer, room, config.seed, settings=settings, ends=policy.ends.tokens)
    for prompt, found in zip(prompts, sampler.samples(policy.model, ids, count, stream), strict=True):
        for number, response in enumerate(found):
            text, ended = policy.text(response.token_ids)
            yield {
                "prompt_id": prompt.prompt_id,
                "number": number,
                "text": text,
                "token_ids": response.token_ids,
                "n_tokens": len(response.token_ids),
                "ended": ended,
                "logp": response.logp,
                "logp_first": None,
                "model": policy.identity,
            }


# ---- log-probs of held-out responses --------------------------------------------------------------------------------------


@torch.no_grad()
def _logps(policy: Policy, rows: Sequence[dict], prompts: Sequence[LoopPrompt]) -> list[float]:
    """The log-prob of each response under a model, at temperature 1."""
    if not rows:
        return []
    ids = {prompt.prompt_id: policy.prompt_ids(prompt) for prompt in prompts}
    examples = list(iterate_examples(TokenizedPrompt(ids[row["prompt_id"]], [row["token_ids"]], []) for row in rows))
    budget = token_budget(policy.model, policy.config.max_tokens_per_microbatch)
    found = torch.zeros(len(examples), dtype=torch.float64)
    for batch in split_into_batches(examples, policy.config.eval_batch_size, budget):
        placed = batch.to(compute_device(policy.model))
        found[batch.places] = response_scores(policy.model, placed).double().cpu()[batch.members[:, 0].cpu()]
    return found.tolist()
