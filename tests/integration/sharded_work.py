"""What the processes of `test_sharded_training.py` do. Each function runs on every rank; rank 0's result is the test's.

Every rank also runs the same thing alone, in one process, and the two are compared.
"""

import json
import math
import shutil
import time
from pathlib import Path
from unittest import mock

import torch
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.torch_version import TorchVersion
from transformers import AutoModelForCausalLM, AutoTokenizer

from preference_training.batching.iterator import BatchIterator, Packing
from preference_training.batching.micro_batches import MicroBatch, evaluation_batches
from preference_training.batching.packing import TokenBudget, build_packs, iterate_examples
from preference_training.batching.schedule import RunLength, Schedule
from preference_training.checkpointing.checkpoint import Checkpoint
from preference_training.checkpointing.snapshot import Snapshot
from preference_training.checkpointing.writer import CheckpointWriter, SaveOptions
from preference_training.configuration.schema import RunConfig
from preference_training.core.metric_names import TOKENS_SAVED
from preference_training.core.process_group import SINGLE_PROCESS, reshard, to_local
from preference_training.core.random_streams import seed_everything
from preference_training.data.prompt_table import PromptTable, Selection
from preference_training.data.records.record import PreferenceRecord
from preference_training.data.rendering.settings import TokenSettings
from preference_training.data.tokenization import tokenize_records
from preference_training.distributed import sharding as sharding_module
from preference_training.distributed.launching import end_group, start_group
from preference_training.distributed.placement import Sharded
from preference_training.distributed.sharding import full_tensor, make_mesh
from preference_training.evaluation.held_out import evaluate_held_out
from preference_training.generation.sampling import Sampler
from preference_training.losses.registry import build_loss
from preference_training.modeling.loading import load_model
from preference_training.modeling.logprobs import LiveReference, response_scores
from preference_training.modeling.prefix_sharing.sharing import share_prefixes
from preference_training.modeling.reference_cache import ReferencePlan, cache_path, cached_reference, compute_logps
from preference_training.modeling.state import free_memory, weights_hash
from preference_training.modeling.tokenizer import load_tokenizer
from preference_training.training import budget_trial
from tests.support.building import build_trainer, weights_of
from tests.support.files import GOLDEN
from tests.support.losses import of_every_kind
from tests.support.saved_memory import SavedTensors
from trainers import Trainer

TRAJECTORIES = json.loads((GOLDEN / "trajectories.json").read_text())


def golden_prompts(tokenizer, examples: str) -> list:
    """The 48 golden rows as tokenised prompts."""
    rows = json.loads((GOLDEN / "pairs.json").read_text())
    records = [PreferenceRecord(r["prompt"], [r["chosen"], r["rejected"]], [(0, 1)], r["chosen"], 0, "") for r in rows]
    kind = "targets" if examples == "targets" else "pairs"
    found = list(tokenize_records(records, tokenizer, TokenSettings(kind, 64, 32)))
    return found if examples == kind else of_every_kind(found)[examples]


class World:
    """A joined process and what it builds trainers of: sharded ones, and the same alone."""

    def __init__(self, settings: dict):
        self.config = RunConfig.of(settings)
        self.device = start_group(5)
        self.rank, self.size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")

    def mesh(self, sharding: str, tensor_size: int = 1, local_size: int | None = None):
        """The mesh of a sharding."""
        return make_mesh("cpu", self.size, local_size or self.size, sharding, tensor_size)

    def sharded(self, architecture: str, loss: dict, mesh, sharding: str, **changes):
        """A sharded trainer on golden models, and its ranks."""
        config = self.config.changed({"trainer.sharding": sharding} | changes)

        def load(name: str):
            one = config.changed({"model.name_or_path": str(GOLDEN / name)})
            return Sharded(one, self.tokenizer, self.device, mesh).load_policy()

        placement = Sharded(config, self.tokenizer, self.device, mesh)
        reference = LiveReference(load(architecture)) if loss["name"] != "sft" else None
        policy = load(f"{architecture}_policy")
        return build_trainer(config, policy, build_loss(**loss), reference, placement=placement), placement.ranks

    def alone(self, architecture: str, loss: dict, **changes) -> Trainer:
        """The same in one process."""

        def load(name: str):
            model = AutoModelForCausalLM.from_pretrained(GOLDEN / name, dtype=torch.float32)
            share_prefixes(model, "on")
            return model

        reference = LiveReference(load(architecture)) if loss["name"] != "sft" else None
        models = load(f"{architecture}_policy"), build_loss(**loss), reference
        return build_trainer(self.config.changed(changes), *models, tokenizer=self.tokenizer)


