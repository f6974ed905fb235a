"""The pages of docs/: their commands work, their links lead somewhere, their keys are there, and the site is built of them.

Quick start, your own data and your own loss are followed word by word in a clean clone, with two exceptions: what installs is
left out, and runs are shortened.
"""

import argparse
import compileall
import importlib.util
import json
import math
import os
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from preference_training.configuration.composition import (
    CONFIG_DIR,
    GROUPS,
    OPTIONAL_GROUPS,
    group_choices,
    in_open_section,
    known_keys,
)
from preference_training.core.errors import UserError
from preference_training.data.records.report import DataReport
from preference_training.data.rows.field_maps import FieldMap
from preference_training.data.rows.grouping import group_rows
from tests.support import forked, shown
from tests.support.files import ROOT

SCRIPTS = shown.commands(r"python scripts/")
DOCS = [page for page in shown.PAGES if page != "README.md"]

# ---- commands -------------------------------------------------------------------------------------------------------------

# Every command that is shown, and what tests it.
KINDS = {
    shown.TRAINING: "test_house.py composes it",
    r"python scripts/\w+\.py( |$)": "test_its_script_understands_it",
    r"python -m preference_collection (import|export|push|generate|judge|score) ": "test_the_labeling_app_understands_it",
    r"python -m preference_training\.rounds (sample|judge|pair|summarize|train|status|run|report) ": (
        "test_the_rounds_understand_it"
    ),
    r"vllm serve ": "tests_apart/servers/test_rounds.py starts it",
    r"make [\w-]+": "test_what_is_made_is_there",
    r"pip install (--no-deps )?-r |pip install hydra-optuna-sweeper": "test_what_is_made_is_there",
    r"python3 -m venv |\. \.venv/bin/activate": "followed in a clean clone",
    r"python my_run\.py": "test_the_page_on_python_can_be_followed",
    r"python benchmarks/gpu_check\.py$": "tests/integration/test_gpu_check.py runs every part of it",
    r"python benchmarks/science\.py (closed_form|beta_dpo|rates)$": "tests/losses/test_science.py runs it",
    r"python benchmarks/dialogues\.py ": "tests/integration/test_dialogues.py runs it",
    r"python benchmarks/cleaning\.py ": "tests/cleaning/test_experiment.py runs it",
    r"python benchmarks/learning_rates\.py ": "tests/training/test_learning_rates.py runs it",
    r"python benchmarks/memory_options\.py": "tests/integration/test_memory_options.py measures with it",
    r"eval \$\(python train.py -sc install=bash\)$": "tests/configuration/test_help.py completes",
    r"python -m pytest |python -c ": "followed in a clean clone, or run by test_what_is_run_in_one_line_runs",
}


@pytest.mark.parametrize("page", DOCS)
def test_a_page_begins_with_a_command_and_what_it_prints(page):
    """Before its third section, a command and behind it something of the kind of an output: lines, a picture, a table."""
    beginning = "".join(shown.PAGES[page].split("\n## ")[:3])
    _, *behind = re.split(r"^```(?:bash|console)$", beginning, maxsplit=1, flags=re.MULTILINE)
    assert behind, f"{page} begins without a command"
    printed = re.search(r"^(```text\n|!\[|\| |\w+: in this project)", behind[0], flags=re.MULTILINE)
    assert printed, f"{page}: what does it print?"


@pytest.mark.parametrize("page", shown.PAGES)
def test_every_command_is_of_a_kind_that_is_tested(page):
    for words in [*(words for block in shown.blocks(page) for words in block.commands), *shown.table_commands(page)]:
        assert any(re.match(kind, " ".join(words)) for kind in KINDS), f"{page}: nothing tests {' '.join(words)}"


class Understood(Exception):  # noqa: N818  it is no error
    """A script has read its command line."""


@pytest.mark.parametrize(("page", "words"), SCRIPTS, ids=[f"{page} {' '.join(words)[:70]}" for page, words in SCRIPTS])
def test_its_script_understands_it(page, words, monkeypatch):
    def reading(read):
        def read_and_stop(*given):
            raise Understood(read(*given))

        return read_and_stop

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, reading(getattr(argparse.ArgumentParser, name)))
    monkeypatch.setattr(sys, "argv", words[1:])
    # One of the two calls the other.
    with pytest.raises(Understood):
        loaded(words[1]).main()


