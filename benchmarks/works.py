"""The benchmarks with their floors, and the sizes of CPU, GPU and smoke runs. Data only."""

from dataclasses import dataclass, replace
from itertools import combinations
from math import prod

# Names of the contenders in the table. padded: without prefix sharing. alone: each sequence in a pack of its own. before:
# another checkout of this project.
TITLES = {
    "trl": "TRL",
    "trl_defaults": "TRL's defaults",
    "padded": "padded path",
    "alone": "each sequence alone",
    "before": "another checkout",
    "tree": "this project",
}
CONTENDERS = tuple(TITLES)
# A length in tokens: a fixed one, or mean and standard deviation of its logarithm.
Length = int | tuple[float, float]


@dataclass(frozen=True)
class Work:
    """One benchmark: an objective, its rows, and the required speedups over other contenders.

    examples_per_step counts pairs (SFT: responses). prompt: the length of generated prompts; None uses dialogues. levels: how
    often each generated prompt, and what continues it, is continued, and by how many tokens; the last level counts the
    end-of-sequence token. all_pairs: every response is preferred to all after it; else each other one to the next. system: the
    length of a system prompt that all rows share. cached: the reference's log-probs are precomputed. memory_floor: the largest
    allowed share of TRL's peak memory. without: contenders that do not run it.
    """

    title: str
    floors: dict[str, float]
    loss: str = "dpo"
    examples_per_step: int = 8
    prompt: Length | None = None
    levels: tuple[tuple[int, Length], ...] = ()
    all_pairs: bool = True
    system: int = 0
    cached: bool = False
    memory_floor: float | None = None
    without: tuple[str, ...] = ("alone",)

    @property
    def responses(self) -> int:
        """The number of responses of each prompt."""
        return prod(count for count, _ in self.levels) if self.levels else 1 if self.loss == "sft" else 2

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The preferred and dispreferred response of each pair of a prompt; none for SFT."""
        if self.loss == "sft":
            return []
        pairs = combinations(range(self.responses), 2)
        return [pair for pair in pairs if self.all_pairs or (pair[0] % 2 == 0 and pair[1] == pair[0] + 1)]

    @property
    def prompts_per_step(self) -> int:
        """The number of prompts per optimizer step."""
        return self.examples_per_step // (len(self.pairs) or self.responses)


# A turn of a conversation: on average 39 tokens, as HH's chosen responses.
TURN = (3.26, 0.9)
WORKS = {
    "dpo_hh_live": Work("DPO on HH, live reference", {"trl": 7.5, "before": 0.98}, memory_floor=0.33),
    "dpo_hh_cached": Work("DPO on HH, cached reference", {"trl": 9.5}, cached=True),
    "dpo_21_pairs": Work(
        "DPO, 7 responses and 21 pairs a prompt", {"trl": 15.0}, examples_per_step=21, prompt=100, levels=((7, 150),)
    ),
    "dpo_long_prompt": Work("DPO, prompts of 400 and responses of 50 tokens", {"trl": 4.5}, prompt=400, levels=((2, 50),)),
    "sft_hh": Work("SFT on HH", {"trl": 3.5}, loss="sft"),
    "dpo_system": Work("DPO on HH, a system prompt of 300 tokens in all rows", {"before": 2.2}, system=300),
    "sft_system": Work("SFT on HH, a system prompt of 300 tokens in all rows", {"before": 2.2}, loss="sft", system=300),
    # A user's turn; the rest of two exchanges and another user's turn; in two versions the third answer and a fourth exchange.
    "dpo_conversations": Work(
        "DPO on conversations of 4 exchanges that part in the third",
        {"padded": 1.6},
        prompt=TURN,
        levels=((1, TURN),) * 4 + ((2, TURN),) + ((1, TURN),) * 2,
    ),
    "dpo_28_pairs": Work("DPO, 8 responses and 28 pairs", {"trl": 5.0}, examples_per_step=28, prompt=100, levels=((8, 150),)),
    "dpo_4_pairs": Work(
        "DPO, 8 responses and 4 pairs", {}, examples_per_step=4, prompt=100, levels=((8, 150),), all_pairs=False
    ),
    # Packed: 100 + 4 * 100 + 20 * 100 tokens, of 20 * 300. Time is to exceed that share by a tenth at most.
    "sft_samples": Work(
        "SFT on 20 samples that branch at two depths",
        {"alone": 20 * 300 / 2500 / 1.1},
        loss="sft",
        examples_per_step=20,
        prompt=100,
        levels=((4, 100), (5, 100)),
        # Of a prompt's targets, earlier code learns one.
        without=("before",),
    ),
}
# Benchmarks that do not compare optimizer steps: title and floor.
MFU, SWEEP = "mfu", "sweep"
OTHER_ROWS = {MFU: ("useful arithmetic over the GEMM rate", 0.60), SWEEP: ("8 betas as one sweep, against 8 runs", 1.2)}
# More pairs of the same responses: two benchmarks, and the largest allowed ratio of their times.
MORE_PAIRS = ("dpo_28_pairs", "dpo_4_pairs", 1.05)
# The largest allowed share of a step that building its tries takes.
BUILDING_SHARE = 0.02
# The run that `mfu` is computed from.
MFU_WORK, MFU_CONTENDER = "dpo_hh_live", "tree"


@dataclass(frozen=True)
class Preset:
    """The sizes of a benchmark run. tolerance is the accepted relative difference of losses and log-probs.

    gemm is the width of the square matrices whose product is the baseline for useful arithmetic. shrink divides the lengths
    of all generated rows. sweep_examples is the number of rows in the file that each job of a sweep trains on, minus the
    few that it holds out.
    """

    name: str
    device: str
    dtype: str
    model: dict
    steps: int
    rounds: int
    works: tuple[str, ...]
    tolerance: float
    gemm: int
    betas: int = 8
    sweep_examples: int = 64
    max_length: int = 512
    shrink: int = 1


VOCABULARY = 32000
CPU = Preset(
    "cpu",
    device="cpu",
    dtype="float32",
    model={
        "model_type": "llama",
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "intermediate_size": 1376,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 1024,
    },
    steps=6,
    rounds=3,
    works=(*WORKS, *OTHER_ROWS),
    tolerance=1e-3,
    gemm=4096,
)
SMOKE = replace(
    CPU,
    name="smoke",
    model=CPU.model
    | {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    | {"intermediate_size": 128},
    steps=2,
    rounds=1,
    works=("dpo_hh_live", "sft_hh"),
    gemm=256,
    betas=2,
    sweep_examples=24,
    shrink=8,
)
# 1.4B parameters. bfloat16 has about three digits, and the two orders of summation differ in the last one.
GPU = replace(
    CPU,
    name="cuda",
    device="cuda",
    dtype="bfloat16",
    model={
        "model_type": "gpt_neox",
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 8192,
        "vocab_size": 50304,
        "max_position_embeddings": 2048,
    },
    steps=21,
    works=(*WORKS, MFU),
    tolerance=2e-2,
    gemm=8192,
)