def follow(world: World, trajectory: dict, mesh, sharding: str, loss: dict | None = None, budget: int | None = None) -> dict:
    """Eight steps of a golden trajectory, sharded and alone: the largest relative difference of each kind of number."""
    loss = loss or trajectory["loss"]
    changes = {key: trajectory[key] for key in ("optimizer", "lr", "warmup_steps", "max_grad_norm")}
    trainer, ranks = world.sharded(trajectory["architecture"], loss, mesh, sharding, **changes)
    single = world.alone(trajectory["architecture"], loss, **changes)
    prompts = golden_prompts(world.tokenizer, trainer.models.loss.examples)
    size = trajectory["batch_size"] // trajectory["gradient_accumulation_steps"]
    limit = TokenBudget(budget, budget) if budget else TokenBudget(10**6, 10**6)
    worst: dict[str, float] = {}
    for step in trajectory["steps"]:
        examples = list(iterate_examples(prompts[row] for row in step["rows"]))
        parts = [examples[start : start + size] for start in range(0, len(examples), size)]
        found = trainer.train_step([MicroBatch.of(part, limit, ranks) for part in parts])
        expected = single.train_step([MicroBatch.of(part, limit) for part in parts])
        # What packs share depends on the packs, and so on the ranks.
        for name, value in ((key, value) for key, value in expected.items() if key != TOKENS_SAVED):
            scale = abs(float(value)) if name in ("loss/train", "grad_norm") else max(1.0, abs(float(value)))
            worst[name] = max(worst.get(name, 0.0), abs(float(found[name]) - float(value)) / scale)
    # A forward that nothing follows, as at an evaluation, may leave weights gathered.
    with torch.no_grad():
        trainer.step.logps(build_packs(parts[0], limit, ranks)[0])
    assert trainer.step.updater.optimizer_state()["state"].keys() == single.step.updater.optimizer_state()["state"].keys()
    weights = dict(trainer.models.policy.named_parameters())
    pairs = [(full_tensor(weights[name]).detach(), weight.detach()) for name, weight in single.models.policy.named_parameters()]
    apart, size = (
        math.sqrt(sum(x.square().sum().item() for x in xs)) for xs in ([a - b for a, b in pairs], [b for _, b in pairs])
    )
    return worst | {"weights": apart / size}


def steps_after_a_trial(settings: dict, shardings: list[str]) -> dict:
    """Budgets by measurement under these shardings, where ranks differ in room; and whether three steps notice the trial."""
    world = World(settings)
    table = PromptTable.of(golden_prompts(world.tokenizer, "pairs"))
    changes = {"optimizer": "AdamW", "batch_size": 48, "model.name_or_path": str(GOLDEN / "llama")}
    results = {}
    for sharding in shardings:
        mesh, loss = world.mesh(sharding), {"name": "dpo", "beta": 0.1}
        made = [world.sharded("llama", loss, mesh, sharding, **changes) for _ in range(2)]
        (tried, ranks), (untried, _) = made
        meter = SavedTensors(8_000_000 * (1 + world.rank))
        with mock.patch.object(budget_trial, "memory_meter", lambda _, meter=meter: meter):
            budget = budget_trial.measured_budget(tried.placement, tried.models.policy, tried.models.loss, table, True)
        rooms = budget_trial.optimizer_bytes(tried.models.policy, tried.config, meter.devices)
        for trainer, _ in made:
            trainer.batches.train = BatchIterator(
                Schedule(table, 8, length=RunLength(n_steps=3)), packing=Packing(budget, ranks)
            )
            for batch in trainer.batches.train:
                trainer.train_step(batch)
        weights = [weights_of(trainer).values() for trainer in (tried, untried)]
        same = all(torch.equal(full_tensor(one), full_tensor(other)) for one, other in zip(*weights, strict=True))
        results[sharding] = {"limits": ranks.all_gather_object(budget.limit), "same": same, "optimizer": rooms[0]}
    end_group()
    return results


TR_DPO = {"name": "tr_dpo", "beta": 0.1, "reference_update_every": 3, "reference_update_share": 0.6}
BCO = {"name": "bco", "beta": 0.1}


