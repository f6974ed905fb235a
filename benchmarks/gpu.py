"""The benchmark of `bench.py` on one NVIDIA GPU: a random GPT-NeoX with 1.4B parameters in bfloat16. Same options.

    python benchmarks/gpu.py --rounds 3

If `liger-kernel` is installed, the contender `trl` uses it. Peak memory is the GPU's.
"""

import subprocess
import sys

from bench import main
from works import GPU

# Runs in its own process, so that this one stays small.
FIND = "import sys, torch; sys.exit(not torch.cuda.is_available())"


def run() -> int:
    """Run the benchmark, or refuse if there is no GPU; returns the exit status."""
    if subprocess.run([sys.executable, "-c", FIND], check=False).returncode:
        print("No NVIDIA GPU that torch can use was found. On a CPU: python benchmarks/bench.py", file=sys.stderr)
        return 2
    return main(preset=GPU)


if __name__ == "__main__":
    sys.exit(run())
