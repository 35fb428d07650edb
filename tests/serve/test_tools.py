"""Tool calls in a text: every format, cut in every way, and what only looks like a call."""

import json

import pytest

from pagoda.common import PagodaError
from pagoda.serve.protocol import ChatRequest
from pagoda.serve.tools import FORCED, FORMATS, Named, Reader, forced_guide, format_for, reader_for

WEATHER = {"city": 'Köln {"[x]"}', "days": [1, {"a": "}"}]}
ONE = json.dumps({"name": "weather", "arguments": WEATHER}, ensure_ascii=False)
TWO = '{"name": "add", "arguments": {"a": 1, "b": 2}}'
BACKWARDS = '{"arguments": {"a": 1, "b": 2}, "name": "add"}'
CALLS = [("weather", WEATHER), ("add", {"a": 1, "b": 2})]
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("weather", "add")
]


def read(format, text, size=None, most=None):
    """(content, [(name, arguments)]) of a text that comes in pieces of `size` characters."""
    reader = Reader(FORMATS.get(format, FORCED), ["weather", "add"], most)
    size = size or len(text) or 1
    deltas = [d for i in range(0, len(text), size) for d in reader.push(text[i : i + size])] + reader.finish()
    return gather(deltas)


def gather(deltas):
    content, calls = "", []
    for delta in deltas:
        content += delta.get("content", "")
        for call in delta.get("tool_calls", []):
            if "id" in call:
                assert call["index"] == len(calls)
                calls.append([call["function"]["name"], call["function"]["arguments"]])
            else:
                assert call["index"] == len(calls) - 1
                calls[-1][1] += call["function"]["arguments"]
    return content, [(name, json.loads(arguments)) for name, arguments in calls]


SPOKEN = [
    ("hermes", f"<tool_call>\n{ONE}\n</tool_call>", "", CALLS[:1]),
    ("hermes", f"Let me see.<tool_call>{ONE}</tool_call>\n<tool_call>\n{TWO}\n</tool_call>", "Let me see.", CALLS),
    ("hermes", f"<tool_call>\n{ONE}\n</tool_call> <tool_call>{BACKWARDS}</tool_call>\n", "", CALLS),
    ("hermes", f"<tool_call>{TWO}</tool_call> and now?", "and now?", CALLS[1:]),
    ("llama3", ONE.replace('"arguments"', '"parameters"'), "", CALLS[:1]),
    ("llama3", f"<|python_tag|>{ONE}; {TWO}", "", CALLS),
    ("mistral", f"[TOOL_CALLS][{ONE}, {TWO}]", "", CALLS),
    ("mistral", f" [{ONE},{TWO}]", "", CALLS),
    ("forced", f"[{ONE},\n {TWO}]", "", CALLS),
]


@pytest.mark.parametrize("size", [None, 1, 2, 7, 50])
@pytest.mark.parametrize(("format", "text", "content", "calls"), SPOKEN)
def test_calls_are_found_however_the_text_is_cut(format, text, content, calls, size):
    assert read(format, text, size) == (content, calls)


PLAIN = [
    ("hermes", "No tool <tool here, 2 < 3."),
    ("hermes", "<tool_call>\nnothing\n</tool_call>"),
    ("hermes", '<tool_call>{"name": "launch", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": broken'),
    ("hermes", '<tool_call>{"name": "f\\q", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "get\n", "arguments": {}}</tool_call>'),
    ("hermes", "ends with <tool_c"),
    ("llama3", '{"answer": 42}'),
    ("llama3", '{"name": "launch", "parameters": {}}'),
    ("llama3", "The answer is {42}."),
    ("mistral", "[1, 2, 3]"),
    ("mistral", "  leading space"),
    ("mistral", ""),
]


@pytest.mark.parametrize("size", [None, 1, 3])
@pytest.mark.parametrize(("format", "text"), PLAIN)
def test_what_is_no_call_comes_out_as_text(format, text, size):
    assert read(format, text, size) == (text, [])


def test_half_a_surrogate_pair_in_arguments_can_be_sent():
    _, calls = read("hermes", '<tool_call>{"arguments": {"a": "x\\ud83d"}, "name": "add"}</tool_call>', None)
    assert calls == [("add", {"a": "x?"})]


def test_arguments_stream_as_they_come():
    reader = Reader(FORMATS["hermes"], ["add"])
    assert reader.push('<tool_call>\n{"name": "add", "argum') == []
    first, second = reader.push('ents": {"a": ')
    assert first["tool_calls"][0]["function"] == {"name": "add", "arguments": ""}
    assert second == {"tool_calls": [{"index": 0, "function": {"arguments": '{"a": '}}]}
    assert reader.push("1}")[0]["tool_calls"][0]["function"]["arguments"] == "1}"
    assert reader.push("}\n</tool_call>") + reader.finish() == []


def test_calls_that_are_not_wanted_in_parallel_are_left_out():
    assert read("mistral", f"[TOOL_CALLS][{ONE}, {TWO}]", 5, most=1) == ("", CALLS[:1])


def test_a_named_choice_is_all_arguments():
    reader = Named("add")
    deltas = [d for c in '{"a": 1, "b": 2}' for d in reader.push(c)] + reader.finish()
    assert gather(deltas) == ("", CALLS[1:])


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ('... <tool_call> ... {"parameters": {}}', "hermes"),
        ("[AVAILABLE_TOOLS] [TOOL_CALLS]", "mistral"),
        ('{"name": function name, "parameters": dictionary}', "llama3"),
        ("{% for m in messages %}", "hermes"),
    ],
)
def test_the_template_tells_the_format(template, name):
    assert format_for(template) is FORMATS[name]


def request(**more):
    return ChatRequest.model_validate({"messages": [{"role": "user", "content": "hi"}], **more})


def test_a_forced_choice_becomes_a_schema():
    named = {"type": "function", "function": {"name": "add"}}
    assert forced_guide(request(tools=TOOLS, tool_choice=named)).json == {"type": "object"}
    schema = forced_guide(request(tools=TOOLS, tool_choice="required", parallel_tool_calls=False)).json
    assert [s["properties"]["name"]["const"] for s in schema["items"]["anyOf"]] == ["weather", "add"]
    assert (schema["minItems"], schema["maxItems"]) == (1, 1)
    assert forced_guide(request(tools=TOOLS, tool_choice="auto")) is None
    assert reader_for(request(tools=TOOLS, tool_choice="none"), FORMATS["hermes"]) is None


@pytest.mark.parametrize(
    "more", [{"tool_choice": "required"}, {"tools": TOOLS, "tool_choice": {"function": {"name": "x"}}}]
)
def test_a_choice_that_cannot_be_met_is_refused(more):
    with pytest.raises(PagodaError, match="tools"):
        forced_guide(request(**more))
