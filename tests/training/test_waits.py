"""A step waits for its device once, and copies no values of Python to it: counted on a CPU, with other memory as the device.

A batch is "on the device" when its tensors are copies of their own. Whatever is read of any tensor that is not the host batch's
counts as a wait, and so does indexing by a mask, whose number of elements the host has to know.
"""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from preference_training.batching.micro_batches import MicroBatch
from preference_training.batching.packing import PackedBatch, TokenBudget, iterate_examples
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.losses.registry import build_loss
from preference_training.modeling.logprobs import LiveReference
from preference_training.modeling.prefix_sharing.sharing import share_prefixes
from preference_training.training.monitors import UnchangedWeights
from tests.support.building import build_trainer
from tests.support.files import GOLDEN, ROOT

# What reads a tensor's values, or needs to know them.
READS = {"item", "tolist", "cpu", "numpy", "nonzero", "masked_select", "__int__", "__float__", "__bool__", "__index__"}

SETTINGS = {"simpo": {"beta": 2.0, "gamma": 0.5}}


class Waits(TorchFunctionMode):
    """The lines of this project that wait for the device, and those that copy values of Python to it."""

    def __init__(self, host: list[PackedBatch]):
        super().__init__()
        self.host = {self._memory(each) for pack in host for each in vars(pack).values() if isinstance(each, torch.Tensor)}
        self.waits: list[str] = []
        self.copies: list[str] = []

    @staticmethod
    def _memory(tensor: torch.Tensor) -> int:
        return tensor.untyped_storage().data_ptr()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = func.__name__
        if name in READS and self._memory(args[0]) not in self.host:
            self._add(self.waits)
        if name in ("__getitem__", "__setitem__") and getattr(args[1], "dtype", None) == torch.bool:
            self._add(self.waits)
        if func in (torch.tensor, torch.as_tensor) and "device" in (kwargs or {}):
            self._add(self.copies)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _add(found: list[str]) -> None:
        """Note where it happens: the innermost line outside torch and this class, if it is the project's."""
        frame = sys._getframe()
        while frame.f_code.co_qualname.startswith("Waits.") or "/torch/" in frame.f_code.co_filename:
            frame = frame.f_back
        path = Path(frame.f_code.co_filename)
        if ROOT in path.parents and "site-packages" not in path.parts:
            found.append(f"{path.name} {frame.f_code.co_name}")


@pytest.fixture
def trainer(compose):
    """Build a trainer of a golden model with a live reference."""

    def built(loss: str, sharing: str = "on"):
        config = compose("wandb.enabled=false", f"prefix_sharing={sharing}", "optimizer=AdamW", "warmup_steps=5")
        policy, reference = (AutoModelForCausalLM.from_pretrained(GOLDEN / "llama", dtype=torch.float32) for _ in range(2))
        for model in (policy, reference):
            share_prefixes(model, sharing)
        objective = build_loss(loss, **SETTINGS.get(loss, {}))
        return build_trainer(config, policy, objective, LiveReference(reference) if objective.needs_reference else None)

    return built


@pytest.fixture
def apart(monkeypatch):
    """Batches of a "device", whose tensors are not those of the host."""

    usual = PackedBatch.to

    def to(pack: PackedBatch, device: torch.device) -> PackedBatch:
        if pack.staged is None:
            return usual(pack, device)
        own = {name: tensor.clone() for name, tensor in pack.staged.to(device).items() if hasattr(pack, name)}
        return replace(pack, staged=None, source=pack, **own)

    monkeypatch.setattr(PackedBatch, "to", to)


def batch(kind: str) -> MicroBatch:
    """Two packs of three prompts, prepared as for a GPU."""
    pairs = [(0, 1)] if kind == "pairs" else []
    prompts = [TokenizedPrompt([5, 6, 7 + number], [[8, 9, 1], [3, 1]], pairs) for number in range(3)]
    found = MicroBatch.of(list(iterate_examples(prompts)), TokenBudget(14, 14))
    return replace(found, packs=[pack.for_gpu() for pack in found.packs])


@pytest.mark.parametrize(("loss", "kind"), [("dpo", "pairs"), ("simpo", "pairs"), ("ipo", "pairs"), ("sft", "targets")])
@pytest.mark.parametrize("sharing", ["on", "off"])
def test_a_step_waits_for_the_device_once_and_copies_no_values_of_python_to_it(trainer, apart, loss, kind, sharing):
    step, micro_batch = trainer(loss, sharing).step, batch(kind)
    assert len(micro_batch.packs) > 1
    # Few steps, ever fewer, also count the weights that they changed; the fourth does not.
    step.state.updates = 3
    with Waits(micro_batch.packs) as found:
        result = step.take([micro_batch], halve=None)
    assert result.metrics
    assert found.waits == ["step.py take"] and not found.copies


def test_what_reads_a_tensor_of_the_device_is_counted_and_what_reads_the_hosts_is_not():
    [pack, *_] = batch("pairs").packs
    device = torch.ones(3)
    with Waits([pack]) as found:
        assert device.sum().item() == 3 and float(device[0]) == 1 and bool(device[0] > 0)
        device[device > 0] = 2
        pack.response_lengths.tolist()
        torch.tensor([1.0], device="cpu")
    assert len(found.waits) == 4 and len(found.copies) == 1


def test_the_weights_that_a_step_changed_are_counted_in_one_wait():
    weights = [torch.ones(4, 4) for _ in range(3)]
    watch = UnchangedWeights([(weight, torch.ones(4, 4)) for weight in weights])
    weights[0] += 1
    with Waits([]) as found:
        assert watch.share_changed() == pytest.approx(1 / 3)
    assert found.waits == ["monitors.py share_changed"]