def loaded(path: str):
    """The module of a script."""
    spec = importlib.util.spec_from_file_location(f"script_{Path(path).stem}", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_labeling_app_understands_it():
    from preference_collection.__main__ import arguments
    from preference_collection.settings import load_settings

    asked = [arguments(words[3:]) for _, words in shown.commands("python -m preference_collection")]
    assert {options.command for options in asked} == {"import", "export", "push", "generate", "judge", "score"}
    for options in asked:
        load_settings(options.overrides)


def test_the_rounds_understand_it():
    from preference_training.rounds.__main__ import arguments

    asked = [arguments(words[3:]) for _, words in shown.commands(r"python -m preference_training\.rounds")]
    assert {options.step for options in asked} >= {"status", "sample", "judge", "run", "report"}


def test_what_is_made_is_there():
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[1].split()
    for page, words in shown.commands(r"make "):
        assert words[1] in targets, f"{page}: {words}"
    for page, words in shown.commands(r"pip install (--no-deps )?-r "):
        assert (ROOT / words[-1]).is_file(), f"{page}: {words}"


def test_what_is_run_in_one_line_runs(tmp_path):
    found = shown.commands("python -c ")
    for _, words in found:
        with (tmp_path / words[-1]).open("w") as file:
            assert words[-2] == ">"
            subprocess.run([sys.executable, *words[1:-2]], stdout=file, check=True, timeout=60)
        assert (tmp_path / words[-1]).read_text().count("\n") == 2048
    assert found


def test_containers_install_and_start_what_the_readme_does_by_hand():
    by_hand = [words for _, words in shown.commands("pip install|python train", ["README.md"])][:2]
    dockerfile = (ROOT / "Dockerfile").read_text()
    [installing] = re.findall(r"^RUN (.*)$", dockerfile, flags=re.MULTILINE)
    [starting] = re.findall(r"^CMD (.*)$", dockerfile, flags=re.MULTILINE)
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    assert [installing.replace("--no-cache-dir ", "").split(), json.loads(starting)] == by_hand
    assert container["postCreateCommand"].split() == by_hand[0]
    assert (ROOT / ".devcontainer" / container["build"]["dockerfile"]).resolve() == ROOT / "Dockerfile"
    # The Python that the package is for.
    [version] = re.findall(r"^FROM python:(\d+\.\d+)\.\d+-", dockerfile, flags=re.MULTILINE)
    assert f">={version}" in (ROOT / "pyproject.toml").read_text()


# What texts name besides the modules that there are: files of users and of other projects, placeholders.
NOT_OURS = re.compile(r"(^|/)(FILE|NAME|(test_)?my_\w+|own|solution|add|convert_hf_to_gguf)\.py$")
# Texts for people, and code with its comments.
NAMING = re.compile(
    r"(README|CONTRIBUTING|SECURITY)\.md|docs/.*\.md|config/.*\.yaml|benchmarks/.*\.(md|py)|tests/golden/README\.md"
    r"|(preference_training|preference_collection|scripts)/.*\.py"
)


def test_texts_name_modules_that_there_are():
    listed = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True, check=True).stdout.splitlines()
    paths = [f"/{name}" for name in listed if name.endswith(".py")]
    for name in filter(NAMING.fullmatch, listed):
        for found in re.findall(r"(?<![\w./-])[\w./-]*\w\.py\b", (ROOT / name).read_text().replace("\\_", "_")):
            there = any(path.endswith(f"/{found.removeprefix('./')}") for path in paths)
            assert there or NOT_OURS.search(found), f"{name}: {found}"


# ---- a clean clone ----------------------------------------------------------------------------------------------------------

INSTALLING = ("python3 -m venv", ". .venv/bin/activate", "pip install")
# What needs weights or data of the hub is composed in test_house.py, and what is of a run of the reader's is understood above.
NOT_HERE = ("model=pythia28", "Intel/orca_dpo_pairs", "_DATE")
# Put behind what is shown.
SHORT_SAMPLES = "evaluation.max_sample_length=32"
SHORTENED = {
    "train.py": ("wandb.enabled=false", "n_examples=32", "n_eval_examples=16", "n_eval_model_samples=2", SHORT_SAMPLES),
    "scripts/evaluate.py": ("evaluation.n_prompts=4", SHORT_SAMPLES),
}


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The tracked files, as they are here, in a folder of their own."""
    folder = tmp_path_factory.mktemp("clone")
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True, check=True).stdout
    for name in listed.rstrip("\0").split("\0"):
        if name.startswith(("tests/golden", "benchmarks/results", "docs/collect")) or not (ROOT / name).is_file():
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((ROOT / name).read_bytes())
    # Once, and not in each process that imports it.
    compileall.compile_dir(folder / "preference_training", quiet=1)
    return folder


def only_there(here: Path) -> None:
    """In a new process: forget the modules of this checkout, so that a clone's are imported."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        if file.startswith(f"{here}/") and "site-packages" not in file:
            del sys.modules[name]
    # As where the clone is installed.
    sys.path[:] = [str(Path.cwd()), *(path for path in sys.path if path not in ("", str(here)))]


