"""The peak arithmetic of GPUs, which model FLOPs utilization is a share of. Imports no heavy library."""

import re

# Dense products of bfloat16 or float16 matrices, sums in float32, in TFLOP/s: NVIDIA's and AMD's data sheets, where those state
# twice as much "with sparsity" half of that. By a pattern of the name that torch gives; the first that fits counts.
PEAKS = (
    # https://www.nvidia.com/en-us/data-center/dgx-b200/, gb200-nvl72/, h200/, h100/, grace-hopper-superchip/
    (r"GB200", 2500.0),
    (r"B200", 2250.0),
    (r"H20\b", 148.0),
    (r"H100 PCIe", 756.0),
    (r"H100 NVL", 835.0),
    (r"H[128]00\b", 989.4),
    # https://www.nvidia.com/en-us/data-center/a100/, a40/, a10/ and so on
    (r"A[18]00\b", 312.0),
    (r"A40\b", 149.7),
    (r"A30\b", 165.0),
    (r"A10\b", 125.0),
    # https://www.nvidia.com/en-us/data-center/l40s/, l40/, l4/
    (r"L40S", 362.0),
    (r"L40\b", 181.0),
    (r"L4\b", 121.0),
    # White papers of the architectures Ampere (GA102), Ada and Blackwell.
    (r"RTX 6000 Ada", 364.2),
    (r"RTX A6000", 154.8),
    (r"RTX 3090 Ti", 80.0),
    (r"RTX 3090", 71.0),
    (r"RTX 4090", 165.2),
    (r"RTX 5090", 209.5),
    # https://www.nvidia.com/en-us/data-center/v100/, tesla-t4/: float16 alone.
    (r"V100-SXM", 125.0),
    (r"V100-PCIE", 112.0),
    (r"T4\b", 65.0),
    # https://www.amd.com/en/products/accelerators/instinct.html
    (r"MI355X", 2500.0),
    (r"MI3(00|25)X", 1307.4),
    (r"MI250X", 191.5),
)
# Those that have TF32, whose peak is half of that of bfloat16: NVIDIA's since Ampere.
WITHOUT_TF32 = re.compile(r"V100|T4\b|MI\d")


def peak_tflops(name: str, dtype: str, tf32: bool) -> float | None:
    """The peak of a GPU of this name in products of a dtype; None where it is not known."""
    peak = next((peak for pattern, peak in PEAKS if re.search(pattern, name)), None)
    if peak is None or dtype in ("bfloat16", "float16"):
        return peak
    return peak / 2 if tf32 and not WITHOUT_TF32.search(name) else None
