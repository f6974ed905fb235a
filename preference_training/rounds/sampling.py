"""The step that samples: responses of the policy that a round begins with, to its prompts and to those held out.

Responses are written in parts, of a few prompts each, that become one table at the end; a step that was killed goes on behind
its last part, with the same responses.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from preference_training.batching.micro_batches import split_into_batches
from preference_training.batching.packing import iterate_examples
from preference_training.configuration.schema import RunConfig
from preference_training.core.errors import UserError
from preference_training.core.files import write_atomically
from preference_training.core.machine import pick_device, quiet_libraries, release_memory, said_while_slow
from preference_training.data.rows.records import Prompt
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
from preference_training.rounds.loop import Loop, RoundFiles, counted
from preference_training.rounds.prompts import LoopPrompt, prompts_of_round
from preference_training.rounds.served.choice import is_policy_served, is_served, served_source
from preference_training.rounds.tables import SAMPLES, join_tables, save_table, write_table
from preference_training.tracking.run_files import STATE, read_run_info
from preference_training.training.defaults import fit_dtypes

# Prompts whose responses are sampled before they are written.
PROMPTS_PER_PART = 32
# Gives the rows of so many responses to each prompt; of a round by its name, for a table of samples.
Source = Callable[[Sequence[LoopPrompt], int, str, Path], Iterable[dict]]


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
        given: Prompt = prompt.prompt
        if not (isinstance(given, str) and self.format.name == "raw"):
            given = with_system(given, self.config.system_prompt)
        ids = self.format.prompt_ids(given)
        longest = min(self.context or self.config.max_length, self.config.max_length)
        if len(ids) >= longest:
            raise UserError(
                f"rounds.prompts: prompt {prompt.prompt_id} has {len(ids):,} tokens, and max_length leaves no room for a "
                f"response behind {longest - 1:,}. Remove it, or raise max_length."
            )
        return ids

    def text(self, ids: list[int]) -> tuple[str, bool]:
        """The text of a response, without what stands behind its end; and whether it has ended by itself."""
        text, cut = self.cut(self.format.response(self.tokenizer.decode(ids, skip_special_tokens=True)))
        return text, cut or ids[-1] in self.ends.tokens

    def cut(self, text: str) -> tuple[str, bool]:
        """A text up to the first one that ends a response, and whether there is one."""
        ends = [place for stop in self.format.stops if (place := text.find(stop)) >= 0]
        return (text[: min(ends)], True) if ends else (text, False)


def find_template(config: RunConfig, tokenizer, prompts: Sequence[LoopPrompt]) -> str:
    """The template of a loop: the configured one, that of the model's own training here, or what fits the tokenizer."""
    directories = [Path(name) for name in (config.model.archive, config.model.name_or_path) if name]
    recorded = next((read_run_info(path).get("prompt_format") for path in directories if (path / STATE).is_file()), None)
    plain = "hh" if any(not isinstance(prompt.prompt, str) for prompt in prompts) else "raw"
    return config.template or recorded or ("chat" if tokenizer.chat_template else plain)


# ---- the step -----------------------------------------------------------------------------------------------------------


def sample(loop: Loop, number: int) -> None:
    """Sample what a round needs: responses to its prompts, and to those held out. Raises UserError."""
    files, rounds = loop.round(number), loop.config.rounds
    if files.is_done("sample"):
        return
    quiet_libraries()
    config = loop.config_before(number)
    policy = Policy.of(config, loop.prompts)
    if number == 1:
        # Before the first response is sampled: that each prompt leaves room for one.
        for prompt in loop.prompts:
            policy.prompt_ids(prompt)
    files.directory.mkdir(parents=True, exist_ok=True)
    local = partial(_responses, policy)
    source, facts = served_source(loop, number, policy) if is_served(config) else (local, {})
    known = {"template": policy.format.name, "model": policy.identity, "archive": config.model.archive} | facts
    write_atomically(files.sampling, json.dumps(known, indent=1) + "\n")
    if files.number is not None and not files.samples.is_file():
        chosen = prompts_of_round(loop.prompts, number, rounds.prompts_per_round, config.seed)
        print(
            f"{files.name}: sampling {counted(rounds.n_samples, 'response')} to each of {counted(len(chosen), 'prompt')}",
            flush=True,
        )
        parts = _sample_parts(source, chosen, rounds.n_samples, files, files.samples)
        _finish(files.samples, join_tables(parts, SAMPLES))
    if files.held_out_samples.is_file():
        return
    held_out, count = loop.held_out, rounds.n_held_out_samples
    if held_out:
        print(
            f"{files.name}: sampling {counted(count, 'response')} to each of {counted(len(held_out), 'held-out prompt')}",
            flush=True,
        )
    # Where another model samples, it is still the policy that is compared from round to round.
    source = source if is_policy_served(config) else local
    parts = _sample_parts(source, held_out, count, files, files.held_out_samples)
    rows = join_tables(parts, SAMPLES).to_pylist()
    own = first = _logps(policy, rows, held_out)
    if rows and number > 1:
        # Its memory is free before the other model takes its own.
        del policy, source, local
        release_memory()
        first = _logps(Policy.of(loop.config, loop.prompts, known["template"]), rows, held_out)
    rows = [row | {"logp": one, "logp_first": other} for row, one, other in zip(rows, own, first, strict=True)]
    write_table(files.held_out_samples, rows, SAMPLES)
    shutil.rmtree(_parts_of(files.held_out_samples), ignore_errors=True)


def _finish(path: Path, table) -> None:
    save_table(path, table)
    shutil.rmtree(_parts_of(path), ignore_errors=True)


def _parts_of(path: Path) -> Path:
    return path.with_suffix(".parts")


def _sample_parts(source: Source, prompts: Sequence[LoopPrompt], count: int, files: RoundFiles, path: Path) -> list[Path]:
    """Sample the parts of a table that are not there yet; the paths of all."""
    folder, paths = _parts_of(path), []
    for start in range(0, len(prompts), PROMPTS_PER_PART):
        part = folder / f"{start // PROMPTS_PER_PART:06d}.parquet"
        paths.append(part)
        if part.is_file():
            continue
        some = prompts[start : start + PROMPTS_PER_PART]
        with said_while_slow("still sampling"):
            write_table(part, source(some, count, files.name, path), SAMPLES)
        print(f"{files.name}: {min(start + PROMPTS_PER_PART, len(prompts)):,} of {len(prompts):,} prompts sampled", flush=True)
    return paths


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
