"""Starting a loop, or continuing one: all that is wrong is said before anything expensive."""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from preference_training.configuration.checks.unread import given_keys, unread_keys
from preference_training.configuration.rerun import OF_THE_START
from preference_training.configuration.schema import RunConfig
from preference_training.configuration.validation import configured
from preference_training.core.errors import UserError
from preference_training.core.metric_names import ROUNDS as ROUNDS_METRICS
from preference_training.core.processes import in_worker
from preference_training.core.values import counted, dotted
from preference_training.losses.registry import example_kind, find_loss, model_head
from preference_training.rounds.driver import run_loop
from preference_training.rounds.judges.choice import check_judge, check_rows
from preference_training.rounds.loop import PROMPTS, ROUNDS, USUAL_PAIRS, Loop
from preference_training.rounds.processes import StepFailedError, locked_loop
from preference_training.rounds.prompts import prompts_of_round, read_prompts, read_stored, store
from preference_training.rounds.served.choice import check_sampler, is_served
from preference_training.rounds.summary import objective_of

# The exit status of a process that a mistake of the user's has ended.
MISTAKE = 2
# The ways to pair that a loss can train on, by what its examples are.
PAIRS_FOR = {
    "pairs": ("best_worst", "all", "top_k"),
    "rankings": ("ranking",),
    "labels": ("unpaired",),
    "targets": ("best_of_n",),
}
# The ways to pair that read a key.
READ_BY = {
    "margin": ("best_worst", "all", "top_k", "ranking"),
    "length_matched": ("best_worst", "all", "top_k"),
    "top_k": ("top_k",),
    "threshold": ("best_worst", "all", "top_k", "unpaired", "best_of_n"),
}

# The keys of servers that sample, and those of sampling here.
OF_LOCAL = ("sampler_processes",)
OF_SERVERS = ("sampler_model", "sampler_weights", "sampler_workers", "sampler_timeout")


def start_loop(config: RunConfig, run_dir: Path, in_sweep: bool = False, report: Callable | None = None) -> float | None:
    """Run a loop from its beginning, or from where `resume` finds one; returns its `objective`. report: see `run_loop`.

    Exits as a step does that fails in its process; as a job of a sweep, raises StepFailedError or UserError in place of it.
    Raises UserError, and StoppedError.
    """
    try:
        return run_found_loop(config, find_loop(config, run_dir, in_sweep), report)
    except StepFailedError as failed:
        if in_sweep and failed.status == MISTAKE:
            raise failed.as_mistake() from failed
        if in_sweep:
            # The other jobs go on.
            raise
        sys.exit(failed.told())


def run_found_loop(config: RunConfig, directory: Path, report: Callable | None = None) -> float | None:
    """Run a loop in a directory of `find_loop`; returns its `objective`. Raises UserError, StoppedError, StepFailedError."""
    for line in check(config):
        print(line, flush=True)
    stored = directory / PROMPTS
    # A loop that goes on has its prompts, whatever has become of their file.
    prompts, said = (read_stored(stored), Counter()) if stored.is_file() else read_prompts(config.rounds)
    check_rows(config, prompts)
    _check_weights(config)
    held_out = [prompt for prompt in prompts if prompt.held_out]
    sampled = prompts_of_round(prompts, 1, config.rounds.prompts_per_round, config.seed)
    rounds = config.rounds
    of = f"{len(sampled):,} of {counted(len(prompts) - len(held_out), 'prompt')}"
    print(
        f"rounds: {rounds.rounds}, each of {counted(rounds.n_samples, 'response')} to {of}; {len(held_out):,} held out",
        *(f"  {count:,} {what}" for what, count in said.items()),
        sep="\n",
        flush=True,
    )
    if config.objective.startswith(ROUNDS_METRICS) and not held_out:
        raise UserError(f"objective: {config.objective} is of held-out prompts, and there are none. Raise rounds.held_out.")
    if config.dry_run:
        return None
    with locked_loop(directory):
        loop = Loop.start(directory, config)
        if not stored.is_file():
            store(prompts, stored)
        run_loop(loop, report=report)
        return objective_of(loop)


def check_not_changed(config: RunConfig) -> None:
    """Raise UserError where a configuration has other values than its command line, of which each step is composed anew."""
    folder = [f"--config-dir={config.origin.folder}"] if config.origin.folder else []
    before, now = (dotted(each.as_dict()) for each in (configured(*folder, *config.origin.overrides), config))
    changed = [key for key in now if key not in OF_THE_START and now[key] != before.get(key)]
    if changed:
        raise UserError(
            f"{changed[0]}: changed to {now[changed[0]]!r} after compose(), of whose overrides the steps of a "
            f"loop and the runs on halves of the data are composed. Expected compose(..., '{changed[0]}=...')."
        )


