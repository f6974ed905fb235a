"""What the machine is and has."""

import importlib.metadata
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import measure
import torch

from gpu_parts.found import Found, Settings
from preference_training.modeling.prefix_sharing.block_attention import unsupported_device

PACKAGES = (
    "torch", "triton", "transformers", "accelerate", "peft", "datasets", "hydra-core", "omegaconf", "trl", "liger-kernel",
    "flash-attn", "bitsandbytes",
)  # fmt: skip


def environment(found: Found, settings: Settings) -> None:
    """Versions, hardware, driver, and what Triton needs: a C compiler and Python.h."""
    found.put("hardware", measure.hardware() | {"load": os.getloadavg()})
    found.put("versions", measure.versions() | {name: version(name) for name in PACKAGES})
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))), None)
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    found.put("triton_needs", {"compiler": compiler, "Python.h": header.is_file()})
    if settings.is_cpu:
        return
    if not torch.cuda.is_available():
        found.put("no_gpu", True, passed=False)
        return
    found.put("gpus", gpus())
    found.attempt("kernels", unsupported_device, torch.device("cuda", 0), must=lambda reason: reason is None)


def version(name: str) -> str | None:
    """The version of an installed package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpus() -> dict:
    """The first GPU, how many there are, and the driver."""
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version,mig.mode.current", "--format=csv,noheader"]
    driver = (
        subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip() if shutil.which(query[0]) else None
    )
    return {
        "number": torch.cuda.device_count(),
        "name": properties.name,
        "capability": torch.cuda.get_device_capability(0),
        "multiprocessors": properties.multi_processor_count,
        "free_bytes": torch.cuda.mem_get_info()[0],
        "cuda": torch.version.cuda,
        "nccl": torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else None,
        "driver": driver,
    }
