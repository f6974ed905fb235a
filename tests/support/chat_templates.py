# ruff: noqa: E501, RUF001
"""Chat templates of the kinds that model families ship, for small tokenizers: our words, the structure of the real ones."""

from functools import cache

from preference_training.modeling.tokenizer import byte_level_tokenizer

# Every turn between headers, trimmed; calls of tools as JSON.
LLAMA_3 = """{{- bos_token }}
{%- if tools %}{{- '<|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n' + (tools | tojson) + '<|eot_id|>' }}{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and message.tool_calls %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}<|eot_id|>' }}
    {%- elif message.role in ('tool', 'ipython') %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + (message.content | tojson) + '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""

# ChatML with a system turn of its own, tools in it, and what tools return in a user's turn.
TOOLS = """{%- if tools %}{{- '\n\n# Tools\n<tools>' }}{%- for tool in tools %}{{- '\n' + (tool | tojson) }}{%- endfor %}{{- '\n</tools>' }}{%- endif %}"""
RESULTS = """    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
"""
CALLS = """{%- for call in message.tool_calls or [] %}{{- ('\n' if content or not loop.first else '') + '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) + '}\n</tool_call>' }}{%- endfor %}"""
QWEN_2 = (
    """{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content }}
{%- else %}{{- '<|im_start|>system\nYou are a helpful assistant.' }}{%- endif %}"""
    + TOOLS
    + """{{- '<|im_end|>\n' }}
{%- for message in messages %}
    {%- set content = message.content or '' %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' + content }}"""
    + CALLS
    + """
        {{- '<|im_end|>\n' }}
"""
    + RESULTS
    + """    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
)
# The reasoning of turns before the last question is dropped; an empty one is written for the last turn without any.
QWEN_3 = (
    """{%- if messages[0].role == 'system' or tools %}{{- '<|im_start|>system\n' + (messages[0].content if messages[0].role == 'system' else '') }}"""
    + TOOLS
    + """{{- '<|im_end|>\n' }}{%- endif %}
{%- set state = namespace(question=messages | length - 1, looking=true) %}
{%- for message in messages[::-1] %}
    {%- if state.looking and message.role == 'user' %}
        {%- set state.looking = false %}{%- set state.question = messages | length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content or '' %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set reasoning = message.reasoning_content or '' %}
        {%- if not reasoning and '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > state.question and (loop.last or reasoning) %}
            {{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}"""
    + CALLS
    + """
        {{- '<|im_end|>\n' }}
"""
    + RESULTS
    + """    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
)
ALTERNATE = (
    "{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('Roles must alternate') }}{%- endif %}"
)
GEMMA_2 = (
    """{{- bos_token }}{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
{%- for message in messages %}"""
    + ALTERNATE
    + """{{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' + message.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}"""
)
# The system's text before the first question.
GEMMA_3 = (
    """{{- bos_token }}{%- set first = '' %}{%- set rest = messages %}
{%- if messages[0].role == 'system' %}{%- set first = messages[0].content + '\n\n' %}{%- set rest = messages[1:] %}{%- endif %}
{%- for message in rest %}"""
    + ALTERNATE
    + """{{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' + (first if loop.first else '') }}
    {%- if message.content is string %}{{- message.content | trim }}
    {%- else %}{%- for part in message.content %}{{- part.text | trim }}{%- endfor %}{%- endif %}{{- '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}"""
)
MISTRAL = (
    """{{- bos_token }}{%- set first = '' %}{%- set rest = messages %}
{%- if messages[0].role == 'system' %}{%- set first = messages[0].content + '\n\n' %}{%- set rest = messages[1:] %}{%- endif %}
{%- for message in rest %}"""
    + ALTERNATE
    + """
    {%- if message.role == 'user' %}{{- '[INST] ' + (first if loop.first else '') + message.content + '[/INST]' }}
    {%- else %}{{- ' ' + message.content + eos_token }}{%- endif %}
{%- endfor %}"""
)
PHI = """{%- for message in messages %}{{- '<|' + message.role + '|>\n' + message.content + '<|end|>\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- else %}{{- eos_token }}{%- endif %}"""
# The system's text first; the reasoning of all responses is dropped.
DEEPSEEK = """{{- bos_token }}{%- for message in messages %}{%- if message.role == 'system' %}{{- message.content }}{%- endif %}{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{{- '<｜User｜>' + message.content }}
    {%- elif message.role == 'assistant' %}{{- '<｜Assistant｜>' + message.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<｜Assistant｜>GENERATION' }}{%- endif %}"""
# Channels; the last response ends with another token than earlier ones.
GPT_OSS = """{{- '<|start|>system<|message|>You are ChatGPT.\n\nReasoning: medium<|end|>' }}
{%- for message in messages %}
    {%- if message.role in ('system', 'developer') %}{{- '<|start|>developer<|message|># Instructions\n\n' + message.content + '<|end|>' }}
    {%- elif message.role == 'tool' %}{{- '<|start|>functions.f to=assistant<|channel|>commentary<|message|>' + (message.content | tojson) + '<|end|>' }}
    {%- elif message.role == 'assistant' and message.tool_calls %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' + (call.arguments | tojson) + '<|call|>' }}
    {%- elif message.role == 'assistant' %}
        {%- if loop.last and message.thinking %}{{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}{%- endif %}
        {{- '<|start|>assistant<|channel|>final<|message|>' + message.content + ('<|return|>' if loop.last and not add_generation_prompt else '<|end|>') }}
    {%- else %}{{- '<|start|>user<|message|>' + message.content + '<|end|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""
SMOLLM_2 = """{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}{{- '<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n' }}{%- endif %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
OLMO_2 = """{{- bos_token }}{%- for message in messages %}
    {%- if message.role == 'assistant' %}{{- '<|assistant|>\n' + message.content + eos_token + ('' if loop.last else '\n') }}
    {%- else %}{{- '<|' + message.role + '|>\n' + message.content + '\n' }}{%- endif %}
    {%- if loop.last and add_generation_prompt %}{{- '<|assistant|>\n' }}{%- endif %}
{%- endfor %}"""

# Name → the template, its tokens, the beginning and the end of a sequence.
KINDS = {
    "Llama 3": (LLAMA_3, ["<|start_header_id|>", "<|end_header_id|>"], "<|begin_of_text|>", "<|eot_id|>"),
    "Qwen 2.5": (QWEN_2, ["<|im_start|>"], None, "<|im_end|>"),
    "Qwen 2.5 base": (QWEN_2, ["<|im_start|>", "<|im_end|>"], None, "<|endoftext|>"),
    "Qwen 3": (QWEN_3, ["<|im_start|>"], None, "<|im_end|>"),
    "Gemma 2": (GEMMA_2, ["<start_of_turn>"], "<bos>", "<end_of_turn>"),
    "Gemma 3": (GEMMA_3, ["<start_of_turn>", "<end_of_turn>"], "<bos>", "<eos>"),
    "Mistral": (MISTRAL, ["[INST]", "[/INST]"], "<s>", "</s>"),
    "Phi": (PHI, ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"], None, "<|endoftext|>"),
    "DeepSeek": (DEEPSEEK.replace("GENERATION", ""), ["<｜User｜>", "<｜Assistant｜>"], "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "DeepSeek R1": (
        DEEPSEEK.replace("GENERATION", "<think>\n"), ["<｜User｜>", "<｜Assistant｜>"], "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>",
    ),
    "GPT-OSS": (GPT_OSS, ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>"], "<|startoftext|>", "<|return|>"),
    "SmolLM 2": (SMOLLM_2, ["<|im_start|>"], None, "<|im_end|>"),
    "OLMo 2": (OLMO_2, [], "<|endoftext|>", "<|endoftext|>"),
}  # fmt: skip
# Whose templates have no system turn, and whose render calls of tools and what they return.
WITHOUT_SYSTEM = ("Gemma 2",)
WITH_TOOLS = ("Llama 3", "Qwen 2.5", "Qwen 2.5 base", "Qwen 3", "GPT-OSS")


@cache
def tokenizer_of(kind: str, marked: bool = False):
    """A small tokenizer with the chat template of a kind; marked: with {% generation %} around what assistants write."""
    template, tokens, bos, eos = KINDS[kind]
    return with_template(MARKED[kind] if marked else template, tokens, bos, eos)


def with_template(template: str, tokens: list[str], bos: str | None, eos: str):
    """A small tokenizer with a chat template and special tokens."""
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": tokens, "eos_token": eos} | ({"bos_token": bos} if bos else {}))
    tokenizer.chat_template = template
    return tokenizer


# Some of them with marks, as trainers ship them.
MARKED = {
    "Llama 3": LLAMA_3.replace(
        """    {%- else %}
        {{- '<|start_header_id|>' +""",
        """    {%- elif message.role == 'assistant' %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- generation %}{{- message.content | trim + '<|eot_id|>' }}{%- endgeneration %}
    {%- else %}
        {{- '<|start_header_id|>' +""",
    ),
    "Qwen 3": QWEN_3.replace(
        "{{- '<|im_start|>assistant\n' }}\n        {%- if loop.index0",
        "{{- '<|im_start|>assistant\n' }}{%- generation %}\n        {%- if loop.index0",
    ).replace(
        "        {{- '<|im_end|>\n' }}\n    {%- elif message.role == 'tool'",
        "        {{- '<|im_end|>' }}{%- endgeneration %}{{- '\n' }}\n    {%- elif message.role == 'tool'",
    ),
    "SmolLM 2": SMOLLM_2.replace(
        "    {{- '<|im_start|>' + message.role",
        "    {%- if message.role == 'assistant' %}{{- '<|im_start|>assistant\n' }}{%- generation %}{{- message.content + '<|im_end|>' }}{%- endgeneration %}{{- '\n' }}"
        "\n    {%- else %}{{- '<|im_start|>' + message.role",
    ).replace("<|im_end|>\n' }}\n{%- endfor %}", "<|im_end|>\n' }}{%- endif %}\n{%- endfor %}"),
    "Mistral": MISTRAL.replace(
        "{{- ' ' + message.content + eos_token }}",
        "{{- ' ' }}{%- generation %}{{- message.content + eos_token }}{%- endgeneration %}",
    ),
}
