"""Tool calls: which parser a template wants, what a forced choice looks like, and the calls in a text that streams in.

A `Reader` takes the answer in pieces and gives back deltas in OpenAI's shape: text, or the name and then the arguments
of a call as the model writes them. The answer that does not stream goes through the same reader, in one piece or many.
"""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import dataclass
from typing import Any

from pagoda.common import PagodaError
from pagoda.engine.options import Guided
from pagoda.serve.protocol import ChatRequest


@dataclass(frozen=True)
class Format:
    """How a model writes calls, each of them an object with its name and its arguments.

    begin, end   texts around calls; special tokens among them are not seen here
    opening      calls may begin with this, at the answer's start, without `begin`
    """

    begin: str
    end: str
    opening: str


FORMATS = {
    "hermes": Format("<tool_call>", "</tool_call>", ""),
    "llama3": Format("<|python_tag|>", "", "{"),
    "mistral": Format("[TOOL_CALLS]", "", "["),
}
FORCED = Format("", "", "[")  # what `forced_guide` lets a model write
HEAD = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
BETWEEN = " \r\n\t,;[]"  # calls


def format_for(template: str) -> Format:
    """The format that a template has its examples in."""
    for text, name in (("[TOOL_CALLS]", "mistral"), ("<tool_call>", "hermes"), ('"parameters": ', "llama3")):
        if text in template:
            return FORMATS[name]
    return FORMATS["hermes"]


def forced_guide(body: ChatRequest) -> Guided | None:
    """What a tool_choice other than none and auto forces the answer to be. PagodaError where it cannot be met."""
    choice, tools = body.tool_choice, body.tools or []
    if choice in (None, "none", "auto"):
        return None
    if not tools:
        raise PagodaError("tool_choice needs tools")
    schemas = {tool.function.name: tool.function.parameters or {"type": "object"} for tool in tools}
    if choice != "required":
        if choice.function.name not in schemas:
            raise PagodaError(f"tool_choice names '{choice.function.name}', which is not among the tools")
        return Guided(json=schemas[choice.function.name])
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": schema},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for name, schema in schemas.items()
    ]
    most = {"maxItems": 1} if body.parallel_tool_calls is False else {}
    return Guided(json={"type": "array", "minItems": 1, **most, "items": {"anyOf": calls}})


def reader_for(body: ChatRequest, spoken: Format) -> Reader | None:
    """What finds the calls in an answer to this request; None where there are none to find."""
    if not body.tools or body.tool_choice == "none":
        return None
    names = [tool.function.name for tool in body.tools]
    if body.tool_choice in (None, "auto"):
        return Reader(spoken, names, most=1 if body.parallel_tool_calls is False else None)
    return Reader(FORCED, names) if body.tool_choice == "required" else Named(body.tool_choice.function.name)


