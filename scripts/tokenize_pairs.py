"""Tokenize preference pairs into a .pt file with token ids and loss masks, to inspect them or to train without the texts.

python scripts/tokenize_pairs.py --model NAME_OR_DIRECTORY --dataset NAME_OR_FILE [--output FILE.pt]

The file holds a list of dicts, one per pair: prompt_chosen_tokens, prompt_rejected_tokens, chosen_loss_mask,
rejected_loss_mask. `python train.py datasets=[FILE.pt]` trains on it, with the same tokenizer.
"""

import argparse
import sys
from pathlib import Path

import preference_datasets  # noqa: F401  its data sets register themselves
from preference_training.configuration.saved import model_config
from preference_training.configuration.schema import TEMPLATES, TRUNCATION_MODES
from preference_training.core.errors import UserError
from preference_training.data.entries import Entry, load_records, read_entry
from preference_training.data.registry import TOKENIZED_SUFFIX


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the tokenizer: a hub id, a directory, or byte_level")
    parser.add_argument("--dataset", required=True, help="a file, a registered name, ORGANIZATION/NAME or FILE.py:NAME")
    parser.add_argument("--output", type=Path, help="output file (default: the name of the data set with .pt)")
    parser.add_argument("--split", choices=("train", "test", "all"), default="all", help="default: all")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of prompt and response together; default: 512")
    parser.add_argument("--max-prompt-length", type=int, default=256, help="tokens of a truncated prompt; default: 256")
    parser.add_argument(
        "--truncation-mode", choices=TRUNCATION_MODES, help="which end of a prompt to keep (default: that of the data set)"
    )
    parser.add_argument("--template", choices=TEMPLATES, help="the format of conversations (default: HH dialogues)")
    parser.add_argument("--chat-template", help="a file, for --template chat in place of the tokenizer's own")
    parser.add_argument("--system-prompt", help="for conversations without one of their own")
    return parser.parse_args()


def output_path(options: argparse.Namespace) -> Path:
    """The output file. Raises UserError for invalid options, before anything is loaded."""
    if not 0 < options.max_prompt_length < options.max_length:
        raise UserError(
            f"--max-prompt-length: found {options.max_prompt_length}, expected 1 to less than --max-length, which is "
            f"{options.max_length}."
        )
    if options.dataset.endswith(TOKENIZED_SUFFIX):
        raise UserError(f"--dataset: {options.dataset} holds token ids already. Expected texts.")
    output = options.output or Path(Path(options.dataset).name.split(".")[0] + TOKENIZED_SUFFIX)
    if output.suffix != TOKENIZED_SUFFIX:
        raise UserError(f"--output: found {output}, expected a name that ends in {TOKENIZED_SUFFIX}.")
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise UserError(f"--output: {output}: expected a file in an existing directory.")
    return output


def dataset_entry(options: argparse.Namespace) -> Entry:
    """The data set as an entry of `datasets`."""
    return read_entry(
        options.dataset,
        {"template": options.template, "system_prompt": options.system_prompt, "truncation_mode": options.truncation_mode},
    )


def tokenized(options: argparse.Namespace, entry: Entry) -> list:
    """The tokenized prompts of the chosen splits; prints what was skipped or changed."""
    from preference_training.core.machine import quiet_libraries
    from preference_training.data.rendering.settings import TokenSettings
    from preference_training.data.tokenization import text_reader, tokenize_records
    from preference_training.modeling.tokenizer import load_tokenizer

    quiet_libraries()
    model = model_config({"tokenizer_name_or_path": options.model, "chat_template": options.chat_template})
    try:
        tokenizer = load_tokenizer(model)
    except UserError as error:
        told = str(error).replace("model.tokenizer_name_or_path", "--model").replace("model.chat_template", "--chat-template")
        raise UserError(told) from error
    mode = entry.truncation_mode or entry.dataset.truncation_mode
    settings = TokenSettings("pairs", options.max_length, options.max_prompt_length, mode, entry.template, entry.system_prompt)
    prompts, lines = [], []
    for split in ("train", "test") if options.split == "all" else (options.split,):
        report = entry.report()
        records = load_records(entry, split, report, text_of=text_reader(tokenizer, settings))
        prompts += tokenize_records(records, tokenizer, settings, report)
        lines += report.lines()
    if not prompts:
        found = "; ".join(line.strip() for line in lines) or "it has none"
        raise UserError(f"--dataset: {entry.name}: no pair is left ({found}). Expected at least one.")
    print(*lines, sep="\n", end="\n" * bool(lines), flush=True)
    return prompts


def write(output: Path, prompts: list) -> int:
    """Write the pairs atomically; returns their number. Raises UserError where the file cannot be written."""
    from preference_training.core.files import atomic_path
    from preference_training.data.token_files import write_tokenized

    try:
        with atomic_path(output) as partial:
            return write_tokenized(partial, prompts)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError for write errors
        reason = (isinstance(error, OSError) and error.strerror) or "the disk is full"
        raise UserError(f"--output: cannot write {output}: {reason}.") from error


def main() -> None:
    """Tokenize a data set into a file. A user's mistake is reported as one message, with exit status 2."""
    options = arguments()
    try:
        output = output_path(options)
        prompts = tokenized(options, dataset_entry(options))
        count = write(output, prompts)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(f"{output}: {count} pairs of {len(prompts)} prompts")


if __name__ == "__main__":
    main()
