"""A validated run before any model is loaded: its loss, its tokenizer, and the tokenized prompts of its splits."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy

from preference_training.batching.micro_batches import evaluation_prompts
from preference_training.batching.schedule import RunLength, Schedule
from preference_training.checkpointing.checkpoint import Checkpoint
from preference_training.checkpointing.resume import check_same_config, checkpoint_to_resume, find_run
from preference_training.configuration.checks.model import check_noise
from preference_training.configuration.checks.run import check_objective, check_weights
from preference_training.configuration.checks.unread import unread_keys
from preference_training.configuration.keys import listed
from preference_training.configuration.schema import RunConfig
from preference_training.configuration.sections import FROM_HALVES
from preference_training.core.errors import UserError
from preference_training.core.files import first_existing
from preference_training.core.machine import allow_tf32, quiet_libraries, tune_malloc
from preference_training.core.random_streams import seed_everything
from preference_training.core.values import counted
from preference_training.data.entries import Entry, check_examples, is_path, read_entries
from preference_training.data.pairs.halves import halves
from preference_training.data.pairs.weights import weigh
from preference_training.data.preparation import Prepared, count_identical_pairs, exclude_held_out, overlap, prepare
from preference_training.data.prompt_table import PromptTable
from preference_training.data.quality.contamination import check_readable
from preference_training.data.rendering.choice import choose_templates
from preference_training.data.rendering.settings import VERSION, VERSIONS, TokenSettings
from preference_training.evaluation.phrasing import too_few
from preference_training.evaluation.pruning import build_pruner
from preference_training.evaluation.task_suites import check_harness
from preference_training.losses.base import Loss
from preference_training.losses.registry import build_loss
from preference_training.modeling.archives import CHAT_TEMPLATE
from preference_training.modeling.limits import check_limits, check_rows, model_limits
from preference_training.modeling.loading import build_on_meta, check_model
from preference_training.modeling.quantization import check_float8
from preference_training.modeling.sources.checks import check_sources
from preference_training.modeling.sources.gguf import with_converted_model
from preference_training.modeling.tokenizer import load_tokenizer
from preference_training.tracking.label_weights import read_label_weights
from preference_training.tracking.run_files import LABEL_WEIGHTS, is_of_loop
from preference_training.training.defaults import fit_lr, fit_steps, settle_dtypes, unusual_lr
from preference_training.training.optimizers.building import check_optimizer
from preference_training.training.optimizers.groups import lr_group_lines
from preference_training.training.optimizers.notices import averages_notice, precision_notices

# What examples are called in messages.
EXAMPLE_WORDS = {"targets": "responses", "pairs": "pairs", "rankings": "rankings", "labels": "labeled responses"}


@dataclass(frozen=True)
class PreparedRun:
    """A validated run before any model is loaded: its loss, tokenizer and data splits, of which the last is held out.

    entries: those of `datasets`, in the order of each split's reports. pruner: Optuna's, None in most runs.
    """

    config: RunConfig
    run_dir: Path
    in_sweep: bool
    loss: Loss
    tokenizer: object
    data: tuple[Prepared, ...]
    entries: Sequence[Entry] = ()
    pruner: object = None


def prepare_run(config: RunConfig, run_dir: Path, in_sweep: bool = False) -> PreparedRun:
    """Set up this process for a run, and prepare its loss, tokenizer and data. Raises UserError for what cannot work."""
    quiet_libraries()
    tune_malloc(keep_freed=not config.trainer.is_sharded)
    allow_tf32(config.tf32)
    seed_everything(config.seed)
    config = settle_dtypes(config, run_dir)
    # A learning rate that is not known yet is valid.
    check_optimizer(replace(config, lr=config.lr or 1.0))
    if config.model.fp8:
        check_float8(config.model)
    pruner = build_pruner(config.pruner, config.pruner_kwargs) if config.pruner else None
    if config.eval_only and config.evaluation.task_names:
        check_harness()
    loss = build_loss(**config.loss.given(), seed=config.seed)
    config = config.with_head(loss.model_head)
    if config.eval_only and loss.model_head == "value":
        check_asks_for_no_text(config)
    check_objective(config.objective, config.loss.name, loss.examples, loss.model_head)
    check_live(config, loss)
    check_noise(config, loss.needs_reference)
    if config.model.reference_archive is not None and not loss.needs_reference:
        raise UserError(f"model.reference_archive: given, and loss={config.loss.name} has no reference. Leave it null.")
    check_contamination_files(config)
    # What takes seconds is checked before a model is converted or its tokenizer read.
    earlier = resumed_run(config, run_dir)
    entries = read_entries(config)
    check_examples(entries, loss, config.loss.name, config.cache_dir)
    config = with_converted_model(config)
    check_sources(config.model, config.cache_dir)
    tokenizer = load_tokenizer(config.model, config.cache_dir)
    lines = [line] if not config.eval_only and (line := adapter_notice(config)) else []
    lines += check_model(config.model, tokenizer, config.cache_dir)
    count = partial(count_parameters, config, tokenizer)
    if not config.eval_only:
        lines += [line] if (line := unusual_lr(config, loss.learns, count)) else []
    config = fit_lr(config, loss.learns, count)
    lines += [*vocabulary_notices(config, tokenizer), *process_notices(config), *unread_notices(config, run_dir)]
    lines += [] if config.eval_only else [*training_notices(config), *rates_of_weights(config, tokenizer)]
    limits = model_limits(config, tokenizer)
    config, entries = fit_templates(config, entries, tokenizer, earlier)
    if notice := other_template_notice(config, entries, tokenizer):
        lines.append(notice)
    print(*config.chosen.values(), *lines, sep="\n", end="\n" * bool(config.chosen or lines), flush=True)
    if earlier is not None and not config.eval_only:
        check_same_config(earlier, config.as_dict())
    check_limits(config, entries, tokenizer, limits)
    # Before the processes join: those that wait for the data have no time-out then.
    splits = ("test",) if config.eval_only and not config.dry_run else ("train", "test")
    data = prepare_data(with_label_weights(config, run_dir, earlier), entries, tokenizer, loss, splits, data_version(earlier))
    check_rows(config, tokenizer, limits, [split.table for split in data])
    if "train" in splits:
        # Nothing is decided by the held-out prompts of a round's training.
        if not is_of_loop(run_dir) and (few := few_held_out(config, data[-1].table)):
            print(few, flush=True)
        said, schedule = config.chosen, run_schedule(config, data[0].table)
        config = fit_steps(config, schedule.total_examples, schedule.total_steps)
        for line in [line for key, line in config.chosen.items() if key not in said]:
            print(line, flush=True)
    return PreparedRun(config, run_dir, in_sweep, loss, tokenizer, data, entries, pruner)


def check_contamination_files(config: RunConfig) -> None:
    """Raise UserError where a dry run could not read one; say that no other run does."""
    if config.dry_run:
        check_readable(listed(config.contamination_files))
    elif config.contamination_files:
        print("contamination_files: read by dry_run=true alone, which compares them with the training data", flush=True)


def adapter_notice(config: RunConfig) -> str | None:
    """The notice for LoRA adapters, which any rank switches on."""
    lora = config.model.lora
    if lora.r is None:
        return None
    kind = "DoRA" if lora.use_dora else "rsLoRA" if lora.use_rslora else "LoRA"
    start = "" if lora.init == "default" else f" that start as {lora.init}"
    adapters = f"{kind} adapters of rank {lora.r} (alpha {lora.alpha:g}){start}"
    whole = f" beside {', '.join(listed(lora.modules_to_save))}" if lora.modules_to_save else ""
    return f"model.lora.r: {adapters} are trained{whole}, all other weights are frozen"


def vocabulary_notices(config: RunConfig, tokenizer) -> list[str]:
    """What a run says of tokens that it adds."""
    added = config.model.added_tokens
    return [f"model.add_tokens: {counted(len(added), 'token')} added, {len(tokenizer):,} in all"] if added else []


def process_notices(config: RunConfig) -> list[str]:
    """What a sharded run says of how its processes share work."""
    trainer, lines = config.trainer, []
    if (trainer.context_parallel_size or 1) > 1:
        lines.append(f"trainer.context_parallel_size: {trainer.context_parallel_size} processes compute each pack together")
    if trainer.world_size is not None and not config.dry_run:
        lines.append("trainer.world_size: read by dry_run=true alone; this run has the processes that are started")
    return lines


def unread_notices(config: RunConfig, run_dir: Path) -> list[str]:
    """What a run says of keys without effect; a loop has said it when it started."""
    return [] if is_of_loop(run_dir) else unread_keys(config)


def count_parameters(config: RunConfig, tokenizer) -> int:
    """The number of the model's parameters, without an adapter's; reads no weights."""
    plain = replace(config.model, lora=replace(config.model.lora, r=None), quantization=None)
    return build_on_meta(plain, tokenizer, config.cache_dir).num_parameters()


def training_notices(config: RunConfig) -> list[str]:
    """What a run says of how its weights are updated, and which are saved."""
    averages = averages_notice(config)
    return [*precision_notices(config), *([averages] if averages else [])]


def rates_of_weights(config: RunConfig, tokenizer) -> list[str]:
    """What `lr_groups` does, in lines of text; reads no weights. Raises UserError for a pattern that no trained weight has."""
    if not config.lr_groups:
        return []
    model = build_on_meta(config.model, tokenizer, config.cache_dir)
    return lr_group_lines(config, [name for name, weight in model.named_parameters() if weight.requires_grad])


def fit_templates(
    config: RunConfig, entries: Sequence[Entry], tokenizer, earlier: Checkpoint | None
) -> tuple[RunConfig, list[Entry]]:
    """Decide the template of each entry without one; config.yaml keeps the null. A resumed run keeps its templates."""
    if earlier is not None:
        kept = earlier.run.get("templates") or [None] * len(entries)
        found = dict(enumerate(kept)) if len(kept) == len(entries) else {}
        chosen = {number: template for number, template in found.items() if entries[number].template is None}
    else:
        choices = choose_templates(entries, tokenizer, config.cache_dir)
        chosen = {number: choice.template for number, choice in choices.items()}
        lines = "\n".join(dict.fromkeys(choice.line for choice in choices.values()))
        config = replace(config, chosen={**config.chosen, "template": lines}) if lines else config
    templates = [entry.template or chosen.get(number) for number, entry in enumerate(entries)]
    entries = [replace(entry, template=template) for entry, template in zip(entries, templates, strict=True)]
    if not any(chosen.values()):
        return config, entries
    if set(templates) == {"chat"}:
        return replace(config, template="chat"), entries
    given = [
        each if isinstance(each, dict) else {("path" if is_path(each) else "name"): each} for each in listed(config.datasets)
    ]
    return replace(config, datasets=[each | {"template": one} for each, one in zip(given, templates, strict=True)]), entries


def resumed_run(config: RunConfig, run_dir: Path) -> Checkpoint | None:
    """The newest checkpoint of the run that is resumed, by its state; None for a new run.

    Raises UserError where there is none at the path that `resume` names.
    """
    earlier = find_run(config.resume, run_dir, config.exp_name)
    if config.resume not in (None, "auto") and earlier is None:
        checkpoint_to_resume(config.resume, Path(), config.exp_name)
    return earlier


def run_schedule(config: RunConfig, prompts: PromptTable) -> Schedule:
    """The steps of a run over prepared prompts."""
    length = RunLength(n_epochs=config.n_epochs, n_examples=config.n_examples, n_steps=config.n_steps)
    return Schedule(prompts, config.batch_size, config.seed, length, replacement=config.sampling == "replacement")


def other_template_notice(config: RunConfig, entries: Sequence[Entry], tokenizer) -> str | None:
    """The notice for a checkpoint to start from whose chat template is not the run's, if the run renders with one."""
    if not config.model.archive or "chat" not in (config.template, *(entry.template for entry in entries)):
        return None
    path = Path(config.model.archive)
    saved = (path if path.is_dir() else path.parent) / CHAT_TEMPLATE
    if not saved.is_file() or saved.read_text() == tokenizer.chat_template:
        return None
    return f"model.archive: its chat template is not the run's; to keep that of the archive, set model.chat_template={saved}"


