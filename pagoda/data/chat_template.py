"""Chat templates: the Jinja source that a model carries, rendered as transformers renders it; and well-known ones by
name, for models that carry none (`use_template`).

A template is code from the internet, so it runs in Jinja's immutable sandbox.
"""

from __future__ import annotations

import json
import re
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pagoda.common import PagodaError, did_you_mean, read_text

if TYPE_CHECKING:
    from pagoda.data.tokenizer import Tokenizer


def render(template: str | None, messages: list[dict[str, Any]], **variables: Any) -> str:
    """The text of a conversation.

    template: Jinja source; None raises PagodaError.
    messages: `{"role": "user", "content": "..."}` dicts; templates may know further keys, such as `tool_calls`.
    variables: what templates read besides: `add_generation_prompt`, `bos_token`, `eos_token`, `tools` (JSON schemas),
    `documents`, and the template's own (`enable_thinking`); None means not given.
    A template that is broken or that refuses the conversation raises PagodaError.
    """
    return _render(template, messages, False, variables)


def generation_spans(template: str, messages: list[dict[str, Any]], **variables: Any) -> list[tuple[int, int]] | None:
    """(begin, end) of what stands in the template's `{% generation %}` blocks, in characters of what `render` returns:
    what the assistant says, by the template's own word. None when the template has no such blocks."""
    if not re.search(r"{%-?\s*generation\s*-?%}", template):
        return None
    spans, begin, length = [], 0, 0
    for piece in re.split(f"([{_BEGIN}{_END}])", _render(template, messages, True, variables)):
        if piece == _BEGIN:
            begin = length
        elif piece == _END:
            spans.append((begin, length))
        else:
            length += len(piece)
    return spans


# Marks around generation blocks: two code points that Unicode keeps out of every text.
_BEGIN, _END = "\ufdd0", "\ufdd1"


def _render(template: str | None, messages: list[dict[str, Any]], mark: bool, variables: dict[str, Any]) -> str:
    if not template:
        raise PagodaError(
            "this model has no chat template, so it cannot chat: use `generate` instead, or an instruction-tuned model"
        )
    import jinja2

    # Templates ask whether `tools` is none; a missing `bos_token` must print as nothing, though, and not as "None".
    given = {name: value for name, value in variables.items() if value is not None}
    given = {"add_generation_prompt": False, "tools": None, "documents": None} | given
    try:
        return _compile(template, mark).render(messages=messages, **given)
    except jinja2.TemplateSyntaxError as error:
        raise PagodaError(f"the model's chat template is broken (line {error.lineno}: {error.message})") from None
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        # What `raise_exception` says, or what went wrong in an expression: these messages do not fit this template.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PagodaError(f"the model's chat template refuses these messages: {reason}") from None


@lru_cache(maxsize=16)
def _compile(template: str, mark: bool = False):
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what the assistant says, for training; the text is the same without it."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            begin, end = (nodes.Output([nodes.TemplateData(text)], lineno=line) for text in (_BEGIN, _END))
            return [begin, *body, end] if mark else body

    def raise_exception(message: str):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # Jinja's own escapes HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment.from_string(template)


# Templates by name ------------------------------------------------------------


def use_template(tokenizer: Tokenizer, name: str | None) -> None:
    """Make a tokenizer wear a template: one of TEMPLATES, or a file of Jinja source (`mine.jinja`); None keeps its own.
    What ends a turn then ends a generation too. Saved with the tokenizer.

    PagodaError: no such template, a tokenizer without the token that ends its turns, or none named where the model has
    no template of its own.
    """
    known = f"{', '.join(TEMPLATES)}, or a .jinja file"
    if name is None:
        if not tokenizer.chat_template:
            raise PagodaError(f"this model has no chat template: name one with --template ({known}); alpaca fits any")
        return
    if name in TEMPLATES:
        source, end = TEMPLATES[name]
    elif name.endswith(".jinja"):
        source, end = read_text(name), None
    else:
        raise PagodaError(f"unknown chat template '{name}'{did_you_mean(name, TEMPLATES) or f': use {known}'}")
    if end == "eos_token" and tokenizer.eos_id is None:
        raise PagodaError(f"template '{name}' ends an answer with the end-of-text token, and this tokenizer has none")
    if end and end != "eos_token":
        if tokenizer.token_id(end) is None:
            fitting = ", ".join(name for name, (_, end) in TEMPLATES.items() if end == "eos_token")
            raise PagodaError(f"template '{name}' ends an answer with {end}, no token of this model: use {fitting}")
        tokenizer.eos_ids = list(dict.fromkeys([tokenizer.token_id(end), *tokenizer.eos_ids]))
        tokenizer.generation.pop("eos_token_id", None)  # the file is to say `eos_ids`
    # A begin-of-text token, where the template leaves it to the tokenizer whether there is one.
    begins = tokenizer.bos_id is not None and tokenizer.encode("")[:1] == [tokenizer.bos_id]
    tokenizer.chat_template = source.replace("<BOS>", "{{ bos_token }}" if begins else "")


