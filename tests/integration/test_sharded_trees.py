"""The trie forward through sharded and adapted models: FSDP2 and tensor parallel on two processes, LoRA, recomputation."""

import copy
import os
import random

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import AutoModelForCausalLM

from preference_training.batching.packing import TokenBudget, build_packs, iterate_examples, pack_examples
from preference_training.core.process_group import Ranks
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.modeling.kernels import enable_activation_checkpointing
from preference_training.modeling.logprobs import response_scores
from preference_training.modeling.prefix_sharing.sharing import share_prefixes
from tests.architectures import tiny_models
from tests.support import forked
from tests.support.files import GOLDEN
from tests.support.random_tries import padded_scores, plain_results, random_prompts, relative_error, weighted_sum

PROMPTS = [
    TokenizedPrompt([5 + n, 6, 7, 8], [[10 + n, 11, 0], [12 + n, 0], [13, 14, 15 + n, 16, 0]], [(0, 1), (0, 2)])
    for n in range(4)
]


def golden_model(name: str = "llama"):
    return AutoModelForCausalLM.from_pretrained(GOLDEN / name, dtype=torch.float32)


def expected_numbers(name: str = "llama") -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probs on padded rows in one process, and the gradient of their sum."""
    model = golden_model(name)
    logps = padded_scores(model, pack_examples(list(iterate_examples(PROMPTS))))
    logps.sum().backward()
    return logps.detach(), {weight_name: weight.grad for weight_name, weight in model.named_parameters()}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def check(model, name: str) -> None:
    """Log-probs and gradients of a sharded model against one process."""
    expected, gradients = expected_numbers(name)
    logps = whole(response_scores(model, pack_examples(list(iterate_examples(PROMPTS)))))
    torch.testing.assert_close(logps.detach(), expected, rtol=1e-5, atol=1e-4)
    logps.sum().backward()
    for weight_name, weight in model.named_parameters():
        torch.testing.assert_close(whole(weight.grad), gradients[weight_name], rtol=1e-4, atol=1e-4, msg=weight_name)


def fsdp_worker(rank: int, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard

    start_group(rank, folder)
    model = golden_model()
    assert share_prefixes(model, "on")
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    check(model, "llama")
    dist.destroy_process_group()


def any_trie_worker(rank: int, folder: str) -> None:
    """The gradient over two ranks is that of one process, each sequence alone, however the tries are cut."""
    from torch.distributed.fsdp import fully_shard

    start_group(rank, folder)
    ranks = Ranks(rank, 2, rank == 0, dist.group.WORLD)
    for number, name in enumerate(("llama", "gpt_oss", "llama4-scaled", "stablelm", "phi3-longrope")):
        plain, model = tiny_models.build(name).eval(), tiny_models.build(name).eval()
        assert share_prefixes(model, "on")
        for block in model.model.layers:
            fully_shard(block)
        fully_shard(model)
        for seed in range(3 * number, 3 * number + 3):
            examples = list(iterate_examples(random_prompts(random.Random(seed), longest=40)))
            expected, expected_gradients = plain_results(plain, examples)
            for batch in build_packs(examples, TokenBudget(100, 60), ranks):
                logps = response_scores(model, batch)
                wanted = torch.stack([expected[row] for row in batch.response_rows.tolist()]).float()
                torch.testing.assert_close(logps.detach(), wanted, rtol=1e-5, atol=1e-5)
                # Ranks with fewer packs compute fillers, which do not count. FSDP averages over ranks.
                (weighted_sum(logps, batch) * (0 if batch.is_filler else ranks.size)).backward()
            found = [whole(weight.grad) for weight in model.parameters()]
            assert relative_error(found, expected_gradients) <= 1e-4, (name, seed)
            model.zero_grad()
    dist.destroy_process_group()


def tensor_parallel_worker(rank: int, folder: str) -> None:
    from torch.distributed.tensor import DTensor

    start_group(rank, folder)
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "gpt_neox", dtype=torch.float32, tp_plan="auto")
    assert any(isinstance(weight, DTensor) for weight in model.parameters())
    assert share_prefixes(model, "on")
    expected, _ = expected_numbers("gpt_neox")
    logps = whole(response_scores(model, pack_examples(list(iterate_examples(PROMPTS)))))
    torch.testing.assert_close(logps.detach(), expected, rtol=1e-5, atol=1e-4)
    dist.destroy_process_group()


def start_group(rank: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)


@pytest.mark.parametrize(
    "worker", [fsdp_worker, tensor_parallel_worker, any_trie_worker], ids=["FSDP2", "tensor parallel", "any trie"]
)
def test_a_model_sharded_over_two_processes_gives_the_numbers_of_one(worker, tmp_path):
    forked.start_server()
    mp.start_processes(worker, args=(str(tmp_path),), nprocs=2, start_method="forkserver")


def test_an_adapted_model_shares_prompts_and_trains_its_adapter_only():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(golden_model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    padded = copy.deepcopy(model)
    assert share_prefixes(model, "on")
    batch = pack_examples(list(iterate_examples(PROMPTS)))
    found, expected = response_scores(model, batch), padded_scores(padded, batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found.sum().backward()
    expected.sum().backward()
    trained = [(a, b) for a, b in zip(model.parameters(), padded.parameters(), strict=True) if a.requires_grad]
    assert len(trained) == 8
    for one, other in trained:
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_a_fresh_adapter_passes_the_proof():
    from peft import LoraConfig, get_peft_model

    assert share_prefixes(get_peft_model(golden_model(), LoraConfig(r=4, target_modules=["q_proj"])), "on")


@pytest.mark.parametrize("kind", [True, "selective"])
def test_recomputed_activations_see_the_trie_again(kind):
    model = golden_model()
    share_prefixes(model, "on")
    enable_activation_checkpointing(model.train(), kind)
    check(model, "llama")
