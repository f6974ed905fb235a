"""Exports as real processes on one small run: the same log-probs, the same bytes on the hub, all or nothing."""

import importlib
import json
import os
import re
import resource
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from gguf import GGUFReader
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from preference_training.checkpointing.writer import publish
from preference_training.configuration.composition import compose_overrides
from preference_training.core.errors import UserError
from preference_training.export import directory, hub, policy_pt, quality
from preference_training.export.checkpoint import export, gguf_type
from preference_training.export.options import ExportOptions
from preference_training.export.policy_pt import convert
from preference_training.export.quality import describe_quality
from preference_training.export.quantization import check_quantization, group_size, quantization_config, quantize_weights
from preference_training.export.source import Source
from preference_training.modeling import loading, tokenizer
from preference_training.reporting.model_card import Quality, Quantized
from tests.architectures.tiny_models import build as tiny_model
from tests.data.test_tokenize_pairs import done, run
from tests.support import shown
from tests.support.files import ROOT
from tests.support.go_templates import read_modelfile
from tests.support.hub_stand_in import TOKEN, serving

CREATE = "ollama create me/toy --quantize q4_K_M -f"
TRAIN = (
    *("loss=dpo", "model.from_config.num_hidden_layers=1", "n_examples=32", "n_eval_examples=8", "do_first_eval=false"),
    *("eval_every=16", "sample_during_eval=false", "wandb.enabled=false", "reference_logps=live", "local_run_dir=runs/it"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with runs/it: a DPO run of two steps on the toy set, step-16 and step-32. All test processes share it."""
    # This process's own folder is in the one of all of them.
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "exported_run"
    with FileLock(shared.with_suffix(".lock")):
        if not shared.exists():
            shared.mkdir()
            done(run(shared, "train.py", *TRAIN))
    return shared


def logps(path, dtype=torch.float32, **options) -> torch.Tensor:
    """Log-probs [1, T, V] of a model on a dialogue."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options)
    return logps_of(model)


def logps_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(5, 45)[None]).logits.float().log_softmax(-1)


def options(tmp_path: Path, **values) -> ExportOptions:
    return ExportOptions(to=tmp_path / "out", **values)


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


# ---- a whole model, for Ollama and on the hub, by the script ----------------------------------------------------------------


def test_a_run_is_exported_to_a_directory_to_ollama_and_to_the_hub(folder, tmp_path, monkeypatch):
    with serving() as hub:
        hub.files["me/my_model"] = {"model-00007-of-00009.safetensors": b"stale", "notes.txt": b"mine"}
        hub.private["me/my_model"] = True
        monkeypatch.setenv("PATH", str(tmp_path))
        for name, value in {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}.items():
            monkeypatch.setenv(name, value)
        out = tmp_path / "my_model"
        arguments = ["--to", str(out), "--ollama", "me/toy", "--push", "me/my_model", "--private"]
        lines = done(script(folder, "scripts/export.py", "runs/it", *arguments))
    assert names(out) == {
        "README.md", "Modelfile", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    assert torch.equal(logps(out), logps(folder / "runs" / "it" / "LATEST"))
    sent = hub.files["me/my_model"]
    assert sent.pop("notes.txt") == b"mine", "what is not a weight stays"
    assert sent == {path.name: path.read_bytes() for path in out.iterdir()}, "the same bytes, and no stale weights"
    assert len(hub.commits) == 1
    served = dict(line.split(": ", 1) for line in lines if line.startswith("for "))
    assert served == {
        "for vLLM": f"vllm serve {out} --dtype float32",
        "for Ollama (not on this machine": f"https://ollama.com/download): {CREATE} {out / 'Modelfile'}",
    }
    assert lines[-1] == f"on the hub: {hub.address}/me/my_model"
    assert not [line for line in lines if TOKEN in line]
    commands = read_modelfile((out / "Modelfile").read_text())
    assert [name for name, _ in commands] == ["FROM", "TEMPLATE", "PARAMETER stop", "PARAMETER stop"]
    for path in out.iterdir():
        content = path.read_bytes()
        assert TOKEN.encode() not in content and str(folder).encode() not in content, path
    check_card(out, "me/my_model")


def script(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """A script on the network: only this machine's own is there."""
    environment = os.environ | {"HF_HUB_OFFLINE": "0"}
    command = [sys.executable, str(ROOT / arguments[0]), *arguments[1:]]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def check_card(out: Path, name: str) -> None:
    """The card's metadata are read by the hub's library, its numbers are the run's, and its snippet runs as it stands."""
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "transformers" and card.data.tags == ["dpo"]
    assert "no intervals" in card.text and "| loss/eval |" in card.text and "## Training\n" in card.text
    assert "`model.from_config.num_hidden_layers`" in card.text and "torch 2" in card.text
    [snippet] = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    printed = []
    exec(snippet.replace(repr(name), repr(str(out))), {"print": printed.append})
    assert len(printed) == 1 and isinstance(printed[0], str)


def test_the_exported_chat_template_writes_the_prompt_of_training(folder, tmp_path):
    export(folder / "runs" / "it" / "step-16", options(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "How do I clean a bike?"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "\n\nHuman: How do I clean a bike?\n\nAssistant:"
    assert "16 examples" in (tmp_path / "out" / "README.md").read_text(), "a checkpoint is exported as it was then"
    assert "| 32 |" not in (tmp_path / "out" / "README.md").read_text()


def test_what_a_server_does_to_the_weights_is_said(folder, tmp_path):
    _, note, vllm = export(folder / "runs" / "it", options(tmp_path))
    assert note.startswith("note: vLLM serves float32 weights in bfloat16 unless --dtype float32 is given")
    assert vllm == f"for vLLM: vllm serve {tmp_path / 'out'} --dtype float32"


def test_a_gguf_file_is_written_beside_its_modelfile_and_holds_the_same_model(folder, tmp_path):
    lines = export(folder / "runs" / "it", options(tmp_path, gguf="f32", ollama="toy"))
    out = tmp_path / "out"
    assert (out / "Modelfile").read_text().splitlines()[1] == "FROM ./out-f32.gguf"
    assert f"for llama.cpp: llama-server -m {out / 'out-f32.gguf'} --jinja" in lines
    assert not [line for line in lines if "pre-tokenizer" in line], "Ollama reads its name in the file"
    assert torch.equal(logps(out, gguf_file="out-f32.gguf"), logps(folder / "runs" / "it" / "LATEST"))
    [template] = GGUFReader(out / "out-f32.gguf").fields["tokenizer.chat_template"].contents().splitlines()
    assert template == (out / "chat_template.jinja").read_text()


@pytest.mark.parametrize(
    ("architecture", "values", "expected"),
    [
        ("LlamaForCausalLM", {"ollama": "x"}, None),
        ("LlamaForCausalLM", {"ollama": "x", "gguf": "auto"}, "bf16"),
        ("LlamaForCausalLM", {"gguf": "auto", "dtype": "float32"}, "f16"),
        # Ollama does not convert it from safetensors.
        ("Qwen3ForCausalLM", {"ollama": "x"}, "bf16"),
        ("GPTNeoXForCausalLM", {}, None),
    ],
)
def test_ollama_has_a_gguf_file_where_it_needs_one(architecture, values, expected, tmp_path):
    source = SimpleNamespace(stored_config={"architectures": [architecture]}, dtype="bfloat16")
    assert gguf_type(source, options(tmp_path, **values)) == expected


def test_an_export_is_a_model_that_can_be_trained_again(folder, tmp_path, compose):
    export(folder / "runs" / "it", options(tmp_path))
    config = compose(
        *("model=blank_model", f"model.name_or_path={tmp_path / 'out'}", "n_examples=16", "n_eval_examples=8", "loss=dpo"),
        *("batch_size=8", "eval_every=16", "sample_during_eval=false", "wandb.enabled=false", "reference_logps=live"),
        *(f"local_run_dir={tmp_path / 'run'}", f"local_dirs=[{tmp_path}]"),
    )
    train.run(config, tmp_path / "run")
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    [last] = [
        row["logps_eval/chosen"]
        for row in map(json.loads, (folder / "runs" / "it" / "metrics.jsonl").read_text().splitlines())
        if row.get("counters/examples") == 32 and "logps_eval/chosen" in row
    ]
    assert first["logps_eval/chosen"] == pytest.approx(last, rel=1e-6), "the held-out log-probs that the run ended with"


def test_weights_in_another_dtype_and_in_several_files_are_the_same_weights(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(directory, "SHARD_SIZE", "200KB")
    export(folder / "runs" / "it", options(tmp_path, dtype="bfloat16"))
    assert {"model.safetensors.index.json"} < names(tmp_path / "out") and "model.safetensors" not in names(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert torch.equal(logps(tmp_path / "out", torch.bfloat16), logps(folder / "runs" / "it" / "LATEST", torch.bfloat16))


def test_file_modes_follow_the_umask(folder, tmp_path):
    export(folder / "runs" / "it", options(tmp_path))
    umask = os.umask(0)
    os.umask(umask)
    for path in (tmp_path / "out").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~umask


def scripts(name: str, monkeypatch):
    """A module of scripts/."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module(name)


def called(name: str, arguments: list[str], monkeypatch, capsys) -> tuple[int, str, str]:
    """Exit status, and what is printed and said of errors, of a script that is called in this process."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    capsys.readouterr()
    try:
        scripts(name, monkeypatch).main()
        status = 0
    except SystemExit as end:
        status = end.code
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_the_commands_of_the_readme_are_understood(monkeypatch):
    """They differ from those that are run here in their paths and names."""
    lines = [words for _, words in shown.commands(r"python scripts/(export|convert_policy_pt)\.py")]
    assert {command[1] for command in lines} == {"scripts/export.py", "scripts/convert_policy_pt.py"}
    for _, name, *arguments in lines:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        assert scripts(Path(name).stem, monkeypatch).arguments().to == Path(arguments[arguments.index("--to") + 1])


@pytest.mark.parametrize("name", ["export", "convert_policy_pt"])
def test_a_mistake_is_one_line_and_status_2(name, tmp_path, monkeypatch, capsys):
    needed = [] if name == "export" else ["--model", "tiny"]
    status, out, err = called(name, [tmp_path / "absent", *needed, "--to", tmp_path / "out"], monkeypatch, capsys)
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert err.startswith(f"{tmp_path / 'absent'}: no such ")


# ---- what cannot be done ----------------------------------------------------------------------------------------------------


def test_leftovers_of_a_killed_export_are_replaced(folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "model.safetensors").write_bytes(b"half")
    export(folder / "runs" / "it", options(tmp_path))
    assert names(tmp_path) == {"out"}
    assert torch.equal(logps(tmp_path / "out"), logps(folder / "runs" / "it" / "LATEST"))


def test_a_full_disk_is_one_message_and_leaves_nothing(folder, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(
            UserError, match="--to: cannot write .*out: File too large. Expected a writable folder with enough space"
        ):
            export(folder / "runs" / "it", options(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == set()


def test_a_lack_of_space_is_noticed_before_writing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(UserError, match=r"--to: cannot write .*out: \d MiB needed, 0 MiB free"):
        export(folder / "runs" / "it", options(tmp_path))
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"merge": True}, "--merge: this checkpoint holds full weights"),
        ({"private": True}, "--private: applies to an upload only"),
        ({"ollama": "a b"}, "--ollama: found 'a b', expected a name"),
        ({"ollama": "x", "quantize": "int8"}, "--quantize: Ollama quantizes the full weights itself"),
        ({"quantize": "int9"}, "--quantize: no format 'int9'; did you mean int8?"),
        ({"quantize": "gptq"}, "--quantize: no format 'gptq'"),
        (
            {"gguf": "q4_k_m"},
            "--gguf: q4_k_m is written by llama.cpp's own program alone. Export with --gguf f16, then: llama-quan",
        ),
        ({"gguf": "q4_9"}, "--gguf: no type 'q4_9'; did you mean q4_"),
        ({"gguf": "q8_0", "quantize": "int8"}, "--quantize: a GGUF file has quantized weights of its own. Use --gguf q8_0"),
        ({"push": "me/it"}, "--push: no hub token"),
    ],
)
def test_options_that_cannot_be_satisfied_are_refused_and_nothing_is_written(values, told, folder, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(UserError) as refusal:
        export(folder / "runs" / "it", options(tmp_path, **values))
    assert str(refusal.value).startswith(told)
    assert names(tmp_path) == set()


def unlike_llama_cpp(checkpoint: Path) -> None:
    edit(checkpoint / "config.json", hidden_act="gelu")


def cut_otherwise(checkpoint: Path) -> None:
    described = json.loads((checkpoint / "tokenizer.json").read_text())
    cut = {"type": "Split", "pattern": {"Regex": r"\w+|\W"}, "behavior": "Isolated", "invert": False}
    edit(checkpoint / "tokenizer.json", pre_tokenizer={"type": "Sequence", "pretokenizers": [cut, described["pre_tokenizer"]]})


def with_more_biases(checkpoint: Path) -> None:
    edit(checkpoint / "config.json", architectures=["Qwen3ForCausalLM"], model_type="qwen3", attention_bias=True)


def without_groups(checkpoint: Path) -> None:
    edit(checkpoint / "config.json", intermediate_size=48)


def with_experts(checkpoint: Path) -> None:
    edit(checkpoint / "config.json", architectures=["MixtralForCausalLM"], model_type="mixtral", num_local_experts=4)


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("change", "values", "told"),
    [
        (unlike_llama_cpp, {"gguf": "f16"}, "its activation is gelu, and llama.cpp computes silu"),
        (cut_otherwise, {"gguf": "f16"}, "llama.cpp knows no pre-tokenizer that cuts words as this tokenizer does"),
        (with_more_biases, {"gguf": "f16"}, "has model.layers.0.self_attn.q_proj.bias, which qwen3 of llama.cpp lacks"),
        (without_groups, {"quantize": "int4"}, "int4 needs linear layers whose inputs are multiples of 32"),
        (with_experts, {"quantize": "int4"}, "int4 is not written for mixtures of experts"),
        (lambda checkpoint: None, {"quantize": "int4"}, "int4 is calibrated with the run's training rows"),
    ],
)
def test_what_a_format_cannot_represent_is_refused_before_weights_are_read_and_the_hub_is_asked(
    change, values, told, folder, tmp_path, monkeypatch
):
    copy = Path(shutil.copytree(folder / "runs" / "it" / "step-16", tmp_path / "copy"))
    change(copy)
    monkeypatch.setattr(Source, "load_model", None)
    monkeypatch.setattr(hub, "reserve", None)
    monkeypatch.setattr(quality, "read_entries", gone)
    with pytest.raises(UserError, match=told):
        export(published(copy), options(tmp_path, push="me/it", **values))
    assert names(tmp_path) == {"step-16", "LATEST"}


def gone(config):
    raise UserError("datasets: mine.jsonl is gone")


def test_a_destination_that_is_taken_is_refused(folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UserError, match="--to: .*out is not empty"):
        export(folder / "runs" / "it", options(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--to: .*file is not a directory"):
        export(folder / "runs" / "it", ExportOptions(tmp_path / "file"))
    with pytest.raises(UserError, match="--to: .*absent does not exist"):
        export(folder / "runs" / "it", ExportOptions(tmp_path / "absent" / "out"))
    assert names(tmp_path) == {"out", "file"}


def test_other_paths_and_damaged_checkpoints_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="that: no such directory. Expected a run directory"):
        Source.read(tmp_path / "that")
    with pytest.raises(UserError, match="checksums.json is missing or damaged. Expected a run directory"):
        Source.read(tmp_path)
    damaged = Path(shutil.copytree(folder / "runs" / "it", tmp_path / "it", symlinks=True))
    weights = damaged / "step-32" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(UserError, match="step-32: model.safetensors is not what was written"):
        Source.read(damaged)
    assert Source.read(damaged / "step-16").examples == 16


def published(checkpoint: Path) -> Path:
    """A changed checkpoint with checksums that agree with it, as step-16 beside it."""
    (checkpoint / "checksums.json").unlink(missing_ok=True)
    place = checkpoint.with_name("step-16")
    publish(checkpoint, place)
    return place


@pytest.mark.parametrize("trained", [16, 32])
def test_only_an_evaluation_of_the_exported_checkpoint_is_in_the_card(trained, folder, tmp_path):
    copy = Path(shutil.copytree(folder / "runs" / "it", tmp_path / "it", symlinks=True))
    numbers = {"examples": 8, "prompts": 6, "loss/eval": {"mean": 0.6, "low": 0.5, "high": 0.7}}
    (copy / "results.json").write_text(json.dumps({"examples_trained": trained, "held_out": {"all": numbers}}))
    export(copy, options(tmp_path))
    assert ("| loss/eval | 0.6 | 0.5 to 0.7 |" in (tmp_path / "out" / "README.md").read_text()) == (trained == 32)


def forged(folder: Path, tmp_path: Path, change) -> Path:
    """A copy of a checkpoint with another state.json, and checksums that agree with it."""
    copy = Path(shutil.copytree(folder / "runs" / "it" / "step-16", tmp_path / "forged"))
    state = json.loads((copy / "state.json").read_text())
    change(state)
    (copy / "state.json").write_text(json.dumps(state))
    return published(copy)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda state: state.pop("run"), "state.run"),
        (lambda state: state["run"]["config"].update(datasets=3), "state.run.config.datasets"),
        (lambda state: state.update(held_out={"loss/eval": "low"}), "state.held_out"),
        (lambda state: state["run"]["config"].pop("loss"), "state.run.config.loss"),
    ],
)
def test_a_value_of_another_kind_in_state_json_is_a_damaged_checkpoint(change, part, folder, tmp_path):
    with pytest.raises(UserError, match=rf"step-16: state.json is damaged \({re.escape(part)}"):
        Source.read(forged(folder, tmp_path, change))


def test_code_next_to_a_checkpoint_does_not_run_unless_trusted(folder, tmp_path):
    trace = tmp_path / "executed"
    hostile = Path(shutil.copytree(folder / "runs" / "it" / "step-16", tmp_path / "hostile"))
    (hostile / "own.py").write_text(f"open({str(trace)!r}, 'w').close()\n")
    for name, kinds in (("config.json", ("AutoConfig", "AutoModelForCausalLM")), ("tokenizer_config.json", ("AutoTokenizer",))):
        values = json.loads((hostile / name).read_text())
        auto_map = {kind: ["own.Own", "own.Own"] if kind == "AutoTokenizer" else "own.Own" for kind in kinds}
        (hostile / name).write_text(json.dumps(values | {"auto_map": auto_map}))
    state = json.loads((hostile / "state.json").read_text())
    state["run"]["config"]["model"]["trust_remote_code"] = True
    (hostile / "state.json").write_text(json.dumps(state))
    export(published(hostile), options(tmp_path))
    assert not trace.exists() and "own.py" not in names(tmp_path / "out")


# ---- adapters ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(folder, tmp_path) -> Path:
    """A checkpoint of a LoRA run: peft's two files beside what every checkpoint has, and no whole weights."""
    from peft import LoraConfig, get_peft_model

    made = Path(shutil.copytree(folder / "runs" / "it" / "step-16", tmp_path / "run" / "made"))
    base = AutoModelForCausalLM.from_pretrained(folder / "runs" / "it" / "step-16", dtype=torch.float32)
    torch.manual_seed(0)
    wanted = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(base, wanted).save_pretrained(made)
    for name in ("model.safetensors", "config.json", "README.md"):
        (made / name).unlink(missing_ok=True)
    # Of its base nothing is known: the run whose state this was began with other weights.
    state = json.loads((made / "state.json").read_text())
    state["run"]["began_with"] = None
    (made / "state.json").write_text(json.dumps(state))
    return published(made)


def test_an_adapter_is_exported_as_one(adapter, folder, tmp_path):
    line, vllm = export(adapter, options(tmp_path))
    out = tmp_path / "out"
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= names(out)
    assert "model.safetensors" not in names(out) and "state.json" not in names(out)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (out / name).read_bytes() == (adapter / name).read_bytes()
    # One layer, r = 2: [2, 128] and [128, 2].
    assert "512 parameters" in line
    # Chat template and end tokens are those of training, not of the base model. The rank is the smallest that vLLM takes.
    serving = f"--max-lora-rank 8 --tokenizer {out} --generation-config {out} --chat-template {out / 'chat_template.jinja'}"
    base = folder / "runs" / "it" / "step-16"
    assert vllm == f"for vLLM: vllm serve {base} --enable-lora --lora-modules out={out} {serving} --dtype float32"
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "peft" and card.data.tags == ["dpo", "lora"]


@pytest.mark.parametrize("values", [{"dtype": "bfloat16"}, {"quantize": "int8"}, {"ollama": "x"}, {"gguf": "f16"}])
def test_what_needs_a_whole_model_asks_for_merge(values, adapter, tmp_path):
    with pytest.raises(UserError, match=r"this checkpoint holds an adapter\. Add --merge"):
        export(adapter, options(tmp_path, **values))


def test_a_merged_adapter_is_a_whole_model(adapter, folder, tmp_path):
    from peft import PeftModel

    export(adapter, options(tmp_path, merge=True, ollama="toy"))
    assert {"model.safetensors", "Modelfile"} < names(tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(folder / "runs" / "it" / "step-16", dtype=torch.float32)
    torch.testing.assert_close(logps(tmp_path / "out"), logps_of(PeftModel.from_pretrained(base, adapter).merge_and_unload()))
    assert not torch.equal(logps(tmp_path / "out"), logps(folder / "runs" / "it" / "step-16"))


def test_an_export_that_gives_another_model_is_refused_and_nothing_is_left(folder, tmp_path, monkeypatch):
    save = loading.save_model

    def damaged(model, directory, **options):
        with torch.no_grad():
            model.model.norm.weight.mul_(1.001)
        save(model, directory, **options)

    monkeypatch.setattr(loading, "save_model", damaged)
    with pytest.raises(UserError, match=r"the exported model is not the run's: its log-probs differ by [\d.e-]+ per token"):
        export(folder / "runs" / "it", options(tmp_path))
    assert names(tmp_path) == set()


def test_a_comparison_without_log_probs_for_lack_of_memory_is_noted(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("preference_training.checkpointing.saved_models.free_memory", lambda _: 1000)
    _, note, *_ = export(folder / "runs" / "it", options(tmp_path))
    assert note.startswith("note: not enough memory to compare log-probs")
    assert torch.equal(logps(tmp_path / "out"), logps(folder / "runs" / "it" / "LATEST"))


def test_the_effect_of_rounding_to_a_shorter_dtype_is_noted(folder, tmp_path):
    _, note, vllm = export(folder / "runs" / "it", options(tmp_path, dtype="bfloat16"))
    assert re.fullmatch(r"note: rounding the weights to bfloat16 changes log-probs by up to [\d.e-]+ nats per token", note)
    assert vllm == f"for vLLM: vllm serve {tmp_path / 'out'}"


def test_checkpoint_and_export_have_the_chat_template_and_the_end_tokens_of_training(folder, tmp_path):
    export(folder / "runs" / "it", options(tmp_path))
    turns = ("user", "How?"), ("assistant", "So."), ("user", "Why?")
    messages = [{"role": role, "content": content} for role, content, *_ in turns]
    for path in (folder / "runs" / "it" / "LATEST", tmp_path / "out"):
        tokenizer = AutoTokenizer.from_pretrained(path)
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert text == "\n\nHuman: How?\n\nAssistant: So.\n\nHuman: Why?\n\nAssistant:"
        values = json.loads((path / "generation_config.json").read_text())
        assert values["eos_token_id"] == tokenizer.eos_token_id and values["pad_token_id"] == tokenizer.pad_token_id


def test_an_adapter_on_a_model_from_scratch_is_exported_with_that_model(folder, tmp_path, compose):
    from peft import PeftModel

    config = compose(*TRAIN[:-1], "+adapter=lora", f"local_run_dir={tmp_path / 'run'}", f"local_dirs=[{tmp_path}]")
    train.run(config, tmp_path / "run")
    for values in ({}, {"merge": True}):
        export(tmp_path / "run", ExportOptions(tmp_path / f"out{len(values)}", **values))
    shutil.rmtree(tmp_path / "run")
    base = json.loads((tmp_path / "out0" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(tmp_path / "out0" / "base")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "out0")
    torch.testing.assert_close(logps(tmp_path / "out1"), logps_of(plain), rtol=1e-5, atol=1e-5)
    assert (logps(tmp_path / "out1") - logps(base)).abs().max() > 1e-4


# ---- quantization -----------------------------------------------------------------------------------------------------------


def test_int8_weights_load_as_they_were_quantized(folder, tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    lines = export(folder / "runs" / "it", options(tmp_path, quantize="int8"))
    assert "note: vLLM needs the package torchao for int8 weights: pip install torchao" in lines
    assert f"for vLLM: vllm serve {tmp_path / 'out'} --dtype float32" in lines
    whole = Source.read(folder / "runs" / "it" / "LATEST").load_model()
    before = logps_of(whole)
    quantize_(whole.model.layers, Int8WeightOnlyConfig())
    found = logps(tmp_path / "out")
    assert torch.equal(found, logps_of(whole))
    # Half a step of 255, of each weight's row: a small difference, and one.
    assert 0 < (found - before).abs().max() < 0.05
    card = (tmp_path / "out" / "README.md").read_text()
    assert "quantized (int8)" in card
    # Of the eight held-out pairs of the run.
    [line] = [line for line in lines if line.startswith("note: int8: held-out")]
    found = re.fullmatch(
        r"note: int8: held-out perplexity (\S+), (\S+) in full \((\S+)%\); reward accuracy (\S+), (\S+) in full; 8 examples",
        line,
    )
    after, full, rise, accuracy, accuracy_in_full = map(float, found.groups())
    assert rise == pytest.approx(100 * (after / full - 1), abs=0.1) and abs(rise) < 5
    assert f"| int8 | {found[1]} | {found[4]} |" in card and f"| full | {found[2]} | {found[5]} |" in card
    held_out = Source.read(folder / "runs" / "it" / "LATEST").held_out
    assert accuracy_in_full == pytest.approx(held_out["rewards_eval/accuracies"], abs=1e-3)
    # Random tokens of a model that has hardly learned anything: exp of the mean surprise of a token, below the vocabulary.
    assert 1 < full < 1000 and abs(accuracy - accuracy_in_full) <= 0.125


@pytest.mark.long
def test_int4_weights_are_calibrated_on_the_runs_rows_and_plain_transformers_loads_them(folder, tmp_path, monkeypatch):
    for name, value in {"checkpoint.WINDOWS": 4, "checkpoint.WINDOW": 64, "quantization.CPU_STEPS": 2}.items():
        monkeypatch.setattr(f"preference_training.export.{name}", value)
    lines = export(folder / "runs" / "it", options(tmp_path, quantize="int4"))
    out = tmp_path / "out"
    assert names(out) == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja",
    }  # fmt: skip
    quantization = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (quantization["quant_method"], quantization["format"]) == ("compressed-tensors", "pack-quantized")
    assert quantization["config_groups"]["group_0"]["weights"]["num_bits"] == 4 and quantization["ignore"] == ["lm_head"]
    assert (out / "model.safetensors").stat().st_size < (folder / "runs" / "it" / "LATEST" / "model.safetensors").stat().st_size
    difference = (logps(out) - logps(folder / "runs" / "it" / "LATEST")).abs().max()
    assert 0 < difference < 1
    assert any(line.startswith("note: int4: held-out perplexity ") for line in lines)
    card = (out / "README.md").read_text()
    assert "Requires compressed-tensors in addition" in card and "| int4 |" in card
    assert (
        "note: vLLM reads int4 weights as they are; transformers needs compressed-tensors: pip install compressed-tensors"
        in lines
    )


def test_a_model_of_its_own_code_is_quantized_where_that_is_trusted(folder, tmp_path):
    own = Path(shutil.copytree(folder / "runs" / "it" / "LATEST", tmp_path / "own"))
    text = "from transformers import LlamaConfig, LlamaForCausalLM\nclass OwnConfig(LlamaConfig): model_type = 'own'\n"
    (own / "own.py").write_text(text + "class Own(LlamaForCausalLM): config_class = OwnConfig\n")
    edit(own / "config.json", model_type="own", auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"})
    quantize_weights(own, "int8", "float32", trust_remote_code=True)
    difference = logps(own, trust_remote_code=True) - logps(folder / "runs" / "it" / "LATEST")
    assert 0 < difference.abs().max() < 0.05


def test_a_gguf_file_of_4_bits_says_what_it_costs(folder, tmp_path):
    lines = export(folder / "runs" / "it", options(tmp_path, gguf="q4_0"))
    [line] = [line for line in lines if line.startswith("note: q4_0: held-out perplexity ")]
    assert "8 examples" in line and "| q4_0 |" in (tmp_path / "out" / "README.md").read_text()


def test_without_the_rows_of_the_run_int8_is_not_measured_and_int4_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "read_entries", gone)
    run_dir = folder / "runs" / "it"
    with pytest.raises(UserError, match=r"--quantize: int4 is calibrated with the run's training rows.*mine.jsonl is gone"):
        export(run_dir, options(tmp_path, quantize="int4"))
    assert names(tmp_path) == set()
    lines = export(run_dir, options(tmp_path, quantize="int8"))
    note = "note: what quantization costs was not measured: the run's rows cannot be read: datasets: mine.jsonl is gone"
    assert note in lines and "## Quantization" not in (tmp_path / "out" / "README.md").read_text()


def test_a_loss_beyond_the_limits_is_a_warning():
    full = Quality(10.0, 0.8, 100)
    kept = Quantized("int4", full, Quality(10.4, 0.79, 100))
    assert describe_quality(kept) == [
        "int4: held-out perplexity 10.4, 10 in full (+4.0%); reward accuracy 0.79, 0.8 in full; 100 examples"
    ]
    _, warning = describe_quality(Quantized("q4_0", full, Quality(12.0, 0.7, 100)))
    assert warning == (
        "warning: q4_0 loses much: perplexity rises by 20.0%, more than 5% and reward accuracy falls by 0.100, more than 0.02"
    )
    [line] = describe_quality(Quantized("int8", Quality(10.0, None, 1), Quality(9.9, None, 1)))
    assert line == "int8: held-out perplexity 9.9, 10 in full (-1.0%); 1 example"
    # No number is no loss that is small.
    assert len(describe_quality(Quantized("int8", full, Quality(float("nan"), 0.8, 1)))) == 2


def test_without_the_packages_of_int4_the_message_has_the_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "auto_round", None)
    with pytest.raises(UserError, match=r"--quantize: int4 needs the packages .* pip install -r requirements/int4.txt"):
        check_quantization("int4")


def test_int4_is_refused_for_experts_and_for_layers_without_groups():
    assert [group_size(tiny_model(name)) for name in ("llama", "gpt_neox")] == [32, 32]
    with pytest.raises(UserError, match=r"int4 is not written for mixtures of experts"):
        group_size(tiny_model("mixtral"))
    model = tiny_model("llama")
    model.model.layers[0].mlp.down_proj = torch.nn.Linear(48, 32)
    with pytest.raises(UserError, match=r"int4 needs linear layers whose inputs are multiples of 32, found \[32, 48, 64\]"):
        group_size(model)


def test_without_torchao_the_message_has_the_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match=r"--quantize: .* pip install -r requirements/export.txt"):
        quantization_config("int8")


def shortened(model):
    """A model with weights in bfloat16, and what is computed from its configuration as it was."""
    for weight in model.parameters():
        weight.data = weight.data.bfloat16()
    return model


# ---- the original code's archives -------------------------------------------------------------------------------------------


def test_an_original_policy_pt_becomes_a_directory_that_loads(tmp_path, compose, monkeypatch, capsys):
    torch.manual_seed(0)
    config = compose("model=tiny").model
    model = loading.load_model(config, tokenizer.load_tokenizer(config))
    archive = {"step_idx": 159_744, "state": model.state_dict(), "metrics": {"loss/eval": 0.58, "rewards": [1.0]}}
    torch.save(archive, tmp_path / "policy.pt")
    command = ["policy.pt", "--model", "tiny", "--to", "out", "--dtype", "bfloat16"]
    monkeypatch.chdir(tmp_path)
    status, line, _ = called("convert_policy_pt", command, monkeypatch, capsys)
    assert status == 0
    assert line.startswith("out: LlamaForCausalLM, ")
    assert torch.equal(logps(tmp_path / "out", torch.bfloat16), logps_of(shortened(model)))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "159,744 examples" in card and "| loss/eval | 0.58 |" in card and "does not record the training data" in card
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("Human: Hi").input_ids


def test_a_preset_that_leaves_the_dtype_to_the_device_is_converted_in_float32(tmp_path, compose, monkeypatch):
    config = compose("model=tiny").model
    model = loading.load_model(config, tokenizer.load_tokenizer(config))
    torch.save({"state": model.state_dict()}, tmp_path / "policy.pt")
    values = compose_overrides("model=tiny")[0].model
    values.policy_dtype = None
    monkeypatch.setattr(policy_pt, "compose_overrides", lambda _: [SimpleNamespace(model=values)])
    convert(tmp_path / "policy.pt", "tiny", tmp_path / "out")
    assert torch.equal(logps(tmp_path / "out"), logps_of(model))


def test_an_archive_of_this_project_belongs_to_a_directory_of_the_model(folder, tmp_path):
    latest = folder / "runs" / "it" / "LATEST"
    convert(latest / "policy.pt", str(latest), tmp_path / "out")
    assert torch.equal(logps(tmp_path / "out"), logps(latest))


def test_invalid_archives_and_archives_of_other_models_are_refused(folder, tmp_path):
    latest = folder / "runs" / "it" / "LATEST"
    for archive, model, told in (
        (tmp_path / "absent.pt", "tiny", "absent.pt: no such file"),
        (latest / "policy.pt", "tinny", "--model: no preset 'tinny', and no directory; did you mean tiny?"),
        # The run's model has one layer, the preset four.
        (latest / "policy.pt", "tiny", "does not fit LlamaForCausalLM"),
        (latest / "state.json", "tiny", "cannot be read as tensors"),
    ):
        with pytest.raises(UserError, match=re.escape(told)):
            convert(archive, model, tmp_path / "out")
    assert names(tmp_path) == set()
