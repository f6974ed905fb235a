"""What is said of a model that is not where its name says, before anything is loaded."""

import httpx
import pytest
from huggingface_hub import constants, errors
from transformers import AutoConfig

from preference_training.core.errors import UserError
from preference_training.modeling.loading import check_model
from preference_training.modeling.sources.checks import check_sources
from preference_training.modeling.sources.configurations import model_configuration
from preference_training.modeling.tokenizer import byte_level_tokenizer
from preference_training.modeling.value_head import check_head
from tests.support.files import GOLDEN

ID = "Qwen/Qwen3-0.5B"


@pytest.fixture
def refused(compose, tmp_path):
    """A function: what is said of a model of this name."""

    def said(name):
        with pytest.raises(UserError) as error:
            check_sources(compose(f"model={name}").model, str(tmp_path / "cache"))
        return str(error.value)

    return said


@pytest.fixture
def hub(monkeypatch):
    """A function that makes the hub answer with an error; it counts how often it is asked."""
    asked = []

    def answers(error):
        def metadata(url, **_):
            asked.append(url)
            raise error

        monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", metadata)
        return asked

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return answers


def response(status):
    return httpx.Response(status, request=httpx.Request("HEAD", "https://huggingface.co"))


def test_a_hub_that_cannot_be_reached_is_asked_once(refused, hub, tmp_path):
    asked = hub(httpx.ConnectError("Name or service not known"))
    told = refused(ID)
    assert told.startswith(
        f"model.name_or_path: {ID}: the Hub cannot be reached (Name or service not known), and it is not in "
    )
    assert f"{tmp_path}/cache" in told
    assert f"hf download {ID} --local-dir DIRECTORY" in told
    assert len(asked) == 1


def test_with_the_hub_switched_off_that_is_the_reason(refused, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refused(ID).startswith(f"model.name_or_path: {ID}: HF_HUB_OFFLINE is set, and it is not in the cache")


def test_a_model_in_the_cache_is_read_from_there_where_the_hub_cannot_be_reached(compose, hub, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    hub(httpx.ConnectError("no network"))
    repository = tmp_path / "models--Qwen--Qwen3-0.5B"
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "snapshots" / "abc" / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    check_sources(compose(f"model={ID}").model, str(tmp_path))
    assert capsys.readouterr().out == f"model.name_or_path: the Hub cannot be reached; {ID} is read from its cache\n"
    assert constants.HF_HUB_OFFLINE


def test_a_gated_model_is_refused_with_where_its_license_is(refused, hub):
    hub(errors.GatedRepoError("gated", response=response(403)))
    told = refused("llama3.2-1b")
    assert (
        "meta-llama/Llama-3.2-1B-Instruct is gated on the Hub. Accept its license at https://huggingface.co/meta-llama" in told
    )
    assert "hf auth login" in told


def test_an_id_that_does_not_exist_is_refused_with_the_nearest_that_is_known(refused, hub):
    hub(errors.RepositoryNotFoundError("not found", response=response(404)))
    assert refused(ID).endswith("or it is private (`hf auth login`); did you mean Qwen/Qwen3-0.6B?")
    assert refused("zzz/qqq").endswith("look it up at https://huggingface.co/models")


def test_a_directory_whose_weights_are_not_whole_is_refused(refused, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert "found no weights (config.json), expected model.safetensors" in refused(tmp_path)
    index = {f"layer.{number}": f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)}
    (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {str(index).replace(chr(39), chr(34))}}}')
    (tmp_path / "model-00001-of-00003.safetensors").touch()
    assert "2 of the 3 files of its weights are missing, the first is model-00002-of-00003.safetensors" in refused(tmp_path)


def test_a_directory_without_a_tokenizer_is_refused(refused, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    assert "found no tokenizer, expected tokenizer.json" in refused(tmp_path)


@pytest.mark.parametrize(("kind", "architectures"), [("t5", ["T5ForConditionalGeneration"]), ("bert", ["BertForMaskedLM"])])
def test_a_model_that_is_not_causal_is_refused(kind, architectures):
    config = AutoConfig.for_model(kind, architectures=architectures)
    with pytest.raises(UserError, match=f"x is no causal language model, but {architectures[0]}. Expected one that writes"):
        check_head(config, "lm", "x")


def test_a_dry_run_refuses_the_sizes_that_training_would_refuse(compose):
    config = compose("model=tiny", f"model.name_or_path={GOLDEN / 'llama'}").model
    with pytest.raises(UserError, match=r"model\.from_config\.\w+: found \d+, and the weights of .*llama are of \d+"):
        check_model(config, byte_level_tokenizer())


def test_weights_in_few_bits_are_loaded_as_numbers_or_refused(compose, tmp_path):
    tokenizer = byte_level_tokenizer()
    for method, undone in (("mxfp4", True), ("fp8", True), ("awq", False), ("gptq", False)):
        AutoConfig.for_model("llama", quantization_config={"quant_method": method}).save_pretrained(tmp_path)
        config = compose(f"model={tmp_path}").model
        if undone:
            assert model_configuration(config, tokenizer).quantization_config["dequantize"] is True
        else:
            with pytest.raises(UserError, match=rf"are quantized \({method}\), and cannot be trained"):
                model_configuration(config, tokenizer)
