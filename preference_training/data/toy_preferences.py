"""A generated preference set with a known ground truth: polite and short answers win against rude and rambling ones.

It lets a new installation be tried, and a training method be judged, without a network: whether an answer is of the
preferred kind is decided by `answer_kind`, not by a model.
"""

import random
from itertools import product

TASKS = ["clean", "repair", "paint", "sell", "store", "carry", "choose", "borrow", "draw", "describe", "move", "protect"]
THINGS = [
    "a bike", "a lamp", "a chair", "a clock", "a boat", "a drum", "a tent", "a piano", "a kettle", "a mirror", "a basket",
    "a ladder", "a window", "a carpet", "a camera", "a violin", "an oven", "a garden", "a statue", "a jacket", "a saddle",
    "a candle", "a bottle", "a wagon",
]  # fmt: skip
REQUESTS = [
    "How do I {task} {thing}?",
    "What is the best way to {task} {thing}?",
    "Please tell me how to {task} {thing}.",
    "Can you help me {task} {thing}?",
    "I want to {task} {thing}. Where do I start?",
    "My friend has to {task} {thing} today. Any advice?",
]
POLITE_OPENINGS = ["Of course!", "Gladly!", "Happy to help!", "With pleasure!"]
RUDE_OPENINGS = ["Ugh, not again.", "Are you serious?", "What a silly thing to ask.", "Leave me alone."]
ADVICE = ["Take your time and start small.", "Ask a neighbour for the tools.", "Read the label first.", "Do it in the morning."]
# Each follows its opening: whether to be rude is decided with the first word, so that is where training has to act.
RAMBLINGS = [
    "Everyone knows that, everyone but you, and I have told you a hundred times.",
    "I could go on about this all day, and on and on, and it would not help you.",
    "Nobody cares, nobody ever did, and I am tired of questions like this one.",
    "You would not get it anyway, so why do I even bother to talk about it.",
]
LONGEST_POLITE_ANSWER = 1 + max(map(len, POLITE_OPENINGS)) + 1 + max(map(len, ADVICE))
TRAIN_PROMPTS, TEST_PROMPTS = 1344, 384


def toy_records(split: str) -> dict[str, dict]:
    """The records of one split. All prompts differ, within and across splits; the same ones come at every call.

    Every third prompt has a second polite answer, and so two pairs. The SFT target is polite for half the prompts and
    rude for the other half: SFT teaches both kinds, and preference training has to choose.
    """
    draw = random.Random(0)
    prompts = [request.format(task=task, thing=thing) for request, task, thing in product(REQUESTS, TASKS, THINGS)]
    draw.shuffle(prompts)
    part = prompts[:TRAIN_PROMPTS] if split == "train" else prompts[TRAIN_PROMPTS : TRAIN_PROMPTS + TEST_PROMPTS]
    return {f"\n\nHuman: {text}\n\nAssistant:": _record(draw, number) for number, text in enumerate(part)}


def _record(draw: random.Random, number: int) -> dict:
    rude = " " + " ".join(draw.choice(list(zip(RUDE_OPENINGS, RAMBLINGS, strict=True))))
    openings, advice = draw.sample(POLITE_OPENINGS, 2), draw.sample(ADVICE, 2)
    polite = [f" {openings[k]} {advice[k]}" for k in range(2 if number % 3 == 0 else 1)]
    responses = [rude, *polite]
    draw.shuffle(responses)
    worse = responses.index(rude)
    pairs = [(index, worse) for index in range(len(responses)) if index != worse]
    return {"responses": responses, "pairs": pairs, "sft_target": polite[0] if number % 2 == 0 else rude}


def answer_kind(answer: str) -> str | None:
    """The ground truth: "preferred" for a polite and short answer, "rude", or None for what is neither.

    Preferred is an answer that opens politely, holds no word of the rude ones' openings and ramblings, and is no longer
    than the longest polite answer of the data.
    """
    text = answer.strip()
    if any(text.startswith(opening) for opening in RUDE_OPENINGS):
        return "rude"
    short = len(text) <= LONGEST_POLITE_ANSWER
    rambles = any(rambling[:12] in text for rambling in [*RUDE_OPENINGS, *RAMBLINGS])
    polite = any(text.startswith(opening) for opening in POLITE_OPENINGS)
    return "preferred" if polite and short and not rambles else None
