"""Tables of tokenized prompts: what goes in comes out, in memory and from a mapped file, whole or as parts of several sets."""

from collections import Counter
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import numpy
import pyarrow
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from preference_training.batching.schedule import epoch_order
from preference_training.data import prompt_table
from preference_training.data.columns import Columns, content_hash
from preference_training.data.prompt_table import PromptTable, Selection, TablePart, shuffled, write_columns
from preference_training.data.tokenization import TokenizedPrompt

# Hypothesis runs one function many times; each example writes its own file, so that sharing tmp_path is harmless.
SHARES_FOLDER = [HealthCheck.function_scoped_fixture]

ids = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=6)


@st.composite
def some_spans(draw, length: int) -> list[tuple[int, int]]:
    """Disjoint [start, end) spans of so many tokens, in their order."""
    cuts = sorted(draw(st.sets(st.integers(0, length), max_size=4)))
    return list(zip(cuts[::2], cuts[1::2], strict=False))


@st.composite
def any_prompt(draw) -> TokenizedPrompt:
    """A prompt with any examples, or for SFT with single responses, and any of the optional columns."""
    responses = draw(st.lists(ids, min_size=1, max_size=4))
    index = st.integers(0, len(responses) - 1)
    examples = draw(st.lists(st.lists(index, min_size=1, max_size=4).map(tuple) | st.tuples(index, index), max_size=5))
    count = len(examples) or len(responses)
    numbers = st.none() | st.lists(st.floats(allow_nan=False), min_size=count, max_size=count)
    spans = draw(st.none() | st.tuples(*(some_spans(len(response)) for response in responses)).map(list))
    number = draw(st.integers(0, 2**40))
    optional = {"spans": spans, "weights": draw(numbers), "margins": draw(numbers), "labels": draw(numbers)}
    return TokenizedPrompt(draw(ids), responses, examples, number=number, **optional)


many_prompts = st.lists(any_prompt(), max_size=9)


def prompts(count: int, start: int = 0) -> list[TokenizedPrompt]:
    """Prompts that differ in every token and number; the k-th has k % 3 + 2 responses, of which the first always wins."""
    return [
        TokenizedPrompt(
            [100 * k, 100 * k + 1],
            [[100 * k + 10 + r] * (r + 1) for r in range(k % 3 + 2)],
            [(0, r) for r in range(1, k % 3 + 2)],
            number=k,
        )
        for k in range(start, start + count)
    ]


def written(path: Path, content: list[TokenizedPrompt]) -> Path:
    with path.open("wb") as file:
        assert write_columns(file, content) == len(content)
    return path


def mapped(path: Path, content: list[TokenizedPrompt], source: str = "set, train prompt", weight: float = 1.0) -> TablePart:
    return TablePart.of_file(written(path, content), source, weight)


def numbered(content: list[TokenizedPrompt], source: str, first_row: int = 0) -> list[TokenizedPrompt]:
    """The prompts as a table gives them: with their names, and the place of their first response."""
    rows = accumulate((len(prompt.responses) for prompt in content), initial=first_row)
    return [
        replace(prompt, source=f"{source} {prompt.number}", first_row=row) for prompt, row in zip(content, rows, strict=False)
    ]


# ---- what goes in comes out -----------------------------------------------------------------------------------------------


@settings(deadline=None, suppress_health_check=SHARES_FOLDER)
@given(content=many_prompts, first_row=st.integers(0, 2**33), batch=st.integers(1, 5))
def test_prompts_are_the_same_in_memory_in_a_file_and_after_arrow(tmp_path, content, first_row, batch):
    expected = numbered(content, "prompt", first_row)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompt_table, "PROMPTS_PER_BATCH", batch)
        part = mapped(tmp_path / "prompts.arrow", content, "prompt")
    assert len(part.batches) == -(-len(content) // batch)
    in_arrow = TablePart("prompt", [Columns.of_arrow(Columns.of(content).as_arrow())], "")
    for table in (PromptTable([part], first_row), PromptTable.of(content, first_row), PromptTable([in_arrow], first_row)):
        assert list(table) == [table[k] for k in range(len(table))] == expected
        assert table.num_examples.tolist() == [prompt.num_examples for prompt in content]
        assert table.num_tokens.tolist() == [
            len(prompt.prompt_ids) + sum(len(response) for response in prompt.responses) for prompt in content
        ]
        assert table.num_responses == sum(len(prompt.responses) for prompt in content)


def test_ids_come_out_as_pythons_own_numbers():
    [prompt] = PromptTable.of(prompts(1))
    numbers = [prompt.number, prompt.first_row, *prompt.prompt_ids, *prompt.responses[0], *prompt.pairs[0]]
    assert {type(number) for number in numbers} == {int}


@pytest.mark.parametrize("index", [-1, 5, 2**40])
def test_a_place_outside_the_table_is_an_index_error(index):
    with pytest.raises(IndexError, match=f"prompt {index} of 5"):
        PromptTable.of(prompts(5))[index]


def test_a_table_without_prompts_is_empty_in_every_way(tmp_path):
    for table in (PromptTable([]), PromptTable.of([]), PromptTable([mapped(tmp_path / "none.arrow", [])])):
        assert (len(table), table.num_responses, list(table)) == (0, 0, [])
        assert [len(values) for values in (table.num_examples, table.num_tokens, epoch_order(table, "seed"))] == [0, 0, 0]
        assert len(Selection(table, numpy.zeros(0, numpy.int32)).by_length()) == 0


def test_pages_that_were_given_back_are_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_table, "READS_BEFORE_RELEASE", 3)
    content = prompts(40)
    table = PromptTable([mapped(tmp_path / "prompts.arrow", content)])
    expected = numbered(content, "set, train prompt")
    for k in shuffled(40, "seed").tolist() * 3:
        assert table[k] == expected[k]


