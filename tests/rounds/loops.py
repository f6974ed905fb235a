"""Small loops for tests: a tiny model that writes letters at random, and judges that count what they are asked."""

import json
from collections.abc import Sequence
from pathlib import Path

from preference_training.configuration.command_line import prepare_arguments
from preference_training.configuration.validation import configured
from preference_training.rounds.driver import run_loop, work
from preference_training.rounds.loop import PROMPTS, Loop
from preference_training.rounds.prompts import read_prompts, store
from utils import train

TINY = (
    "model=tiny", "model.from_config.hidden_size=32", "model.from_config.intermediate_size=64",
    "model.from_config.num_hidden_layers=2", "wandb.enabled=false", "n_eval_model_samples=0", "n_eval_examples=8",
    "warmup_steps=0", "ledger=false", "batch_size=8",
)  # fmt: skip
SMALL = (
    "+rounds=default", "rounds.prompts=prompts.jsonl", "rounds.judge=my_judge.py:score", "rounds.rounds=2",
    "rounds.n_samples=4", "rounds.max_new_tokens=12", "rounds.held_out=held_out.jsonl",
)  # fmt: skip
# The score is the share of the letter e; each question is a line in asked.txt.
JUDGE = """
from pathlib import Path

def score(prompt, response):
    with open(Path(__file__).with_name("asked.txt"), "a") as file:
        file.write(repr((prompt, response)) + "\\n")
    return response.count("e") / max(1, len(response))
"""


def make_model(folder: Path) -> None:
    """A checkpoint of the tiny model in `folder`/first, hardly trained."""
    arguments = ("loss=sft", "n_steps=2", "lr=1e-4", f"local_run_dir={folder / 'first'}", f"local_dirs={folder / 'runs'}")
    train(configured(*TINY, *arguments, "do_first_eval=false", "save_policy_pt=false"), quiet=True)


def make_prompts(folder: Path, count: int = 12, held_out: int = 4) -> None:
    """prompts.jsonl, held_out.jsonl and my_judge.py."""
    rows = [{"prompt": f"\n\nHuman: Question {k}?\n\nAssistant:", "topic": k % 3} for k in range(count + held_out)]
    for name, part in (("prompts.jsonl", rows[:count]), ("held_out.jsonl", rows[count:])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    (folder / "my_judge.py").write_text(JUDGE)


def overrides(folder: Path, *more: str) -> list[str]:
    """The command line of a small loop from the model of `make_model`."""
    first = (
        f"model.archive={folder / 'first' / 'LATEST'}",
        f"local_dirs={folder / 'runs'}",
        f"local_run_dir={folder / 'loop'}",
    )
    return [*TINY, *SMALL, *first, *more]


def start(folder: Path, *more: str) -> Loop:
    """A loop, of which nothing is done yet."""
    config = configured(*overrides(folder, *more))
    loop = Loop.start(Path(config.local_run_dir), config)
    store(read_prompts(config.rounds)[0], loop.directory / PROMPTS)
    return loop


def in_this_process(command: Sequence[str], _name: str) -> None:
    """For `run_loop`: do what a command would do in a process of its own."""
    if command[1] == "-m":
        step, directory, _, number = command[3:]
        work(Loop.open(Path(directory)), int(number), step)
    else:
        train(configured(*prepare_arguments(list(command[2:]))), quiet=True)


def run(loop: Loop) -> None:
    """Run what is missing of a loop, in this process."""
    run_loop(loop, in_this_process)


def asked(folder: Path) -> list[str]:
    """What the judge was asked, in its order."""
    file = folder / "asked.txt"
    return file.read_text().splitlines() if file.is_file() else []
