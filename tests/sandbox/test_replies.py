"""Code is found in all kinds of replies, and prose is not mistaken for code."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from preference_training.sandbox.replies import LONGEST_REPLY, Extracted, extract_code, only_function

CODE = "def add(a, b):\n    return a + b"

REPLIES = {
    "a fenced block": f"Here it is:\n\n```python\n{CODE}\n```\n\nIt adds.",
    "without a language": f"```\n{CODE}\n```",
    "with another name of the language": f"```Python3 title=add.py\n{CODE}\n```",
    "tildes": f"~~~py\n{CODE}\n~~~",
    "more backticks": f"````python\n{CODE}\n````",
    "cut short before its end": f"```python\n{CODE}",
    "in a list": "1. The code:\n   ```python\n   def add(a, b):\n       return a + b\n   ```",
    "lines of DOS": f"```python\n{CODE}\n```".replace("\n", "\r\n"),
    "closed at the end of a line": f"```python\n{CODE}```\nDone.",
    "opened behind a word": f"Code: ```python\n{CODE}\n```",
    "no fence at all": CODE,
    "prose before and behind": f"Sure!\n\n{CODE}\n\nThis is O(1), isn't it?",
    "CodeLlama's tags": f"[PYTHON]\n{CODE}\n[/PYTHON]\n[TESTS]\nassert add(1, 2) == 3\n[/TESTS]",
    "an example first": f"```python\n>>> add(1, 2)\n3\n```\n\n```python\n{CODE}\n```",
    "an example last": f"```python\n{CODE}\n```\n\n```python\nprint(add(1, 2))\n```",
    "thoughts first": f"<think>Maybe\n```python\ndef add(a, b): return 0\n```\n</think>\n```python\n{CODE}\n```",
    "thoughts without a beginning": f"Hm, def add?</think>```python\n{CODE}\n```",
    "another language first": f"```bash\npip install x\n```\n```python\n{CODE}\n```",
    "shell and output around": f"```\n$ python\n```\n\n```py\n{CODE}\n```\n\n```text\n3\n```",
}


@pytest.mark.parametrize("reply", REPLIES.values(), ids=REPLIES)
def test_code_is_found_in_typical_replies(reply):
    found = extract_code(reply, "add")
    assert (found.code, found.fault) == (CODE, None)


def test_code_alone_is_taken_whole():
    code = f"ZERO = 0\n\n{CODE} + ZERO\n\nadd = abs(add)"
    assert extract_code(code, "add").code == code


def test_the_last_of_several_solutions_counts():
    slow = "```python\ndef add(a, b):\n    return sum([a, b])\n```"
    assert extract_code(f"{slow}\nBetter:\n```python\n{CODE}\n```", "add").code == CODE


def test_a_method_and_another_spelling_of_the_name_are_accepted():
    code = "class Solution:\n    def twoSum(self, a, b):\n        return a + b"
    assert extract_code(f"```python\n{code}\n```", "two_sum").fault is None


# Two numbers go in.
TESTS = ({"args": [1, 2], "expected": 3},)

STANDING_IN = {
    "another name": "def plus(a, b):\n    return a + b",
    "a helper with an underscore": "def _twice(a, b):\n    return 2 * a\n\ndef plus(a, b):\n    return a + b",
    "a main program": "def plus(a, b):\n    return a + b\n\ndef main():\n    print(plus(1, 2))\n\nmain()",
    "optional arguments": "def plus(a, b, c=0, *, d=0):\n    return a + b",
    "any number of arguments": "def plus(*numbers):\n    return sum(numbers)",
    "LeetCode's class": "class Solution:\n    def plus(self, a: int, b: int) -> int:\n        return a + b",
    "LeetCode's class with helpers": (
        "def help(a, b):\n    return a\n\nclass Solution:\n    def _sum(self, a, b):\n        return a + b\n"
        "    def plus(self, a, b):\n        return self._sum(a, b)"
    ),
    "a static method": "class Solution:\n    @staticmethod\n    def plus(a, b):\n        return a + b",
}


@pytest.mark.parametrize("code", STANDING_IN.values(), ids=STANDING_IN)
@pytest.mark.parametrize("requested", ["add", ""])
def test_the_only_function_that_takes_the_arguments_stands_for_the_requested_one(code, requested):
    assert extract_code(f"```python\n{code}\n```", requested, TESTS) == Extracted(code, None, "plus")


def test_the_requested_name_goes_before_another_even_in_an_earlier_block():
    reply = f"```python\n{CODE}\n```\nA variant:\n```python\n{STANDING_IN['another name']}\n```"
    assert extract_code(reply, "add", TESTS) == Extracted(CODE, None)
    assert extract_code("add = lambda a, b: a + b", "add", TESTS).fault is not None, "code without a fence begins with def"
    assert extract_code("```\nadd = lambda a, b: a + b\n```", "add", TESTS) == Extracted("add = lambda a, b: a + b", None)


NOT_STANDING_IN = {
    "two that fit": "def plus(a, b):\n    return a + b\n\ndef minus(a, b):\n    return a - b",
    "two methods that fit": "class Solution:\n    def plus(self, a, b): pass\n    def minus(self, a, b): pass",
    "too few arguments": "def plus(a):\n    return a",
    "too many arguments": "def plus(a, b, c):\n    return a",
    "a needed keyword": "def plus(a, b, *, c):\n    return a",
    "a coroutine": "async def plus(a, b):\n    return a + b",
    "a function inside another": "def make():\n    def plus(a, b):\n        return a + b\n    return plus",
    "another class": "class Adder:\n    def plus(self, a, b):\n        return a + b",
    "no function": "print(3)",
}


@pytest.mark.parametrize("code", NOT_STANDING_IN.values(), ids=NOT_STANDING_IN)
def test_no_function_is_guessed_where_none_or_several_fit(code):
    found = extract_code(f"```python\n{code}\n```", "add", TESTS)
    assert (found.code, found.fault, found.function_name) == (code, "does not define the function add", "")
    found = extract_code(f"```python\n{code}\n```", "", TESTS)
    assert found.fault == "does not define a single function that takes the arguments of the tests"


def test_without_tests_no_function_stands_for_another():
    assert extract_code(STANDING_IN["another name"], "add").fault == "does not define the function add"


HOSTILE = {
    "deep decorators": "@(" + "-" * 900 + "1)\ndef plus(a, b):\n    return a + b",
    "a name twice": "def plus(a, b):\n    return 0\n\ndef plus(a, b):\n    return a + b",
    "a deleted function": "def plus(a, b):\n    return a + b\n\ndel plus",
    "many functions": "\n".join(f"def f{n}(a): pass" for n in range(2000)) + "\ndef plus(a, b): return a + b",
}


@pytest.mark.parametrize("code", HOSTILE.values(), ids=HOSTILE)
def test_odd_code_is_only_read_never_run(code):
    assert only_function(code, TESTS) == "plus"


@settings(deadline=None)
@given(st.text(st.sampled_from("defclassSolution plus(self,a,b*=):\n\t @staticmethod.lambda0")))
def test_any_code_has_one_function_or_none(code):
    name = only_function(code, TESTS)
    assert name is None or f"def {name}" in code.replace("\t", " ")


def test_fences_inside_a_string_do_not_end_the_block():
    code = 'def add(a, b):\n    """Adds.\n\n    ```\n    add(1, 2)\n    ```\n    """\n    return a + b'
    assert extract_code(f"````python\n{code}\n````", "add").code == code


UNUSABLE = {
    "": "is empty",
    "I cannot do that.": "contains no code",
    "<think>Let me see": "ends before its answer",
    "```python\ndef add(a, b:\n```": "does not parse: ",
    "```python\ndef sub(a, b):\n    return a - b\n```": "does not define the function add",
    "```python\n# later\n```": "does not parse: it contains only comments",
    "```python\n" + "(" * 5000 + "\n```": "does not parse: ",
    "```python\n" + "-" * 100_000 + "1\n```": "does not parse: ",
    "```python\nx = '\0'\n```": "does not parse: ",
}


@pytest.mark.parametrize(("reply", "fault"), UNUSABLE.items(), ids=[key[:20] for key in UNUSABLE])
def test_the_fault_of_a_reply_without_usable_code_is_given(reply, fault):
    found = extract_code(reply, "add")
    assert found.fault.startswith(fault)


def test_an_overlong_reply_is_truncated():
    assert extract_code("x" * LONGEST_REPLY + f"\n```python\n{CODE}\n```", "add").code is None


@settings(deadline=None)
@given(st.text(st.sampled_from("`~\n\t ->1.[]/PYTHONpythondefadd(ab):return+<think>\0é#'\"")), st.sampled_from(["", "add"]))
@example("```", "add")
@example("```python", "")
def test_any_text_gives_code_that_parses_or_a_fault(text, name):
    found = extract_code(text, name)
    if found.fault is None:
        compile(found.code, "solution.py", "exec", flags=0x400)  # parses; PyCF_ONLY_AST executes nothing
    else:
        assert found.fault


PROSE = st.text(st.characters(codec="utf-8", exclude_characters="`~<[\r\x85\u2028\u2029"), max_size=60)


@settings(deadline=None)
@given(PROSE, PROSE, st.sampled_from(["```", "~~~", "`````"]), st.sampled_from(["", "python", "py", "Python 3"]),
       st.integers(0, 3))  # fmt: skip
def test_a_fenced_block_is_found_in_any_prose(before, behind, fence, language, blanks):
    indent = " " * blanks
    block = "\n".join(indent + line for line in f"{fence}{language}\n{CODE}\n{fence}".split("\n"))
    assert extract_code(f"{before}\n{block}\n{behind}", "add").code == CODE
