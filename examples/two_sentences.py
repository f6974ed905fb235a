"""A rule as the judge of rounds: answers of two sentences, without lists or headings."""

import re

# What begins an item of a list, or a heading.
ITEM = re.compile(r"^\s*([-*•]|\d+[.)]|#+)\s", re.MULTILINE)
# What ends a sentence; not the point of a number or of a single letter, as in "U.S.".
END = re.compile(r"(?<!\b[A-Za-z])[.!?][\"')\]]*(?=\s|$)")


def score(prompt: str, response: str) -> tuple[float, str]:
    """0 for two sentences in prose; less by 1 for each sentence more or fewer, up to 4, and by 2 for a list."""
    sentences, has_list = len(END.findall(response)), ITEM.search(response) is not None
    if not response.rstrip().endswith((".", "!", "?", '"', ")")):
        # The rest of a sentence that was not finished.
        sentences += 1
    found = f"{sentences} sentence{'s' * (sentences != 1)}" + ", a list" * has_list
    return -min(abs(sentences - 2), 4) - 2.0 * has_list, found
