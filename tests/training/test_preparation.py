"""What a run says and refuses before any model is loaded."""

import pytest

from preference_training.configuration.validation import configured
from preference_training.data.entries import read_entries
from preference_training.modeling.tokenizer import byte_level_tokenizer
from preference_training.training.preparation import other_template_notice


@pytest.mark.parametrize(
    ("saved", "template", "archive", "told"),
    [
        ("{{ other }}", "chat", "LATEST", True),
        ("{{ other }}", "chat", "LATEST/policy.pt", True),
        ("{{ own }}", "chat", "LATEST", False),
        # Responses of such runs are rendered without it.
        ("{{ other }}", "hh", "LATEST", False),
        (None, "chat", "LATEST", False),
        ("{{ other }}", "chat", None, False),
    ],
)
def test_an_archive_with_another_chat_template_is_told_with_the_key_that_keeps_it(tmp_path, saved, template, archive, told):
    (tmp_path / "LATEST").mkdir()
    (tmp_path / "LATEST" / "policy.pt").touch()
    if saved:
        (tmp_path / "LATEST" / "chat_template.jinja").write_text(saved)
    config = configured(f"template={template}", f"model.archive={tmp_path / archive if archive else 'null'}")
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = "{{ own }}"
    notice = other_template_notice(config, read_entries(config), tokenizer)
    assert (notice is not None) == told
    assert not told or notice.endswith(f"set model.chat_template={tmp_path / 'LATEST' / 'chat_template.jinja'}")
