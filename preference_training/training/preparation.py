"""The tokenized prompts of a run's splits, and the lines that say what they hold."""

from pathlib import Path

from preference_training.configuration.schema import RunConfig
from preference_training.core.errors import UserError
from preference_training.core.files import first_existing
from preference_training.data.entries import read_entries
from preference_training.training.run_directory import folders_of


def data_version(config: RunConfig, run_dir: Path) -> int:
    """The version of the rules by which data is prepared: that of the run that goes on, the newest for a new one."""
    from preference_training.data.tokenization import VERSION, VERSIONS

    found = None
    if config.resume:
        from preference_training.checkpointing.resume import version_of_data

        found = version_of_data(config.resume, run_dir, config.exp_name)
    if found is not None and found not in VERSIONS:
        raise UserError(
            f"resume: the data of that run was prepared by version {found} of the rules, and this code knows those up to "
            f"{VERSION}. Expected code at least as new as the run's."
        )
    if found not in (None, VERSION):
        print(f"resume: the data stays as the run began, by version {found} of the rules: {VERSIONS[found]}", flush=True)
    return found or VERSION


def check_same_data(data, ranks) -> None:
    """Raise UserError, on all ranks, where some have prepared other data than others: they would train on a mixture."""
    found = ranks.gather([split.table.fingerprint for split in data])
    if any(other != found[0] for other in found):
        ranks_apart = ", ".join(str(rank) for rank, other in enumerate(found) if other != found[0])
        raise UserError(
            f"datasets: ranks {ranks_apart} have prepared other data than rank 0. Expected the same files on all machines, and "
            "where a run goes on, its directory too."
        )


def prepare_data(
    config: RunConfig, tokenizer, paired: bool, names: tuple[str, ...] = ("train", "test"), version: int | None = None
) -> tuple:
    """The tokenized prompts of the named splits, and a line or more that says what they hold: a `Prepared` for each.

    version: `data_version`, None for the newest. Responses of the held-out split are numbered behind those of the training
    split. Raises UserError where the first of the splits has no example.
    """
    from preference_training.data.preparation import overlap, prepare, same_ids, without_held_out

    entries = read_entries(config)
    directory = first_existing(folders_of(config.local_dirs)) / "prepared_data"
    settings = token_settings(config, paired, version)
    splits = [prepare(entries, split, tokenizer, settings, directory, config.cache_dir) for split in names]
    if len(splits) == 2 and splits[0].version > 1:
        splits[0] = without_held_out(splits[0], splits[1], entries, directory)
    for split, data in zip(names, splits, strict=True):
        say_what_is_there(data, entries, split, "pairs" if paired else "responses", needed=split == names[0])
        if data.version == 1 and (count := same_ids(data.table)):
            print(f"  pairs of equal token ids, which a new run would leave out: {count}", flush=True)
    if len(splits) == 2:
        train_split, held_out = splits
        splits[1] = held_out.numbered_from(train_split.table.num_responses)
        if found := overlap(train_split.table, held_out.table):
            print(found.line(tokenizer), flush=True)
    return tuple(splits)


def say_what_is_there(prepared, entries: list, split: str, what: str, needed: bool) -> None:
    """Print what one split holds, and of each data set what was left out or changed.

    Raises UserError where a split that is needed has no example.
    """
    examples = int(prepared.table.num_examples.sum())
    lines = [
        f"  {entry.name}: {line}" for entry, report in zip(entries, prepared.reports, strict=True) for line in report.lines()
    ]
    if not examples and needed:
        names = ", ".join(entry.name for entry in entries)
        found = "; ".join(line.strip() for line in lines) or "the data is empty"
        kind = {"train": "training", "test": "held-out"}[split]
        raise UserError(f"datasets: {names}: no {kind} example is left ({found}). Expected at least one.")
    print(f"{split}: {len(prepared.table)} prompts, {examples} {what}", *lines, sep="\n", flush=True)


def token_settings(config: RunConfig, paired: bool, version: int | None = None):
    """A function that says of an entry what its token ids depend on: the entry's own wishes, then the configuration's."""
    from preference_training.data.tokenization import VERSION, TokenSettings

    def settings(entry) -> TokenSettings:
        mode = entry.truncation_mode or entry.dataset.truncation_mode
        lengths = config.max_length, config.max_prompt_length
        return TokenSettings(paired, *lengths, mode, entry.template, entry.system_prompt, version or VERSION)

    return settings