def _turns(user: str, answer: str, prompt: str, system: str = "", start: str = "", opening: str = "") -> str:
    """A template, from expressions for what each role's message `m` is written as, the answer's prompt, and what comes
    first. A system message is a turn of its own (`system`), or goes as `opening` into the first user's."""
    if opening:
        start += "{% set opening = " + opening + " if messages and messages[0].role == 'system' else '' %}"
        user = user.replace("OPENING", "(opening if loop.index0 == 1 else '')")
    return (
        start + "{% for m in messages %}{% if m.role == 'system' %}{{ " + (system or "''") + " }}"
        "{% elif m.role == 'assistant' %}{{ " + answer + " }}{% else %}{{ " + user + " }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ " + prompt + " }}{% endif %}"
    )


def _headed(before: str, after: str, end: str, start: str = "", content: str = "m.content") -> str:
    """Every message alike: its role between two texts, its content, an end (`end` is an expression)."""
    turn = f"'{before}' ~ m.role ~ '{after}' ~ {content} ~ {end}"
    return _turns(turn, turn, f"'{before}assistant{after}'", turn, start)


def _unless_system(text: str) -> str:
    return "{{ '' if messages and messages[0].role == 'system' else " + text + " }}"


_ALPACA = (
    "'Below is an instruction that describes a task' ~ (', paired with an input that provides further context' "
    "if messages and messages[0].input else '') ~ '. Write a response that appropriately completes the request.\n\n'"
)
_VICUNA = (
    "'A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user\\'s questions. '"
)
_LLAMA_2 = "'<<SYS>>\n' ~ messages[0].content ~ '\n<</SYS>>\n\n'"
_BOS = "{{ bos_token }}"

# name: (template, the token that ends an answer). Alpaca rows keep `instruction` and `input` beside the content.
TEMPLATES: dict[str, tuple[str, str]] = {
    "plain": (_turns("m.content", "m.content ~ eos_token", "''", "m.content ~ '\\n\\n'", "<BOS>"), "eos_token"),
    "alpaca": (
        _turns(
            "'### Instruction:\n' ~ (m.instruction or m.content) ~ ('\n\n### Input:\n' ~ m.input if m.input else '') ~ "
            "'\n\n### Response:\n'",
            "m.content ~ eos_token ~ '\n\n'",
            "''",
            "m.content ~ '\n\n'",
            "<BOS>" + _unless_system(_ALPACA),
        ),
        "eos_token",
    ),
    "vicuna": (
        _turns(
            "'USER: ' ~ m.content ~ ' ASSISTANT:'",
            "' ' ~ m.content ~ eos_token",
            "''",
            "m.content ~ ' '",
            "<BOS>" + _unless_system(_VICUNA),
        ),
        "eos_token",
    ),
    "chatml": (_headed("<|im_start|>", "\n", "'<|im_end|>\n'"), "<|im_end|>"),
    "llama-2": (
        _turns(
            "bos_token ~ '[INST] ' ~ OPENING ~ m.content|trim ~ ' [/INST]'",
            "' ' ~ m.content|trim ~ ' ' ~ eos_token",
            "''",
            opening=_LLAMA_2,
        ),
        "eos_token",
    ),
    "llama-3": (
        _headed("<|start_header_id|>", "<|end_header_id|>\n\n", "'<|eot_id|>'", _BOS, "m.content|trim"),
        "<|eot_id|>",
    ),
    "mistral": (
        _turns(
            "'[INST] ' ~ OPENING ~ m.content ~ ' [/INST]'",
            "' ' ~ m.content|trim ~ eos_token",
            "''",
            start=_BOS,
            opening="messages[0].content ~ '\n\n'",
        ),
        "eos_token",
    ),
    "zephyr": (_headed("<|", "|>\n", "eos_token ~ '\n'"), "eos_token"),
    "gemma": (
        _turns(
            "'<start_of_turn>user\n' ~ OPENING ~ m.content|trim ~ '<end_of_turn>\n'",
            "'<start_of_turn>model\n' ~ m.content|trim ~ '<end_of_turn>\n'",
            "'<start_of_turn>model\n'",
            start=_BOS,
            opening="messages[0].content ~ '\n\n'",
        ),
        "<end_of_turn>",
    ),
    "phi-3": (_headed("<|", "|>\n", "'<|end|>\n'"), "<|end|>"),
}


def spell_out_tools(
    template: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """(messages, tools) for a template. One that knows no tool calls would drop them without a word: for such a one
    they become text, in the words of Hermes and Qwen2.5 (`<tools>`, `<tool_call>`, `<tool_response>`)."""
    if "tool_calls" in template or not (tools or any(m.get("tool_calls") or m["role"] == "tool" for m in messages)):
        return messages, tools
    spelled = []
    for message in messages:
        content = message.get("content") or ""
        if message["role"] == "tool":
            message = {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
        elif calls := message.get("tool_calls"):
            calls = [call.get("function", call) for call in calls]
            calls = [json.dumps({k: c[k] for k in ("name", "arguments") if k in c}, ensure_ascii=False) for c in calls]
            texts = [content, *(f"<tool_call>\n{call}\n</tool_call>" for call in calls)]
            message = {"role": "assistant", "content": "\n".join(text for text in texts if text)}
        spelled.append(message)
    if tools:
        first = spelled.pop(0)["content"] if spelled[0]["role"] == "system" else ""
        listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        text = _TOOLS.format(tools=listed)
        spelled.insert(0, {"role": "system", "content": f"{first}\n\n{text}" if first else text})
    return spelled, None


_TOOLS = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""
