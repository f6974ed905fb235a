"""What is checked of an architecture: runs of the project's own, and what plain transformers and peft say of what they leave.

Each check returns what is to be said where all is well, mostly "ok", and raises Wrong where a number is not what it should be.
"""

import functools
import importlib.util
import io
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException

import train
from preference_training.configuration.schema import RunConfig
from preference_training.configuration.validation import configured
from preference_training.core.errors import UserError
from preference_training.data.toy_preferences import toy_records
from tests.architectures import plain, tiny_models, two_processes
from tests.support.files import ROOT

# By how much a log-prob may differ, per token, and weights of their size; of what training has changed they may not differ by
# more than a hundredth either. Unit of the first: nats.
PER_TOKEN, WEIGHTS, CHANGED = 1e-5, 1e-5, 1e-2
LR, MAX_NORM, PAIRS, HELD_OUT = 0.05, 1.0, 8, 4
COMMON = (
    "model=blank_model", "wandb.enabled=false", "sample_during_eval=false", "save_policy_pt=false", "save_async=false",
    f"batch_size={PAIRS}", f"eval_batch_size={HELD_OUT}", "n_epochs=null", "eval_every=1000", "warmup_steps=0", "optimizer=SGD",
    f"lr={LR}", f"max_grad_norm={MAX_NORM}", "loss_spike=null",
)  # fmt: skip
DPO = ("loss=dpo", "reference_logps=live", "n_steps=2")
TWO_PROCESSES = ("trainer=FSDPTrainer", "trainer.nproc_per_node=2", "trainer.distributed_timeout_minutes=0.5")
# What a run says where a model computes each response with a prompt of its own.
PADDED = r"prefix sharing: off, using padded rows: \w+ cannot: (.*)"


class Wrong(Exception):  # noqa: N818  it is a finding
    """A number that is not what it should be."""


def write_rows(folder: Path) -> None:
    """Pairs to train on and held-out ones, of all lengths from a few tokens to twice a chunk."""
    records = list(toy_records("train").items())
    for name, first, count in (("train", 0, PAIRS), ("test", PAIRS, HELD_OUT)):
        rows = []
        for number in range(first, first + count):
            prompt, record = records[7 * number]
            chosen, rejected = (record["responses"][at] for at in record["pairs"][0])
            lengthened = {"prompt": f"{number}: {prompt} " * (1 + number % 3), "chosen": chosen * (1 + number % 2)}
            rows.append(lengthened | {"rejected": rejected})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@functools.cache
def composed(*overrides: str) -> RunConfig:
    """A run's configuration, composed and validated as the command line's is, but for its paths."""
    return configured(*COMMON, "model.name_or_path=none", *overrides)


def configuration(folder: Path, model: Path, run_dir: Path, *overrides: str, resume: Path | None = None) -> RunConfig:
    """The configuration of a run of a model into a directory, on the rows of a folder."""
    return composed(*overrides).changed(
        {
            "datasets": [{"path": str(folder / "train.jsonl"), "test_path": str(folder / "test.jsonl")}],
            "local_dirs": [str(folder / "runs")],
            "local_run_dir": str(run_dir),
            "model.name_or_path": str(model),
            "resume": resume and str(resume),
        }
    )


class Run:
    """A run within this process, to its end; what it has said, and its rows of metrics.jsonl."""

    def __init__(self, config: RunConfig):
        self.dir = Path(config.local_run_dir)
        said = io.StringIO()
        with redirect_stdout(said):
            train.run(config, self.dir)
        self.said = said.getvalue()
        self.rows = rows_of(self.dir)

    @property
    def checkpoint(self) -> Path:
        """The newest checkpoint."""
        return self.dir / "LATEST"

    def logged(self, split: str) -> list[dict]:
        """The rows of training steps (train) or evaluations (eval)."""
        return [row for row in self.rows if f"loss/{split}" in row]


