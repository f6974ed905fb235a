"""The model card of an exported model: hub metadata, training data and configuration, metrics, and how to load it.

Everything comes from the checkpoint and the run's metrics.jsonl. Local paths and secrets are omitted.
"""

import json
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from preference_training.configuration.composition import default_values, in_open_section, known_keys
from preference_training.configuration.keys import NOT_SHOWN, is_within
from preference_training.configuration.schema import keys_with
from preference_training.core.metric_names import EVAL_ACCURACY, EVAL_LOSS, EVAL_MARGIN, EXAMPLES, TRAIN_ACCURACY, TRAIN_LOSS
from preference_training.core.secrets import without_secrets
from preference_training.core.values import dotted
from preference_training.data.files import is_data_file
from preference_training.data.registry import DATASETS, TOKENIZED_SUFFIX, dataset_entries
from preference_training.data.rendering.chat_templates import PLAIN_PROMPT, QUESTION
from preference_training.evaluation.phrasing import too_few
from preference_training.losses.registry import Registration, find_loss

# What loads weights of a kind, besides transformers.
PACKAGES = {"int8": "torchao", "int4": "compressed-tensors"}


@dataclass(frozen=True)
class Quality:
    """A model on held-out examples: perplexity of a token of the preferred responses, and reward accuracy, None without one."""

    perplexity: float
    accuracy: float | None
    examples: int


@dataclass(frozen=True)
class Quantized:
    """What a kind of quantized weights costs: the quality of the full weights, and theirs."""

    kind: str
    before: Quality
    after: Quality


@dataclass(frozen=True)
class CardFacts:
    """The content of a model card.

    name: what to load the model by. config: the run's configuration, None if unknown. examples: how many it was trained on.
    held_out: metric → mean at this checkpoint, over held_out_prompts, if known. evaluation: metric → {mean, low, high} and the
    numbers of examples and prompts, if it was evaluated. rows: metrics.jsonl up to this checkpoint. overrides: those of the
    run's command line. sample: a prompt of the data and the response to it. prompt: an example in the format of training.
    notes: sentences about this export. adapter: it holds an adapter, not full weights. head: lm, or value for a reward model.
    usual: `usual_values` of the run. is_merged: it was computed from the weights of others, whose hub ids are in merged_from.
    costs: of each kind of quantized weights in the directory.
    """

    name: str
    architecture: str
    dtype: str
    parameters: int
    config: dict | None
    base: str | None
    examples: int | None = None
    held_out: dict[str, float] = field(default_factory=dict)
    evaluation: dict = field(default_factory=dict)
    rows: list[dict] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    held_out_prompts: int | None = None
    overrides: dict = field(default_factory=dict)
    sample: tuple[str, str] | None = None
    license: str | None = None
    prompt: str = PLAIN_PROMPT
    notes: list[str] = field(default_factory=list)
    adapter: bool = False
    head: str = "lm"
    quantized: str | None = None
    usual: object = None
    is_merged: bool = False
    merged_from: list[str] = field(default_factory=list)
    costs: tuple[Quantized, ...] = ()

    def summary(self, directory: Path) -> str:
        """One line on the model in a directory."""
        return f"{directory}: {self.architecture}, {self.parameters:,} parameters, {self.dtype}"


def model_card(facts: CardFacts) -> str:
    """The text of the README.md, with its metadata."""
    sections = [f"---\n{metadata(facts)}\n---", f"# {facts.name.rsplit('/', 1)[-1]}", _introduction(facts), _loading(facts)]
    if facts.config is not None:
        sections += [_data(facts.config), _sample(facts), _command(facts), _configuration(facts.config, facts.usual)]
    sections += [_costs(facts.costs), _metrics(facts), _curves(facts.rows), _versions(facts)]
    return without_secrets("\n\n".join(section for section in sections if section) + "\n")


