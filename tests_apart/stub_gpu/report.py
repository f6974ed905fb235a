"""What this project's code for CUDA does over the stub, as a line of JSON. Arguments: the name of a function, and its own.

Run by test_stub_gpu.py with a CUDA build of torch, the stub preloaded, and the project and its benchmarks on the path.
"""

import gpu  # isort: skip  before anything else imports torch

import json
import sys
import tempfile
from pathlib import Path

import torch
from gpu_parts import compiling, memory
from gpu_parts.found import Settings
from gpu_parts.making import FAMILIES, build_config, make_model, make_trainer, packed, random_prompts

from preference_training.modeling.logprobs import response_scores
from preference_training.modeling.prefix_sharing import attention_choice, sharing
from preference_training.modeling.prefix_sharing.sharing import attend_over_tries

# What is computed means nothing, so nothing can be proved of it.
sharing.find_sharing_failure = lambda model: None
SETTINGS = Settings(Path(tempfile.gettempdir()), is_cpu=False)


def graphs(family: str, kind: str) -> dict:
    """The graphs of 40 batches: those of benchmarks/gpu_check.py."""
    return compiling.count(family, kind, SETTINGS)


class Ones:
    """Numbers of a step, which are read from the device, and are all ones: a step goes by none that was not computed."""

    def __init__(self, numbers: torch.Tensor):
        self.numbers = numbers

    def tolist(self) -> list[float]:
        """Waits for the numbers."""
        return [1.0] * len(self.numbers.tolist())


def step(prefix_sharing: str, attention: str) -> dict:
    """What a step of one pack does, after some that compile and allocate; `lines` wait for the device."""
    from gpu_parts.profiling import waits

    values = FAMILIES["llama"] | {"num_hidden_layers": 2}
    overrides = (f"prefix_sharing={prefix_sharing}", f"prefix_attention={attention}", "batch_size=8", "optimizer=AdamW")
    prompts = random_prompts(0, 8 * 7, prompt=(5, 40), response=(2, 20))
    trainer = make_trainer(build_config(values, "bfloat16", *overrides), SETTINGS, prompts)
    reduce = trainer.step.reduce
    trainer.step.reduce = lambda *given: Ones(reduce(*given))
    # Weights are compared before and after some steps, ever fewer; not in these.
    trainer.step.updater.first_full_step = -1 - (1 << 20)
    batches = iter(trainer.batches.train)
    for _ in range(4):
        # Those of later steps are prepared with what the layers of earlier ones have asked for.
        trainer.train_step(next(batches))
    batch = next(batches)
    torch.cuda.synchronize()
    before = gpu.counts()
    trainer.train_step(batch)
    found = gpu.since(before)
    lines = waits(trainer, next(batches), SETTINGS)["lines"]
    batches.close()
    return found | {"lines": lines, "packs": sum(len(each.packs) for each in batch)}


def head(which: str) -> dict:
    """The memory of a head of 131,072 words for 32,000 scored tokens."""
    return memory.head(which == "frozen", SETTINGS)


def varlen(family: str) -> dict:
    """Flash attention in parts: a model's forward and backward pass, as torch's own code for CUDA takes its arguments."""
    model = make_model(build_config(FAMILIES[family], "bfloat16"), SETTINGS)
    attend_over_tries(model)
    attention_choice.ask_for(attention_choice.VARLEN)
    batch = packed(random_prompts(0, 4, responses=3, prompt=(5, 60), response=(2, 40)), SETTINGS)
    before = gpu.counts()
    response_scores(model, batch).sum().backward()
    torch.cuda.synchronize()
    has_gradients = all(weight.grad is not None for weight in model.parameters())
    return gpu.since(before) | {"has_gradients": has_gradients, "attention": attention_choice.asked_for()}


if __name__ == "__main__":
    name, *given = sys.argv[1:]
    print(json.dumps(globals()[name](*given)))
