"""FlexAttention as a GPU runs it, compiled, as far as a CPU can tell: the same numbers, few graphs, no breaks; and what happens
where it cannot be used."""

import itertools
import random
from functools import cache

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention as flex

from preference_training.batching.packing import iterate_examples, pack_examples
from preference_training.batching.tries import TrieLayout, build_trie
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.modeling.kernels import compile_between_attentions, enable_activation_checkpointing
from preference_training.modeling.logprobs import response_scores
from preference_training.modeling.prefix_sharing import block_attention, tree_attention
from preference_training.modeling.prefix_sharing.block_attention import attention_by_blocks
from preference_training.modeling.prefix_sharing.rules import Rules
from preference_training.modeling.prefix_sharing.sharing import attend_over_tries
from preference_training.modeling.prefix_sharing.tree_attention import _attention_by_branches
from tests.modeling.test_tree_attention import make

CPU = torch.device("cpu")


@cache
def traced(_device_type: str):
    """As on a GPU, but for the code that is generated: captured whole, differentiated, and executed operation by operation."""
    return block_attention.compiled(flex.flex_attention, "aot_eager")


@pytest.fixture
def blocks(monkeypatch):
    """FlexAttention compiled on this machine, with gradients, which its own code for CPUs does not have."""
    torch._dynamo.reset()
    counters.clear()
    traced.cache_clear()
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(block_attention, "compiled_attention", traced)
    monkeypatch.setattr(tree_attention, "block_attention_fault", lambda _: None)
    yield
    torch._dynamo.reset()