# ---- several sets ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, suppress_health_check=SHARES_FOLDER, max_examples=50)
@given(contents=st.lists(many_prompts, min_size=1, max_size=4), first_row=st.integers(0, 99))
def test_responses_are_numbered_through_all_parts_and_joined_tables(tmp_path, contents, first_row):
    parts = [mapped(tmp_path / f"{k}.arrow", content, f"set {k}, row") for k, content in enumerate(contents)]
    table = PromptTable(parts, first_row)
    expected, row = [], first_row
    for k, content in enumerate(contents):
        expected += numbered(content, f"set {k}, row", row)
        row += sum(len(prompt.responses) for prompt in content)
    assert list(table) == expected
    assert table.num_responses == row - first_row
    held_out = PromptTable.of(prompts(3), row)
    joined = table.joined(held_out)
    assert list(joined) == [*expected, *numbered(prompts(3), "prompt", row)]
    assert joined.num_responses == table.num_responses + held_out.num_responses
    rows = [prompt.first_row + k for prompt in joined for k in range(len(prompt.responses))]
    assert rows == list(range(first_row, first_row + joined.num_responses))


def test_a_table_joins_only_one_that_is_numbered_behind_it():
    table = PromptTable.of(prompts(2))
    with pytest.raises(AssertionError):
        table.joined(PromptTable.of(prompts(2)))


def test_a_selection_keeps_its_order_and_joins_another_tables():
    first, second = PromptTable.of(prompts(4)), PromptTable.of(prompts(3, start=4), first_row=3 + 2 + 4 + 2)
    assert first.num_responses == 2 + 3 + 4 + 2
    joined = Selection(first, numpy.array([2, 0])).joined(Selection(second, numpy.array([1])))
    assert [prompt.number for prompt in joined] == [2, 0, 5]
    # Prompts 0 to 5 have 2, 3, 4, 2, 3, 4 responses.
    assert [prompt.first_row for prompt in joined] == [5, 0, 14]
    assert len(joined) == 3


@settings(deadline=None)
@given(content=st.lists(any_prompt(), min_size=1, max_size=9), data=st.data())
def test_by_length_keeps_the_prompts_and_puts_short_ones_first(content, data):
    table = PromptTable.of(content)
    indices = data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, unique=True))
    sorted_ones = Selection(table, numpy.array(indices)).by_length()
    assert sorted(sorted_ones.indices.tolist()) == sorted(indices)
    # Where lengths are equal, the order stays.
    assert sorted_ones.indices.tolist() == sorted(indices, key=lambda k: int(table.num_tokens[k]))


# ---- orders ---------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(size=st.integers(0, 300), seed=st.text(max_size=8))
def test_shuffled_is_a_permutation(size, seed):
    assert sorted(shuffled(size, seed).tolist()) == list(range(size))


def test_shuffled_does_not_change_from_version_to_version():
    # What a run's order, and so its numbers, hang on: the first draws of PCG64, whose stream numpy promises to keep.
    words = numpy.random.PCG64(3).random_raw(2)
    halves = [int(word) >> shift & 0xFFFFFFFF for word in words for shift in (0, 32)]
    expected = sorted(range(4), key=halves.__getitem__)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompt_table.xxhash, "xxh3_64_hexdigest", lambda _: "3")
        assert shuffled(4, "seed").tolist() == expected


def part(count: int, weight: float = 1.0, start: int = 0) -> TablePart:
    return TablePart("set", [Columns.of(prompts(count, start))], f"{start} {count}", weight)


@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 12), min_size=1, max_size=3), seed=st.text(max_size=5))
def test_an_epoch_visits_every_prompt_once_in_an_order_of_the_seeds(sizes, seed):
    make = lambda: PromptTable([part(size, start=100 * k) for k, size in enumerate(sizes)])  # noqa: E731
    order = epoch_order(make(), seed)
    assert sorted(order.tolist()) == list(range(sum(sizes)))
    assert order.tolist() == epoch_order(make(), seed).tolist()


