"""Code is found in all kinds of replies, and prose is not mistaken for code."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from preference_collection.generation.replies import LONGEST_REPLY, extract_code

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


def test_the_last_of_several_solutions_counts():
    slow = "```python\ndef add(a, b):\n    return sum([a, b])\n```"
    assert extract_code(f"{slow}\nBetter:\n```python\n{CODE}\n```", "add").code == CODE


def test_a_method_and_another_spelling_of_the_name_are_accepted():
    code = "class Solution:\n    def twoSum(self, a, b):\n        return a + b"
    assert extract_code(f"```python\n{code}\n```", "two_sum").fault is None


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
