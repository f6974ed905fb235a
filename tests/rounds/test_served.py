"""Servers as samplers of rounds: what they are asked, the weights that a vLLM gets, and what happens where they fail."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from preference_training.configuration.validation import configured
from preference_training.core.errors import UserError
from preference_training.core.signals import StoppedError
from preference_training.generation.servers import OpenAIServer
from preference_training.rounds import sampling, start
from preference_training.rounds.driver import run_one
from preference_training.rounds.loop import Loop
from preference_training.rounds.served import asking, weights
from preference_training.rounds.served.notes import count_unanswered, note_unanswered
from preference_training.rounds.tables import read_table
from tests.rounds import loops
from tests.support.files import ROOT
from tests.support.listening import listening
from tests.support.sampling_servers import Chats, Fault, Vllm

SFT = ("loss=sft", "rounds.pairs=best_of_n", "rounds.n_samples=3", "rounds.sampler_weights=fixed")
DPO = ("loss=dpo", "lr=1e-2", "rounds.n_samples=3")


@pytest.fixture
def folder(folder, monkeypatch):
    """The working directory of a loop; failing servers are asked again without a pause."""
    monkeypatch.setattr(asking, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(weights, "BETWEEN_LOOKS", 0.001)
    return folder


def rows_of(path: Path) -> dict[tuple[int, int], dict]:
    return {(row["prompt_id"], row["number"]): row for row in read_table(path)}


def answers_of_prompts(messages: list[dict], seed: int) -> tuple[str, str]:
    """A teacher that repeats what it is asked, and its seed."""
    return f" {messages[-1]['content']} {seed}", "stop"


# ---- a vLLM with the weights of the policy ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(first, tmp_path_factory):
    """A loop whose sampler was a vLLM, in the middle of its second round, and what that was asked."""
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(first, folder, dirs_exist_ok=True, symlinks=True)
    with pytest.MonkeyPatch.context() as patch, listening(Vllm(folder / "first" / "LATEST", "reload")) as vllm:
        patch.chdir(folder)
        loop = loops.start(folder, *DPO, f"rounds.sampler={vllm.url}")
        assert start.check(loop.config) == [
            f"rounds.sampler: the-model of {vllm.url}/v1 gets the weights of the policy each round"
        ]
        for step in loop.round(1).steps:
            run_one(loop, 1, step, loops.in_this_process)
        run_one(loop, 2, "sample", loops.in_this_process)
    return loop, vllm


def test_a_vllm_samples_every_round_with_the_weights_of_its_policy(served):
    """The log-probs that the server gave are those of the round's checkpoint, computed by transformers alone."""
    loop, _ = served
    for number, archive in ((1, loop.directory.parent / "first" / "LATEST"), (2, loop.round(1).policy)):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(archive), AutoTokenizer.from_pretrained(archive)
        prompts = {prompt.prompt_id: tokenizer(prompt.prompt).input_ids for prompt in loop.prompts}
        rows = rows_of(loop.round(number).samples)
        assert rows.keys() == {(prompt_id, k) for prompt_id in range(12) for k in range(3)}
        for row in list(rows.values())[:6]:
            prompt = prompts[row["prompt_id"]]
            with torch.no_grad():
                logps = model(torch.tensor([prompt + row["token_ids"]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            expected = logps.gather(1, torch.tensor(row["token_ids"])[:, None]).sum().item()
            assert row["logp"] == pytest.approx(expected, abs=1e-3)
            assert row["n_tokens"] == len(row["token_ids"])
            assert row["ended"] == (row["token_ids"][-1] == tokenizer.eos_token_id)


def test_before_each_round_a_vllm_is_idle_then_reloads_then_drops_its_cache(served):
    loop, vllm = served
    paths = [path for path, _ in vllm.asked]
    reloads = [(k, body) for k, (path, body) in enumerate(vllm.asked) if path == "/collective_rpc" and body]
    for place, _ in reloads:
        assert (paths[place - 1], paths[place + 1]) == ("/metrics", "/reset_prefix_cache")
    found = [Path(body["kwargs"]["weights_path"]) for _, body in reloads]
    policies = [loop.directory.parent / "first" / "LATEST", loop.round(1).policy]
    assert found == [path.resolve() for path in policies]


def test_a_vllm_gets_token_ids_and_samples_from_the_models_own_distribution(served):
    loop, vllm = served
    policy = sampling.Policy.of(loop.config, loop.prompts)
    asked = [body for body in vllm.bodies("/v1/completions") if body["n"] == 3]
    assert len(asked) == 2 * 12
    assert {tuple(body["prompt"]) for body in asked} == {
        tuple(policy.prompt_ids(prompt)) for prompt in loop.prompts if not prompt.held_out
    }
    # What a generation_config.json may advise is switched off.
    neutral = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    for body in asked:
        assert {name: body[name] for name in neutral} == neutral
        assert (body["temperature"], body["top_p"], body["max_tokens"]) == (1.0, 1.0, 12)
        assert (body["stop"], body["stop_token_ids"]) == (["\n\nHuman:"], [policy.tokenizer.eos_token_id])
    # Another seed for each prompt and round.
    assert len({body["seed"] for body in asked}) == len(asked)


def test_log_probs_of_held_out_responses_are_computed_here_under_both_models(served):
    loop, _ = served
    rows = rows_of(loop.round(2).held_out_samples).values()
    assert len(rows) == 4 and all(row["logp"] != row["logp_first"] for row in rows)
    record = json.loads(loop.round(2).sampling.read_text())
    assert record["server"] == "the-model" and record["difference"] < 1e-4


@pytest.fixture
def second(served, folder):
    """A vLLM with the weights before the first round, and the step that samples the second round by it, with more overrides."""
    loop, _ = served
    shutil.copytree(loop.directory, folder / "loop", symlinks=True)
    shutil.rmtree(folder / "loop" / "round-2")
    with listening(Vllm(folder / "first" / "LATEST", "reload")) as vllm:

        def sample(*more: str) -> Loop:
            loop = loop_of(folder, *DPO, f"rounds.sampler={vllm.url}", *more)
            sampling.sample(loop, 2)
            return loop

        yield vllm, sample


def loop_of(folder: Path, *more: str) -> Loop:
    """The loop in a folder with other options."""
    return Loop(folder / "loop", configured(*loops.overrides(folder, *more)), {})


def test_a_vllm_that_keeps_its_weights_is_found_out_by_its_log_probs(second):
    vllm, sample = second
    vllm.reloads = False
    with pytest.raises(
        UserError, match=r"does not have the weights of the policy \(its weights were reloaded\): its log-probs"
    ):
        sample()


def test_a_vllm_that_does_not_drop_its_cache_is_an_error(second):
    vllm, sample = second
    vllm.resets = False
    with pytest.raises(UserError, match="/reset_prefix_cache: it keeps what it computed under the former weights"):
        sample("rounds.sampler_timeout=0.1")


def test_what_a_vllm_computed_under_former_weights_shows_in_its_log_probs(second, monkeypatch):
    """It says that it drops its cache, and does not: behind prompts that it knows, log-probs are of two models at once."""
    vllm, sample = second
    monkeypatch.setattr(vllm, "reset", lambda _body: (200, {"success": True}))
    asked = {"model": "the-model", "max_tokens": 1, "seed": 0, "n": 1, "temperature": 1.0, "stop_token_ids": []}
    loop = loop_of(Path.cwd())
    policy = sampling.Policy.of(loop.config, loop.prompts)
    for prompt in loop.prompts:
        vllm.complete(asked | {"prompt": policy.prompt_ids(prompt)})
    with pytest.raises(UserError, match="does not have the weights of the policy"):
        sample()


def test_a_vllm_with_requests_of_others_is_waited_for(second, monkeypatch):
    vllm, sample = second
    vllm.running = 2
    with pytest.raises(UserError, match="/metrics: 2 requests are in progress, not ours. Stop its other clients"):
        sample("rounds.sampler_timeout=0.1")
    assert not vllm.bodies("/collective_rpc")

    def fewer(_path, _body, _count):
        vllm.running = max(0, vllm.running - 1)

    vllm.fault = fewer
    loop = sample()
    assert vllm.running == 0 and loop.round(2).samples.is_file()


def test_log_probs_that_are_those_of_the_round_before_to_the_last_bit_are_an_error(second):
    """As where the server's dtype rounds away what a round has changed; here nothing has, but for the note of the policy."""
    _, sample = second
    loop = loop_of(Path.cwd())
    noted = json.loads(loop.round(1).sampling.read_text())
    sample()
    probed = json.loads(loop.round(2).sampling.read_text())["probe"]
    loop.round(1).sampling.write_text(json.dumps(noted | {"probe": probed}))
    for path in (loop.round(2).samples, loop.round(2).held_out_samples):
        path.unlink()
    with pytest.raises(UserError, match="log-probs of the round before to the last bit"):
        sample()


def test_an_adapter_has_a_name_for_its_content_and_is_loaded_once(folder):
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(folder / "first" / "LATEST")
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder / "adapter")
    with listening(Vllm(folder / "first" / "LATEST", "lora")) as server:
        vllm = weights.Vllm(OpenAIServer("the-model", f"{server.url}/v1"), wait=5)
        # The hash of the model that is adapted, the same in all rounds, and that of the adapter.
        [one, again, other] = [vllm.load_adapter(folder / "adapter", "a" * 32 + adapter * 32) for adapter in "bbc"]
        assert one == again != other and one.startswith("policy-") and list(server.adapters) == [other]
        assert len(server.bodies("/v1/load_lora_adapter")) == 2
        server.fault = lambda path, *_: Fault(500, '{"error": {"message": "LoRA rank 64 is greater than max_lora_rank 16."}}')
        with pytest.raises(
            UserError, match=r"max_lora_rank 16\.\. Expected a vLLM with --enable-lora and a --max-lora-rank of"
        ):
            vllm.load_adapter(folder / "adapter", "d" * 64)


@pytest.mark.long
def test_an_adapter_is_loaded_beside_the_model_and_that_of_the_round_before_unloaded(folder):
    given = (*DPO, "+adapter=lora", "lr=1e-2")
    with listening(Vllm(folder / "first" / "LATEST", "lora")) as vllm:
        loop = loops.start(folder, *given, f"rounds.sampler={vllm.url}")
        start.check(loop.config)
        for step in loop.round(1).steps:
            run_one(loop, 1, step, loops.in_this_process)
        vllm.adapters["policy-of-before"] = ("before", None)
        run_one(loop, 2, "sample", loops.in_this_process)
        names = [body["lora_name"] for body in vllm.bodies("/v1/load_lora_adapter") if body]
        assert vllm.bodies("/v1/unload_lora_adapter") == [{"lora_name": "policy-of-before"}]
        assert list(vllm.adapters) == names and len(names) == 1
        assert [body["lora_path"] for body in vllm.bodies("/v1/load_lora_adapter") if body] == [
            str(loop.round(1).policy.resolve())
        ]
        models = [body["model"] for body in vllm.bodies("/v1/completions")]
    # 4 tokens are compared, then 12 prompts sampled and 4 that are held out.
    assert models == ["the-model"] * 20 + names * 20
    assert len({row["model"] for row in read_table(loop.round(2).samples)}) == 1


# ---- another model, which stays what it is ---------------------------------------------------------------------------------


def fixed(folder: Path, url: str, *more: str) -> Loop:
    """A loop that learns from a server's responses, whose first round is sampled."""
    loop = loops.start(folder, *SFT, f"rounds.sampler={url}", *more)
    run_one(loop, 1, "sample", loops.in_this_process)
    return loop


@pytest.mark.parametrize("protocol", ["", "/v1", "/api"])
def test_another_model_is_asked_by_messages_and_the_policy_is_still_what_is_held_out(protocol, folder):
    with listening(Chats(answers_of_prompts)) as server:
        loop = fixed(folder, server.url + protocol, "system_prompt='Be brief.'", "rounds.top_p=0.9")
        assert start.check(loop.config)[0].endswith("writes the responses of all rounds, not the policy")
    path = "/api/chat" if protocol == "/api" else "/v1/chat/completions"
    bodies = server.bodies(path)
    assert len(bodies) == (36 if protocol == "/api" else 12)
    for body in bodies:
        assert [turn["role"] for turn in body["messages"]] == ["system", "user"]
        asked = body["options"] if protocol == "/api" else body
        assert (asked["temperature"], asked["top_p"], asked["stop"]) == (1.0, 0.9, ["\n\nHuman:"])
        assert asked["num_predict" if protocol == "/api" else "max_tokens"] == 12
    rows = rows_of(loop.round(1).samples)
    assert len(rows) == 36
    seeds = {prompt_id: asking.seed_of(0, "round-1", prompt) for prompt_id, prompt in enumerate(loop.prompts)}
    tokenizer = AutoTokenizer.from_pretrained(folder / "first" / "LATEST")
    for (prompt_id, number), row in rows.items():
        assert row["text"] == f" Question {prompt_id}? {seeds[prompt_id] + number}"
        assert (row["ended"], row["token_ids"], row["logp"]) == (True, None, None)
        assert row["n_tokens"] == len(tokenizer(row["text"]).input_ids)
        assert row["model"].startswith("ollama:teacher" if protocol == "/api" else "openai:teacher")
    held_out = rows_of(loop.round(1).held_out_samples).values()
    assert len(held_out) == 4 and all(row["token_ids"] and row["logp"] is not None for row in held_out)


def test_a_response_that_was_cut_is_truncated(folder):
    with listening(Chats(lambda _messages, seed: ("a", "length" if seed % 2 else "stop"))) as server:
        loop = fixed(folder, server.url)
    ended = [row["ended"] for row in read_table(loop.round(1).samples)]
    assert 0 < sum(ended) < len(ended) == 36


@pytest.mark.parametrize("quietly", [True, False])
def test_a_server_with_one_response_to_a_request_is_asked_more_often(quietly, folder):
    with listening(Chats(answers_of_prompts, most=1, is_quiet=quietly)) as server:
        loop = fixed(folder, server.url, "rounds.sampler_workers=1")
    texts = {(key, row["text"]) for key, row in rows_of(loop.round(1).samples).items()}
    seeds = {prompt_id: asking.seed_of(0, "round-1", prompt) for prompt_id, prompt in enumerate(loop.prompts)}
    # As of a server that gives three at once.
    assert texts == {((k, n), f" Question {k}? {seeds[k] + n}") for k in range(12) for n in range(3)}
    # The first request shows it, none after it asks for several.
    assert [body["n"] for body in server.bodies("/v1/chat/completions")] == [3, *[1] * (35 if quietly else 36)]


def test_what_was_sampled_is_not_asked_for_again(folder, monkeypatch):
    monkeypatch.setattr(sampling, "PROMPTS_PER_PART", 4)
    written = []
    save = sampling.write_table

    def write_table(path, rows, schema):
        save(path, rows, schema)
        written.append(path)
        if len(written) == 2:
            raise StoppedError("behind two parts")

    monkeypatch.setattr(sampling, "write_table", write_table)
    with listening(Chats(answers_of_prompts)) as server:
        with pytest.raises(StoppedError):
            fixed(folder, server.url)
        assert len(server.bodies("/v1/chat/completions")) == 8
        loop = fixed(folder, server.url)
        assert len(server.bodies("/v1/chat/completions")) == 12
    assert len(read_table(loop.round(1).samples)) == 36


# ---- servers that fail ------------------------------------------------------------------------------------------------------


def failing(fault, first: int = 0, last: int = 10**6):
    """A fault of the requests for responses from one to before another."""
    return lambda path, _body, count: fault if path.startswith("/v1/chat") and first <= count < last else None


@pytest.mark.parametrize("fault", [Fault(503, "busy"), Fault(429, "{}"), Fault(drops=True)])
def test_what_fails_for_a_while_is_asked_again(fault, folder, capsys):
    with listening(Chats(answers_of_prompts, fault=failing(fault, 2, 6))) as server:
        loop = fixed(folder, server.url)
    assert len(read_table(loop.round(1).samples)) == 36
    assert "round-1: 4 requests were sent again: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault(401, '{"error": {"message": "no such key"}}'), "status 401: no such key. Expected a server that has the model"),
        (Fault(404, "{}"), "status 404. Expected a server that has the model teacher"),
        (Fault(500, "broken"), "status 500: broken, 6 times. Start it, or name another one. What has been sampled is kept"),
        (Fault(drops=True), "unreachable, 6 times. Start it"),
        (Fault(hangs=True), "timeout, 6 times. Start it"),
        (Fault(200, "garbage"), "it answers none of 12 prompts: its reply cannot be read. Check its log"),
        (Fault(200, '{"choices": []}'), "it answers none of 12 prompts: its reply has no response"),
        (Fault(400, '{"detail": "no"}'), "it answers none of 12 prompts: status 400: no"),
    ],
)  # fmt: skip
def test_a_server_that_fails_for_good_stops_the_loop_with_a_message(fault, message, folder):
    with listening(Chats(answers_of_prompts, fault=failing(fault))) as server, pytest.raises(UserError) as error:
        fixed(folder, server.url, "rounds.sampler_timeout=0.2" if fault.hangs else "rounds.sampler_timeout=20")
    assert str(error.value).startswith(f"rounds.sampler: {server.url}/v1/chat/completions: {message}")


