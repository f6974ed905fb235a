"""The conversations and the chat template that a page of docs/ shows, against what transformers makes of them."""

import json
import runpy

from preference_training.data.entries import load_records, read_entry
from preference_training.data.rendering.settings import TokenSettings
from preference_training.data.tokenization import tokenize_records
from preference_training.modeling.tokenizer import byte_level_tokenizer
from tests.support import shown
from tests.support.files import ROOT


def marked(template: str) -> str:
    """The page's chat template, with marks around what the assistant writes."""
    call = "{%- for call in"
    one, other = "message.role + '\\n' + message.content }}\n", "{{- '<|im_end|>\\n' }}{%- endif %}{%- endfor %}\n"
    assert template.count(one) == template.count(other) == template.count(call) == 1
    opened = "message.role + '\\n' }}{%- if message.role == 'assistant' %}{%- generation %}{{- message.content }}\n"
    closed = "{{- '<|im_end|>' }}{%- endgeneration %}{%- else %}{{- message.content + '<|im_end|>' }}{%- endif %}{{- '\\n' }}"
    return template.replace(one, opened).replace(other, f"{closed}{{%- endif %}}{{%- endfor %}}\n")


def test_conversations_with_tools_have_the_ids_and_the_marks_of_their_chat_template(tmp_path):
    script, tokenizer = runpy.run_path(str(ROOT / "scripts/tool_conversations.py")), byte_level_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    [template] = [block.text for block in shown.blocks("docs/conversations-with-tools.md") if block.title]
    script["write"](tmp_path / "rows.jsonl", script["conversation"], 30, seed=1)
    expected = []
    for row in map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines()):
        messages = [message | {"content": message["content"] or ""} for message in row["messages"]]
        options = {"tools": row["tools"], "chat_template": marked(template), "return_assistant_tokens_mask": True}
        found = tokenizer.apply_chat_template(messages, return_dict=True, **options)
        # Without the end of the line behind the last turn.
        expected.append((found["input_ids"][:-1], found["assistant_masks"][:-1]))
    tokenizer.chat_template = template
    records = load_records(read_entry(str(tmp_path / "rows.jsonl"), {"held_out_share": 0}), "train")
    for prompt in tokenize_records(records, tokenizer, TokenSettings("targets", 4096, 2048, template="chat")):
        [response], [spans] = prompt.responses, prompt.spans
        mask = [0] * len(prompt.prompt_ids) + [int(any(a <= k < b for a, b in spans)) for k in range(len(response))]
        expected.remove(([*prompt.prompt_ids, *response], mask))
    assert not expected