def rows_of(run_dir: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def require_exact_start(rows: list[dict]) -> None:
    """At the first step the policy is the reference: margin 0 and loss ln 2, in the evaluation before it too."""
    for split in ("eval", "train"):
        row = next(row for row in rows if f"loss/{split}" in row)
        margin, loss = row[f"rewards_{split}/margins"], row[f"loss/{split}"]
        # The mean of eight float32 values of ln 2.
        if margin != 0 or abs(loss - math.log(2)) > 1e-7:
            raise Wrong(f"{max(abs(margin), abs(loss - math.log(2))):.1g} (margin at step 0)")


def require_logps(logged: dict, expected: dict[str, float], rows: plain.Rows, where: str) -> None:
    """What a run logged of the held-out rows is what plain transformers say."""
    for number, (kind, value) in enumerate(expected.items(), start=1):
        error = abs(logged[f"logps_eval/{kind}"] - value) / rows.tokens(number)
        if not error <= PER_TOKEN:
            raise Wrong(f"{error:.1g} a token ({where})")


def require_weights(found: dict, expected: dict, before: dict, where: str) -> None:
    """Trained weights are those of another training that began with the same."""
    shared = [name for name in expected if name in found]
    if not shared:
        raise Wrong(f"no weight in common ({where})")
    norm = lambda parts: math.sqrt(sum(part.double().square().sum().item() for part in parts))  # noqa: E731
    apart = norm([found[name] - expected[name] for name in shared])
    moved, size = norm([expected[name] - before[name] for name in shared]), norm([expected[name] for name in shared])
    if moved < LR / 2:
        raise Wrong(f"{moved:.1g} is all that training has changed ({where})")
    if not (apart <= WEIGHTS * size and apart <= CHANGED * moved):
        raise Wrong(f"{apart / moved:.1g} of the change ({where})")


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A model's weights as they are now."""
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def weights_in(folder: Path) -> dict:
    """All weights of a checkpoint."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


class Architecture:
    """An architecture in a folder of its own: its tiny model, the rows, and runs that several checks look at."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder, self.model = name, folder, folder / "model"
        # How the run of two processes has ended, once there was one.
        self.sharded_end: str | None = None
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(folder)
        tiny_models.make(name, self.model)
        self.train_rows = plain.Rows(folder / "train.jsonl", self.model)
        self.held_out = plain.Rows(folder / "test.jsonl", self.model)

    def configured(self, name: str, *overrides: str, resume: Path | None = None) -> RunConfig:
        """The configuration of a run of this model into the directory of a name."""
        return configuration(self.folder, self.model, self.folder / name, *overrides, resume=resume)

    def run(self, name: str, *overrides: str, resume: Path | None = None) -> Run:
        """A run of this model."""
        return Run(self.configured(name, *overrides, resume=resume))

    @functools.cached_property
    def dpo_run(self) -> Run:
        """Two steps of DPO in float32, with a live reference."""
        return self.run("dpo", *DPO)

    @functools.cached_property
    def lora_run(self) -> Run:
        """Two steps of DPO of an adapter, as `+adapter=lora` has it."""
        return self.run("lora", *DPO, "+adapter=lora", "optimizer=AdamW", "lr=1e-2")

    def require_plain(self, run: Run, paired: bool = True, adapter: bool = False) -> None:
        """What a run logged before and after training is what plain transformers, and peft, say of model and checkpoint."""
        first, last = run.logged("eval")[0], run.logged("eval")[-1]
        require_logps(first, plain.mean_logps(plain.load(self.model), self.held_out, paired), self.held_out, "before training")
        trained = plain.load(self.model, run.checkpoint) if adapter else plain.load(run.checkpoint)
        require_logps(last, plain.mean_logps(trained, self.held_out, paired), self.held_out, "of the checkpoint")
        if abs(first["logps_eval/chosen"] - last["logps_eval/chosen"]) < 10 * PER_TOKEN * self.held_out.tokens(1):
            raise Wrong("nothing: training has not changed a log-prob")

    def require_plain_training(self, run: Run, paired: bool) -> None:
        """A run's weights are those of the same steps on plain transformers."""
        model = plain.load(self.model)
        before = weights_of(model)
        expected = plain.train(model, self.train_rows, paired, 2, LR, MAX_NORM)
        require_weights(weights_of(plain.load(run.checkpoint)), expected, before, "weights after two steps")


# ---- the checks -----------------------------------------------------------------------------------------------------------


def prefix(of: Architecture) -> str:
    """Does the model share prompts, and if not, why?"""
    why = re.search(PADDED, of.dpo_run.said)
    return f"padded: {why[1]}" if why else "shared"


def sft(of: Architecture) -> str:
    """Supervised fine-tuning: log-probs before and after, and the weights."""
    run = of.run("sft", "loss=sft", "n_steps=2")
    of.require_plain(run, paired=False)
    of.require_plain_training(run, paired=False)
    return "ok"


def dpo(of: Architecture) -> str:
    """DPO in float32: an exact start, log-probs before and after, and the weights."""
    require_exact_start(of.dpo_run.rows)
    of.require_plain(of.dpo_run)
    of.require_plain_training(of.dpo_run, paired=True)
    return "ok"


def start(of: Architecture) -> str:
    """DPO's first step is exact in bfloat16 too, with a live and with a cached reference."""
    for dtype, reference in (("float32", "cached"), ("bfloat16", "live"), ("bfloat16", "cached")):
        settings = f"model.policy_dtype={dtype}", f"reference_logps={reference}"
        run = of.run(f"{dtype}_{reference}", "loss=dpo", *settings, "n_steps=1", "debug=true")
        try:
            require_exact_start(run.rows)
        except Wrong as wrong:
            raise Wrong(f"{wrong}, {dtype}, {reference}") from None
    return "ok"


def resumed(of: Architecture) -> str:
    """A run that goes on from its checkpoint is the one that was not interrupted."""
    whole = of.run("whole", *DPO, "n_steps=3")
    begun = of.run("begun", *DPO)
    again = of.run("begun", *DPO, "n_steps=3", resume=begun.dir)
    expected, before = weights_in(whole.checkpoint), weights_in(begun.dir / f"step-{2 * PAIRS}")
    require_weights(weights_in(again.checkpoint), expected, before, "resumed")
    return "ok"


def lora(of: Architecture) -> str:
    """A LoRA adapter, which plain peft loads."""
    require_exact_start(of.lora_run.rows)
    of.require_plain(of.lora_run, adapter=True)
    return "ok"


def merged(of: Architecture) -> str:
    """Adapter and model as one model, which plain transformers load."""
    return _exported(of, of.lora_run, "merged", "--merge")


def exported(of: Architecture) -> str:
    """The whole model as a directory, which plain transformers load."""
    return _exported(of, of.dpo_run, "exported")


def _exported(of: Architecture, run: Run, name: str, *options: str) -> str:
    to = of.folder / name
    export(run.dir, "--to", str(to), *options)
    require_logps(run.logged("eval")[-1], plain.mean_logps(plain.load(to), of.held_out, True), of.held_out, name)
    return "ok"


def export(*words) -> None:
    """scripts/export.py within this process. Raises UserError with what it says where it refuses."""
    spec = importlib.util.spec_from_file_location("export_script", ROOT / "scripts" / "export.py")
    script = importlib.util.module_from_spec(spec)
    said, refused = io.StringIO(), io.StringIO()
    with mock.patch.object(sys, "argv", ["export.py", *map(str, words)]), mock.patch.object(sys, "path", list(sys.path)):
        spec.loader.exec_module(script)
        try:
            with redirect_stdout(said), redirect_stderr(refused):
                script.main()
        except SystemExit as end:
            if end.code != 2:
                raise
            raise UserError(refused.getvalue()) from None


def run_sharded(architectures: list[Architecture]) -> None:
    """The DPO run of each architecture in two processes, which are started once for all of them."""
    configs = [of.configured("fsdp", *DPO, *TWO_PROCESSES) for of in architectures]
    wanted = [(config.as_dict(), Path(config.local_run_dir)) for config in configs]
    for of, end in zip(architectures, two_processes.runs(wanted), strict=True):
        of.sharded_end = end


def fsdp(of: Architecture) -> str:
    """Two processes of FSDPTrainer train the weights that one process does."""
    if of.sharded_end is None:
        run_sharded([of])
    if of.sharded_end != two_processes.ENDED:
        return of.sharded_end
    run_dir = of.folder / "fsdp"
    rows = rows_of(run_dir)
    require_exact_start(rows)
    before, alone, together = map(plain.load, (of.model, of.dpo_run.checkpoint, run_dir / "LATEST"))
    require_weights(weights_of(together), weights_of(alone), weights_of(before), "two processes")
    last = [row for row in rows if "loss/eval" in row][-1]
    require_logps(last, plain.mean_logps(together, of.held_out, True), of.held_out, "of the checkpoint of two processes")
    return "ok"


# In the order of the table.
CHECKS: dict[str, Callable[[Architecture], str]] = {
    check.__name__: check for check in (prefix, sft, dpo, start, resumed, lora, merged, exported, fsdp)
}


def outcome_of(check: Callable[[], str]) -> str:
    """What a cell of the table says: what the check says, or how it has ended."""
    try:
        return check()
    except UserError as refused:
        return f"refused: {' '.join(str(refused).split())}"
    except Wrong as wrong:
        return f"WRONG by {wrong}"
    except (Exception, SystemExit, CheckpointException) as error:
        return f"TRACEBACK: {told(error)}"


def told(error: BaseException) -> str:
    """An error's type and first line, and where it was raised."""
    at = error.__traceback__
    while at.tb_next:
        at = at.tb_next
    place = f"{Path(at.tb_frame.f_code.co_filename).name}:{at.tb_lineno}"
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:150]} ({place})"


def outcomes(of: Architecture, wanted: list[str]) -> Iterator[tuple[str, str]]:
    """Each wanted check of an architecture: its name, and what it says."""
    for name in wanted:
        yield name, outcome_of(lambda name=name: CHECKS[name](of))