def metadata(facts: CardFacts) -> str:
    """The card's YAML metadata, in the terms of the hub."""
    from huggingface_hub import ModelCardData

    loss = _find_loss(facts.config)
    method = [loss.name.lower().replace("_", "-")] if loss and loss.name != "own" else []
    base = facts.base if facts.base and is_hub_id(facts.base) else None
    values = {
        "library_name": "peft" if facts.adapter else "transformers",
        "pipeline_tag": "text-classification" if facts.head == "value" else "text-generation",
        "base_model": base,
        "license": facts.license,
        "datasets": sorted(set(hub_datasets(facts.config))) or None,
        "tags": [*method, *(["lora"] if facts.adapter else [])] or None,
    }
    if facts.is_merged:
        relation = "merge" if facts.merged_from else None
        values |= {"base_model": facts.merged_from, "base_model_relation": relation, "tags": ["merge"]}
    elif base:
        values["base_model_relation"] = "adapter" if facts.adapter else "quantized" if facts.quantized else "finetune"
    return ModelCardData(**{name: value for name, value in values.items() if value}).to_yaml()


def is_hub_id(name: str) -> bool:
    """Whether the name of a model or a data set may be a hub id, rather than a local path."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not name.startswith(".") and not Path(name).exists()


def hub_datasets(config: dict | None) -> Iterable[str]:
    """The hub ids of those of a run's data sets that are on the hub."""
    for entry in dataset_entries(config):
        name = str(entry.get("name") or entry.get("path"))
        if name in DATASETS:
            if hub_id := DATASETS[name].hub_id:
                yield hub_id
        elif "/" in name and ".py:" not in name and not _is_file(name) and is_hub_id(name):
            yield name


def _is_file(name: str) -> bool:
    return is_data_file(name) or name.endswith(TOKENIZED_SUFFIX)


def _find_loss(config: dict | None) -> Registration | None:
    return None if config is None else find_loss(config["loss"]["name"], config["loss"].get("mode_loss"))


def _introduction(facts: CardFacts) -> str:
    kind = "An adapter" if facts.adapter else f"A {facts.architecture}"
    text = f"{kind} with {facts.parameters:,} parameters in {facts.dtype}"
    if facts.quantized:
        text += f", its linear layers quantized ({facts.quantized})"
    if loss := _find_loss(facts.config):
        # For a user-defined loss, its name without its local path.
        own = Path(str(facts.config["loss"].get("function", ""))).name
        values = ", ".join(f"{key} {value}" for key, value in _loss_values(facts.config["loss"], loss).items())
        text += f", trained by {loss.link if not own else f'{loss.title}, `{own}`,'}"
        text += f" with {values}" if values else ""
    if facts.examples is not None:
        text += f" on {facts.examples:,} examples"
    if facts.base is not None:
        text += f", starting from `{_shown_name(facts.base)}`."
    else:
        text += ", randomly initialized." if facts.config is not None else "."
    return "\n\n".join([text, *facts.notes])


def _loss_values(keys: dict, loss: Registration) -> dict:
    """The values of a loss that it computes with; what is switched off by default and has stayed so is left out."""
    if keys.get("function"):
        return keys.get("options") or {}
    beta_dpo = find_loss("beta_DPO")
    others = set(beta_dpo.objective.training_keys if beta_dpo else ()) - set(loss.objective.training_keys)
    defaults = default_values(loss=keys["name"])["loss"]
    hidden = {"name", "mode_loss", *others}
    return {key: value for key, value in keys.items() if key not in hidden and (value or value != defaults.get(key))}


def _loading(facts: CardFacts) -> str:
    lines = _value_lines(facts) if facts.head == "value" else _text_lines(facts)
    needed = [
        package for package, used in (("peft", facts.adapter), (PACKAGES.get(str(facts.quantized)), facts.quantized)) if used
    ]
    also = f"Requires {needed[0]} in addition to transformers.\n\n" if needed else ""
    snippet = "\n".join(lines)
    if facts.prompt == PLAIN_PROMPT:
        end = "The model continues plain texts: it was not trained on conversations, and prompts are passed as they are."
    else:
        end = f"The model answers conversations. Its chat template renders prompts as in training:\n\n{_block(facts.prompt)}"
    return f"## Use\n\n{also}```python\n{snippet}\n```\n\n{end}"


def _block(text: str, longest: int = 1000) -> str:
    """A text as it is, in a block that nothing in it ends."""
    shown = text if len(text) <= longest else f"{text[:longest]} ..."
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", shown)), default=0))
    return f"{fence}text\n{shown}\n{fence}"


