"""What follows a sweep. Hydra makes the callback at every start, so that nothing heavy is imported before it is needed."""

from pathlib import Path

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from utils import UserError


class WriteComparison(Callback):
    """Compares the jobs of a sweep when all have ended, into comparison.html and comparison.csv of the sweep's directory."""

    def on_multirun_end(self, config: DictConfig, **_) -> None:
        """Write the comparison; where it cannot be written that is said, and the sweep has ended all the same."""
        from comparison import write_comparison

        folder = Path(config.hydra.sweep.dir)
        try:
            page, _ = write_comparison([folder], folder)
        except UserError as error:
            print(f"comparison: {error}", flush=True)
        else:
            print(f"comparison: {page}", flush=True)
