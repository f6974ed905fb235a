"""Products in FP8, emulated on a CPU: what is rounded, by which scales, what stays as it is, and what is refused."""

import sys

import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity

import train
from preference_training.batching.packing import iterate_examples, pack_examples
from preference_training.configuration.validation import configured
from preference_training.core.errors import UserError
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.distributed.placement import OneProcess
from preference_training.modeling.logprobs import response_scores
from preference_training.modeling.quantization import check_float8, use_float8
from preference_training.modeling.tokenizer import load_tokenizer
from preference_training.training.defaults import fit_dtypes

MODEL = (
    "model=tiny", "loss=dpo", "wandb.enabled=false", "model.policy_dtype=bfloat16", "model.from_config.num_hidden_layers=2",
    "model.from_config.hidden_size=64", "model.from_config.intermediate_size=96",
)  # fmt: skip


class Layers(nn.Module):
    """A block with a router and a layer of an odd size, and a head."""

    def __init__(self):
        super().__init__()
        self.proj, self.gate, self.odd, self.head = (nn.Linear(32, size, bias=False) for size in (32, 16, 24, 64))

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.head


def batch_of(*prompts: TokenizedPrompt):
    return pack_examples(list(iterate_examples(prompts)))


def pairs(*seeds: int) -> list[TokenizedPrompt]:
    return [TokenizedPrompt([5, 6, 7 + seed], [[8, 9, 10 + seed], [3, 4]], [(0, 1)]) for seed in seeds]


def test_the_head_routers_and_odd_sizes_stay_as_they_are():
    model = Layers()
    names = set(model.state_dict())
    assert use_float8(model) == 1
    assert type(model.proj).__name__ == "Float8Linear"
    assert {type(layer) for layer in (model.gate, model.odd, model.head)} == {nn.Linear}
    assert set(model.state_dict()) == names and model.proj.weight.dtype == torch.float32


def test_what_a_token_is_rounded_to_does_not_depend_on_the_rest_of_its_pack():
    model = Layers()
    use_float8(model)
    torch.manual_seed(0)
    token, others = torch.randn(16, 32), 1000 * torch.randn(16, 32)
    with torch.no_grad():
        alone, beside = model.proj(token), model.proj(torch.cat([token, others]))[:16]
        exact = token @ model.proj.weight.T
    torch.testing.assert_close(alone, beside, rtol=1e-5, atol=1e-6)
    # E4M3 has four significant bits: a relative error of at most 2 ** -4 each for input and weight.
    assert 0 < (alone - exact).norm() / exact.norm() < 2**-4


def test_policy_and_reference_are_the_same_to_the_bit_and_the_gradient_is_close():
    gradients = {}
    for fp8 in ("false", "true"):
        torch.manual_seed(0)
        config = configured(*MODEL, f"model.fp8={fp8}")
        placement = OneProcess(config, load_tokenizer(config.model))
        policy = placement.load_policy()
        reference = placement.frozen_copy(policy)
        for pack in (batch_of(*pairs(0, 1, 2)), batch_of(*pairs(1))):
            logps = response_scores(policy, pack)
            with torch.no_grad():
                assert torch.equal(logps.detach(), response_scores(reference, pack))
        policy.zero_grad()
        response_scores(policy, batch_of(*pairs(0, 1, 2)))[::2].sum().backward()
        gradients[fp8] = torch.cat([weight.grad.flatten().float() for weight in policy.parameters()])
    assert cosine_similarity(gradients["true"], gradients["false"], dim=0) > 0.98
    assert not torch.equal(gradients["true"], gradients["false"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("+adapter=lora", "model.fp8: found true with an adapter"),
        ("trainer=FSDPTrainer", "model.fp8: FSDPTrainer compares"),
    ],
)
def test_what_does_not_go_with_it_is_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        configured(*MODEL, "model.fp8=true", *overrides.split())


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        ("model.policy_dtype=float32", "float32"),
        ("model.autocast_dtype=float16", "float16"),
        ("model.policy_dtype=null", "float32"),
    ],
)
def test_products_in_another_dtype_are_refused_once_dtypes_are_settled(overrides, found):
    config = fit_dtypes(configured(*MODEL, "model.fp8=true", overrides), supported=lambda: False)
    with pytest.raises(UserError, match=f"model.fp8: the products are {found}, expected bfloat16"):
        check_float8(config.model)


def test_bf16_gives_float32_weights_the_products_it_needs():
    weights = ("model.policy_dtype=float32", "model.reference_dtype=float32")
    config = fit_dtypes(configured(*MODEL, "model.fp8=true", *weights, "bf16=true"))
    check_float8(config.model)
    assert config.model.autocast_dtype == "bfloat16"


def test_a_checkpoint_is_compared_with_the_rounding_of_its_run(compose, tmp_path):
    """Without it the log-probs of what was saved differ by FP8's rounding, more than bfloat16 explains."""
    short = ("n_examples=16", "batch_size=8", "n_eval_examples=8", "sample_during_eval=false", "do_first_eval=false", "lr=1e-2")
    run_dir = tmp_path / "run"
    # The width at which the difference exceeds what is expected of bfloat16.
    wide = ("model.from_config.hidden_size=128", "model.from_config.intermediate_size=384", "warmup_steps=0")
    train.run(compose(*MODEL, "model.fp8=true", *short, *wide, f"local_run_dir={run_dir}", f"local_dirs=[{tmp_path}]"), run_dir)
    assert (run_dir / "LATEST" / "model.safetensors").is_file()


def test_a_gpu_without_fp8_is_refused_by_its_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    with pytest.raises(UserError, match="model.fp8: NVIDIA A100 has compute capability 8.0, and FP8 needs 8.9"):
        check_float8(configured(*MODEL).model)


def test_without_the_package_the_remedy_is_its_installation(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UserError, match="pip install -r requirements/fp8.txt"):
        check_float8(configured(*MODEL).model)
