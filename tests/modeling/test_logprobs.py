"""Response log-probs against golden numbers, plain forwards, and themselves in other company."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from preference_training.batching.packing import iterate_examples, pack_examples
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.modeling.logprobs import response_scores
from tests.support.files import GOLDEN


class FixedLogits(torch.nn.Module):
    """A stand-in for a model, which answers any input with the same logits [B, S, V]."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits
        self.config = SimpleNamespace(_attn_implementation="sdpa", get_text_config=SimpleNamespace)

    def forward(self, input_ids, attention_mask, use_cache):
        return SimpleNamespace(logits=self.logits[: len(input_ids), : input_ids.shape[1]])


def test_sums_equal_the_golden_ones(golden):
    for case in golden("response_logps.json"):
        for row, labels in enumerate(case["labels"]):
            scored = [index for index, label in enumerate(labels) if label != -100]
            first, last = scored[0], scored[-1] + 1
            assert scored == list(range(first, last))
            prompt = TokenizedPrompt([0] * first, [labels[first:last]], [])
            model = FixedLogits(torch.tensor(case["logits"][row])[None, :last])
            found = response_scores(model, pack_examples([(prompt, 0)]))
            assert found.item() == pytest.approx(case["sum"][row], rel=1e-5)


@pytest.fixture(scope="module", params=["gpt_neox", "llama"])
def model(request):
    return AutoModelForCausalLM.from_pretrained(GOLDEN / request.param, dtype=torch.float32).eval()


PROMPTS = [
    TokenizedPrompt([5, 6, 7, 8, 9], [[10, 11, 0], [12, 0]], [(0, 1)]),
    TokenizedPrompt([13], [[14, 15, 16, 17, 18, 19, 20, 0], [0]], [(0, 1)]),
    TokenizedPrompt(list(range(30, 60)), [[61, 0], [62, 63, 64, 0], [65, 0]], [(0, 1), (2, 1)]),
]


def plain_logp(model, prompt: list[int], response: list[int]) -> float:
    """One unpadded forward; token t is predicted at t - 1."""
    logits = model(torch.tensor([prompt + response])).logits[0].double().log_softmax(-1)
    return sum(logits[len(prompt) + i - 1, token].item() for i, token in enumerate(response))


@torch.no_grad()
def test_log_probs_equal_those_of_one_plain_forward_per_response(model):
    expected = [plain_logp(model, prompt.prompt_ids, response) for prompt in PROMPTS for response in prompt.responses]
    found = response_scores(model, pack_examples(list(iterate_examples(PROMPTS))))
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
def test_a_response_scores_the_same_alone_as_in_padded_company(model):
    together = response_scores(model, pack_examples(list(iterate_examples(PROMPTS))))
    alone = torch.cat([response_scores(model, pack_examples(list(iterate_examples([prompt])))) for prompt in PROMPTS])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_response_may_hold_the_padding_token(model):
    # The golden tokenizer pads with its end-of-sequence token, id 0; position, not id, says what is scored.
    inside = TokenizedPrompt([5, 6], [[0, 0, 7, 0]], [])
    longer = TokenizedPrompt([5, 6], [[8, 9, 10, 11, 12, 0]], [])
    found = response_scores(model, pack_examples([(inside, 0), (longer, 0)]))
    assert found[0].item() == pytest.approx(plain_logp(model, [5, 6], [0, 0, 7, 0]), abs=1e-4)
