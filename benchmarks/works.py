"""The benchmarks with their floors, and the sizes of CPU, GPU and smoke runs. Data only."""

from dataclasses import dataclass, replace

CONTENDERS = ("trl", "trl_defaults", "padded", "tree")
# Names of the contenders in the table.
TITLES = {"trl": "TRL", "trl_defaults": "TRL's defaults", "padded": "padded path", "tree": "this project"}


@dataclass(frozen=True)
class Work:
    """One benchmark: an objective, its rows, and the required ratio to TRL.

    examples_per_step counts pairs (SFT: responses). lengths: (prompt, response) in tokens with the end-of-sequence token;
    None uses dialogues. responses is the number per prompt, all ranked against each other. cached: the reference's
    log-probs are precomputed. memory_floor: the largest allowed share of TRL's peak memory.
    """

    title: str
    floor: float
    loss: str = "dpo"
    examples_per_step: int = 8
    lengths: tuple[int, int] | None = None
    responses: int = 2
    cached: bool = False
    memory_floor: float | None = None

    @property
    def prompts_per_step(self) -> int:
        """The number of prompts per optimizer step."""
        pairs = 1 if self.loss == "sft" else self.responses * (self.responses - 1) // 2
        return self.examples_per_step // pairs


WORKS = {
    "dpo_hh_live": Work("DPO on HH, live reference", floor=7.5, memory_floor=0.33),
    "dpo_hh_cached": Work("DPO on HH, cached reference", floor=9.5, cached=True),
    "dpo_21_pairs": Work(
        "DPO, 7 responses and 21 pairs a prompt", floor=15.0, examples_per_step=21, lengths=(100, 150), responses=7
    ),
    "dpo_long_prompt": Work("DPO, prompts of 400 and responses of 50 tokens", floor=4.5, lengths=(400, 50)),
    "sft_hh": Work("SFT on HH", floor=3.5, loss="sft"),
}
# Benchmarks that do not compare optimizer steps: title and floor.
MFU, SWEEP = "mfu", "sweep"
OTHER_ROWS = {MFU: ("useful arithmetic over the GEMM rate", 0.60), SWEEP: ("8 betas as one sweep, against 8 runs", 1.2)}
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