def test_prompts_that_a_server_does_not_answer_are_left_out_and_counted(folder, capsys):
    def fault(path, body, _count):
        if path.startswith("/v1/chat") and "Question 3?" in body["messages"][-1]["content"]:
            return Fault(400, '{"error": {"message": "blocked"}}')
        return None

    def write(messages, seed):
        return (None, "content_filter") if "Question 5?" in messages[-1]["content"] else answers_of_prompts(messages, seed)

    with listening(Chats(write, fault=fault)) as server:
        loop = fixed(folder, server.url)
    assert {prompt_id for prompt_id, _ in rows_of(loop.round(1).samples)} == set(range(12)) - {3, 5}
    assert "round-1: 6 responses were not given: status 400: blocked (3); refused (3)" in capsys.readouterr().out
    for step in ("judge", "pair"):
        run_one(loop, 1, step, loops.in_this_process)
    excluded = json.loads(loop.round(1).excluded.read_text())["excluded"]
    assert excluded["responses that the server did not give (status 400: blocked)"] == 3
    assert excluded["responses that the server did not give (refused)"] == 3


def test_a_response_that_was_noted_as_missing_and_came_later_does_not_count(tmp_path):
    table = tmp_path / "samples.parquet"
    for _ in range(2):
        note_unanswered(table, 1, range(3), "refused")
    assert count_unanswered(table, {(1, 0)}) == {"responses that the server did not give (refused)": 2}


