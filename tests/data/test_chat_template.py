"""Chat templates render as transformers renders them, and their complaints come out in one line."""

import datetime

import pytest

from pagoda.common import PagodaError
from pagoda.data.chat_template import render

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'"
    "}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + "
    "'<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
TOOLS = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages %}
    {%- if message.role == "system" and tools %}{% continue %}{% endif %}
    {%- if message.tool_calls %}
        {%- for tool_call in message.tool_calls %}
            {{- '<tool_call>' }}{{- tool_call.function | tojson(indent=2) }}{{- '</tool_call>' }}
        {%- endfor %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' }}{% generation %}{{ message.content }}{% endgeneration %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
    {%- if loop.index0 == ns.last and message.role == 'assistant' %}{% break %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
{{ strftime_now("%d %b %Y") }}
"""
MESSAGES = [
    {"role": "user", "content": " What is 1 < 2 & 'three'? 你好 😀 "},
    {"role": "assistant", "content": "True.\n"},
    {"role": "user", "content": "Thanks"},
]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": "<é>"}}}]}
TOOL = {"type": "function", "function": {"name": "f", "description": "It's <b>", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def theirs():
    from transformers.utils.chat_template_utils import render_jinja_template

    def render(template, messages, **variables):
        return render_jinja_template([messages], chat_template=template, **variables)[0][0]

    return render


@pytest.mark.parametrize(
    "template", [CHATML, LLAMA_3, MISTRAL, GEMMA, TOOLS], ids=["chatml", "llama3", "mistral", "gemma", "tools"]
)
@pytest.mark.parametrize("prompt", [True, False])
def test_templates_render_as_in_transformers(theirs, template, prompt):
    for messages in (MESSAGES, MESSAGES[:1], MESSAGES[:2]):
        variables = {"add_generation_prompt": prompt, "bos_token": "<s>", "eos_token": "</s>"}
        assert render(template, messages, **variables) == theirs(template, messages, **variables)


def test_tools_and_template_variables_render_as_in_transformers(theirs):
    messages = [{"role": "system", "content": "Be brief."}, *MESSAGES, CALL]
    variables = {"tools": [TOOL], "enable_thinking": False, "add_generation_prompt": True}
    text = render(TOOLS, messages, **variables)
    assert text == theirs(TOOLS, messages, **variables)
    assert "It's <b>" in text
    assert datetime.datetime.now().strftime("%Y") in text


def test_a_missing_special_token_prints_as_nothing():
    assert render("{{ bos_token }}a", MESSAGES, bos_token=None) == "a"


def test_a_template_that_refuses_the_roles_says_why():
    with pytest.raises(PagodaError, match="refuses these messages: System role not supported"):
        render(GEMMA, [{"role": "system", "content": "x"}])
    with pytest.raises(PagodaError, match="roles must alternate"):
        render(MISTRAL, MESSAGES[1:])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("", "no chat template"),
        ("a\n{% for %}", r"broken \(line 2"),
        ("{{ messages[0].nothing.more }}", "refuses these messages"),
        ("{{ 1 + 'a' }}", "refuses these messages"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses these messages: .*unsafe"),
        ("{{ messages.append(1) }}", "refuses these messages: .*unsafe|not safely callable"),
    ],
)
def test_bad_templates_are_one_line_errors(template, message):
    with pytest.raises(PagodaError, match=message) as caught:
        render(template, MESSAGES)
    assert "\n" not in str(caught.value)