def _text_lines(facts: CardFacts) -> list[str]:
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"name = {facts.name!r}",
        "tokenizer = AutoTokenizer.from_pretrained(name)",
        f'model = AutoModelForCausalLM.from_pretrained(name, dtype="{facts.dtype}")',
    ]
    if facts.prompt == PLAIN_PROMPT:
        lines.append(f'inputs = tokenizer({facts.prompt!r}, return_tensors="pt")')
    else:
        lines += [
            f"messages = {[{'role': 'user', 'content': QUESTION}]}",
            'options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}',
            "inputs = tokenizer.apply_chat_template(messages, **options)",
        ]
    return [
        *lines,
        "output = model.generate(**inputs, max_new_tokens=64)",
        "print(tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))",
    ]


def _value_lines(facts: CardFacts) -> list[str]:
    text, special = f"{facts.prompt + ' there was a king.'!r}", ""
    if facts.prompt != PLAIN_PROMPT:
        messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "Paris."}]
        text, special = f"tokenizer.apply_chat_template({messages}, tokenize=False)", ", add_special_tokens=False"
    labels = "num_labels=1, " if facts.adapter else ""
    return [
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
        "",
        f"name = {facts.name!r}",
        "tokenizer = AutoTokenizer.from_pretrained(name)",
        f'model = AutoModelForSequenceClassification.from_pretrained(name, {labels}dtype="{facts.dtype}")',
        *(["model.config.pad_token_id = tokenizer.pad_token_id"] if facts.adapter else []),
        f"text = {text}",
        "# In training every response ended with this token.",
        f'inputs = tokenizer(text + tokenizer.eos_token, return_tensors="pt"{special})',
        "print(model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask).logits.item())",
    ]


def _data(config: dict) -> str:
    lines = []
    for entry in dataset_entries(config):
        name = str(entry.get("name") or entry.get("path"))
        shown = _shown_name(name)
        rest = {key: value for key, value in entry.items() if key not in ("name", "path", "data_dir", "test_path")}
        lines.append(f"- `{shown}`" + (f", with `{json.dumps(rest, ensure_ascii=False)}`" if rest else ""))
    template = config.get("template") or "none: plain texts unchanged, conversations as HH dialogues"
    return "## Training data\n\n" + "\n".join(lines) + f"\n\nPrompt template: {template}."


def _sample(facts: CardFacts) -> str:
    if facts.sample is None:
        return ""
    prompt, response = facts.sample
    return f"A held-out prompt:\n\n{_block(prompt)}\n\nand what the model answered to it:\n\n{_block(response)}"


def _command(facts: CardFacts) -> str:
    """The command line of the run, without local directories."""
    if not facts.overrides:
        return ""
    shown = {key: value for key, value in facts.overrides.items() if is_shown(key) or key == "datasets"}
    words = [shlex.quote(f"{_added(key)}{key}={_override(value)}") for key, value in shown.items()]
    return "## Training command\n\n```bash\n" + " ".join(["python train.py", *words]) + "\n```"


def _added(key: str) -> str:
    """What Hydra needs before a key that the configuration does not have by itself."""
    return "" if key in known_keys() or in_open_section(key) else "+"