def check_asks_for_no_text(config: RunConfig) -> None:
    """Raise UserError where the evaluation of a reward model would need responses that it writes."""
    for key, found in {"judge": config.evaluation.judge, "tasks": config.evaluation.task_names}.items():
        if found:
            raise UserError(
                f"evaluation.{key}: found {found}, and loss={config.loss.name} trains a reward model, which writes no "
                "responses. To have it judge those of a language model, evaluate that one with "
                "evaluation.judge=reward_model:DIRECTORY."
            )


def check_live(config: RunConfig, loss: Loss) -> None:
    """Raise UserError where the reference is to be cached, but the loss reads log-probs of its tokens."""
    if loss.needs_reference and loss.reads_tokens and config.reference_logps == "cached":
        raise UserError(
            f"reference_logps: found cached, but loss={config.loss.name} reads log-probs of the reference's tokens, of which "
            "none are kept. Set it to live or null."
        )


def data_version(earlier: Checkpoint | None) -> int:
    """The version of the rules by which data is prepared: that of the resumed run, the newest for a new one."""
    found = earlier and earlier.data_version
    if found is not None and found not in VERSIONS:
        raise UserError(
            f"resume: the data of that run was prepared by version {found} of the rules, and this code knows those up to "
            f"{VERSION}. Expected code at least as new as the run's."
        )
    if found not in (None, VERSION):
        print(
            f"resume: the data stays as at the start of the run, by version {found} of the rules: {VERSIONS[found]}", flush=True
        )
    return found or VERSION


