"""What a command line of scripts/benchmark.py asks for: models are loaded, files read, results printed and written as JSON."""

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from preference_training.checkpointing.saved_run import newest_checkpoint
from preference_training.configuration.schema import RunConfig
from preference_training.core.errors import UserError
from preference_training.core.machine import pick_device, said_while_slow
from preference_training.core.values import UNREADABLE
from preference_training.data.records.record import message_of
from preference_training.evaluation.benchmarks import text
from preference_training.evaluation.benchmarks.arguments import check_arguments, named_files
from preference_training.evaluation.benchmarks.graded_judge import build_graded_judge
from preference_training.evaluation.benchmarks.outputs import Output, joined, read_outputs
from preference_training.evaluation.benchmarks.pairs import (
    Pairs,
    Scored,
    prompts_of,
    read_pairs,
    same_vocabulary,
    score_by_language_model,
    score_by_reward_model,
)
from preference_training.evaluation.benchmarks.sections import by_category, sections
from preference_training.evaluation.benchmarks.win_rates import compare_with_baseline
from preference_training.evaluation.judges import Judge, build_judge
from preference_training.evaluation.reward_models import RewardModel
from preference_training.evaluation.runs import write_results, write_text
from preference_training.generation.chat import load_before_training, load_for_chat, open_responders
from preference_training.generation.settings import GenerationSettings, LoadOptions
from preference_training.tracking.run_files import JUDGEMENTS, RESULTS_FILE, STATE

# The part of results.json, and the folder in a run directory, for benchmarks.
BENCHMARKS = "benchmarks"


# ---- pairs ------------------------------------------------------------------------------------------------------------------


def pair_accuracy(options: Namespace) -> list[str]:
    """Score the pairs of a file by the models that are named; returns the lines to print. Raises UserError."""
    check_arguments(options)
    path = _results_path(options, f"pairs_{Path(options.file).name.partition('.')[0]}.json")
    pairs = read_pairs(options.file, options.by)
    results: dict = {"file": options.file, "category_column": pairs.column, "left_out": pairs.left_out, "models": {}}
    if options.model is not None:
        results["models"][options.model] = _found(pairs, _by_language_model(pairs, options))
    for name in options.reward_model or ():
        where = Path(name).expanduser()
        model = RewardModel(str(newest_checkpoint(where)) if where.is_dir() else name, options.cache_dir, pick_device())
        with said_while_slow("still scoring"):
            results["models"][name] = _found(pairs, score_by_reward_model(pairs, model))
    return _concluded(path, results, text.pair_lines(results), options.model)


def _by_language_model(pairs: Pairs, options: Namespace) -> Scored:
    loading = LoadOptions.of(options)
    policy = load_for_chat(options.model, loading)
    reference = None
    if options.reference:
        reference = load_for_chat(options.reference, loading)
        if not same_vocabulary(reference.tokenizer, policy.tokenizer):
            raise UserError(
                f"--reference: {options.reference} has another tokenizer than {options.model}, so that their log-probs are of "
                "other tokens. Expected the model that its training started from."
            )
    elif policy.saved is not None:
        reference = load_before_training(policy, loading)
    with said_while_slow("still scoring"):
        return score_by_language_model(pairs, policy, reference)


def _found(pairs: Pairs, scored: Scored) -> dict:
    """The accuracies of each way to score, with the sections of RewardBench, in plain values."""
    prompts, categories = prompts_of(pairs, scored), [pairs.categories[number] for number in scored.records]
    outcomes = {name: scored.outcomes(name) for name in scored.margins}
    return {
        "accuracy": {name: by_category(values, categories, prompts) for name, values in outcomes.items()},
        "sections": {name: found for name, values in outcomes.items() if (found := sections(values, categories))},
        "left_out": scored.left_out,
    }


# ---- win rates --------------------------------------------------------------------------------------------------------------