def _override(value) -> str:
    """A value as Hydra reads it on a command line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_override(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_override, value)) + "]"
    if isinstance(value, str):
        return Path(value).name if Path(value).is_absolute() else value
    return json.dumps(value)


def _shown_name(name: str) -> str:
    """A name without local directories."""
    return name if is_hub_id(name) and not _is_file(name) else Path(name).name


def is_shown(key: str) -> bool:
    """Whether cards and comparisons show a key: not paths, hardware and logging, which the model does not depend on."""
    return not is_within(key, ("hydra", *keys_with(NOT_SHOWN)))


def changed_settings(config: dict, usual: object = None) -> dict[str, tuple[object, object]]:
    """The settings of a run that differ from its defaults: key → (value, default or None).

    usual: `usual_values`, as the run recorded them.
    """
    now = dotted(config)
    # Its default is an interpolation of another key.
    defaults = default_values(model="base_model", loss=config["loss"]["name"], trainer=config["trainer"]["name"])
    before = dotted(defaults) | {"model.reference_dtype": now.get("model.policy_dtype")}
    no_change = {key: [value] for key, value in before.items()} | (usual if isinstance(usual, dict) else {})
    changed = [key for key in now if now[key] not in no_change.get(key, [None]) and is_shown(key)]
    return {key: (now[key], no_change.get(key, [None])[-1]) for key in sorted(changed)}


def _configuration(config: dict, usual: object) -> str:
    changed = changed_settings(config, usual)
    # A local path.
    changed.pop("loss.function", None)
    rows = [f"| `{key}` | {_cell(value)} | {_cell(default)} |" for key, (value, default) in changed.items()]
    head = "## Configuration\n\nSettings that differ from the defaults:\n\n| key | value | default |\n|---|---|---|\n"
    return head + "\n".join(rows) if rows else ""


def _cell(value) -> str:
    """A value as code in a table cell, on one line."""
    shown = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in str(value))
    return "" if value is None else "`" + shown.replace("`", "'").replace("|", "\\|") + "`"


def _costs(costs: Iterable[Quantized]) -> str:
    """What quantization costs, as a table."""
    rows = [
        f"| {name} | {each.perplexity:.4g} | {'' if each.accuracy is None else f'{each.accuracy:.3g}'} |"
        for cost in costs
        for name, each in (("full", cost.before), (cost.kind, cost.after))
    ]
    number = next((cost.after.examples for cost in costs), 0)
    head = "| weights | perplexity | reward accuracy |\n|---|---|---|\n"
    lines = list(dict.fromkeys(rows))
    return f"## Quantization\n\nOver {number:,} held-out examples:\n\n{head}" + "\n".join(lines) if lines else ""


def _metrics(facts: CardFacts) -> str:
    if facts.evaluation:
        return _intervals(facts.evaluation)
    if not facts.held_out:
        return ""
    table = "\n".join(f"| {name} | {value:.4g} |" for name, value in sorted(facts.held_out.items()))
    return (
        f"## Held-out metrics\n\nMeans over {_held_out_number(facts)}. A checkpoint does not store the values of single "
        "examples, so there are no intervals: `python scripts/evaluate.py` computes them.\n\n"
        f"| metric | mean |\n|---|---|\n{table}"
    )


def _held_out_number(facts: CardFacts) -> str:
    """Of how many held-out examples metrics are means, as far as that is known."""
    limit, prompts = facts.config and facts.config.get("n_eval_examples"), facts.held_out_prompts
    of = "the held-out examples" if prompts is None else f"the examples of {prompts:,} held-out prompts"
    return f"{of}, at most {limit:,} of them" if limit and (prompts is None or prompts > limit) else of


def _intervals(evaluation: dict) -> str:
    few = f" {text}." if (text := too_few(evaluation["prompts"], "Held-out metrics")) else ""
    rows = [(name, value) for name, value in evaluation.items() if isinstance(value, dict) and value.get("low") is not None]
    table = "\n".join(f"| {name} | {value['mean']:.4g} | {value['low']:.4g} to {value['high']:.4g} |" for name, value in rows)
    return (
        f"## Held-out metrics\n\nOver {evaluation['examples']:,} examples of {evaluation['prompts']:,} held-out prompts, with "
        f"95% intervals over prompts.{few}\n\n| metric | mean | 95% interval |\n|---|---|---|\n{table}"
    )


CURVES = (TRAIN_LOSS, EVAL_LOSS, TRAIN_ACCURACY, EVAL_ACCURACY, EVAL_MARGIN)


def _curves(rows: list[dict], points: int = 12) -> str:
    """A table of at most `points` rows: means of the steps since the previous row, and the last evaluation."""
    names = [name for name in CURVES if any(name in row for row in rows)]
    last = max((row[EXAMPLES] for row in rows if TRAIN_LOSS in row), default=0)
    bounds = [-1, *(last * number / points for number in range(1, points + 1))]
    lines = []
    for low, high in pairwise(bounds):
        part = [row for row in rows if low < row[EXAMPLES] <= high]
        if any(TRAIN_LOSS in row for row in part):
            lines.append(" | ".join([f"| {part[-1][EXAMPLES]:,.0f}", *(_curve(part, name) for name in names)]) + " |")
    if not lines:
        return ""
    head = "| examples | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 1)
    return "\n".join(["## Training", "", "Training metrics are means of the steps since the previous row.", "", head, *lines])


def _curve(part: list[dict], name: str) -> str:
    values = [row[name] for row in part if isinstance(row.get(name), int | float)]
    if not values:
        return ""
    return f"{values[-1] if 'eval' in name else sum(values) / len(values):.4g}"


def _versions(facts: CardFacts) -> str:
    if not facts.versions:
        return ""
    return "## Versions\n\n" + ", ".join(f"{name} {version}" for name, version in facts.versions.items()) + "."