def follow_each_sharding(settings: dict, numbers: list[int]) -> dict:
    """Trajectories under every sharding that two processes can have; small packs; a reference that moves."""
    world = World(settings)
    results = {}
    for number in numbers:
        trajectory = TRAJECTORIES[number]
        for sharding in ("full", "grad_op", "optimizer", "none"):
            results[f"{number} {sharding}"] = follow(world, trajectory, world.mesh(sharding), sharding)
    results["small packs"] = follow(world, TRAJECTORIES[numbers[0]], world.mesh("full"), "full", budget=40)
    for sharding in ("full", "grad_op"):
        results[f"TR-DPO {sharding}"] = follow(world, TRAJECTORIES[numbers[0]], world.mesh(sharding), sharding, TR_DPO)
    results["BCO, small packs"] = follow(world, TRAJECTORIES[numbers[0]], world.mesh("full"), "full", BCO, budget=40)
    sgd = TRAJECTORIES[numbers[0]] | {"optimizer": "SGD"}
    results["SGD"] = follow(world, sgd, world.mesh("full"), "full")
    end_group()
    return results


BETA_DPO = {"name": "dpo", "beta": 0.1, "mode_loss": "beta_DPO", "mode_weight": 0.5, "a": 0.6}


OTHER_LOSSES = (
    {"name": "kto", "beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 2.0},
    {"name": "plackett_luce", "beta": 0.1},
    {"name": "aot_unpaired", "beta": 0.1, "label_smoothing": 0.1},
    {"name": "ld_dpo", "beta": 0.1, "alpha": 0.5},
    {"name": "wpo", "beta": 0.1},
    {"name": "sft", "average": "tokens"},
    {"name": "rpo", "beta": 0.1, "alpha": 1.0, "average": "tokens"},
)


def follow_other_losses(settings: dict, number: int) -> dict:
    """A trajectory with losses of labels, rankings, sorted gaps, tokens and token averages, in small packs."""
    world = World(settings)
    follows = (follow(world, TRAJECTORIES[number], world.mesh("full"), "full", loss, budget=60) for loss in OTHER_LOSSES)
    results = {loss["name"]: worst for loss, worst in zip(OTHER_LOSSES, follows, strict=True)}
    end_group()
    return results


def follow_on_four(settings: dict, number: int) -> dict:
    """Hybrid sharding, tensor parallel beside sharding, and beta-DPO, on four processes."""
    world = World(settings)
    trajectory = TRAJECTORIES[number]
    results = {
        "hybrid": follow(world, trajectory, world.mesh("hybrid", local_size=2), "hybrid"),
        "tensor x shard": follow(world, trajectory, world.mesh("full", tensor_size=2), "full"),
        "beta-DPO": follow(world, trajectory, world.mesh("full"), "full", BETA_DPO),
        "beta-DPO, small packs": follow(world, trajectory, world.mesh("full"), "full", BETA_DPO, budget=40),
    }
    end_group()
    return results


def follow_split_layers(settings: dict, numbers: list[int]) -> dict:
    """Tensor parallel over two processes, on both architectures; beta-DPO over two ranks."""
    world = World(settings)
    results = {str(n): follow(world, TRAJECTORIES[n], world.mesh("full", tensor_size=2), "full") for n in numbers}
    results["beta-DPO"] = follow(world, TRAJECTORIES[numbers[0]], world.mesh("full"), "full", BETA_DPO)
    end_group()
    return results


def follow_in_bfloat16(settings: dict, number_of_steps: int) -> dict:
    """Losses of a run whose weights are gathered and computed with in bfloat16, and of the same in float32 alone."""
    world = World(settings)
    losses = {}
    for loss in ({"name": "sft"}, {"name": "dpo", "beta": 0.1}):
        changes = {"optimizer": "AdamW", "lr": 2e-4, "warmup_steps": 5}
        short, ranks = world.sharded(
            "llama", loss, world.mesh("full"), "full", **changes, **{"model.fsdp_policy_mp": "bfloat16"}
        )
        exact = world.alone("llama", loss, **changes)
        examples = list(iterate_examples(golden_prompts(world.tokenizer, exact.models.loss.examples)))
        curves = losses[loss["name"]] = [[], []]
        for step in range(number_of_steps):
            part = [examples[(16 * step + k) % len(examples)] for k in range(16)]
            for trainer, on, curve in ((short, ranks, curves[0]), (exact, SINGLE_PROCESS, curves[1])):
                metrics = trainer.train_step([MicroBatch.of(part, TokenBudget(10**6, 10**6), on)])
                curve.append(metrics["loss/train"])
    end_group()
    return losses


class Adapted:
    """A trainer of an adapter on the golden Llama over all ranks, and the same alone. Of all or some weights by SFT."""

    def __init__(self, world: World, changes: dict, local_size: int | None = None):
        fixed = {"optimizer": "AdamW", "lr": 1e-3, "warmup_steps": 0, "model.lora.r": 4}
        config = world.config.changed(fixed | {"model.name_or_path": str(GOLDEN / "llama")} | changes)
        sharding, tokenizer = (
            config.trainer.sharding,
            load_tokenizer(config.model) if config.model.added_tokens else world.tokenizer,
        )
        placement = Sharded(config, tokenizer, world.device, world.mesh(sharding, local_size=local_size))
        self.ranks = placement.ranks
        seed_everything(0)
        policy = placement.load_policy()
        seed_everything(0)
        own = load_model(config.model, tokenizer)
        share_prefixes(own, "on")
        assert placement.began_with in (None, weights_hash(own))
        self.share_held = _share_held(policy)
        self.has_reference = config.model.lora.r is not None
        loss = build_loss("dpo" if self.has_reference else "sft")
        references = [LiveReference(model) if self.has_reference else None for model in (policy, own)]
        self.sharded = build_trainer(config, policy, loss, references[0], placement=placement)
        self.single = build_trainer(config, own, loss, references[1], tokenizer=tokenizer)

    def follow(self, examples: list) -> dict[str, float]:
        """Four steps of both: the largest differences of log-probs before, of numbers, and of the adapter's weights after."""
        [pack] = build_packs(examples[:8], TokenBudget(10**6, 10**6))
        with torch.no_grad():
            found, expected = (response_scores(trainer.models.policy, pack) for trainer in (self.sharded, self.single))
        reshard(self.sharded.models.policy)
        worst = 0.0
        for step in range(4):
            part = examples[8 * step : 8 * step + 8]
            metrics, wanted = (
                trainer.train_step([MicroBatch.of(part, TokenBudget(10**6, 10**6), on)])
                for trainer, on in ((self.sharded, self.ranks), (self.single, SINGLE_PROCESS))
            )
            assert step or not self.has_reference or metrics["rewards_train/margins"] == wanted["rewards_train/margins"] == 0
            worst = max(worst, *(abs(metrics[name] / wanted[name] - 1) for name in ("loss/train", "grad_norm")))
        kept = weights_of(self.single)
        pairs = [(full_tensor(weight).detach(), kept[name].detach()) for name, weight in weights_of(self.sharded).items()]
        assert len(pairs) == len(kept)
        apart = sum((a - b).norm() for a, b in pairs) / sum(b.norm() for _, b in pairs)
        return {"logps": (found - expected).abs().max().item(), "numbers": worst, "weights": apart.item()}


def _share_held(model) -> float:
    """The share of a model's frozen weights that this process holds."""
    frozen = [weight for weight in model.parameters() if not weight.requires_grad]
    held, whole = (
        sum(weight.numel() * weight.element_size() for weight in weights) for weights in (map(to_local, frozen), frozen)
    )
    return held / whole if whole else math.nan


def follow_adapters(settings: dict, cases: list[dict], local_size: int | None = None) -> list[dict]:
    """What `Adapted.follow` finds in each case, and the share of the frozen weights that this process holds."""
    world = World(settings)
    examples = list(iterate_examples(golden_prompts(world.tokenizer, "pairs")))
    results = []
    for case in cases:
        adapted = Adapted(world, case, local_size)
        results.append({"held": adapted.share_held} | adapted.follow(examples))
    end_group()
    return results


def _cast_as_before_torch_2_13(self, mp_policy) -> None:
    """How FSDP decides what to cast a weight to in torch 2.11: integers as any other."""
    param_dtype, reduce_dtype = mp_policy.param_dtype, mp_policy.reduce_dtype
    self.orig_dtype = self.sharded_param.dtype
    self.param_dtype = None if param_dtype == self.orig_dtype else param_dtype
    self.reduce_dtype = None if reduce_dtype == param_dtype else reduce_dtype


def follow_adapters_before_torch_2_13(settings: dict, cases: list[dict]) -> list[dict]:
    """`follow_adapters` with an FSDP that casts integers too."""
    earlier = mock.patch.object(FSDPParam, "init_dtype_attrs", _cast_as_before_torch_2_13)
    with earlier, mock.patch.object(torch, "__version__", TorchVersion("2.11.0")):
        return follow_adapters(settings, cases)


def train_with_masters(settings: dict, folder: str) -> dict:
    """Four steps of bfloat16 weights with master weights, sharded and split, and the same steps alone in float32.

    For each layout: the cosine of the two updates, and whether a trainer that goes on from the second step ends alike.
    """
    world = World(settings)
    loss, low = {"name": "dpo", "beta": 0.1}, {"model.policy_dtype": "bfloat16", "model.reference_dtype": "bfloat16"}
    changes = {"optimizer": "AdamW", "lr": 5e-7, "warmup_steps": 0, "batch_size": 8}
    table = PromptTable.of(golden_prompts(world.tokenizer, "pairs"))
    results = {}
    for name, sharding, size in (("full", "full", 1), ("optimizer", "optimizer", 1), ("tensor", "full", 2)):
        mesh, run_dir = world.mesh(sharding, size), Path(folder) / name
        made = [world.sharded("llama", loss, mesh, sharding, **changes, **low) for _ in range(2)]
        (first, ranks), (second, _), single = *made, world.alone("llama", loss, **changes)
        for trainer, on in ((first, ranks), (second, ranks), (single, SINGLE_PROCESS)):
            trainer.batches.train = BatchIterator(
                Schedule(table, 8, length=RunLength(n_epochs=None, n_steps=4)), packing=Packing(ranks=on)
            )
        before = torch.cat([weight.detach().flatten() for weight in single.models.policy.parameters()])
        for step in first.batches.train:
            first.train_step(step)
            if first.state.updates == 2:
                if ranks.is_rank_zero:
                    run_dir.mkdir(exist_ok=True)
                ranks.barrier()
                options = SaveOptions(timeout_minutes=1)
                with CheckpointWriter(run_dir, first.models.policy, world.tokenizer, ranks, options) as writer:
                    writer.write(first.snapshot())
        for step in single.batches.train:
            single.train_step(step)
        second.continue_from(Checkpoint.read(run_dir / "step-16"))
        for step in second.batches.train:
            second.train_step(step)
        masters = [
            [state["master"] for state in each.step.updater.optimizer_state()["state"].values()] for each in (first, second)
        ]
        wholes = torch.cat([full_tensor(master).flatten() for master in masters[0]])
        exact = torch.cat([weight.detach().flatten() for weight in single.models.policy.parameters()])
        results[name] = {
            # The first updates of AdamW are lr, whatever the gradient, and bfloat16 rounds the starting weights: off that.
            "cosine": torch.cosine_similarity(wholes - before.bfloat16().float(), exact - before, 0).item(),
            "again": all(torch.equal(full_tensor(one), full_tensor(other)) for one, other in zip(*masters, strict=True)),
            "sharded": [master.to_local().numel() / master.numel() for master in masters[0][:1]],
            "dtypes": [str(master.dtype) for master in masters[0][:1]],
        }
    end_group()
    return results


def counted_gathers():
    """Context that counts how often FSDP gathers a group of weights."""
    gather = _fsdp_param_group.foreach_all_gather
    return mock.patch.object(_fsdp_param_group, "foreach_all_gather", wraps=gather)


def sample_on_each(settings: dict) -> dict:
    """Samples of a policy whose weights are sharded, and how often weights are gathered and a rank computes; and alone."""
    world = World(settings)
    config = world.config.changed({"model.name_or_path": str(GOLDEN / "llama")})
    placement = Sharded(config, world.tokenizer, world.device, world.mesh("full"))
    policy, ranks = placement.load_policy(), placement.ranks
    alone = load_model(config.model, world.tokenizer).eval()
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [5], [20, 21, 22, 23]]
    expected = Sampler(world.tokenizer, 24, 0).samples(alone, prompts, 2)
    sampler, results = Sampler(world.tokenizer, 24, 0, ranks), {}
    for name, free in {"whole": free_memory(torch.device("cpu")), "sharded": 0}.items():
        rows: list[int] = []

        def note(_model, _arguments, given, rows=rows) -> None:
            rows.append(len(given["input_ids"]))

        hook = policy.register_forward_pre_hook(note, with_kwargs=True)
        with mock.patch.object(sharding_module, "free_memory", lambda _, free=free: free), counted_gathers() as gathers:
            found = sampler.samples(policy, prompts, 2)
        hook.remove()
        pairs = [pair for one, other in zip(found, expected, strict=True) for pair in zip(one, other, strict=True)]
        results[name] = {
            "same": all(one.token_ids == other.token_ids for one, other in pairs),
            "logps": max(abs(one.logp - other.logp) for one, other in pairs),
            "rows": max(rows),
            "forwards": len(rows),
            "gathers": gathers.call_count,
            "shards left": all(weight.to_local().numel() < weight.numel() for weight in policy.parameters()),
        }
    end_group()
    return results


