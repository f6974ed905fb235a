"""Train on collected preferences: export, SFT, DPO, in one directory below runs/. The model writes the next answers.

python scripts/collect_train.py [--exported] [--directory DIRECTORY] [KEY=VALUE ...]      # make collect-train

Keys of config/config.yaml apply to both runs: model=..., lr=..., trainer=...; `collect.KEY=VALUE` is a setting of the app, such
as collect.store=my.duckdb. The app offers the trained model under "checkpoints". While the app is running it locks the store:
export on its page, then train with --exported.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from datetime import datetime
from pathlib import Path

from preference_collection.exchange.export import counts_line, entry_of, export_dataset, is_export
from preference_collection.settings import load_settings
from preference_collection.store.store import open_store
from preference_training.core.errors import UserError

ROOT = Path(__file__).resolve().parent.parent

SETTING = "collect."


def train(directory: Path, loss: Sequence[str], data: Path, overrides: Sequence[str]) -> Path:
    """Train into `directory`; returns its LATEST. Exits with the status of a run that fails."""
    command = [sys.executable, str(ROOT / "train.py"), f"datasets=[{entry_of(data)}]", *loss]
    command += [f"local_run_dir='{directory}'", *overrides]
    print(f"\n$ python train.py {' '.join(command[2:])}", flush=True)
    if status := subprocess.run(command, check=False).returncode:
        sys.exit(status)
    return directory / "LATEST"


def training_data(settings, exported: bool, directory: Path) -> Path:
    """The directory of the preferences: the page's export, or a new export into `directory`."""
    if exported:
        data = Path(settings.export).absolute()
        if not is_export(data):
            raise UserError(f"export: {data} contains no export. Press Export on the page first.")
        return data
    with closing(open_store(settings.store, read_only=True)) as store:
        counts = export_dataset(store, directory)
    print(f"{directory}: {counts_line(counts)}", flush=True)
    return directory


def main() -> None:
    """Export and train. A user's mistake is reported as one message, with exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exported", action="store_true", help="train on the page's export")
    parser.add_argument("--directory", type=Path, help="output directory (default: a new one below runs/)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_intermixed_args()
    own = [text.removeprefix(SETTING) for text in options.overrides if text.startswith(SETTING)]
    overrides = [text for text in options.overrides if not text.startswith(SETTING)]
    directory = (options.directory or ROOT / "runs" / f"collect_{datetime.now():%Y-%m-%d_%H-%M-%S-%f}").absolute()
    try:
        data = training_data(load_settings(own), options.exported, directory / "data")
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    sft = train(directory / "sft", ["loss=sft", "exp_name=collect_sft"], data, overrides)
    dpo = train(directory / "dpo", ["loss=dpo", "exp_name=collect_dpo", f"model.archive='{sft}'"], data, overrides)
    print(f'\nTrained: {dpo}\nThe app offers it under "checkpoints".')


if __name__ == "__main__":
    main()