class Reader:
    """Text in, deltas out. What looks like a call and is none comes out as text.

    mode   start: nothing but space so far; text: outside of calls; calls: before, between and behind objects;
           object: inside of one
    """

    def __init__(self, format: Format, names: list[str], most: int | None = None):
        self.format, self.names, self.most = format, names, most
        self.mode, self.held = "start", ""
        self.raw = ""  # what was passed over since the last call, in case there is none
        self.n = 0  # calls so far
        self.after_call = False

    def push(self, text: str) -> list[dict[str, Any]]:
        self.held += text
        deltas: list[dict[str, Any]] = []
        while (found := getattr(self, f"_{self.mode}")()) is not None:
            deltas += found
        return deltas

    def finish(self) -> list[dict[str, Any]]:
        """The rest, at the end of the answer."""
        rest, self.held = self.held, ""
        if self.mode == "object":
            return [] if self.head else content(self.raw + rest)
        if self.after_call and not self.raw.strip(BETWEEN):
            return []  # an end that was cut short
        return content(self.raw + rest)

    # Each of these takes something off `held` and returns deltas, or None when it must see more.

    def _start(self) -> list | None:
        text, begin = self.held.lstrip(), self.format.begin
        if not text or (begin and begin.startswith(text) and begin != text):
            return None
        marked = begin and text.startswith(begin)
        calls = not marked and self.format.opening and text.startswith(self.format.opening)
        self.mode, self.raw = ("calls" if calls else "text"), ""
        return []

    def _text(self) -> list | None:
        begin = self.format.begin
        if self.after_call:
            self.held = self.held.lstrip()
        place = self.held.find(begin) if begin else -1
        if place >= 0:
            before, self.held = self.held[:place], self.held[place + len(begin) :]
            self.mode, self.raw = "calls", begin
            return content(before)
        keep = max((n for n in range(1, len(begin)) if self.held.endswith(begin[:n])), default=0)
        text, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        self.after_call = self.after_call and not text
        return content(text) or None

    def _calls(self) -> list | None:
        end, rest = self.format.end, self.held.lstrip(BETWEEN)
        self.raw, self.held = self.raw + self.held[: len(self.held) - len(rest)], rest
        if not rest or (end and end.startswith(rest) and end != rest):
            return None
        if rest.startswith("{"):
            self.mode, self.head, self.scanned, self.sent = "object", False, 0, 0
            self.depth, self.quoted, self.escaped, self.value_end = 0, False, False, 0
            return []
        if end and rest.startswith(end):
            self.mode, self.held, self.raw = "text", rest[len(end) :], self.raw.strip(BETWEEN) and self.raw + end
            return self._give_up("")
        return self._give_up("")

    def _object(self) -> list | None:
        text, deltas = self.held, []
        if not self.head and (match := HEAD.match(text)):
            try:
                name = json.loads(match[1])
            except ValueError:
                name = None
            if name not in self.names:
                return self._give_up(text)
            self.head, self.sent = True, match.end()
            deltas += self._call(name, "")
        end = self._scan(text)
        if self.head:
            upto = self.value_end or self.scanned
            if upto > self.sent:
                deltas += self._arguments(text[self.sent : upto])
                self.sent = upto
        if not end:
            return deltas or None
        if not self.head:
            called = self._whole(text[:end])
            if called is None:
                return self._give_up(text)
            deltas += self._call(*called)
        self.mode, self.held, self.raw, self.after_call = "calls", text[end:], "", True
        self.n += 1
        return deltas

    def _scan(self, text: str) -> int:
        """Go on to the end of the object: where that is, or 0. Notes where the value that began at `sent` ends."""
        for i in range(self.scanned, len(text)):
            c = text[i]
            if self.quoted:
                self.quoted = self.escaped or c != '"'
                self.escaped = c == "\\" and not self.escaped
            elif c == '"':
                self.quoted = True
            elif c in "{[":
                self.depth += 1
            elif c in "}]":
                self.depth -= 1
                if self.depth == 1 and self.head and not self.value_end:
                    self.value_end = i + 1
                if self.depth == 0:
                    self.scanned = i + 1
                    return i + 1
        self.scanned = len(text)
        return 0

    def _whole(self, text: str) -> tuple[str, str] | None:
        """(name, arguments) of an object that is not written in the usual order."""
        try:
            call = json.loads(text)
        except (ValueError, RecursionError):
            return None
        arguments = call.get("arguments", call.get("parameters", {}))
        if call.get("name") not in self.names or not isinstance(arguments, (dict, str)):
            return None
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return call["name"], text.encode("utf-8", "replace").decode()  # half a surrogate pair cannot be sent

    def _give_up(self, text: str) -> list[dict[str, Any]]:
        """These were no calls but text: what was passed over, and `text`, which is all that is held."""
        text, self.raw, self.mode, self.held = self.raw + text, "", "text", self.held[len(text) :]
        self.after_call = self.after_call and not text.strip()
        return [] if self.after_call else content(text)

    def _call(self, name: str, arguments: str) -> list[dict[str, Any]]:
        if self.most is not None and self.n >= self.most:
            return []
        function = {"name": name, "arguments": arguments}
        call = {"index": self.n, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
        return [{"tool_calls": [call]}]

    def _arguments(self, text: str) -> list[dict[str, Any]]:
        if self.most is not None and self.n >= self.most:
            return []
        return [{"tool_calls": [{"index": self.n, "function": {"arguments": text}}]}]


class Named(Reader):
    """The whole answer is the arguments of one call."""

    def __init__(self, name: str):
        super().__init__(FORCED, [name])

    def push(self, text: str) -> list[dict[str, Any]]:
        first = self._call(self.names[0], "") if not self.raw and text else []
        self.raw += text
        return first + (self._arguments(text) if text else [])

    def finish(self) -> list[dict[str, Any]]:
        return []


def content(text: str) -> list[dict[str, Any]]:
    return [{"content": text}] if text else []
