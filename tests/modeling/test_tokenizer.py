"""The tokenizer of a configuration."""

import pytest

from preference_training.configuration.saved import model_config
from preference_training.core.errors import UserError
from preference_training.data.records.record import PreferenceRecord, Turn
from preference_training.data.rendering.settings import TokenSettings
from preference_training.data.tokenization import tokenize_records
from preference_training.modeling.tokenizer import byte_level_tokenizer, load_tokenizer

WITH_TOOLS = """{%- for tool in tools or [] %}{{- '[' + tool.name + ']' }}{%- endfor %}
{%- for message in messages %}{{- '<' + message.role + '>' + message.content }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<assistant>' }}{%- endif %}"""


def load(name, template):
    return load_tokenizer(model_config({"tokenizer_name_or_path": str(name), "chat_template": str(template)}))


@pytest.fixture
def template(tmp_path):
    path = tmp_path / "tools.jinja"
    path.write_text(WITH_TOOLS)
    return path


def test_a_chat_template_in_a_file_renders_the_tools_and_is_part_of_what_is_saved(tmp_path, template):
    tokenizer = load("byte_level", template)
    record = PreferenceRecord((Turn("user", "Why?"),), ("So.", "No."), ((0, 1),), 0, 1, "x", tools='[{"name": "search"}]')
    [prompt] = tokenize_records([record], tokenizer, TokenSettings("pairs", 512, 256, template="chat"))
    assert tokenizer.decode(prompt.prompt_ids) == "[search]<user>Why?<assistant>"
    tokenizer.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(model_config({"name_or_path": str(tmp_path / "saved")})).chat_template == WITH_TOOLS


def test_a_chat_template_in_a_file_replaces_the_tokenizers_own(tmp_path, template):
    own = byte_level_tokenizer()
    own.chat_template = "{{ messages[0].content }}"
    own.save_pretrained(tmp_path / "saved")
    assert load(tmp_path / "saved", template).chat_template == WITH_TOOLS


def test_a_chat_template_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("binary", "missing", "."):
        with pytest.raises(UserError, match=r"model\.chat_template: .* could not be read"):
            load("byte_level", tmp_path / name)
