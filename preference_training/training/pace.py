"""The pace of a run: the time since its start, throughput, and how much of the devices' arithmetic is used."""

import time
from dataclasses import dataclass

import torch

from preference_training.configuration.schema import RunConfig
from preference_training.core import metric_names as names
from preference_training.core.gpu_peaks import peak_tflops
from preference_training.modeling.flops import num_devices, step_flops
from preference_training.modeling.logprobs import CachedReference
from preference_training.tracking.tracker import Metrics
from preference_training.training.parts import Models, RunState


@dataclass(frozen=True)
class Utilization:
    """FLOPs of a step per token, and the peak of all devices together, in FLOP/s."""

    flops_per_token: float
    peak: float

    @classmethod
    def of(cls, config: RunConfig, models: Models, device: torch.device) -> "Utilization | None":
        """That of a run; None where the peak of its devices is neither known nor given as `peak_tflops`."""
        peak = config.peak_tflops
        if peak is None and device.type == "cuda":
            peak = peak_tflops(torch.cuda.get_device_name(device), _dtype_of_products(config), config.tf32)
        if peak is None:
            return None
        is_live = models.reference is not None and not isinstance(models.reference, CachedReference)
        return cls(step_flops(models.policy, is_live), peak * 1e12 * num_devices(models.policy))


def _dtype_of_products(config: RunConfig) -> str:
    """The dtype that most matrix products of a step are computed in."""
    model = config.model
    quantized = model.quantized_compute_dtype if model.quantization else None
    return quantized or model.autocast_dtype or config.sharded_dtype or model.policy_dtype


class Pace:
    """Measures steps by the clock, and adds to the seconds of `state`, which resume with the run."""

    def __init__(self, state: RunState, utilization: Utilization | None = None):
        self.state, self.utilization = state, utilization
        self.start()

    def start(self) -> None:
        """Count from now on; from where `state` has resumed."""
        self.now, self.tokens = time.perf_counter(), self.state.tokens

    def idle(self) -> None:
        """Count the time since the last call as the run's, but not as a step's: it went into evaluations and checkpoints."""
        self._tick()

    def step(self, examples: int) -> Metrics:
        """The metrics of a step, which ends now, on so many examples."""
        tokens = self.state.tokens - self.tokens
        seconds = self._tick()
        measured = {
            names.TIME: self.state.seconds,
            names.EXAMPLES_PER_SECOND: examples / seconds,
            names.TOKENS_PER_SECOND: tokens / seconds,
        }
        if self.utilization is not None:
            measured[names.MFU] = tokens / seconds * self.utilization.flops_per_token / self.utilization.peak
        return measured

    def _tick(self) -> float:
        """Seconds since the last tick, which are added to the run's."""
        seconds = max(time.perf_counter() - self.now, 1e-9)
        self.state.seconds += seconds
        self.start()
        return seconds