def follow(words: list[str], clone: Path) -> str:
    """Run one command of a page in the clone; what it printed."""
    line = " ".join(words)
    if line.startswith(INSTALLING) or any(text in line for text in NOT_HERE):
        return ""
    assert words[0] == "python"
    if words[1] == "-m":
        (clone / "module.py").write_text(f"import runpy\nrunpy.run_module({words[2]!r}, run_name='__main__')\n")
        words = ["python", "module.py", *words[3:]]
    arguments = [word for word in words[1:] if word != "-u"]
    command = [clone / arguments[0], *arguments[1:], *SHORTENED.get(arguments[0], ())]
    done = forked.run(command, clone, first=partial(only_there, ROOT))
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def follow_page(page: str, clone: Path) -> dict[str, str]:
    """Do what a page says from its beginning to its end; what each command printed."""
    printed = {}
    for number, block in enumerate(shown.blocks(page)):
        if block.title:
            (clone / block.title).write_text(block.text)
        elif block.language == "python":
            (clone / f"block_{number}.py").write_text(block.text)
            printed[f"block {number}"] = follow(["python", f"block_{number}.py"], clone)
        for words in block.commands:
            printed[" ".join(words)] = follow(words, clone)
    return printed


def test_what_is_followed_is_the_clones_own_code(clone):
    (clone / "where.py").write_text(
        "import preference_training, train, utils\nprint(preference_training.__file__, train.__file__, utils.__file__)\n"
    )
    assert follow(["python", "where.py"], clone).split() == [
        f"{clone}/{name}.py" for name in ("preference_training/__init__", "train", "utils")
    ]


def test_quick_start_can_be_followed(clone):
    printed = follow_page("docs/quick-start.md", clone)
    preferred = next(text for line, text in printed.items() if "loss=dpo" in line)
    assert "0.693" in preferred and f"run directory: {clone}" in preferred
    assert (clone / "runs" / "first_dpo" / "report.html").is_file()
    assert any("win rate against reference, judged by toy" in text for text in printed.values())


def test_the_page_on_python_can_be_followed(clone):
    printed, judged = follow_page("docs/python.md", clone).values()
    run_dir, stopped = printed.splitlines()[-1].split(" ", 1)
    assert stopped.startswith("callback: the loss is small enough 0.2")
    assert (Path(run_dir) / "LATEST" / "model.safetensors").is_file()
    [judging] = [block.text for block in shown.blocks("docs/python.md") if "run_tests" in block.text]
    assert judged.splitlines() == [line.removeprefix("# ") for line in judging.splitlines() if line.startswith("# ")]


@pytest.mark.long
def test_your_own_data_can_be_followed(clone):
    rows = {
        "my_labels": {"response": "Blue.", "label": True},
        "my_rankings": {"responses": ["Blue.", "Bluish.", "Seven."], "scores": [3, 2, 0.5]},
        "my_margins": {"chosen": "Blue.", "rejected": "Seven.", "margin": 2.5},
    }
    for name, row in rows.items():
        lines = [json.dumps({"prompt": f"Name color {number}."} | row) + "\n" for number in range(12)]
        (clone / f"{name}.jsonl").write_text("".join(lines))
    printed = follow_page("docs/your-own-data.md", clone)
    looked = next(text for line, text in printed.items() if "dry_run=true" in line)
    assert "my_preferences.jsonl: 5 rows read" in looked
    filtered = next(text for line, text in printed.items() if "my_answers.csv" in line)
    assert "my_answers.csv: 3 rows read" in filtered
    assert (clone / "runs" / "names_dpo" / "LATEST").is_dir() and (clone / "runs" / "colors" / "LATEST").is_dir()


