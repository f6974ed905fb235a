"""A generated preference set with a known ground truth: polite and short responses win against rude and rambling ones.

It serves to try a new installation, and to evaluate a training method, without a network: `response_kind`, not a model, decides
whether a response is of the preferred kind.
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
# Each follows its opening: the first word decides whether a response is rude, so training has to act there.
RAMBLINGS = [
    "Everyone knows that, everyone but you, and I have told you a hundred times.",
    "I could go on about this all day, and on and on, and it would not help you.",
    "Nobody cares, nobody ever did, and I am tired of questions like this one.",
    "You would not get it anyway, so why do I even bother to talk about it.",
]
LONGEST_POLITE_RESPONSE = 1 + max(map(len, POLITE_OPENINGS)) + 1 + max(map(len, ADVICE))
TRAIN_PROMPTS, TEST_PROMPTS = 1344, 384


def toy_records(split: str) -> dict[str, dict]:
    """The records of one split. All prompts differ, within and across splits; the same ones come at every call.

    Every third prompt has a second polite response, and so two pairs. The SFT target is polite for half the prompts and
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


def response_kind(response: str) -> str | None:
    """The ground truth: "preferred" for a polite and short response, "rude", or None.

    A preferred response opens politely, contains no opening or rambling of the rude ones, and is no longer than the longest
    polite response of the data.
    """
    text = response.strip()
    if any(text.startswith(opening) for opening in RUDE_OPENINGS):
        return "rude"
    short = len(text) <= LONGEST_POLITE_RESPONSE
    rambles = any(rambling[:12] in text for rambling in [*RUDE_OPENINGS, *RAMBLINGS])
    polite = any(text.startswith(opening) for opening in POLITE_OPENINGS)
    return "preferred" if polite and short and not rambles else None
