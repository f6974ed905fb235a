"""Safe to open: nothing of a model, a data set or a checkpoint is executed, and nothing secret or unreadable is left behind."""

import ast
import gzip
import io
import json
import os
import pickle
import re
import shutil
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from preference_training.checkpointing.checkpoint import find_damage
from preference_training.core.errors import UserError
from preference_training.core.files import load_tensors
from preference_training.data.entries import load_records, read_entry
from preference_training.data.rendering.chat_rendering import ConversationError
from preference_training.data.rows.templates import build_template
from preference_training.modeling.archives import read_archive
from preference_training.modeling.loading import load_model
from preference_training.modeling.tokenizer import byte_level_tokenizer, load_tokenizer
from tests.support import forked
from tests.support.files import GOLDEN, ROOT

SOURCES = [*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py"), *ROOT.glob("preference_training/**/*.py")]


# ---- the code -------------------------------------------------------------------------------------------------------------

# What runs or unpickles what it is given, by the last part of its name.
RISKY = {
    *("eval", "exec", "compile", "exec_module", "__import__", "instantiate", "get_class", "get_method", "system", "popen"),
    *("load", "loads", "unsafe_load", "full_load", "read_pickle", "Unpickler", "extractall", "unpack_archive", "run_path"),
    *("all_gather_object", "broadcast_object_list", "scatter_object_list", "gather_object", "send_object_list"),
}
# Where each of them stands, and that is all there is. Objects go only between the processes of one run.
KNOWN = {
    "torch.load": ["files.py"],
    "spec.loader.exec_module": ["files.py"],
    "torch.distributed.all_gather_object": ["process_group.py"],
    "torch.distributed.broadcast_object_list": ["process_group.py"],
    # Kernels of a module that is there.
    "child.compile": ["kernels.py"],
    # Generated code, in the isolated process: see the next test.
    "compile": ["child.py"],
    "exec": ["child.py"],
    # In the same process, what the one that starts it has written; that one reads JSON.
    "marshal.loads": ["child.py"],
}
# Methods of ours; those of `Ranks` hand objects on to the calls in process_group.py.
OWN = ("entry.dataset.load", "gguf_model.load", "self.all_gather_object", "self.step.updater.load")
HARMLESS = ("json.", "tomllib.", "re.", "OmegaConf.", "dcp.", "model.", "policy.", "copy.", "torch.compile", "hub.load")


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return [(ast.unparse(node.func), node) for node in nodes]


def test_what_could_execute_data_stands_in_few_known_places():
    found: dict[str, list[str]] = {}
    for path in SOURCES:
        for name, _ in calls(path):
            own = name.endswith((".eval", "ranks.all_gather_object")) or name.startswith(HARMLESS) or name in OWN
            if name.rsplit(".", 1)[-1] in RISKY and not own:
                found.setdefault(name, []).append(path.name)
    assert found == KNOWN
    imports = [node for path in SOURCES for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import)]
    imported = {alias.name for node in imports for alias in node.names}
    assert not imported & {
        "pickle",
        "shelve",
        "dill",
        "cloudpickle",
        "joblib",
        "runpy",
        "tarfile",
        "zipfile",
        "yaml",
    }