def evaluate_unevenly(settings: dict, num_rows: int) -> dict:
    """Held-out metrics of some rows, and reference log-probs, over all ranks and alone."""
    world = World(settings)
    loss = {"name": "dpo", "beta": 0.1}
    trainer, ranks = world.sharded("llama", loss, world.mesh("full"), "full")
    single = world.alone("llama", loss)
    prompts = golden_prompts(world.tokenizer, "pairs")
    table = PromptTable.of((prompts * 3)[:num_rows])
    sizes = 7, None, 0, TokenBudget(60, 60)
    found = evaluate_held_out(
        trainer.models.policy, trainer.models.reference, trainer.models.loss, evaluation_batches(table, *sizes, ranks), ranks
    )
    expected = evaluate_held_out(
        single.models.policy, single.models.reference, single.models.loss, evaluation_batches(table, *sizes)
    )
    everything = Selection(table, torch.arange(len(table)).numpy())
    logps = [
        compute_logps(LiveReference(trainer.models.policy), ReferencePlan(everything, everything), ranks).logps,
        compute_logps(LiveReference(single.models.policy), ReferencePlan(everything, everything)).logps,
    ]
    epoch = [BatchIterator(Schedule(table, 8), packing=Packing(ranks=each)) for each in (ranks, SINGLE_PROCESS)]
    seen = [sum(micro.num_examples for step in steps for micro in step) for steps in epoch]
    end_group()
    return {
        "rows": [len(values) for values in found.examples.values()],
        "worst": max((found.examples[name] - values).abs().max().item() for name, values in expected.examples.items()),
        "logps": (logps[0] - logps[1]).abs().max().item(),
        "seen": seen,
    }


