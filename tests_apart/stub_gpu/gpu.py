"""Makes torch, Inductor and Triton compile for an H100 (sm_90) in a process that runs over the stub; nothing is launched.

Import it before anything else that imports torch. Torch's own kernels are counted by the stub, Triton's in `launches`.
"""

import ctypes
import os
from types import SimpleNamespace

# Everything is compiled anew, in this process, so that it is counted.
os.environ |= {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}

import torch
import triton
from torch._inductor import config
from torch._inductor.runtime import triton_helpers, triton_heuristics
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver

SHARED_MEMORY = 232448
TARGET = GPUTarget("cuda", 90, 32)
# As the stub counts them.
COUNTED = (
    "kernels", "to device", "from device", "on device", "stream waits", "device waits", "event waits", "allocations", "fills",
)  # fmt: skip
launches = SimpleNamespace(triton=0)


class Utilities:
    """What Triton's driver asks the device and has it load."""

    def load_binary(self, *_):
        """Module, function, registers, spills and threads of a kernel that will not be launched."""
        return 0, 0, 32, 0, 1024

    def get_device_properties(self, *_):
        """Those of the stub."""
        clocks = dict.fromkeys(("sm_clock_rate", "mem_clock_rate", "mem_bus_width"), 1)
        return {
            "max_shared_mem": SHARED_MEMORY, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536, **clocks,
        }  # fmt: skip

    def __getattr__(self, name: str):
        return lambda *_, **__: 0


class Driver:
    """Triton's driver of a device that launches nothing."""

    utils = Utilities()

    def get_current_target(self):
        """What kernels are compiled for."""
        return TARGET

    def get_current_device(self):
        """The only one."""
        return 0

    def get_current_stream(self, _device=0):
        """The default stream."""
        return 0

    def get_active_torch_device(self):
        """The device that tensors are on."""
        return torch.device("cuda", 0)

    def get_device_interface(self):
        """Of torch."""
        return torch.cuda

    def set_current_device(self, _device):
        """There is only one."""

    def get_device_capability(self, _device=0):
        """Of an H100."""
        return 9, 0

    def get_benchmarker(self):
        """All kernels take no time."""
        return lambda *_, **__: 0.0

    def map_python_to_cpp_type(self, _name):
        """For launchers, of which there are none."""
        return "int"

    def launcher_cls(self, *_):
        """A launcher that counts."""
        return _launch


def _launch(*_, **__) -> None:
    launches.triton += 1


def counts() -> dict[str, int]:
    """What the process has done so far."""
    numbers = (ctypes.c_long * len(COUNTED))()
    ctypes.CDLL(None).stub_counts(numbers)
    return dict(zip(COUNTED, numbers, strict=True)) | {"triton kernels": launches.triton}


def since(before: dict[str, int]) -> dict[str, int]:
    """What it has done since."""
    return {name: number - before[name] for name, number in counts().items()}


def _install() -> None:
    driver, compile_ = Driver(), triton.compile
    CudaDriver.is_active = staticmethod(lambda: True)
    triton.runtime.driver.set_active(driver)
    triton_helpers.set_driver_to_gpu = lambda: triton.runtime.driver.set_active(driver)
    triton.compile = lambda source, target=None, options=None, **rest: compile_(source, target=TARGET, options=options, **rest)
    triton_heuristics.triton.compile = triton.compile
    for name in ("use_static_cuda_launcher", "use_static_triton_launcher"):
        if hasattr(config, name):
            setattr(config, name, False)
    # cuDNN would look for a driver of its own.
    torch.backends.cuda.enable_cudnn_sdp(False)


_install()