def check_same_data(data, ranks) -> None:
    """Raise UserError, on all ranks, where some have prepared other data than others: they would train on a mixture."""
    found = ranks.all_gather_object([split.table.fingerprint for split in data])
    if any(other != found[0] for other in found):
        ranks_apart = ", ".join(str(rank) for rank, other in enumerate(found) if other != found[0])
        raise UserError(
            f"datasets: ranks {ranks_apart} have prepared other data than rank 0. Expected the same files on all machines, and "
            "when resuming, the same run directory."
        )


def prepare_data(
    config: RunConfig,
    entries: Sequence[Entry],
    tokenizer,
    loss: Loss,
    names: tuple[str, ...] = ("train", "test"),
    version: int | None = None,
) -> tuple[Prepared, ...]:
    """Tokenize the prompts of the named splits, and print what each holds.

    version: `data_version`, None for the newest. Responses of the held-out split are numbered behind those of the training
    split. Raises UserError where the first of the splits has no example.
    """
    check_weights(config, loss.examples)
    directory = first_existing(config.local_dirs) / "prepared_data"
    settings = token_settings(config, loss, version)
    splits = [prepare(entries, split, tokenizer, settings, directory, config.cache_dir) for split in names]
    if len(splits) == 2 and splits[0].version > 1:
        splits[0] = exclude_held_out(splits[0], splits[1], entries, directory)
    if len(splits) == 2:
        splits = weighed_or_halved(config, splits[0], splits[1], directory)
    for split, data in zip(names, splits, strict=True):
        report_split(data, entries, split, EXAMPLE_WORDS[loss.examples], needed=split == names[0])
        if data.version == 1 and (count := count_identical_pairs(data.table)):
            print(f"  pairs of equal token ids, which a new run would skip: {count}", flush=True)
        for line in remarks_on(split, data.table, loss):
            print(line, flush=True)
    if len(splits) == 2:
        train_split, held_out = splits
        splits[1] = held_out.numbered_from(train_split.table.num_responses)
        if found := overlap(train_split.table, held_out.table):
            print(found.line(tokenizer), flush=True)
    return tuple(splits)


