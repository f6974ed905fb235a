"""Assertions become arguments and expected values; what is more than that is refused."""

import pytest

from preference_training.sandbox.assertions import read_tests


def test_objects_stay_as_they_are():
    tests = [{"args": [1, 2], "expected": 3}, {"args": [[2, 1]], "expected": [1, 2], "compare": "unordered", "note": "x"}]
    assert read_tests(tests, "add") == (
        "add", ({"args": [1, 2], "expected": 3}, {"args": [[2, 1]], "expected": [1, 2], "compare": "unordered"})
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "test"),
    [
        ("assert f(1, [2, -3]) == 4", {"args": [1, [2, -3]], "expected": 4}),
        ("assert f('a') == {'a': (1, None)}, 'of a letter'", {"args": ["a"], "expected": {"a": [1, None]}}),
        ("assert f({1: 2.5})", {"args": [{"1": 2.5}], "expected": True}),
        ("assert not f()", {"args": [], "expected": False}),
        ("assert abs(f(2) - 0.5) < 1e-6", {"args": [2], "expected": 0.5, "compare": "close"}),
        ("assert f([]) == {2, 1}", {"args": [[]], "expected": [1, 2]}),
    ],
)
def test_assertions_name_the_function_and_become_objects(text, test):
    assert read_tests([text]) == ("f", (test,))


@pytest.mark.parametrize(
    "text",
    ["assert f(1) > 2", "assert f(x) == 1", "assert f(open('/etc/passwd')) == 1", "f(1) == 1", "assert f(1) == g(1)",
     "assert f(a=1) == 1", "assert m.f(1) == 1", "assert f(1) == 1j", "assert f(", "", "assert f(1) == 1\nassert f(2) == 2"],
)  # fmt: skip
def test_what_is_not_a_call_with_literals_is_refused(text):
    with pytest.raises(ValueError, match="test 2 is .* expected an assertion such as"):
        read_tests(["assert f(1) == 1", text])


@pytest.mark.parametrize(
    ("tests", "name", "told"),
    [
        (["assert f(1) == 1", "assert g(1) == 1"], "", "test 2 calls g, expected f"),
        (["assert f(1) == 1"], "g", "test 1 calls f, expected g"),
        ([{"args": 1, "expected": 1}], "f", r"test 1 is not an object with args \(a list\) and expected"),
        ([{"args": [1]}], "f", "test 1 is not an object"),
        ([5], "f", "test 1 is '5', expected an assertion"),
        ([{"args": [], "expected": 1, "compare": "about"}], "f", "test 1 has compare 'about', expected one of equal"),
        ([{"args": [], "expected": 1}], "", "it has tests but no function_name"),
    ],
)
def test_faulty_tests_are_named_by_number(tests, name, told):
    with pytest.raises(ValueError, match=told):
        read_tests(tests, name)
