"""Secrets that are never written into a page or an export: tokens, keys and passwords."""

import os
import re

from markupsafe import escape

SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY|CREDENTIAL", re.IGNORECASE)
SECRET_LOOKS = re.compile(r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{16})\b")


def without_secrets(text: str) -> str:
    """A text with the environment's tokens and keys, and whatever looks like one, replaced."""
    secrets = {
        value for name, value in os.environ.items() if SECRET_NAMES.search(name) and len(value) >= 8 and not value.isdigit()
    }
    # As they are, and as a page has them.
    secrets |= {str(escape(value)) for value in secrets}
    for value in sorted(secrets, key=len, reverse=True):
        text = text.replace(value, "(a secret)")
    return SECRET_LOOKS.sub("(a secret)", text)