def weighed_or_halved(config: RunConfig, train: Prepared, held_out: Prepared, directory: Path) -> list[Prepared]:
    """Training and held-out data as the section `data` asks for it; prints what that is. Raises UserError."""
    if config.data.half is not None:
        print(f"data.half: half {config.data.half} of the training prompts is trained on, the other one held out", flush=True)
        return list(halves(train, config.data.half, directory))
    if config.data.weights is None:
        return [train, held_out]
    weighed = weigh(train, read_label_weights(Path(config.data.weights)), directory)
    print(weighed.line, flush=True)
    return [weighed.prepared, held_out]


def with_label_weights(config: RunConfig, run_dir: Path, earlier: Checkpoint | None = None) -> RunConfig:
    """The configuration whose data.weights=ledger has become the run directory with the weights, or that of `earlier`.

    Where nothing is trained, there may be none. Raises UserError for a run that lacks them.
    """
    if config.data.weights != FROM_HALVES:
        return config
    run_dir = earlier.path.parent if earlier else run_dir
    found = str(run_dir) if (run_dir / LABEL_WEIGHTS).is_file() else None
    if found is None and config.dry_run:
        print(
            "data.weights: before this run, the same configuration would be trained on each half of the training pairs, which "
            "takes about as long again; the pairs are shown as they are, without weights",
            flush=True,
        )
    elif found is None and not config.eval_only:
        raise UserError(
            f"data.weights: found {FROM_HALVES}, and {run_dir} has no {LABEL_WEIGHTS}. Expected a start by train.py, which "
            "trains on the halves first, or the directory of a run that has done so."
        )
    return replace(config, data=replace(config.data, weights=found))