def write_into_a_folder_that_is_cleared_late(settings: dict, folder: str) -> list[str]:
    """What the main rank removes when it is slow to remove the remains of a checkpoint, and what is then said."""
    world = World(settings)
    trainer, ranks = world.sharded("llama", {"name": "sft"}, world.mesh("full"), "full")
    partial = Path(folder) / "step-0.partial"
    said: list[str] = []
    with CheckpointWriter(
        Path(folder),
        trainer.models.policy,
        world.tokenizer,
        ranks,
        log_message=said.append,
        options=SaveOptions(timeout_minutes=1),
    ) as writer:
        remove = shutil.rmtree

        def late(path, **how) -> None:
            if Path(path) == partial:
                time.sleep(1)
                said.extend(found.name for found in partial.iterdir())
            remove(path, **how)

        with mock.patch("preference_training.checkpointing.writer.shutil.rmtree", late):
            writer.write(Snapshot.of(0, weights_of(trainer), {}, {}))
    end_group()
    return said


def keep_on_disks_of_their_own(settings: dict, folder: str) -> dict:
    """Reference log-probs computed and found again where each rank sees other files: how far apart, and who keeps them."""
    world = World(settings)
    trainer, ranks = world.sharded("llama", {"name": "dpo", "beta": 0.1}, world.mesh("full"), "full")
    table = PromptTable.of(golden_prompts(world.tokenizer, "pairs"))
    everything = Selection(table, torch.arange(len(table)).numpy())
    reads = ReferencePlan(everything, everything)
    path = cache_path(Path(folder) / str(ranks.rank), trainer.models.policy, reads, None, ranks)
    computed, found = (cached_reference(LiveReference(trainer.models.policy), reads, path, ranks).logps for _ in range(2))
    apart = ranks.all_gather_object((computed - found).abs().max().item())
    kept = ranks.all_gather_object(path.exists())
    end_group()
    return {"apart": apart, "kept": kept}
