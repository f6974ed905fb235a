"""The step that pairs: from the scored responses of a round to records that it trains on, as any file of a user's."""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence

import pyarrow

from preference_training.core.errors import UserError
from preference_training.core.values import counted
from preference_training.rounds.loop import Loop, RoundFiles
from preference_training.rounds.pairing import Candidate, pair
from preference_training.rounds.prompts import LoopPrompt, as_json
from preference_training.rounds.served.notes import count_unanswered
from preference_training.rounds.tables import read_table, save_table, save_text

MESSAGES = pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())]))


def make_pairs(loop: Loop, number: int) -> None:
    """Write what a round trains on, and how much was excluded. Raises UserError where nothing is left."""
    files = loop.round(number)
    if files.is_done("pair"):
        return
    prompts = {prompt.prompt_id: prompt for prompt in loop.prompts}
    by_prompt = scored_responses(files)
    found: list[tuple[LoopPrompt, dict]] = []
    excluded = count_unanswered(files.samples, {(row["prompt_id"], row["number"]) for row in read_table(files.scores)})
    for prompt_id, candidates in by_prompt.items():
        paired = pair(candidates, loop.rule)
        excluded += paired.excluded
        if paired.record is not None:
            found.append((prompts[prompt_id], paired.record))
    counts = {"prompts": len(by_prompt), "responses": sum(map(len, by_prompt.values())), "records": len(found)}
    counts["pairs"] = sum(len(record["pairs"]) for _, record in found)
    counts["truncated"] = sum(not each.ended for candidates in by_prompt.values() for each in candidates)
    cut = _cut(counts["truncated"], loop.rule.truncated)
    print(f"{files.name}: {_words(counts, loop.rule.pairs)}", *cut, *_lines(excluded), sep="\n", flush=True)
    if not found:
        reasons = "; ".join(f"{count:,} {reason}" for reason, count in excluded.most_common())
        raise UserError(
            f"rounds.pairs: {loop.rule.pairs} makes nothing to train on of the {counts['responses']:,} responses of "
            f"{files.name}: {reasons}. Look at {files.scores}. More samples (rounds.n_samples), a higher rounds.temperature, "
            "or a judge that tells responses apart would give some."
        )
    save_text(files.excluded, json.dumps({"counts": counts, "excluded": dict(sorted(excluded.items()))}, indent=1) + "\n")
    save_table(files.pairs, _table(found))


def scored_responses(files: RoundFiles) -> dict[int, list[Candidate]]:
    """The scored responses of a round by their prompts. Raises UserError where scores are not those of the samples."""
    samples = read_table(files.samples, ["prompt_id", "number", "text", "n_tokens", "ended"])
    scores = {(row["prompt_id"], row["number"]): row["score"] for row in read_table(files.scores)}
    if scores.keys() != {(row["prompt_id"], row["number"]) for row in samples}:
        raise UserError(f"{files.scores}: not the scores of {files.samples.name}. Remove it, and its step runs again.")
    found: dict[int, list[Candidate]] = defaultdict(list)
    for row in samples:
        score = scores[row["prompt_id"], row["number"]]
        found[row["prompt_id"]].append(Candidate(row["text"], score, row["n_tokens"], row["ended"]))
    return dict(found)


def _words(counts: dict, way: str) -> str:
    what = {"ranking": "rankings", "unpaired": "labeled prompts", "best_of_n": "targets"}.get(way)
    made = (
        f"{counts['records']:,} {what}"
        if what
        else f"{counted(counts['pairs'], 'pair')} of {counted(counts['records'], 'prompt')}"
    )
    return f"{made}, of {counted(counts['responses'], 'response')} to {counted(counts['prompts'], 'prompt')}"


def _cut(truncated: int, rule: str) -> list[str]:
    """What is said of truncated responses; of those that are excluded the reasons speak."""
    words = {"keep": "count as whole ones", "worst": "are worse than those to their prompt that have ended"}.get(rule)
    return [f"  {counted(truncated, 'response')} cut: they {words} (rounds.truncated={rule})"] * bool(truncated and words)


def _lines(excluded: Counter) -> list[str]:
    return [f"  excluded: {count:,} {reason}" for reason, count in excluded.most_common()]


def _table(found: Sequence[tuple[LoopPrompt, dict]]) -> pyarrow.Table:
    """Records as a table: prompts are texts, or messages where all are conversations."""
    texts = [isinstance(prompt.prompt, str) for prompt, _ in found]
    plain = not any(texts) and not any(turn.rest for prompt, _ in found for turn in prompt.prompt)
    if plain:
        prompts = [[{"role": turn.role, "content": turn.content} for turn in prompt.prompt] for prompt, _ in found]
    else:
        # A conversation among texts is the JSON of its messages, which is read as such.
        prompts = [
            prompt.prompt if is_text else as_json(prompt.prompt) for (prompt, _), is_text in zip(found, texts, strict=True)
        ]
    columns = {
        "prompt": pyarrow.array(prompts, MESSAGES if plain else pyarrow.string()),
        "responses": pyarrow.array([record["responses"] for _, record in found], pyarrow.list_(pyarrow.string())),
        "pairs": pyarrow.array([record["pairs"] for _, record in found], pyarrow.list_(pyarrow.list_(pyarrow.int64()))),
        "sft_target": pyarrow.array([record["sft_target"] for _, record in found], pyarrow.string()),
        "scores": pyarrow.array([record["scores"] for _, record in found], pyarrow.list_(pyarrow.float64())),
    }
    if "labels" in found[0][1]:
        columns["labels"] = pyarrow.array([record["labels"] for _, record in found], pyarrow.list_(pyarrow.bool_()))
    return pyarrow.table(columns)