def find_loop(config: RunConfig, run_dir: Path, in_sweep: bool = False) -> Path:
    """The directory of a loop: that of the start, or one that `resume` means. Raises UserError.

    in_sweep: other loops beside it are other jobs, whatever their names.
    """
    if config.resume is None:
        if (run_dir / ROUNDS).is_file():
            raise UserError(
                f"local_run_dir: {run_dir} holds a loop of rounds. Continue it with resume={run_dir}, or name another."
            )
        return run_dir
    if config.resume != "auto":
        given = Path(config.resume).resolve()
        if not (given / ROUNDS).is_file():
            raise UserError(f"resume: {given} holds no loop of rounds. Expected the run directory of one, or auto.")
        return given
    beside = [] if in_sweep else sorted(run_dir.parent.glob(f"{config.exp_name}_*"), reverse=True)
    found = next((path for path in (run_dir, *beside) if (path / ROUNDS).is_file()), None)
    print(f"resume: continuing {found}" if found else f"resume: no loop of {config.exp_name} yet, starting one", flush=True)
    return found or run_dir


def check(config: RunConfig) -> list[str]:
    """Raise UserError for a loop that cannot work. Returns lines on keys without effect."""
    rounds, loss = config.rounds, config.loss.name
    if in_worker():
        raise UserError(
            "rounds: a launcher has started this process, and a loop starts its own. Run python train.py by itself."
        )
    if config.eval_only or config.debug:
        key = "eval_only" if config.eval_only else "debug"
        raise UserError(f"{key}: found true, and rounds train from the checkpoint of the round before. Set {key}=false.")
    if config.pruner is not None:
        raise UserError(
            f"pruner: found {config.pruner}, and loops of rounds have no evaluations in common to be pruned by. Set it to null."
        )
    if model_head(loss) == "value":
        raise UserError(
            f"loss: {loss} trains a reward model, which writes no responses. Train it first; rounds can be judged by it."
        )
    kind = example_kind(loss)
    pairs = rounds.pairs or USUAL_PAIRS[kind]
    if pairs not in PAIRS_FOR[kind]:
        raise UserError(
            f"rounds.pairs: found {pairs}, which loss={loss} cannot train on. Expected {' or '.join(PAIRS_FOR[kind])}."
        )
    _check_reference(config)
    _check_samples(config, pairs)
    check_judge(config)
    given = given_keys(config)
    unread = [key for key, ways in READ_BY.items() if f"rounds.{key}" in given and pairs not in ways]
    unused = [f"rounds.{key}: without effect, since pairs is {pairs}" for key in unread]
    others, why = (OF_LOCAL, "a server") if is_served(config) else (OF_SERVERS, "local")
    unused += [f"rounds.{key}: without effect, since sampler is {why}" for key in others if f"rounds.{key}" in given]
    return unused + unread_keys(config) + check_sampler(config)


def _check_weights(config: RunConfig) -> None:
    """Raise UserError for a model of random weights. After the files are checked, which takes less time than to train one."""
    if not (config.model.name_or_path or config.model.archive):
        raise UserError(
            "model: rounds sample from the model, and this one would have random weights. Train it with loss=sft first, then "
            "set model.archive to its checkpoint."
        )


def _check_reference(config: RunConfig) -> None:
    found, moves = config.rounds.reference, config.loss.moves_reference
    if (found == "moving") != moves:
        remedy = "Set loss=tr_dpo, whose reference does." if found == "moving" else "Set rounds.reference=moving."
        does = "moves" if moves else "does not move"
        raise UserError(f"rounds.reference: found {found}, and the reference of loss={config.loss.name} {does}. {remedy}")
    registered = find_loss(config.loss.name, config.loss.mode_loss)
    if found == "first" and registered is not None and not registered.objective.needs_reference:
        raise UserError(f"rounds.reference: found first, and loss={config.loss.name} has no reference. Set it to previous.")


def _check_samples(config: RunConfig, pairs: str) -> None:
    rounds = config.rounds
    alone = pairs == "best_of_n" or (pairs == "unpaired" and rounds.threshold is not None)
    if rounds.n_samples < 2 and not alone:
        raise UserError(f"rounds.n_samples: found 1, and pairs={pairs} compares responses to a prompt. Expected at least 2.")
    if rounds.temperature == 0 and rounds.n_samples > 1:
        raise UserError(
            f"rounds.temperature: found 0, at which all {rounds.n_samples} responses to a prompt are the same. Expected more."
        )