def test_seeds_and_epochs_differ_in_their_order():
    table = PromptTable([part(30)])
    orders = {tuple(epoch_order(table, f"{seed} epoch {epoch}")) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@settings(deadline=None)
@given(size=st.integers(0, 25), weight=st.sampled_from([0.25, 0.5, 1, 1.0, 1.5, 2, 2.0, 3.75]), seed=st.text(max_size=5))
@example(size=9, weight=0.5, seed="0")
def test_a_part_of_a_weight_is_visited_so_often(size, weight, seed):
    visits = Counter(epoch_order(PromptTable([part(7), part(size, weight, start=50)]), seed).tolist())
    # The first part has weight 1: once each.
    assert all(visits[k] == 1 for k in range(7))
    of_part = [visits[k] for k in range(7, 7 + size)]
    whole, rest = int(weight), weight - int(weight)
    assert set(of_part) <= {whole, whole + (rest > 0)}
    # One prompt at least, however small the weight.
    assert sum(of_part) == max(whole * size + round(rest * size), min(size, 1))


def test_weights_of_two_a_half_and_one_and_a_half_visit_so_many():
    table = PromptTable([part(10, 2), part(10, 0.5, 20), part(10, 1.5, 40)])
    order = epoch_order(table, "0")
    visits = numpy.bincount(order, minlength=30)
    assert visits[:10].tolist() == [2] * 10
    assert sorted(visits[10:20]) == [0] * 5 + [1] * 5
    assert sorted(visits[20:]) == [1] * 5 + [2] * 5
    assert len(order) == 20 + 5 + 15


def test_the_drawn_share_is_another_in_each_epoch_and_after_enough_of_them_all_were_seen():
    table = PromptTable([part(10, 0.5)])
    drawn = [frozenset(epoch_order(table, f"0 epoch {epoch}").tolist()) for epoch in range(20)]
    assert {len(share) for share in drawn} == {5}
    assert len(set(drawn)) > 5
    assert frozenset().union(*drawn) == set(range(10))


# ---- fingerprints ---------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(content=st.lists(any_prompt(), min_size=1, max_size=5), data=st.data())
def test_a_fingerprint_differs_where_any_id_example_span_or_number_differs(content, data):
    k = data.draw(st.integers(0, len(content) - 1))
    prompt = content[k]
    response = prompt.responses[0]
    changed = {
        "prompt": replace(prompt, prompt_ids=[prompt.prompt_ids[0] ^ 1, *prompt.prompt_ids[1:]]),
        "longer prompt": replace(prompt, prompt_ids=[*prompt.prompt_ids, 0]),
        "response": replace(prompt, responses=[[*response[:-1], response[-1] ^ 1], *prompt.responses[1:]]),
        "longer response": replace(prompt, responses=[[*response, 0], *prompt.responses[1:]]),
        "one more pair": replace(prompt, examples=[*prompt.examples, (0, 0)]),
        "a single response": replace(prompt, examples=[*prompt.examples, (0,)]),
        "an example in two parts": replace(prompt, examples=[*prompt.examples, (0, 0), (0, 0)]),
        "an example of four": replace(prompt, examples=[*prompt.examples, (0, 0, 0, 0)]),
    }
    for name in ("spans", "weights", "margins", "labels"):
        values = [[(0, 1)]] * len(prompt.responses) if name == "spans" else [0.25] * prompt.num_examples
        others = [None, values, [*values[:-1], [(0, 2)] if name == "spans" else 0.5]]
        changed |= {f"{name} {other}": replace(prompt, **{name: other}) for other in others if getattr(prompt, name) != other}
    tables = [PromptTable.of([*content[:k], other, *content[k + 1 :]]) for other in (prompt, *changed.values())]
    tables += [PromptTable.of(content, first_row=1), PromptTable.of(content[:-1])]
    assert len({table.fingerprint for table in tables}) == len(tables)
    assert PromptTable.of(content).fingerprint == tables[0].fingerprint
    # Numbers are for messages.
    renumbered = [replace(each, number=each.number + 1, source="another") for each in content]
    assert PromptTable.of(renumbered).fingerprint == tables[0].fingerprint


# Of the version before spans, weights, margins, labels and rankings: numbers that runs of that version have stored.
FINGERPRINTS = {
    "pairs": "92c51be4c961e85f4e67ffd3a719d641",
    "targets": "4551e97821b1ce1e090d50b2d82927ca",
    "nothing": "950bd82273f42b6ef9e700807805ed11",
}


def test_the_fingerprints_of_pairs_and_of_targets_are_those_of_earlier_versions():
    targets = [replace(prompt, responses=prompt.responses[:1], examples=[]) for prompt in prompts(7)]
    tables = {"pairs": prompts(7), "targets": targets, "nothing": []}
    assert {name: content_hash([Columns.of(content)]) for name, content in tables.items()} == FINGERPRINTS


@settings(deadline=None)
@given(content=st.lists(any_prompt(), max_size=6), cut=st.integers(0, 6))
def test_a_fingerprint_does_not_depend_on_batches(content, cut):
    assert content_hash(map(Columns.of, (content[:cut], content[cut:]))) == content_hash([Columns.of(content)])


def test_where_one_text_ends_and_the_next_begins_is_part_of_the_fingerprint():
    ways = [([1], [[2, 3], [4]]), ([1, 2], [[3], [4]]), ([1], [[2], [3, 4]]), ([1, 2, 3], [[4]])]
    tables = [PromptTable.of([TokenizedPrompt(prompt, responses, [])]) for prompt, responses in ways]
    assert len({table.fingerprint for table in tables}) == len(ways)


def test_the_fingerprint_of_a_table_of_files_is_that_of_their_contents_in_order(tmp_path, monkeypatch):
    a, b = mapped(tmp_path / "a.arrow", prompts(2)), mapped(tmp_path / "b.arrow", prompts(2, start=5))
    monkeypatch.setattr(prompt_table, "PROMPTS_PER_BATCH", 1)
    in_small_batches = mapped(tmp_path / "another name.arrow", prompts(2))
    assert len(in_small_batches.batches) == 2 and in_small_batches.fingerprint == a.fingerprint
    assert PromptTable.of(prompts(2)).fingerprint == PromptTable([a]).fingerprint
    tables = [PromptTable([a]), PromptTable([b]), PromptTable([a, b]), PromptTable([b, a]), PromptTable([a], first_row=1)]
    assert len({table.fingerprint for table in tables}) == len(tables)
    assert PromptTable([replace(a, source="another name", weight=2.0)]).fingerprint == PromptTable([a]).fingerprint


def test_the_fingerprint_of_a_selection_is_that_of_its_prompts_in_any_order():
    table = PromptTable.of(prompts(6))
    select = lambda *indices: Selection(table, numpy.array(indices)).fingerprint  # noqa: E731
    assert select(1, 4, 2) == select(4, 2, 1) == Selection(table, numpy.array([1, 2, 4], numpy.int32)).fingerprint
    assert (
        len({select(1, 2), select(1, 3), select(1), select(1, 2, 3), Selection(PromptTable.of(prompts(7)), [1]).fingerprint})
        == 5
    )


# ---- damaged files --------------------------------------------------------------------------------------------------------


def test_a_file_that_is_cut_short_anywhere_is_refused(tmp_path):
    whole = written(tmp_path / "whole.arrow", prompts(3)).read_bytes()
    path = tmp_path / "cut.arrow"
    for length in (*range(0, len(whole), 7), *range(len(whole) - 20, len(whole))):
        path.write_bytes(whole[:length])
        with pytest.raises((OSError, ValueError)):
            TablePart.of_file(path, "set")


@settings(deadline=None, suppress_health_check=SHARES_FOLDER)
@given(content=st.binary(max_size=300))
@example(content=b"ARROW1\0\0" + b"\0" * 40 + b"ARROW1")
def test_a_file_of_any_bytes_is_refused(tmp_path, content):
    path = tmp_path / "junk.arrow"
    path.write_bytes(content)
    with pytest.raises((OSError, ValueError)):
        TablePart.of_file(path, "set")


def test_a_file_of_other_columns_is_refused(tmp_path):
    path = tmp_path / "other.arrow"
    table = pyarrow.table({"number": [1]})
    with pyarrow.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(ValueError, match="other.arrow has other columns"):
        TablePart.of_file(path, "set")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        TablePart.of_file(tmp_path / "absent.arrow", "set")


def test_prompts_are_written_as_they_come_and_not_gathered_first(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_table, "PROMPTS_PER_BATCH", 2)
    path, sizes = tmp_path / "prompts.arrow", []

    def growing():
        for prompt in prompts(6):
            sizes.append(path.stat().st_size)
            yield prompt

    with path.open("wb", buffering=0) as file:
        write_columns(file, growing())
    # The first two are asked for before anything of them is on disk, the next two behind those.
    assert sizes[0] == sizes[1] < sizes[2] == sizes[3] < sizes[4] == sizes[5]


def test_an_epoch_has_a_prompt_of_every_part_however_small_its_weight():
    prompts = [TokenizedPrompt([1], [[2], [3]], [(0, 1)], number=n) for n in range(3)]
    table = PromptTable([TablePart("x", [Columns.of(prompts)], "f", 0.1), TablePart("y", [Columns.of(prompts)], "g", 1.0)])
    assert sum(index < 3 for index in epoch_order(table, "0")) == 1