def test_is_my_data_any_good_can_be_followed(clone):
    printed = follow_page("docs/is-my-data-any-good.md", clone)
    [found] = [text for line, text in printed.items() if "dry_run=true" in line]
    shown_there = [block.text for block in shown.blocks("docs/is-my-data-any-good.md") if block.language == "text"][-1]
    for line in shown_there.strip().splitlines():
        assert f"  {line}\n" in found
    assert (clone / "runs" / "data_report.html").is_file()


def format_rows() -> list[tuple[str, str, str]]:
    """The rows of the table of formats: a row of data, what it is read as, what it gives."""
    page = shown.PAGES["docs/your-own-data.md"]
    table = page[page.index("## Formats") : page.index("## Other fields")]
    return re.findall(r"^\| `(\{.*\})` \| ?(.*) \| (.*) \|$", table, flags=re.MULTILINE)


@pytest.mark.parametrize(("row", "words", "gives"), format_rows())
def test_every_row_of_the_table_of_formats_is_read_as_it_says(row, words, gives):
    report = DataReport()
    mapped = list(FieldMap().map_rows([(1, json.loads(row))], "data.jsonl", report))
    records = [record for _, record in group_rows(mapped, report)]
    assert (report.found, report.columns_not_read) == (words.strip(), {})
    if gives.startswith("nothing: "):
        assert (records, report.left_out) == ([], {gives.removeprefix("nothing: "): 1})
        return
    pairs, labels = (sum(len(record.get(key, ())) for record in records) for key in ("pairs", "labels"))
    found = f"{pairs} pair{'s' * (pairs > 1)}" if pairs else "1 labeled response" if labels else f"{len(records)} target"
    assert found == gives


# In place of a model of the hub, the embedded one, with room for texts in bytes.
EMBEDDED = (
    "model=tiny", "model.from_config.num_hidden_layers=1", "model.from_config.max_position_embeddings=2048",
    "max_length=2048", "max_prompt_length=1024",
)  # fmt: skip


@pytest.mark.long
def test_conversations_with_tools_can_be_followed(clone):
    page, printed = "docs/conversations-with-tools.md", {}
    shown.write_files(page, clone)
    for _, words in shown.commands("python ", [page]):
        of_hub = "model=blank_model" in words
        given = [word for word in words if not word.startswith(("model=", "model.name_or_path="))]
        printed[" ".join(words)] = follow([*given, *(EMBEDDED if of_hub else ())], clone)
    sft, dpo = (text for line, text in printed.items() if "dry_run=true" in line)
    assert "tools_sft.jsonl: 200 rows read" in sft and "tools_dpo.jsonl: 100 rows read" in dpo
    assert "conversations in `messages`, tools in `tools`" in sft and "pairs in `chosen` and `rejected`, tools" in dpo
    for text in (sft, dpo):
        assert "columns not read" not in text and "without" not in text
        readable = text.replace("|", "").replace("▁", " ").replace("⏎", "\n")
        # The tools are in the prompt; calls are scored, what tools return is not.
        assert '"description": "Value of an expression"' in readable
        assert re.search(r'«<tool_call>\{"name": "\w+", "arguments": [^«»]*</tool_call><im_end>»', readable)
        assert re.search(r"<tool_response>[^«»]*</tool_response>", readable)
    assert (clone / "runs" / "tools_dpo" / "LATEST" / "chat_template.jinja").read_text() == (clone / "tools.jinja").read_text()


@pytest.mark.long
def test_your_own_loss_can_be_followed(clone):
    printed = follow_page("docs/your-own-loss.md", clone)
    assert "2 passed" in next(text for line, text in printed.items() if "pytest" in line)
    assert OmegaConf.load(clone / "runs" / "capped" / "config.yaml").loss.options.cap == 10
    [loss] = [block for block in shown.blocks("docs/your-own-loss.md") if block.title == "my_losses.py"]
    assert len(loss.text.splitlines()) <= 20


# ---- keys -------------------------------------------------------------------------------------------------------------------


def is_known(text: str) -> bool:
    """Whether `key` or `key=value` is one of ours."""
    key, _, value = text.lstrip("+").partition("=")
    if key in (*GROUPS, *OPTIONAL_GROUPS) and value:
        a_model = key == "model" and ("/" in value or value in ("DIRECTORY", "FILE.gguf", "X"))
        return value == "NAME" or a_model or value in group_choices(key)
    if text.startswith("+"):
        return (CONFIG_DIR / key / f"{value}.yaml").is_file()
    return key in known_keys() or in_open_section(key) or key == "hydra/sweeper"


