"""Rounds that sample by vLLM and by llama.cpp: the former gets the weights of each round, the latter keeps its own."""

import json
from pathlib import Path

import pyarrow.parquet
import pytest

from preference_training.generation.servers import OpenAIServer
from preference_training.rounds.served.weights import Vllm
from tests_apart.servers.exports import QUESTIONS, TRAIN, python
from tests_apart.servers.servers import llama_cpp, vllm
from tests_apart.servers.test_servers import exported, folder, results, trained  # noqa: F401  fixtures

ROUNDS = (
    "+rounds=default", "model=smollm2-135m", *TRAIN, "rounds.rounds=1", "rounds.n_samples=4", "rounds.max_new_tokens=16",
    "rounds.sampler_timeout=120", "lr=1e-5",
)  # fmt: skip


def loop(place: Path, *more: str) -> Path:
    """Run a loop of one round; its directory."""
    for name, questions in (("prompts.jsonl", QUESTIONS[:6]), ("held_out.jsonl", QUESTIONS[6:])):
        (place / name).write_text("".join(json.dumps({"prompt": question}) + "\n" for question in questions))
    (place / "judge.py").write_text("def score(prompt, response):\n    return -len(response)\n")
    files = (f"rounds.prompts={place / 'prompts.jsonl'}", f"rounds.held_out={place / 'held_out.jsonl'}")
    run = place / "loop"
    lines = python("train.py", *ROUNDS, *files, f"rounds.judge={place / 'judge.py'}:score", f"local_run_dir={run}", *more)
    assert (run / "final" / "summary.json").is_file(), "\n".join(lines[-20:])
    return run


def facts(run: Path, name: str) -> dict:
    return json.loads((run / name / "sampling.json").read_text())


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_vllm_samples_with_the_weights_of_each_round(kind, folder, tmp_path, results):  # noqa: F811
    first = (trained(folder, "full") / "LATEST").resolve()
    environment = {"full": {"VLLM_SERVER_DEV_MODE": "1"}, "adapter": {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}}[kind]
    options = "--enable-lora --max-lora-rank 64" if kind == "adapter" else ""
    line = f"vllm serve {first} --dtype float32 --served-model-name first {options}"
    more = ["+adapter=lora", "lr=1e-3"] if kind == "adapter" else []
    with vllm(line, tmp_path / "log", environment) as server:
        run = loop(tmp_path, f"rounds.sampler={server.address}", f"model.archive={first}", *more)
        known = Vllm(OpenAIServer("first", f"{server.address}/v1"), 10)
        assert known.has("/collective_rpc") == (kind == "full") and known.has("/v1/load_lora_adapter") == (kind == "adapter")
    before, after = facts(run, "round-1"), facts(run, "final")
    assert before["model"] != after["model"] and before["probe"] != after["probe"]
    differences = [before["difference"], after["difference"]]
    assert max(differences) < 0.01
    samples = pyarrow.parquet.read_table(run / "round-1" / "samples.parquet").to_pylist()
    assert len(samples) == 24 and all(row["token_ids"] and row["logp"] < 0 for row in samples)
    results[f"rounds, {kind}"] = "vllm", {"command": server.command, "difference_per_token": differences}


def test_llama_cpp_is_refused_as_the_policy_and_writes_responses_to_learn_from(exported, tmp_path, results):  # noqa: F811
    export = exported("merged")
    with llama_cpp(export.gguf, tmp_path / "log") as server:
        with pytest.raises(AssertionError, match="cannot take the weights of the policy each round"):
            loop(tmp_path, f"rounds.sampler={server.address}")
        run = loop(
            tmp_path, f"rounds.sampler={server.address}", "rounds.sampler_weights=fixed", "loss=sft", "rounds.sampler_workers=2"
        )
    samples = pyarrow.parquet.read_table(run / "round-1" / "samples.parquet").to_pylist()
    assert len(samples) == 24 and {row["logp"] for row in samples} == {None}
    assert len({(row["prompt_id"], row["text"]) for row in samples}) > 12
    results["rounds, fixed"] = "llama_cpp", {"responses": len(samples)}
