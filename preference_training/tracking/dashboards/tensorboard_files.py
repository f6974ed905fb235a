"""TensorBoard: its files in a run directory."""

from preference_training.configuration.saved import as_yaml
from preference_training.core.metric_names import EXAMPLES
from preference_training.tracking.dashboards.base import Dashboard, RunEnd, RunStart
from preference_training.tracking.run_files import TENSORBOARD


class TensorBoardDashboard(Dashboard):
    """TensorBoard's files in a run directory; its steps are examples.

    Earlier files' steps after the checkpoint from which the run resumes are no longer shown.
    """

    def __init__(self, start: RunStart):
        from torch.utils.tensorboard import SummaryWriter

        purge_step = start.examples + 1 if start.examples else None
        self.writer = SummaryWriter(str(start.run_dir / TENSORBOARD), purge_step=purge_step)
        text = "".join(f"    {line}\n" for line in as_yaml(start.config).splitlines())
        self.writer.add_text("config", text, start.examples)

    def log(self, row: dict[str, float]) -> None:
        """As Dashboard's."""
        for name, value in row.items():
            if name != EXAMPLES:
                self.writer.add_scalar(name, value, int(row[EXAMPLES]))

    def log_table(self, name: str, rows: list[dict], examples: int) -> None:
        """As Dashboard's; one text a row, with what each key holds beneath its name."""
        for number, row in enumerate(rows):
            # Indented, TensorBoard's Markdown shows a text as it is.
            parts = ("\n".join((f"**{key}**", "", *(f"    {line}" for line in str(row[key]).split("\n")))) for key in row)
            self.writer.add_text(f"{name}/{number}", "\n\n".join(parts), examples)

    def finish(self, end: RunEnd) -> None:
        """As Dashboard's."""
        self.writer.close()