# Short for a key, as the page says.
SHORT_FOR_A_KEY = ("t=8",)


# The reference is made of the files; what other programs call their keys is in a test of its own.
@pytest.mark.parametrize("page", [page for page in DOCS if page not in ("docs/key-reference.md", "docs/coming-from.md")])
def test_keys_that_a_page_sets_are_there(page):
    from preference_collection.settings import load_settings

    text = re.sub(r"```.*?```", "", shown.PAGES[page], flags=re.DOTALL)
    for setting in re.findall(r"`(\+?[a-z][\w.]*=[^`\s]+)`", text):
        if page == "docs/labeling.md" and not is_known(setting):
            load_settings([setting])
        else:
            assert is_known(setting) or setting in SHORT_FOR_A_KEY, f"{page}: {setting}"


def test_what_the_tables_of_other_programs_name_as_ours_is_there():
    rows = re.findall(r"^\|([^|]*)\|([^|]*)\|([^|]*)\|$", shown.PAGES["docs/coming-from.md"], flags=re.MULTILINE)
    rows = [row for row in rows if "---" not in row[0] and row[0].strip() != "there"]
    assert len(rows) > 100
    for there, here, remark in rows:
        for text in [*re.findall(r"`([^`]+)`", here), *re.findall(r"`(\+?[a-z][\w.]*=[^`\s]+)`", remark)]:
            assert is_known(text), f"{there.strip()}: {text}"


def test_what_is_shown_as_refused_is_refused_in_these_words(compose):
    shown_there = [block.text for page in DOCS for block in shown.blocks(page) if block.language == "console"]
    for text in shown_there:
        command, told = text.removeprefix("$ ").split("\n", 1)
        with pytest.raises(UserError) as refusal:
            compose(*shown.training_arguments(shlex.split(command)))
        assert str(refusal.value) == told.strip(), command
    assert shown_there


def test_what_users_of_other_tools_look_for_has_its_command():
    page = shown.PAGES["docs/coming-from.md"]
    rows = re.findall(r"^\| .* \| (.*) \|$", page.split("## What you look for")[1].split("\n## ")[0], flags=re.MULTILINE)[1:]
    assert len(rows) >= 25
    for row in rows:
        assert re.match(r"`(python|pip|make) |\[", row), row


def test_the_reference_of_keys_is_what_the_files_say():
    script = loaded("scripts/key_reference.py")
    assert script.PAGE.read_text() == script.page(), "run python scripts/key_reference.py"
    for key in known_keys() - {*GROUPS}:
        assert f"\n| `{key}` |" in script.page(), key


def test_the_picture_is_what_its_script_draws():
    script = loaded("scripts/one_idea.py")
    assert script.PICTURE.read_text() == script.picture(), "run python scripts/one_idea.py"
    # 8 rows of the system prompt, the longest prompt and the longest response; each of them once.
    once = 8 + (5 + 5 + 7 + 3) + (3 + 6 + 4)
    assert f"{8 * (8 + 5 + 7)} tokens" in script.picture() and f"{once} tokens" in script.picture()


def test_the_picture_of_the_layers_shows_the_imports_that_there_are_and_none_that_leads_down():
    script = loaded("scripts/layers_picture.py")
    assert script.PICTURE.read_text() == script.picture(), "run python scripts/layers_picture.py"
    names = script.layers()
    assert {path.parent.name for path in script.PACKAGE.glob("*/__init__.py")} == set(names)
    found = re.findall(r"<title>(\w+) imports (\w+)</title>", script.picture())
    assert ("losses", "core") in found and all(names.index(other) < names.index(name) for name, other in found)


