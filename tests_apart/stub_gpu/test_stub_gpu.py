"""What docs/memory-and-speed.md says of CUDA without a card, over a driver that executes nothing: graphs, copies, waits.

`make stub-gpu-test` makes the environment. device.c, silent.c and driver.c take the place of CUDA's runtime, cuBLAS and driver.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PYTHON = Path(os.environ.get("STUB_GPU_PYTHON", ROOT / ".venv-stub-gpu" / "bin" / "python"))
# Compiling for 40 batches takes minutes on a slow machine. Unit: seconds.
PATIENCE = 1500

pytestmark = [
    pytest.mark.skipif(
        not PYTHON.is_file(), reason=f"{PYTHON} is missing: make stub-gpu-test installs a CUDA build of torch there"
    ),
    pytest.mark.skipif(sys.platform != "linux", reason="the stub is preloaded as Linux does it"),
]


@pytest.fixture(scope="session")
def libraries(tmp_path_factory) -> Path:
    """A folder with libstub.so and libcuda.so.1, compiled with the headers of torch's own packages."""
    folder = tmp_path_factory.mktemp("stub_gpu")
    command = [PYTHON, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]
    packages = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    headers = (packages / "nvidia" / "cu13" / "include", packages / "triton" / "backends" / "nvidia" / "include")
    compile_ = ["gcc", "-shared", "-fPIC", "-w", "-O1", *(f"-I{folder}" for folder in headers)]
    for library, sources in {"libstub.so": ("device.c", "silent.c"), "libcuda.so.1": ("driver.c",)}.items():
        subprocess.run([*compile_, "-o", folder / library, *(HERE / source for source in sources)], check=True)
    return folder


@pytest.fixture(scope="session")
def report(libraries):
    """What a function of report.py finds: `report("graphs", "llama", "plain")`."""

    def reported(*arguments: str) -> dict:
        paths = {"LD_LIBRARY_PATH": str(libraries), "LD_PRELOAD": str(libraries / "libstub.so"), "OMP_NUM_THREADS": "1"}
        paths["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "benchmarks")))
        command = [PYTHON, HERE / "report.py", *arguments]
        options = {"capture_output": True, "text": True, "check": False, "timeout": PATIENCE, "cwd": libraries}
        done = subprocess.run(command, env=os.environ | paths, **options)
        assert done.returncode == 0, done.stderr[-3000:]
        found = json.loads(done.stdout.strip().splitlines()[-1])
        print(*arguments, found)
        return found

    return reported


# Gemma's layers have two kinds of mask. With compile=true a model's blocks are graphs too.
GRAPHS = [("llama", "plain", 4), ("llama", "checkpointing", 4), ("gemma2", "plain", 8)]


@pytest.mark.parametrize(("family", "kind", "most"), GRAPHS)
def test_forty_batches_compile_few_graphs_and_none_after_the_first(report, family, kind, most):
    found = report("graphs", family, kind)
    assert found["graphs"]["first"] == found["graphs"]["last"] <= most
    assert not found["graph_breaks"] and not found["given_up"]


@pytest.mark.parametrize("attention", ["flex", "varlen"])
def test_a_step_of_one_pack_makes_one_copy_each_way_waits_once_and_allocates_nothing(report, attention):
    found = report("step", "on", attention)
    assert found["packs"] == 1
    assert found["to device"] == found["from device"] == found["stream waits"] == 1
    assert not found["device waits"] and not found["event waits"] and not found["allocations"]
    assert sum(found["lines"].values()) == 1
    assert (found["triton kernels"] > 0) == (attention == "flex")


def test_with_padded_rows_masks_of_transformers_wait_four_times_more(report):
    found = report("step", "off", "flex")
    assert found["packs"] == 1 and found["stream waits"] == 5
    assert sum(number for line, number in found["lines"].items() if "masking_utils" in line) >= 3


@pytest.mark.parametrize(("which", "gigabytes"), [("trained", 1.6), ("frozen", 0.9)])
def test_a_head_of_131072_words_takes_little_for_32000_scored_tokens(report, which, gigabytes):
    found = report("head", which)
    # All logits in float32: 32,000 * 131,072 * 4 bytes.
    assert found["scored_tokens"] == 32_000 and found["gb_of_all_logits"] == pytest.approx(16.8, abs=0.1)
    assert 0 < found["gb_above_weights"] < gigabytes


@pytest.mark.parametrize("family", ["llama", "qwen3", "head_80", "gpt_oss"])
def test_torchs_flash_attention_takes_the_parts_of_a_trie(report, family):
    found = report("varlen", family)
    assert found["has_gradients"] and found["attention"] == "varlen"
    # gpt_oss has layers whose window hides tokens, which FlexAttention computes.
    assert (found["triton kernels"] > 0) == (family == "gpt_oss")
