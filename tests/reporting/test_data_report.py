"""Which data a strict dry run refuses, and the page that says so."""

import re

import pytest

from preference_training.core.errors import UserError
from preference_training.data.prompt_table import PromptTable
from preference_training.data.quality.checks import check_data
from preference_training.data.tokenization import TokenizedPrompt
from preference_training.reporting.data_report import assess, data_page, write_data_report

NOTHING_REFUSED = [
    f"quality.{name}=null"
    for name in (
        "max_leaked", "max_near_leaked", "max_near_duplicates", "max_baseline_accuracy", "max_contradictions", "min_agreement",
        "max_contaminated",
    )
]  # fmt: skip


class Numbers:
    """A tokenizer whose words are numbers."""

    is_fast = False

    @staticmethod
    def decode(ids, skip_special_tokens=False) -> str:
        return " ".join(map(str, ids))


def prompts(numbers, preferred: int = 3, other: int = 3, reverse: bool = False) -> list[TokenizedPrompt]:
    """Prompts of ten tokens, whose responses have so many."""
    return [
        TokenizedPrompt(list(range(20 * n, 20 * n + 10)), [[n] * preferred, [n + 1] * other], [(1, 0) if reverse else (0, 1)])
        for n in numbers
    ]


GOOD = [*prompts(range(50)), *prompts(range(50, 100), reverse=True)]
HELD_OUT = [*prompts(range(100, 130)), *prompts(range(130, 160), reverse=True)]


@pytest.fixture
def report(compose, tmp_path):
    """A function: the findings of two lists of prompts, by the keys of their limits."""

    def of(train: list, held_out: list, *overrides: str):
        config = compose(*overrides)
        files = config.contamination_files if isinstance(config.contamination_files, list) else [config.contamination_files]
        quality = check_data(PromptTable.of(train), PromptTable.of(held_out), Numbers(), config.quality, files)
        return quality, assess(quality, config.quality)

    return of


def failed(findings) -> set[str]:
    return {finding.key.removeprefix("quality.") for finding in findings if finding.failed}


def test_data_without_a_fault_passes(report):
    quality, findings = report(GOOD, HELD_OUT)
    assert failed(findings) == set() and quality.position_known
    assert {each.name: each.accuracy for each in quality.baselines}["the first wins"] == 0.5


@pytest.mark.parametrize(
    ("train", "held_out", "expected"),
    [
        (GOOD, [*HELD_OUT, GOOD[3]], {"max_leaked"}),
        # 30 of 30 right: the interval begins at 0.884.
        (prompts(range(100), preferred=5), prompts(range(100, 130), preferred=5), {"max_baseline_accuracy"}),
        # Of 100 prompts 3 are judged both ways; three are too few to say how often verdicts agree (0 of 3: up to 0.71).
        ([*GOOD, *prompts(range(3), reverse=True)], HELD_OUT, {"max_contradictions"}),
        # Of 30 none agrees: at most 0.116.
        ([*GOOD, *prompts(range(30), reverse=True)], HELD_OUT, {"max_contradictions", "min_agreement"}),
    ],
    ids=["leak", "length", "contradictions", "agreement"],
)
def test_each_fault_fails_its_check_and_null_removes_the_limit(report, train, held_out, expected):
    assert failed(report(train, held_out)[1]) == expected
    assert failed(report(train, held_out, *NOTHING_REFUSED)[1]) == set()


def test_four_long_responses_of_five_are_too_few_to_say_that_length_decides(report):
    train, held_out = prompts(range(100), preferred=5), prompts(range(100, 105), preferred=5)
    assert failed(report(train, held_out)[1]) == set()


def test_a_benchmark_in_the_data_fails(report, tmp_path):
    (tmp_path / "bench.txt").write_text(Numbers.decode(range(40, 50)))
    quality, findings = report(GOOD, HELD_OUT, f"contamination_files={tmp_path / 'bench.txt'}")
    assert failed(findings) == {"max_contaminated"} and quality.contamination[0].prompts == 1


def test_data_without_pairs_says_which_checks_need_them(report):
    targets = [TokenizedPrompt([n, n + 1], [[n]], []) for n in range(5)]
    lines = [finding.line for finding in report(targets, targets[:1])[1]]
    assert "trivial baselines: none: they need held-out pairs (a loss of pairs, and a held-out split)" in lines
    assert not any("directions" in line for line in lines)


def test_the_page_is_complete_in_itself_and_shows_texts_as_text(report):
    train = [*GOOD, *prompts(range(3), reverse=True)]
    quality, findings = report(train, [*HELD_OUT, GOOD[3]])
    page = data_page(["<b>mine</b>"], quality, findings, Numbers())
    assert "&lt;b&gt;mine&lt;/b&gt;" in page and "<b>mine" not in page
    assert not re.search(r"""(src|href)=["'](?!#|data:)""", page)
    for text in ("dry_run=strict refuses this data", "quality.max_leaked", "1 of 61 (1.64%)", "7,847", "longer wins"):
        assert text in page


def test_an_empty_held_out_split_has_a_page_too(report):
    quality, findings = report(GOOD, [])
    assert "none: they need held-out pairs" in data_page(["mine"], quality, findings, Numbers())
    assert failed(findings) == set()


def test_a_folder_that_cannot_be_written_to_is_named(report, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"local_dirs: cannot write .*data_report.html"):
        write_data_report(tmp_path / "file", ["mine"], *report(GOOD, []), Numbers())