def test_the_page_of_intervals_is_what_its_script_finds():
    """All of it takes minutes: here are all shares up to 64, and of each kind that is simulated a cell."""
    script = loaded("scripts/interval_coverage.py")
    page = script.PAGE.read_text()
    assert page.startswith(script.HEAD.format(rounds=script.ROUNDS))

    def row(title: str, name: str) -> list[str]:
        lines = page.split(f"| {title} |")[1].split("\n\n")[0].splitlines()
        return next(line for line in lines if line.startswith(f"| {name} |")).strip("| ").split(" | ")[1:]

    small = [n for n in script.SHARE_SIZES if n <= 64]
    for name, method in script.SHARE_METHODS.items():
        found = [script.percent(script.coverage(method(n)).min()) for n in small]
        assert row("interval of n independent examples", name)[: len(small)] == found, name
    assert row("ties", "20%")[0] == script.percent(script.least_with_ties(8, 0.2))
    assert row("true share", "0.5")[1] == script.percent(script.of_alike(10, 0.5))
    assert row("true correlation", "0.6")[1] == script.percent(script.of_correlations(0.6, 10))
    ours = next(iter(script.MEAN_METHODS))
    for title, shape in script.shapes().items():
        assert row(title, ours)[2] == script.percent(script.of_means(shape, 10, script.MEAN_METHODS[ours])), title


def test_the_tables_of_options_are_those_of_the_raw_results(tmp_path, monkeypatch):
    script = loaded("scripts/options_page.py")
    assert script.PAGE.read_text() == script.page(), "run python scripts/options_page.py"

    def entry(against, *runs):
        return {"overrides": [], "against": against, "runs": list(runs)}

    mib, failed = 2**20, {"error": "OutOfMemoryError: a | b"}
    numbers = [{"peak_in_steps": peak * mib, "cpu_seconds": [9.0, seconds, 7.0]} for peak, seconds in ((1000, 2.0), (250, 3.0))]
    settings = {"all": entry(None, numbers[0]), "LoRA": entry("all", failed, numbers[1]), "other": entry("LoRA", failed)}
    facts = {"hardware": {"cores": 2}, "load_average": [[0.5, 0, 0]], "models": {"smollm2": {"settings": settings}}}
    monkeypatch.setattr(script, "ROOT", tmp_path)
    file = tmp_path / "raw.json"
    file.write_text(json.dumps(facts))
    assert script.tables(file).splitlines()[4:7] == [
        "| all |  | 1,000 |  | 2.00 |  |",
        "| LoRA | all | 250 | 0.25 | 3.00 | 1.50 |",
        r"| other | LoRA | failed: OutOfMemoryError: a \| b | | | |",
    ]


def test_what_the_recipes_for_dialogues_reach_is_what_the_raw_results_say(tmp_path, monkeypatch):
    script = loaded("scripts/dialogues_page.py")
    newest = script.newest_results()
    assert script.PAGE.read_text() == script.page(), "run python scripts/dialogues_page.py"
    for path, text in script.recipes().items():
        assert path.read_text() == text, "run python scripts/dialogues_page.py"
    if newest:
        assert script.PICTURE.read_text() == script.picture(newest), "run python scripts/dialogues_page.py"

    def of(mean, low, high):
        return {"mean": mean, "low": low, "high": high}

    def method(accuracy, difference, rate, kl):
        won = {"wins": 3, "ties": 4, "losses": 1, "rate": rate}
        tokens = {"policy": of(48.25, 44, 52), "other": of(50, 45, 55)}
        own = {"accuracy of its own reward": accuracy, "accuracy minus DPO's": difference}
        return {"accuracy": accuracy, **own, "win rate": won, "kl": {"per_answer": kl}, "tokens": tokens}

    share, nats, same = of(0.625, 0.5, 0.75), of(2.5, 2, 12), of(0, 0, 0)
    better, unclear = of(0.0625, 0.01, 0.115), of(-0.01, -0.03, 0.01)
    methods = {"dpo": method(share, same, share, nats), "ipo": method(share, better, share, nats)}
    times = {name: {"training": {"cpu_seconds": 630}, "load": 2.6} for name in ("sft", "dpo", "ipo", "kto")}
    file = tmp_path / "raw.json"
    monkeypatch.setattr(script, "ROOT", tmp_path)
    file.write_text(json.dumps({"hardware": {"cores": 2}, "methods": methods, "times": times}))
    assert script.tables(file).splitlines()[2:7] == [
        "| SFT | | | | | 0 | 50.0 [45.0, 55.0] | 10 |",
        "| DPO | 62.5 [50.0, 75.0] | 62.5 [50.0, 75.0] |  | 62.5 [50.0, 75.0] | 2.50 [2.00, 12.0] | 48.2 [44.0, 52.0] | 10 |",
        "| IPO | 62.5 [50.0, 75.0] | 62.5 [50.0, 75.0] | +6.2 [+1.0, +11.5] | 62.5 [50.0, 75.0] | 2.50 [2.00, 12.0] "
        "| 48.2 [44.0, 52.0] | 10 |",
        "",
        "Accuracy, compared with DPO's: higher for IPO.",
    ]
    assert "8 held-out prompts" in script.tables(file) and "(2 cores, load average at most 3)" in script.tables(file)
    both = methods | {"kto": method(share, unclear, share, nats)}
    assert script.differences(both) == "Accuracy, compared with DPO's: higher for IPO; no significant difference for KTO."
    assert script.differences({"kto": both["kto"]}) == "No method's accuracy differs significantly from DPO's."
    monkeypatch.undo()
    # A dot and two intervals for each method, the SFT model's dot without.
    drawn = script.picture(file)
    assert drawn.count('r="2.6"') == 2 * 3 and "SFT, DPO, IPO" in drawn
    assert script.reached(methods["dpo"]) == (
        "# Reached (docs/recipes.md): accuracy 62.5 [50.0, 75.0]%, win rate 62.5 [50.0, 75.0]%, KL 2.50 [2.00, 12.0] nats."
    )