def some_trie(draw: random.Random) -> TrieLayout:
    """Prompts with some responses each, padded as for a GPU."""
    sequences, owners = [], []
    for owner in range(draw.choice([1, 2, 4])):
        prompt = [1000 + owner, *(draw.randint(1, 9) for _ in range(draw.randint(1, 120)))]
        for _ in range(draw.choice([1, 2, 7])):
            sequences.append(prompt + [draw.randint(10, 99) for _ in range(draw.randint(1, 60))])
            owners.append(owner)
    trie, _ = build_trie(sequences, owners)
    return TrieLayout(trie.padded(max(256, -(-trie.num_tokens // 128) * 128)), CPU)


def random_inputs(length: int) -> list[torch.Tensor]:
    """Query, key and value of two query heads for each key head."""
    return [torch.randn(1, length, heads, 8, requires_grad=True) for heads in (4, 2, 2)]


def mostly_long(cases: list, ordinary: list) -> list:
    """Test cases, of which some belong to the ordinary run: compiling takes seconds."""
    return [case if case in ordinary else pytest.param(*case, marks=pytest.mark.long) for case in cases]


RULES = list(itertools.product([None, 20.0], [None, 40], [None, 64]))


@pytest.mark.parametrize(("softcap", "window", "chunk"), mostly_long(RULES, [(20.0, 40, None)]))
def test_compiled_attention_and_its_gradient_are_those_of_the_branches(blocks, softcap, window, chunk):
    layout = some_trie(random.Random(1))
    inputs = random_inputs(layout.trie.num_tokens)
    sinks = torch.randn(4)
    results = []
    for attend in (attention_by_blocks, _attention_by_branches):
        rules = Rules(0.5, window, chunk, softcap, sinks)
        output = attend(*(each.transpose(1, 2) for each in inputs), layout, rules)
        results.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not counters["graph_break"]


@pytest.mark.parametrize("batches", [8, pytest.param(40, marks=pytest.mark.long)])
def test_batches_of_many_lengths_compile_few_graphs(blocks, batches):
    draw = random.Random(0)
    # The layers of Gemma 3: two kinds of mask. Evaluations compute without gradients.
    kinds = [Rules(0.3, window=64), Rules(0.3)]
    lengths = set()
    for step in range(batches):
        layout = some_trie(draw)
        lengths.add(layout.trie.num_tokens)
        for rules in kinds:
            with torch.set_grad_enabled(step % 2 == 0):
                query, key, value = (each.transpose(1, 2) for each in random_inputs(layout.trie.num_tokens))
                attention_by_blocks(query, key, value, layout, rules)
    assert len(lengths) > 3
    assert counters["stats"]["unique_graphs"] <= 4, "two kinds, with and without gradients"
    assert not counters["graph_break"]


def some_batch(draw: random.Random):
    """A packed batch, prepared as for a GPU, whose attention goes by blocks."""
    tokens = lambda least, most: [draw.randint(3, 90) for _ in range(draw.randint(least, most))]  # noqa: E731
    prompts = [TokenizedPrompt(tokens(1, 60), [tokens(2, 40), tokens(2, 40)], [(0, 1)]) for _ in range(draw.randint(1, 5))]
    batch = pack_examples(list(iterate_examples(prompts))).for_gpu()
    batch.layout.by_branches = False
    return batch


KINDS = ("whole", "lora", "checkpointing", "selective", "autocast")
MODELS = [("llama", kind, False) for kind in KINDS]
MODELS += [(name, "whole", False) for name in ("gemma2", "gemma3_text", "gpt_oss")]
MODELS += [("llama", kind, True) for kind in KINDS]
# Of the others the kinds whose graphs may differ from Llama's: parallel blocks, soft-caps, windows, sinks.
MODELS += [("gpt_neox", "lora", True), ("gemma2", "whole", True), ("gemma2", "autocast", True)]
MODELS += [("gemma3_text", "whole", True), ("gemma3_text", "autocast", True), ("gpt_oss", "checkpointing", True)]
# Those of attention, two kinds of mask with and without gradients, twice; compiled norms and MLPs have their own.
MOST_GRAPHS = {False: 8, True: 16}


@pytest.mark.parametrize(
    ("model_type", "kind", "compiled"), mostly_long(MODELS, [("llama", "selective", False), ("llama", "whole", True)])
)
def test_models_train_on_changing_lengths_in_few_graphs(blocks, model_type, kind, compiled):
    model = make(model_type)
    if kind == "lora":
        get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    attend_over_tries(model)
    if kind in ("checkpointing", "selective"):
        enable_activation_checkpointing(model.train(), "selective" if kind == "selective" else True)
    if compiled:
        compile_between_attentions(model, "aot_eager")
    if kind == "autocast":
        model.autocast_dtype = torch.bfloat16
    draw = random.Random(2)
    after = []
    for _ in range(4):
        batch = some_batch(draw)
        logps = response_scores(model, batch)
        logps.sum().backward()
        with torch.no_grad():
            expected = response_scores(model, batch)
        # The same kernel with and without gradients: a policy equals its frozen copy bit for bit.
        assert torch.equal(logps.detach(), expected)
        after.append(counters["stats"]["unique_graphs"])
    assert after[0] == after[-1] <= MOST_GRAPHS[compiled], "what the first batch compiled serves all others"
    assert not counters["graph_break"]


def test_short_rows_are_computed_by_the_kernel_of_all_others(monkeypatch):
    """Torch's kernel for decoding, which it prefers below 128 tokens, does not compile for grouped heads."""
    asked = []

    def attend(query, key, value, **options):
        asked.append(options["kernel_options"])
        return query

    monkeypatch.setattr(block_attention, "compiled_attention", lambda _: attend)
    trie, _ = build_trie([[1, 2, 3], [1, 2, 4]], [0, 0])
    attention_by_blocks(*(each.transpose(1, 2) for each in random_inputs(4)), TrieLayout(trie, CPU), Rules())
    assert asked == [{"BACKEND": "TRITON"}]


def test_what_does_not_compile_goes_branch_by_branch_and_says_so_once(blocks, monkeypatch, capsys):
    def fails(*_, **__):
        raise torch._dynamo.exc.FailOnRecompileLimitHit("recompile_limit reached")

    monkeypatch.setattr(block_attention, "_faults", {})
    monkeypatch.setattr(block_attention, "compiled_attention", lambda _: fails)
    model = make("llama")
    attend_over_tries(model)
    batch = some_batch(random.Random(3))
    found = response_scores(model, batch)
    batch.layout.by_branches = True
    assert torch.equal(found, response_scores(model, batch))
    said = capsys.readouterr().out
    assert said.count("branch by branch, not through FlexAttention") == 1
    assert "FailOnRecompileLimitHit: recompile_limit reached" in said


def test_memory_that_does_not_suffice_is_no_fault_of_the_kernel(blocks, monkeypatch):
    def fails(*_, **__):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(block_attention, "compiled_attention", lambda _: fails)
    model = make("llama")
    attend_over_tries(model)
    with pytest.raises(torch.OutOfMemoryError):
        response_scores(model, some_batch(random.Random(3)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"capability": (7, 5)}, "Tesla T4 has compute capability 7.5, and it needs 8.0"),
        ({"hip": "6.2"}, "AMD GPUs"),
        ({"triton": False}, "pip install triton"),
        ({"compiler": None}, "Triton needs a C compiler"),
    ],
)
def test_a_gpu_without_kernels_is_named_with_the_reason(monkeypatch, changes, said):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: changes.get("capability", (9, 0)))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    monkeypatch.setattr(torch.version, "hip", changes.get("hip"))
    monkeypatch.setattr("torch.utils._triton.has_triton_package", lambda: changes.get("triton", True))
    monkeypatch.setattr(block_attention.shutil, "which", lambda _: changes.get("compiler", "/usr/bin/gcc"))
    found = block_attention.unsupported_device.__wrapped__(torch.device("cuda", 0))
    assert found is None if said is None else said in found


def test_a_device_other_than_an_nvidia_gpu_has_no_kernels():
    assert "no kernels for mps" in block_attention.unsupported_device.__wrapped__(torch.device("mps"))
