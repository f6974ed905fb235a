"""Sampling of responses: tokens per second, and the same responses from the same seed."""

import time

from gpu_parts.found import Found, Settings
from gpu_parts.making import BILLION, build_config, make_model, small_of, wait
from preference_training.generation.sampling import Sampler
from preference_training.modeling.prefix_sharing.sharing import attend_over_tries
from preference_training.modeling.tokenizer import load_tokenizer


def generation(found: Found, settings: Settings) -> None:
    """Responses of 1.4B parameters to prompts of several lengths: one each, then several each."""
    values = settings.choose(BILLION, small_of(BILLION) | {"max_position_embeddings": 512})
    config = build_config(values, settings.choose("bfloat16", "float32"))
    model, tokenizer = make_model(config, settings), load_tokenizer(config.model)
    attend_over_tries(model)
    prompts = [[3 + (7 * place + token) % 200 for token in range(5 + 3 * place)] for place in range(settings.choose(64, 3))]
    sampler = Sampler(tokenizer, settings.choose(450, 24), seed=0)

    def draw(number: int) -> dict:
        began = time.perf_counter()
        answers = sampler.samples(model, prompts, number)
        wait(settings)
        seconds = time.perf_counter() - began
        tokens = sum(len(answer.token_ids) for each in answers for answer in each)
        kept.append(answers)
        return {"seconds": seconds, "tokens": tokens, "tokens_per_second": round(tokens / seconds)}

    kept: list = []
    for name, number in {"first": 1, "one each": 1, "four each": 4}.items():
        found.attempt(name, draw, number)
    found.put("repeated", len(kept) > 1 and kept[0] == kept[1], passed=len(kept) > 1 and kept[0] == kept[1])