def test_what_executes_generated_code_is_imported_by_nothing_and_its_text_goes_to_the_sandbox_only():
    nodes = [node for path in SOURCES for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    imported = {f"{node.module}.{alias.name}" for node in nodes for alias in node.names} | {node.module for node in nodes}
    assert "preference_training.sandbox.sandbox" in imported and "preference_training.sandbox.child" not in imported
    assert [path.name for path in SOURCES if "child.py" in path.read_text()] == ["sandbox.py"]


def test_the_one_call_that_could_unpickle_takes_only_tensors_and_plain_values():
    [call] = [node for name, node in calls(ROOT / "preference_training" / "core" / "files.py") if name == "torch.load"]
    assert {word.arg: ast.unparse(word.value) for word in call.keywords}["weights_only"] == "True"
    words = [word for path in SOURCES for _, node in calls(path) for word in node.keywords]
    assert not [word for word in words if word.arg in ("allow_pickle", "shell") and ast.unparse(word.value) != "False"]


def test_every_test_that_the_security_page_names_is_there():
    named = re.findall(r"`(test_\w+)`", (ROOT / "SECURITY.md").read_text())
    tests = {
        name for path in ROOT.glob("tests/**/test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    assert len(named) > 15 and set(named) <= tests


# ---- models and tokenizers ------------------------------------------------------------------------------------------------


class Hostile:
    """Unpickled, it makes a file."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


@pytest.fixture
def trace(tmp_path):
    """The file that every payload would make; it must not be there at the end."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists()


def code(trace: Path) -> str:
    return f"open({str(trace)!r}, 'w').close()\n"


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A directory with the golden model and tokenizer; code that comes with a model would be copied below `tmp_path`."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    shutil.copytree(GOLDEN / "llama", tmp_path / "model")
    return Path(shutil.copytree(GOLDEN / "tokenizer", tmp_path / "model", dirs_exist_ok=True))


@pytest.fixture
def load(compose):
    """Load tokenizer and model of a directory, as a run does."""

    def loaded(directory: Path, *overrides: str):
        config = compose("model=blank_model", f"model.name_or_path={directory}", *overrides).model
        return load_model(config, load_tokenizer(config))

    return loaded


def change(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def code_of_a_tokenizer(model: Path, trace: Path) -> None:
    own = "from transformers import PreTrainedTokenizerFast\nclass Own(PreTrainedTokenizerFast): pass\n"
    (model / "tokenizer.py").write_text(code(trace) + own)
    names = {"AutoTokenizer": ["tokenizer.Own", "tokenizer.Own"]}
    change(model / "tokenizer_config.json", auto_map=names, tokenizer_class="Own")


def code_of_a_model(model: Path, trace: Path) -> None:
    own = "from transformers import LlamaConfig, LlamaForCausalLM\nclass OwnConfig(LlamaConfig): model_type = 'own'\n"
    own += "class Own(LlamaForCausalLM): config_class = OwnConfig\n"
    (model / "own.py").write_text(code(trace) + own)
    change(model / "config.json", auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}, model_type="own")


@pytest.mark.parametrize("add", [code_of_a_tokenizer, code_of_a_model])
def test_code_that_comes_with_a_model_runs_only_where_it_is_asked_for_by_name(add, model, load, trace):
    add(model, trace)
    with pytest.raises(UserError, match="custom code.*Code that comes with it runs only with model.trust_remote_code=true"):
        load(model)
    assert not trace.exists()
    load(model, "model.trust_remote_code=true")
    # The payload works.
    trace.unlink()


def test_code_for_generation_that_lies_beside_a_model_is_left_alone(model, load, trace):
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(code(trace) + "def generate(model, *args, **kwargs): pass\n")
    policy = load(model)
    policy.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=1)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_kernel_of_the_hub_that_a_configuration_names_is_not_fetched(key, model, load):
    change(model / "config.json", **{key: "someone/kernel"})
    with pytest.raises(UserError, match="model.name_or_path: .*asks for the code of someone/kernel"):
        load(model)


def test_weights_in_a_pickle_are_refused(model, load, trace):
    (model / "model.safetensors").unlink()
    torch.save({"weight": Hostile(trace)}, model / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"model.name_or_path: .* it holds (io|_io)\.open, and nothing but tensors"):
        load(model)
    torch.load(model / "pytorch_model.bin", weights_only=False)
    # The payload works.
    trace.unlink()


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\xff" * 8 + b"{}"], ids=["empty", "text", "a huge header"])
def test_weights_that_are_damaged_are_one_message(content, model, load):
    (model / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="model.name_or_path: .* could not be loaded"):
        load(model)


@pytest.mark.parametrize("values", [{"model_type": ["x"]}, {"hidden_size": "wide"}, {"vocab_size": -1}])
def test_a_configuration_that_is_damaged_is_one_message(values, model, load):
    change(model / "config.json", **values)
    with pytest.raises(UserError, match="could not be loaded"):
        load(model)


NAMES = {
    "above": "../outside.safetensors",
    "absolute": "/etc/passwd",
    "far above": "../../../../etc/passwd",
    "below": "a/b.safetensors",
    "no weights": "config.json",
    "number": 5,
    "null": None,
    "list": ["x"],
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_an_index_of_weights_cannot_lead_out_of_its_directory(kind, name, model, load):
    # What lies outside would fit the model, and be taken without a word.
    weights = list(load_file(model / "model.safetensors"))
    (model / "model.safetensors").rename(model.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
    (model / f"{kind}.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"model.name_or_path: .*{kind}.index.json names"):
        load(model)
    if kind == "model.safetensors":
        with pytest.raises(UserError, match=f"model.archive: .*{kind}.index.json names"):
            read_archive(model)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"weight_map": [1]}', "{}", "5", ""], ids=lambda text: text[:20])
def test_an_index_that_is_damaged_is_one_message(content, model, load):
    (model / "model.safetensors.index.json").write_text(content)
    for attempt in (load, read_archive):
        with pytest.raises(UserError, match=r"index.json is damaged"):
            attempt(model)


def test_a_chat_template_cannot_reach_python(model, compose, trace):
    reach = "{% for c in ''.__class__.__mro__[1].__subclasses__() if c.__name__ == 'Popen' %}"
    (model / "chat_template.jinja").write_text(f"{reach}{{{{ c(['touch', '{trace}']).wait() }}}}{{% endfor %}}")
    tokenizer = load_tokenizer(compose("model=blank_model", f"model.name_or_path={model}").model)
    with pytest.raises(ConversationError, match="unsafe"):
        build_template("chat", None, tokenizer)("Hello?", ["Yes."])


def test_trust_is_not_given_by_the_section_of_a_models_own_values(compose):
    config = compose(
        "model=blank_model", f"model.name_or_path={GOLDEN / 'llama'}", "++model.from_config.trust_remote_code=true"
    ).model
    assert config.trust_remote_code is False
    assert load_model(config, byte_level_tokenizer()).config.model_type == "llama"


# ---- data -----------------------------------------------------------------------------------------------------------------


def rows_of(entry) -> list:
    return [record for split in ("train", "test") for record in load_records(read_entry(entry), split)]


SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_in_place_of_a_data_file_is_refused(suffix, protocol, tmp_path, trace):
    path = tmp_path / f"rows{suffix}"
    content = pickle.dumps([Hostile(trace)], protocol)
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    with pytest.raises(UserError, match=f"datasets: .*rows{suffix}"):
        rows_of(str(path))


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside data"])
def test_a_loading_script_in_a_data_sets_directory_is_refused(beside, tmp_path, trace):
    directory = tmp_path / "own_set"
    directory.mkdir()
    own = "import datasets\nclass Own(datasets.GeneratorBasedBuilder): pass\n"
    (directory / "own_set.py").write_text(code(trace) + own)
    if beside:
        (directory / "train.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    for entry in (str(directory), str(directory / "own_set.py")):
        with pytest.raises(UserError, match="scripts are no longer supported"):
            rows_of(entry)


def test_pickles_in_a_data_sets_directory_are_refused(tmp_path, trace):
    directory = tmp_path / "own_set"
    directory.mkdir()
    (directory / "train.pkl").write_bytes(pickle.dumps(Hostile(trace)))
    with pytest.raises(UserError, match="could not be loaded: No"):
        rows_of(str(directory))
    with pytest.raises(UserError, match="could not be loaded: Pickle loading .* is disabled"):
        rows_of({"path": "pandas", "data_dir": str(directory)})


def test_an_archive_in_a_data_sets_directory_is_not_unpacked_and_not_unpickled(tmp_path, trace):
    directory, weights = tmp_path / "own_set", io.BytesIO()
    directory.mkdir()
    torch.save({"x": Hostile(trace)}, weights)
    with tarfile.open(directory / "train.tar", "w") as archive:
        for name, content in (("a.pth", weights.getvalue()), ("../../b.txt", b"x"), ("/c.txt", b"x")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with pytest.raises(UserError, match=r"it holds (io|_io)\.open, and nothing but tensors"):
        rows_of(str(directory))
    assert not list(tmp_path.rglob("b.txt")) and not Path("/c.txt").exists()


def test_tags_of_yaml_in_a_data_sets_readme_are_not_obeyed(tmp_path, trace):
    directory = tmp_path / "own_set"
    directory.mkdir()
    (directory / "train.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    tag = f"license: !!python/object/apply:os.system ['touch {trace}']\n"
    (directory / "README.md").write_text(f"---\n{tag}---\n")
    # Nobody reads a description that says nothing of files.
    assert rows_of(str(directory))
    (directory / "README.md").write_text(f"---\n{tag}configs:\n- config_name: default\n---\n")
    with pytest.raises(UserError, match="could not determine a constructor for the tag"):
        rows_of(str(directory))


@pytest.mark.parametrize("entry", [{"name": "toy"}, {"path": "rows.jsonl"}])
def test_hydras_target_is_no_key_of_a_data_set(entry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    with pytest.raises(UserError, match="no key '_target_'"):
        rows_of(entry | {"_target_": "os.system"})


def test_the_words_of_hydra_and_omegaconf_mean_nothing_in_rows(tmp_path):
    text = "${oc.env:HOME} {_target_: os.system} ${hydra:runtime.cwd}"
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": text, "chosen": text + "!", "rejected": "_target_"}) + "\n")
    [record] = rows_of(str(tmp_path / "rows.jsonl"))
    assert (record.prompt, record.responses) == (text, [text + "!", "_target_"])


@pytest.mark.parametrize("kind", ["model.archive", "datasets"])
def test_a_pt_file_with_a_payload_is_refused_and_told_what_it_holds(kind, tmp_path, trace):
    path = tmp_path / "rows.pt"
    torch.save({"state": {"weight": Hostile(trace)}} if kind == "model.archive" else [Hostile(trace)], path)
    with pytest.raises(ValueError, match=r"it holds (io|_io)\.open, and nothing but tensors and plain values"):
        load_tensors(path)


# ---- the command line -----------------------------------------------------------------------------------------------------


def process(folder: Path, *overrides: str, umask: int = -1, **environment: str) -> subprocess.CompletedProcess:
    """`python train.py` with overrides in `folder`, and its output as one text."""
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *overrides],
        cwd=folder,
        env=os.environ | environment,
        umask=umask,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("+loss._target_=os.system", "loss._target_: no such key"),
        ("+trainer._target_=os.system", "trainer._target_: no such key"),
        ("+model._target_=os.system", "model._target_: no such key"),
        ("+_target_=os.system", "_target_: no such key"),
        ("exp_name=../escaped", "exp_name: found '../escaped', expected the beginning of a directory's name"),
    ],
)
def test_targets_and_paths_on_the_command_line_are_refused(override, told, tmp_path):
    (tmp_path / "here").mkdir()
    done = process(tmp_path / "here", override)
    assert done.returncode == 2 and done.stdout.startswith(told)
    assert list(tmp_path.iterdir()) == [tmp_path / "here"] and not list(tmp_path.glob("here/*/*"))


def test_a_target_in_a_section_of_another_library_is_a_value_like_any_other(tmp_path):
    done = forked.run([ROOT / "train.py", "optimizer_kwargs._target_=os.system"], tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("optimizer_kwargs: AdamW refuses {'_target_': 'os.system'}")


# ---- checkpoints ----------------------------------------------------------------------------------------------------------

LISTED = {"bytes": 5, "xxh3_128": "0" * 32}


@pytest.mark.parametrize(
    "listed",
    [
        {"../outside": LISTED},
        {"/etc/passwd": LISTED},
        {"a/../../outside": LISTED},
        {"state.json": 5},
        {"state.json": {"bytes": 5}},
        ["state.json"],
        {},
        5,
        None,
    ],
    ids=json.dumps,
)
def test_checksums_that_are_damaged_or_lead_elsewhere_are_a_fault_of_the_checkpoint(listed, tmp_path):
    (tmp_path / "outside").write_text("12345")
    checkpoint = tmp_path / "step-1"
    checkpoint.mkdir()
    (checkpoint / "state.json").write_text("{}")
    content = {"state.json": LISTED} | listed if isinstance(listed, dict) and listed and "state.json" not in listed else listed
    (checkpoint / "checksums.json").write_text(json.dumps(content))
    assert find_damage(checkpoint) in ("checksums.json is damaged", "checksums.json is missing or damaged")


@pytest.mark.parametrize("size", [10**30, -1, "5", None, 5.5, [5]], ids=str)
def test_a_size_that_no_file_has_is_a_fault_of_its_file(size, tmp_path):
    (tmp_path / "state.json").write_text("12345")
    (tmp_path / "checksums.json").write_text(json.dumps({"state.json": LISTED | {"bytes": size}}))
    assert find_damage(tmp_path) == "state.json is not what was written"


def test_checksums_nested_deeper_than_python_reads_are_a_fault(tmp_path):
    (tmp_path / "checksums.json").write_text("[" * 100_000)
    assert find_damage(tmp_path) == "checksums.json is missing or damaged"


# ---- what a run leaves behind ---------------------------------------------------------------------------------------------

SECRETS = {
    "WANDB_API_KEY": "5ec2e7" * 6 + "5ec2",
    "HF_TOKEN": "hf_verysecretindeed",
    "HUGGING_FACE_HUB_TOKEN": "hf_anothersecret",
    "AWS_SECRET_ACCESS_KEY": "aws/verysecret",
}
RUN = (
    *("loss=dpo", "model.from_config.num_hidden_layers=1", "n_examples=16", "n_eval_examples=16", "n_eval_model_samples=1"),
    *("batch_size=8", "reference_logps=cached", "save_every=8", "local_run_dir=runs/it"),
)


@pytest.mark.parametrize(("umask", "wandb"), [(0o077, "true"), pytest.param(0o022, "false", marks=pytest.mark.long)])
def test_a_run_leaves_no_secret_behind_and_files_as_open_as_the_umask_allows(umask, wandb, tmp_path):
    done = process(tmp_path, *RUN, f"wandb.enabled={wandb}", umask=umask, WANDB_MODE="offline", **SECRETS)
    assert done.returncode == 0, done.stdout
    assert not [name for name, secret in SECRETS.items() if secret in done.stdout]
    paths = [path for path in tmp_path.rglob("*") if not path.is_symlink()]
    kinds = {path.suffix for path in paths} | {path.name for path in paths}
    assert {"config.yaml", "metrics.jsonl", "samples.jsonl", "state.json", "policy.pt", "reference_logps"} <= kinds
    assert {".lock", ".arrow", ".safetensors"} <= kinds and (wandb == "false" or ".wandb" in kinds)
    for path in paths:
        allowed = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) == allowed, f"{path}: {oct(path.stat().st_mode)}"
        content = b"" if path.is_dir() else path.read_bytes()
        assert not [name for name, secret in SECRETS.items() if secret.encode() in content], path
