"""Chat templates: the Jinja source that a model carries, rendered as transformers renders it.

A template is code from the internet, so it runs in Jinja's immutable sandbox.
"""

from __future__ import annotations

import json
from datetime import datetime
from functools import lru_cache
from typing import Any

from pagoda.common import PagodaError


def render(template: str | None, messages: list[dict[str, Any]], **variables: Any) -> str:
    """The text of a conversation.

    template: Jinja source; None raises PagodaError.
    messages: `{"role": "user", "content": "..."}` dicts; templates may know further keys, such as `tool_calls`.
    variables: what templates read besides: `add_generation_prompt`, `bos_token`, `eos_token`, `tools` (JSON schemas),
    `documents`, and the template's own (`enable_thinking`); None means not given.
    A template that is broken or that refuses the conversation raises PagodaError.
    """
    if not template:
        raise PagodaError(
            "this model has no chat template, so it cannot chat: use `generate` instead, or an instruction-tuned model"
        )
    import jinja2

    # Templates ask whether `tools` is none; a missing `bos_token` must print as nothing, though, and not as "None".
    given = {name: value for name, value in variables.items() if value is not None}
    given = {"add_generation_prompt": False, "tools": None, "documents": None} | given
    try:
        return _compile(template).render(messages=messages, **given)
    except jinja2.TemplateSyntaxError as error:
        raise PagodaError(f"the model's chat template is broken (line {error.lineno}: {error.message})") from None
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        # What `raise_exception` says, or what went wrong in an expression: these messages do not fit this template.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PagodaError(f"the model's chat template refuses these messages: {reason}") from None


@lru_cache(maxsize=16)
def _compile(template: str):
    from jinja2 import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what the assistant says, for training; the text is the same without it."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

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