def benchmark_win_rate(options: Namespace, config: RunConfig, judge: Judge | None = None) -> list[str]:
    """Compare outputs with a baseline's; returns the lines to print. Raises UserError.

    config: the project's, whose section `evaluation` names the judge. judge: one that was built already.
    """
    check_arguments(options)
    baseline = read_outputs(options.baseline, "--baseline")
    settings = config.evaluation
    if options.graded and (judge is not None or settings.judge.partition(":")[0] not in ("openai", "ollama")):
        raise UserError(f"--graded: {settings.judge} gives no degrees. Use openai:MODEL or ollama:MODEL, or drop it.")
    path = _results_path(options, f"win_rate_{Path(options.baseline).name.partition('.')[0]}.json")
    models = _outputs_of_files(options.outputs, baseline) if options.outputs else {}
    if judge is None:
        graded = build_graded_judge(settings) if options.graded else None
        judge = graded or build_judge(settings, options.cache_dir, pick_device())
    if options.model:
        models = {options.model: _written_outputs(options, list(baseline.values()), path)}
    verdicts = path.with_name(f"{path.stem}_{JUDGEMENTS}")
    with said_while_slow("still judging"):
        found = compare_with_baseline(judge, list(baseline.values()), models, verdicts, settings)
    results = {"baseline": options.baseline, "judge": settings.judge, "graded": options.graded, "models": found}
    return _concluded(path, results, text.win_rate_lines(results), options.model)


def _outputs_of_files(given: Sequence[str], baseline: dict[str, Output]) -> dict[str, list[Output]]:
    models = {}
    for name, file in named_files(given):
        models[name], others = joined(baseline, read_outputs(file, "--outputs"), name)
        if others:
            print(f"{file}: {others:,} outputs to other instructions are not read", flush=True)
    return models


def _written_outputs(options: Namespace, asked: list[Output], path: Path) -> list[Output]:
    """The outputs of a model that writes them now, which are kept beside the results."""
    settings = ("temperature", "top_p", "top_k", "max_new_tokens", "seed")
    given = {name: value for name in settings if (value := getattr(options, name)) is not None}
    known = GenerationSettings().changed(given)
    [responder] = open_responders(options.model, None, options.url, LoadOptions.of(options))
    print(f"writing outputs to {len(asked):,} instructions", flush=True)
    with said_while_slow("still writing"):
        responses = responder.responses([each.prompt for each in asked], {name: getattr(known, name) for name in given})
    outputs = [each._replace(text=response) for each, response in zip(asked, responses, strict=True)]
    lines = [
        {
            "prompt": each.prompt if isinstance(each.prompt, str) else [message_of(turn) for turn in each.prompt],
            "output": each.text,
        }
        for each in outputs
    ]
    file = path.with_name(f"{path.stem}_outputs.jsonl")
    write_text(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return outputs


# ---- where results go ------------------------------------------------------------------------------------------------------


def _run_directory(model: str | None) -> Path | None:
    """The directory of the run that a model is of."""
    path = Path(model).expanduser() if model else Path()
    checkpoint = newest_checkpoint(path) if model and path.is_dir() else path
    return checkpoint.resolve().parent if (checkpoint / STATE).is_file() else None


def _results_path(options: Namespace, name: str) -> Path:
    """The file of the results: --to, or in the directory of the run, or here. Raises UserError where it cannot be written."""
    run = _run_directory(options.model)
    path = Path(options.to) if options.to else (run / BENCHMARKS if run else Path()) / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--to: cannot write {path}: {error.strerror}. Expected a file in a writable folder.") from error
    return path


def _concluded(path: Path, results: dict, lines: Sequence[str], model: str | None) -> list[str]:
    """Write the results, also into the results.json of a run's evaluation; returns the lines to print."""
    write_results(path, results)
    run = _run_directory(model)
    if run is not None and (file := run / RESULTS_FILE).is_file():
        try:
            known = json.loads(file.read_text(encoding="utf-8"))
            known[BENCHMARKS] = {**known.get(BENCHMARKS, {}), path.stem: [line for line in lines if line]}
        except UNREADABLE:
            # Not an evaluation's, and none of this command's business.
            return [*lines, f"results: {path}"]
        write_results(file, known)
    return [*lines, f"results: {path}"]
