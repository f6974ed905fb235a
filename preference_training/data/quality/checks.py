"""All checks of a run's data, which read tokenized prompts: what the model reads, whatever form the rows had."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from preference_training.configuration.sections import QualityConfig
from preference_training.data.prompt_table import PromptTable
from preference_training.data.quality.bag_of_words import bag_of_words, spread
from preference_training.data.quality.contamination import Contamination, find_contamination
from preference_training.data.quality.facts import Facts, collect_facts
from preference_training.data.quality.languages import languages
from preference_training.data.quality.near_duplicates import NearDuplicates, find_near_duplicates
from preference_training.data.quality.pairs import Baseline, position_is_known, simple_baselines
from preference_training.data.quality.words import decode

LANGUAGE_SAMPLE = 1000


@dataclass(frozen=True)
class DataQuality:
    """What was found in the training and the held-out split.

    baselines: on held-out pairs, none without pairs. position_known: whether the data says in what order responses stood.
    leaked: held-out prompts with the token ids of a training prompt. repeated: training prompts that occur before.
    near_duplicates: None where they were not searched. languages: of `language_sample` training prompts with a response.
    """

    train: Facts
    held_out: Facts
    baselines: list[Baseline]
    position_known: bool
    leaked: int
    repeated: int
    near_duplicates: NearDuplicates | None
    contamination: list[Contamination]
    languages: dict[str, int]
    language_sample: int


def check_data(
    train: PromptTable,
    held_out: PromptTable,
    tokenizer,
    settings: QualityConfig,
    contamination_files: Sequence[str] = (),
    facts: tuple[Facts, Facts] | None = None,
) -> DataQuality:
    """Check both splits. facts: of both, if they are known. Raises UserError where a contamination file cannot be read."""
    of_train, of_held_out = facts or (collect_facts(train), collect_facts(held_out))
    baselines: list[Baseline] = []
    if len(of_held_out.pairs):
        baselines += simple_baselines(of_train.pairs, of_held_out.pairs)
        learned = bag_of_words((train, held_out), of_train.pairs, of_held_out.pairs, tokenizer)
        baselines += [learned] if learned else []
    texts = _sample(train, tokenizer)
    return DataQuality(
        train=of_train,
        held_out=of_held_out,
        baselines=baselines,
        position_known=position_is_known(of_train.pairs, of_held_out.pairs),
        leaked=int(numpy.isin(of_held_out.prompt_hashes, of_train.prompt_hashes).sum()),
        repeated=of_train.prompts - len(numpy.unique(of_train.prompt_hashes)),
        near_duplicates=find_near_duplicates(train, held_out, settings.near_duplicate_similarity),
        contamination=find_contamination(train, tokenizer, contamination_files, settings.contamination_ngram),
        languages=languages(texts),
        language_sample=len(texts),
    )


def _sample(table: PromptTable, tokenizer) -> list[str]:
    """The texts of some prompts, at equal distances, with their first response."""
    prompts = [table[int(place)] for place in spread(len(table), LANGUAGE_SAMPLE)]
    return decode(tokenizer, [prompt.prompt_ids + (prompt.responses or [[]])[0] for prompt in prompts])