def few_held_out(config: RunConfig, held_out: PromptTable) -> str | None:
    """The warning for too few held-out prompts to decide anything by; None for enough, or none at all."""
    prompts = evaluation_prompts(held_out, config.n_eval_examples, config.seed)
    text = too_few(len(prompts), "held-out metrics") if len(prompts) else None
    remedy = "Raise held_out_share." if len(prompts) == len(held_out) else "Raise n_eval_examples, which leaves some out."
    return text and f"warning: {text}. {remedy}"


def remarks_on(split: str, table: PromptTable, loss: Loss) -> list[str]:
    """What a split lacks, in lines of text."""
    if split == "test" and not len(table):
        return ["  nothing is held out, so nothing is evaluated: held_out_share=0.1 holds out a tenth of the prompts"]
    if split != "train" or loss.examples != "labels":
        return []
    labels = {label for part in table.parts for columns in part.batches for label in numpy.unique(columns.labels.values)}
    if len(labels) == 1:
        found, lacking = ("desirable", "undesirable") if labels.pop() else ("undesirable", "desirable")
        return [f"warning: datasets: all responses to train on are labeled {found}, expected {lacking} ones too to learn from."]
    return []


def report_split(prepared, entries: list, split: str, what: str, needed: bool) -> None:
    """Print what one split holds, and what was skipped or changed of each data set.

    Raises UserError where a split that is needed has no example.
    """
    examples = int(prepared.table.num_examples.sum())
    found = [(entry.name, line) for entry, report in zip(entries, prepared.reports, strict=True) for line in report.lines()]
    if not examples and needed:
        names = ", ".join(entry.name for entry in entries)
        # Of a single entry the name is said already.
        reasons = [line.strip() if len(entries) == 1 else f"{name}: {line.strip()}" for name, line in found]
        kind = {"train": "training", "test": "held-out"}[split]
        why = "; ".join(reasons) or "the data is empty"
        raise UserError(f"datasets: {names}: expected at least one {kind} example, and none is left: {why}.")
    prompts, what = "prompt" + "s" * (len(prepared.table) != 1), what.removesuffix("s") if examples == 1 else what
    lines = [f"  {name}: {line}" for name, line in found]
    if split == "test" and len(prepared.table) and len(entries) > 1:
        empty = [e.name for e, report in zip(entries, prepared.reports, strict=True) if not report.num_prompts]
        lines += [f"  {name}: nothing is held out of it (held_out_share)" for name in empty]
    print(f"{split}: {len(prepared.table)} {prompts}, {examples} {what}", *lines, sep="\n", flush=True)


def token_settings(config: RunConfig, loss: Loss, version: int | None = None):
    """A function from an entry to the settings that its token ids depend on: the entry's own, then the configuration's."""

    def settings(entry) -> TokenSettings:
        mode = entry.truncation_mode or entry.dataset.truncation_mode
        lengths = config.max_length, config.max_prompt_length
        templates = entry.template, entry.system_prompt
        train_on = entry.train_on or config.train_on
        return TokenSettings(loss.examples, *lengths, mode, *templates, version or VERSION, loss.margin_use, train_on)

    return settings
