"""A run whose policy and reference do not say the same before the first update ends before it, with the reason."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from preference_training.batching.iterator import BatchIterator, Packing
from preference_training.batching.micro_batches import evaluation_batches
from preference_training.batching.packing import UNLIMITED, TokenBudget
from preference_training.batching.schedule import RunLength, Schedule
from preference_training.core.errors import UserError
from preference_training.core.process_group import SINGLE_PROCESS
from preference_training.data.prompt_table import PromptTable
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.losses.registry import build_loss
from preference_training.modeling.logprobs import CachedReference, LiveReference
from preference_training.modeling.prefix_sharing.sharing import share_prefixes
from preference_training.modeling.reference_cache import ReferencePlan, cached_reference
from preference_training.tracking.tracker import Tracker
from preference_training.training.start_check import StartCheck
from tests.support.building import build_trainer
from tests.support.files import GOLDEN

DRAW = torch.Generator().manual_seed(0)


def prompts(count: int, first: int = 0) -> list[TokenizedPrompt]:
    """Prompts with three responses and two pairs, which a small pack parts."""
    tokens = lambda n: torch.randint(3, 60, (n,), generator=DRAW).tolist()  # noqa: E731
    responses = lambda: [tokens(9), tokens(14), tokens(5)]  # noqa: E731
    return [TokenizedPrompt(tokens(7 + k % 5), responses(), [(0, 1), (0, 2)], f"row {first + k}") for k in range(count)]


TRAIN = PromptTable.of(prompts(9))
HELD_OUT = PromptTable.of(prompts(4, 9), TRAIN.num_responses)
# So few tokens at once that the two pairs of a prompt may part.
SMALL = TokenBudget(40, 40)


@pytest.fixture(scope="module")
def policies():
    """Models by dtype and way of computing; tests change copies."""
    made = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for mode in ("on", "off"):
            made[dtype, mode] = AutoModelForCausalLM.from_pretrained(GOLDEN / "llama_policy", dtype=dtype)
            share_prefixes(made[dtype, mode], mode)
    return made


@pytest.fixture
def start(compose, tokenizer, tmp_path):
    """A trainer at the beginning of a run of two steps in small packs, with a reference: `start(policy, reference)`."""

    def started(policy, reference, *overrides):
        config = compose(
            "batch_size=6", "gradient_accumulation_steps=2", "optimizer=SGD", "lr=1.0", "warmup_steps=0", *overrides
        )
        batches = BatchIterator(Schedule(TRAIN, 6, length=RunLength(n_steps=2)), 2, Packing(SMALL))
        held_out = evaluation_batches(HELD_OUT, 4, None, 0, SMALL)
        loss, tracker = build_loss("dpo"), Tracker(tmp_path, None)
        made = {"tokenizer": tokenizer, "train": batches, "held_out": held_out, "tracker": tracker}
        return build_trainer(config, policy, loss, reference, start_check=StartCheck(policy, reference), **made)

    return started


def cached(policy, folder) -> CachedReference:
    """The reference of such a run, computed before and read again."""
    batches = BatchIterator(Schedule(TRAIN, 6, length=RunLength(n_steps=2)), 2, Packing(budget=SMALL))
    plan = ReferencePlan.for_run(batches, HELD_OUT, 4, None, 0, SMALL, SINGLE_PROCESS)
    made, read = (cached_reference(LiveReference(policy), plan, folder / "logps.safetensors") for _ in range(2))
    assert torch.equal(made.logps.nan_to_num(), read.logps.nan_to_num())
    return read


@pytest.mark.parametrize("mode", ["on", "off"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kept", [True, False], ids=["cached", "live"])
def test_every_margin_is_exactly_0_until_the_first_update(policies, start, tmp_path, kept, dtype, mode):
    policy = copy.deepcopy(policies[dtype, mode])
    reference = cached(policy, tmp_path) if kept else LiveReference(copy.deepcopy(policy).eval())
    trainer = start(policy, reference)
    margins = []
    for step in trainer.batches.train:
        for micro_batch in step:
            for output, _, _ in trainer.step.pack_losses(micro_batch, 1.0):
                margins += (output.chosen_rewards - output.rejected_rewards).tolist()
    trainer.evaluator.evaluate()
    assert margins == [0.0] * 12
    assert trainer.state.held_out["rewards_eval/margins"] == 0.0


def test_a_run_that_starts_equal_goes_on(policies, start):
    policy = copy.deepcopy(policies[torch.float32, "on"])
    before = policy.lm_head.weight.clone()
    trainer = start(policy, LiveReference(copy.deepcopy(policy).eval()), "do_first_eval=true")
    trainer.train()
    assert trainer.state.updates == 2 and not torch.equal(policy.lm_head.weight, before)


@pytest.mark.parametrize("first_eval", [True, False])
def test_a_reference_that_differs_ends_the_run_before_its_first_update(policies, start, first_eval):
    policy = copy.deepcopy(policies[torch.float32, "on"])
    other = copy.deepcopy(policy).eval()
    # A buffer alone, by a bit: 1 becomes the next float32.
    other.model.rotary_emb.inv_freq[0] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    before = {name: weight.clone() for name, weight in policy.named_parameters()}
    trainer = start(policy, LiveReference(other), f"do_first_eval={first_eval}")
    with pytest.raises(UserError, match=r"reference: before the first update .* differ, by up to .* for prompt \d+\."):
        trainer.train()
    assert trainer.state.updates == 0 and all(torch.equal(weight, before[name]) for name, weight in policy.named_parameters())


def test_a_stale_file_is_named_as_a_cause(policies, start, tmp_path):
    policy = copy.deepcopy(policies[torch.float32, "on"])
    reference = cached(policy, tmp_path)
    with torch.no_grad():
        policy.lm_head.weight[5] += 0.01
    with pytest.raises(UserError, match="Remove the reference_logps folder"):
        start(policy, reference).train()


def test_a_run_that_goes_on_is_not_looked_at(policies, start):
    policy = copy.deepcopy(policies[torch.float32, "on"])
    trainer = start(policy, LiveReference(policies[torch.bfloat16, "on"]))
    trainer.state.examples = 6
    trainer.train()
    assert trainer.state.updates == 2


def test_dropout_of_the_adapter_that_training_starts_from_is_no_difference(policies):
    policy = copy.deepcopy(policies[torch.float32, "off"])
    policy.lm_head = nn.Sequential(nn.Dropout(0.5), policy.lm_head)
    reference, [batch, *_] = copy.deepcopy(policy).eval(), list(BatchIterator(Schedule(TRAIN, 6)).first_epoch())
    look = StartCheck(policy.train(), LiveReference(reference))
    trained = trained_logps(policy, batch)
    assert not torch.equal(trained, LiveReference(reference)(batch))
    look.compare(batch, trained, LiveReference(reference)(batch))
    look.check(SINGLE_PROCESS)
    assert policy.training


def trained_logps(policy, batch):
    """What a policy says in training mode."""
    from preference_training.modeling.logprobs import response_scores

    return response_scores(policy, batch).detach()


def test_all_ranks_end_where_one_has_seen_a_difference():
    batch = SimpleNamespace(is_filler=False, members=torch.tensor([[0, 1]]), sources=("row 3",))
    looks = [StartCheck(nn.Linear(1, 1), None) for _ in range(2)]
    looks[0].compare(batch, torch.zeros(2), torch.zeros(2))
    looks[1].compare(batch, torch.zeros(2), torch.tensor([0.0, 0.5]))
    seen: list = []
    ranks = SimpleNamespace(all_gather_object=lambda value: seen.append(value) or seen)
    with pytest.raises(UserError):
        looks[1].check(ranks)
    with pytest.raises(UserError, match="1 of 4 responses differ, by up to 0.5 nats, for row 3"):
        looks[0].check(ranks)


def test_what_is_not_finite_in_the_policy_is_left_to_the_step(policies):
    batch = SimpleNamespace(is_filler=False, members=torch.tensor([[0, 1]]), sources=("row 3",))
    look = StartCheck(nn.Linear(1, 1), None)
    look.compare(batch, torch.tensor([torch.nan, torch.inf]), torch.zeros(2))
    look.check(SINGLE_PROCESS)
    look.compare(batch, torch.zeros(2), torch.tensor([0.0, torch.nan]))
    with pytest.raises(UserError, match="by up to inf nats"):
        look.check(SINGLE_PROCESS)


def test_fillers_are_not_looked_at():
    look = StartCheck(nn.Linear(1, 1), None)
    look.compare(SimpleNamespace(is_filler=True), torch.zeros(2), torch.ones(2))
    look.check(SINGLE_PROCESS)


def test_a_response_of_two_packs_has_the_bits_of_each(policies, tmp_path):
    # In bfloat16 on padded rows the last bits depend on what else is in the pack.
    policy = policies[torch.bfloat16, "off"]
    batches = BatchIterator(Schedule(TRAIN, 6, length=RunLength(n_steps=3)), 2, Packing(budget=SMALL))
    plan = ReferencePlan.for_run(batches, HELD_OUT, 4, None, 0, SMALL, SINGLE_PROCESS)
    kept = cached_reference(LiveReference(policy), plan, tmp_path / "logps.safetensors")
    pieces = list(batches.first_epoch())
    rows = [row for piece in pieces for row in piece.response_rows.tolist()]
    assert len(set(rows)) < len(rows), "a response is in two pieces"
    for piece in pieces:
        assert torch.equal(kept(piece), LiveReference(policy)(piece))


def test_of_several_epochs_all_is_known_after_the_first(policies, tmp_path):
    batches = BatchIterator(Schedule(TRAIN, 6, length=RunLength(n_epochs=3)))
    plan = ReferencePlan.for_run(batches, HELD_OUT, 4, None, 0, UNLIMITED, SINGLE_PROCESS)
    reference = LiveReference(policies[torch.float32, "on"])
    kept = cached_reference(reference, plan, tmp_path / "logps.safetensors")
    assert not len(plan.rest) and kept.logps.isfinite().all()
