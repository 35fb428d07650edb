"""What all routes share: the engine, the names that it answers to, the chat template, and the way in."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from pagoda.common import PagodaError
from pagoda.data.tokenizer import Tokenizer
from pagoda.engine.async_engine import AsyncEngine, Stream
from pagoda.engine.engine import Engine
from pagoda.engine.request import Request
from pagoda.serve.errors import Refusal
from pagoda.serve.metrics import Metrics
from pagoda.serve.options import Serving
from pagoda.serve.protocol import ChatRequest, Message
from pagoda.serve.tools import FORMATS, format_for

LONG_TEXT = 20_000  # characters; to encode more would hold up everybody, so a thread does it
MOST_PROMPTS = 2048  # in one request
SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class Service:
    """name: the served model's. draining: no new requests; active: those that are being answered.
    checkpoint: which one of a run is served."""

    def __init__(self, engine: AsyncEngine, name: str, options: Serving, checkpoint: str = ""):
        self.engine, self.name, self.options, self.checkpoint = engine, name, options, checkpoint
        self.metrics = Metrics(engine)
        self.draining, self.active, self.started = False, 0, int(time.time())
        generation = self.tokenizer.generation
        self.defaults = {k: generation[k] for k in SAMPLING_DEFAULTS if generation.get(k) is not None}
        template, parser = self.tokenizer.chat_template or "", options.tool_parser
        self.tool_format = format_for(template) if parser == "auto" else FORMATS[parser]

    @property
    def inner(self) -> Engine:
        return self.engine.engine

    @property
    def tokenizer(self) -> Tokenizer:
        return self.inner.tokenizer

    def adapter(self, model: str | None) -> str | None:
        """The adapter that a model name means; None is the model itself. Refuses other names."""
        if model is None or model == self.name:
            return None
        if model in self.inner.adapters.names:
            return model
        names = ", ".join([self.name, *self.inner.adapters.names])
        raise Refusal(404, f"no model '{model[:100]}' is served here, only {names}", "model_not_found", "model")

    def models(self) -> list[dict[str, Any]]:
        common = {"object": "model", "created": self.started, "owned_by": "pagoda", "max_model_len": self.inner.context}
        base = {"id": self.name, **common, "parent": None, "checkpoint": self.checkpoint or None}
        return [base, *({"id": name, **common, "parent": self.name} for name in self.inner.adapters.names)]

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        try:
            if len(text.encode()) < LONG_TEXT:
                return self.tokenizer.encode(text, add_special_tokens)
            return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens)
        except UnicodeEncodeError:
            raise PagodaError("the text has half a surrogate pair, which is no character") from None

    async def prompts(self, given: str | list) -> list[list[int]]:
        """A text, several, the tokens of one, or of several: as lists of tokens."""
        some = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
        if not 0 < len(some) <= MOST_PROMPTS:
            raise PagodaError(f"one request takes 1 to {MOST_PROMPTS} texts, not {len(some)}")
        return [await self.encode(p) if isinstance(p, str) else p for p in some]

    async def chat_ids(self, messages: list[Message], body: ChatRequest | None = None) -> list[int]:
        """A conversation as the template writes it, ready for the answer."""
        tools = body.tools if body and body.tool_choice != "none" else None
        template = self.tokenizer.chat_template or ""
        if template and "tools" not in template and (tools or any(m.tool_calls or m.role == "tool" for m in messages)):
            raise PagodaError("this model's chat template has no tools; serve it with a --template that has them")
        variables = (body and body.chat_template_kwargs) or {}
        if reserved := {"self", "template", "messages", "add_generation_prompt", "tools"} & set(variables):
            raise PagodaError(f"chat_template_kwargs must not hold {', '.join(sorted(reserved))}")
        shown = [tool.model_dump(exclude_none=True) for tool in tools] if tools else None
        text = self.tokenizer.apply_chat_template([m.for_template() for m in messages], tools=shown, **variables)
        return await self.encode(text, add_special_tokens=False)

    def room(self, ids: list[int]) -> int:
        """Tokens that fit behind a prompt."""
        context = self.inner.context
        if len(ids) >= context:
            message = f"the prompt has {len(ids)} tokens and the model's context is {context}"
            raise Refusal(400, message, "context_length_exceeded")
        return context - len(ids)

    def submit(self, requests: list[Request]) -> list[Stream]:
        """All of them, or none."""
        if not self.engine.thread.is_alive():
            raise Refusal(503, "the engine has stopped", "engine_dead")
        streams: list[Stream] = []
        try:
            for request in requests:
                streams.append(self.engine.submit(request))
        except BaseException:
            for stream in streams:
                stream.cancel()
            raise
        return streams
