"""`benchmarks/memory_options.py`: each option against its absence, and whatever fails is a result."""

import json
import subprocess
import sys

import pytest

from tests.support.files import ROOT

SETTINGS = {"none": [], "LoRA": ["+adapter=lora"], "none of this name": ["optimizer=Nothing"]}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import memory_options

    return memory_options


def test_a_setting_is_compared_with_itself_without_its_option(script):
    settings = {
        "all": [],
        "AdamW": ["optimizer=AdamW"],
        "LoRA": ["+adapter=lora"],
        "LoRA, AdamW": ["+adapter=lora", "optimizer=AdamW"],
        "LoRA, AdamW, checkpointing": ["+adapter=lora", "optimizer=AdamW", "activation_checkpointing=true"],
    }
    found = {name: script.against(name, settings) for name in settings}
    assert found == {
        "all": None, "AdamW": "all", "LoRA": "all", "LoRA, AdamW": "LoRA", "LoRA, AdamW, checkpointing": "LoRA, AdamW",
    }  # fmt: skip
    assert script.against("QLoRA, RMSprop", script.SETTINGS) == "LoRA, RMSprop"
    alone = [name for name in script.SETTINGS if script.against(name, script.SETTINGS) is None]
    assert alone == ["all weights, RMSprop", "SFT of all weights, RMSprop"]
    assert {*script.AGAINST, *filter(None, script.AGAINST.values())} <= script.SETTINGS.keys()


@pytest.mark.parametrize("model", ["llama-62m", "smollm2"])
def test_a_settings_overrides_come_last(script, model, compose):
    given = script.last_ones(*script.RUN, *script.MODELS[model], "loss=sft", "optimizer=AdamW", "+adapter=lora")
    config = compose(*given)
    assert (config.loss.name, config.optimizer, config.batch_size, config.lr) == ("sft", "AdamW", 8, 1e-6)
    assert config.model.lora.r


@pytest.mark.long
def test_every_setting_has_numbers_or_says_why_not_and_the_next_one_runs(tmp_path):
    (tmp_path / "small.py").write_text(
        f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'benchmarks')!r}]\nimport memory_options\n"
        f"memory_options.SETTINGS = {SETTINGS}\nmemory_options.MODELS = {{'llama-62m': ('model=tiny',)}}\n"
        "if __name__ == '__main__':\n    memory_options.main()\n"
    )
    results = tmp_path / "results.json"
    limits = "--seconds", "300", "--minutes", "30"
    command = [sys.executable, tmp_path / "small.py", "--model", "llama-62m", "--results", results, *limits]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    found = json.loads(results.read_text())["models"]["llama-62m"]["settings"]
    [whole], [lora], [nothing] = (found[name]["runs"] for name in SETTINGS)
    assert nothing["error"].startswith("UserError: optimizer") and "failed: UserError" in done.stdout
    assert len(whole["cpu_seconds"]) == 3 and whole["peak_in_steps"] > 0
    assert 0 < lora["trained"] < whole["trained"] and found["LoRA"]["against"] == "none"