def test_a_units_sentence_becomes_a_cell_and_lines_that_are_set_in_stay_lines():
    script = loaded("scripts/key_reference.py")
    assert script.explained(("How long a | b.", "Unit: seconds.")) == (" How long a \\| b.", "seconds")
    assert script.explained(("One of", "  one    the first", "and so on")) == (" One of<br>one: the first<br>and so on", "")


# ---- numbers ----------------------------------------------------------------------------------------------------------------


def table_numbers(page: str, header: str) -> list[list[float]]:
    """The numbers of a table's rows, without cells of words."""
    rows = shown.PAGES[page].split(f"| {header}")[1].split("\n\n")[0].splitlines()[2:]
    return [[float(cell) for cell in row.strip("|").split("|") if re.fullmatch(r"\s*[\d.]+\s*", cell)] for row in rows]


def test_the_margins_of_the_table_of_beta_are_those_of_the_formula():
    for beta, half, tenth in table_numbers("docs/choosing-beta.md", "`loss.beta` |"):
        # beta sigmoid(-beta m) against beta / 2: a half of it where sigmoid is 1/4, a tenth where it is 1/20.
        assert half == pytest.approx(math.log(3) / beta, rel=0.02)
        assert tenth == pytest.approx(math.log(19) / beta, rel=0.02)


def test_the_table_of_the_scaling_factor_is_that_of_the_formula():
    for deviation, *moved in table_numbers("docs/choosing-beta.md", "`gap_std`"):
        assert moved == pytest.approx([0.6 * deviation / math.sqrt(n) for n in (4, 16, 64)], abs=0.006)


# ---- links and the site -----------------------------------------------------------------------------------------------------

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


OTHER_PAGES = ("CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md", "tests/golden/README.md")


@pytest.mark.parametrize("page", [*shown.PAGES, *OTHER_PAGES])
def test_every_link_leads_somewhere(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for target in LINK.findall(re.sub(r"`[^`]*`", "", text)):
        if target.startswith("http"):
            assert re.fullmatch(r"https://[\w.-]+\.\w+(/[\w./#?=%-]*)?", target), f"{page}: {target}"
            continue
        path, _, anchor = target.partition("#")
        file = ROOT / page if not path else (ROOT / page).parent / path
        assert file.is_file(), f"{page}: {target}"
        assert not anchor or anchor in anchors(file.read_text()), f"{page}: {target}"
        assert page not in DOCS or file.is_relative_to(ROOT / "docs"), f"{page}: {target} is not on the site"


def test_the_site_is_built_without_a_warning_and_asks_no_other_host_for_anything(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {path.stem: path.read_text() for path in tmp_path.glob("*.html")}
    assert {Path(page).stem for page in DOCS} <= pages.keys()
    for name, html in pages.items():
        fetched = re.findall(r'<(?:script|img|iframe|source)[^>]* src="?([^" >]+)|<link[^>]* href="?([^" >]+)', html)
        assert not [each for both in fetched for each in both if each.startswith(("http", "//"))], name
    styles = "".join(path.read_text() for path in tmp_path.rglob("*.css"))
    assert not re.search(r"(@import|url\()[\"' ]*(https?:)?//", styles)