@pytest.mark.long
def test_a_signal_ends_the_step_though_a_server_hangs(folder):
    """Exit status 75, long before the server's time is over, and what was sampled before is kept."""
    with listening(Chats(answers_of_prompts, fault=failing(Fault(hangs=True), 1))) as server:
        loop = loops.start(
            folder, *SFT, f"rounds.sampler={server.url}", "rounds.sampler_timeout=500", "rounds.sampler_workers=1"
        )
        command = [sys.executable, "-m", "preference_training.rounds", "sample", str(loop.directory), "--round", "1"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        try:
            while len(server.bodies("/v1/chat/completions")) < 2 and process.poll() is None:
                time.sleep(0.02)
            process.terminate()
            said, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 75, said
    assert said.endswith("stopped: SIGTERM\n")


# ---- before anything begins -------------------------------------------------------------------------------------------------


def problem(folder: Path, *more: str) -> str:
    """What is wrong with a loop, before it begins."""
    with pytest.raises(UserError) as error:
        start.check(configured(*loops.overrides(folder, *DPO, *more)))
    return str(error.value)


def test_a_server_that_is_not_there_or_lacks_what_is_needed_is_named_before_anything_begins(folder):
    assert (
        problem(folder, "rounds.sampler=vllm")
        == "rounds.sampler: found 'vllm', expected local, or http://HOST:PORT of a server."
    )
    assert "http://127.0.0.1:9/v1/models: unreachable. Start it first." in problem(folder, "rounds.sampler=http://127.0.0.1:9")
    with listening(Chats(answers_of_prompts)) as server:
        for url in (server.url, f"{server.url}/api"):
            found = problem(folder, f"rounds.sampler={url}")
            assert (
                f"{url} cannot take the weights of the policy each round: it has no /collective_rpc. Expected a vLLM" in found
            )
            assert "With rounds.sampler_weights=fixed its own model writes the responses." in found
        found = problem(folder, f"rounds.sampler={server.url}", "rounds.sampler_model=teachr")
        assert found == f"rounds.sampler_model: {server.url}/v1 has no such model; did you mean teacher?"
    with listening(Vllm(folder / "first" / "LATEST", "reload")) as vllm:
        found = problem(folder, f"rounds.sampler={vllm.url}", "+adapter=lora")
        assert "it has no /v1/load_lora_adapter. Expected a vLLM with --enable-lora" in found


def test_keys_of_servers_without_a_server_are_named(folder):
    config = configured(*loops.overrides(folder, *DPO, "rounds.sampler_workers=3"))
    assert start.check(config) == ["rounds.sampler_workers: without effect, since sampler is local"]
