"""The same numbers without this project: models as transformers and peft load them, one row at a time, their own attention."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

BETA = 0.1


class Rows:
    """The pairs of a file as token ids: (prompt, chosen, rejected), with an end of text behind each response."""

    def __init__(self, file: Path, tokenizer_of: Path):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
        read = [json.loads(line) for line in file.read_text().splitlines()]
        keys, end = ("prompt", "chosen", "rejected"), [tokenizer.eos_token_id]
        ids = [[tokenizer(row[key], add_special_tokens=False).input_ids for key in keys] for row in read]
        self.pairs = [(prompt, chosen + end, rejected + end) for prompt, chosen, rejected in ids]

    def tokens(self, response: int) -> float:
        """How many tokens the chosen (1) or rejected (2) responses have, on average."""
        return sum(len(pair[response]) for pair in self.pairs) / len(self.pairs)


def load(folder: Path, adapter: Path | None = None) -> nn.Module:
    """A directory's model in float32; where an adapter is given, with it. Raises AssertionError where weights are left over."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[what], f"{what}: {sorted(info[what])[:3]}"
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    return model.eval()


def logp(model: nn.Module, prompt: list[int], response: list[int]) -> Tensor:
    """Log-prob of a response, a scalar in float64."""
    logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum()


@torch.no_grad()
def mean_logps(model: nn.Module, rows: Rows, paired: bool) -> dict[str, float]:
    """Mean log-prob of the chosen responses, and of the rejected ones where there are pairs."""
    kinds = ("chosen", "rejected") if paired else ("chosen",)
    sums = {kind: sum(logp(model, pair[0], pair[at]).item() for pair in rows.pairs) for at, kind in enumerate(kinds, start=1)}
    return {kind: total / len(rows.pairs) for kind, total in sums.items()}


def losses(model: nn.Module, pairs: Sequence, reference: Sequence[float] | None) -> Tensor:
    """The sum of the losses of some rows: DPO's where the reference's log-ratios are given, else of fine-tuning."""
    if reference is None:
        return -sum(logp(model, prompt, chosen) for prompt, chosen, _ in pairs)
    ratios = (logp(model, prompt, chosen) - logp(model, prompt, rejected) for prompt, chosen, rejected in pairs)
    return sum(-F.logsigmoid(BETA * (ratio - known)) for ratio, known in zip(ratios, reference, strict=True))


def train(model: nn.Module, rows: Rows, paired: bool, steps: int, lr: float, max_norm: float) -> dict[str, Tensor]:
    """The weights after some steps of gradient descent on all rows, each row a forward and backward of its own."""
    with torch.no_grad():
        ratios = [(logp(model, p, c) - logp(model, p, r)).item() for p, c, r in rows.pairs] if paired else None
    weights = list(model.parameters())
    for _ in range(steps):
        for number, pair in enumerate(rows.pairs):
            (losses(model, [pair], ratios and [ratios[number]]) / len(rows.pairs)).backward()
        nn.utils.clip_grad_norm_(weights, max_norm)
        torch.optim.SGD(weights, lr).step()
        model.zero_grad()
    return {name: weight.detach() for name, weight in model.named_parameters()}
