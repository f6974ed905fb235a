"""The commands that ask models: `generate` fills a store ahead, `judge` asks for verdicts."""

import argparse
from functools import partial
from pathlib import Path

from preference_collection.generation.filling import fill, plan_of
from preference_collection.generation.judges import Judging, judge_all, rubric_with
from preference_collection.generation.sources import model_named
from preference_collection.settings import guidelines_text
from preference_training.core.errors import UserError

MOST_WORKERS = 64


def add_generate(commands) -> argparse.ArgumentParser:
    """Add `generate` to the commands of a parser."""
    parser = commands.add_parser("generate", help="make answers to tasks that have no comparison yet")
    parser.add_argument("--n", type=_count, default=100, help="the number of tasks (100)")
    parser.add_argument("--per-problem", type=_count, help="answers to each, 2 to 5; by default the setting `answers`")
    parser.add_argument(
        "--model", action="append", help="ollama:MODEL, openai:MODEL or a checkpoint, by default the setting `generator`; "
        "given several times: one answer of each",
    )  # fmt: skip
    _add_workers(parser)
    return parser


def add_judge(commands) -> argparse.ArgumentParser:
    """Add `judge` to the commands of a parser."""
    parser = commands.add_parser("judge", help="ask a model which answers are better")
    parser.add_argument("--judge", help="ollama:MODEL, openai:MODEL or a checkpoint, by default the setting `judge`")
    parser.add_argument("--n", type=_count, help="the number of comparisons (all)")
    parser.add_argument("--rubric", type=Path, help="a text file: what the judge is to look at")
    _add_workers(parser)
    return parser


def _add_workers(parser: argparse.ArgumentParser) -> None:
    kind = partial(_count, most=MOST_WORKERS)
    parser.add_argument("--workers", type=kind, default=4, help=f"requests at a time, up to {MOST_WORKERS} (4)")


def _count(text: str, most: int = 10**9) -> int:
    """A number of at least 1."""
    if not text.isdecimal() or not 1 <= int(text[:20]) <= most:
        raise argparse.ArgumentTypeError(f"found {text[:40]!r}, expected an integer from 1 to {most}")
    return int(text)


def prepare_generate(options: argparse.Namespace, settings):
    """What `generate` does with a store, checked before the store is opened. Raises UserError."""
    names = options.model or [settings.generator] * bool(settings.generator)
    if not names:
        raise UserError("generate: no model. Name one with --model or generator=..., such as ollama:qwen2.5-coder:1.5b.")
    plan = plan_of(settings, [model_named(name, settings) for name in names], options.per_problem)
    return lambda store: fill(store, plan, options.n, options.workers)


def prepare_judge(options: argparse.Namespace, settings):
    """What `judge` does with a store, checked before the store is opened. Raises UserError."""
    name = options.judge or settings.judge
    if not name:
        raise UserError("judge: no model. Name one with --judge or judge=..., such as ollama:llama3.1:8b.")
    model, rubric = model_named(name, settings), rubric_with(_rubric(options.rubric), guidelines_text(settings))
    return lambda store: judge_all(Judging(store, model, rubric, settings.max_tokens), options.n, options.workers)


def _rubric(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"--rubric: {path} cannot be read: {error}. Expected a text file in UTF-8.") from error
    if not text.strip():
        raise UserError(f"--rubric: {path} is empty. Expected what the judge is to look at.")
    return text
