"""Answers on their way out: the engine's pieces become OpenAI's choices, whole or as a stream of server-sent events.

An `Answer` is one choice as it grows. `push` takes a piece and gives back what a stream shows of it; `whole` is the
choice of an answer that did not stream. Both come from the same state, so that they say the same.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import lru_cache
from typing import Any

from starlette.requests import Request as Http
from starlette.responses import JSONResponse, Response, StreamingResponse

from pagoda.data.tokenizer import Tokenizer
from pagoda.data.vocabulary import spelled_bytes
from pagoda.engine.async_engine import Stream
from pagoda.engine.request import Output, TokenLogprob
from pagoda.serve.errors import error_body
from pagoda.serve.metrics import Clock, Metrics
from pagoda.serve.tools import Reader

Choice = dict[str, Any]
Calls = dict[int, dict[str, Any]]
encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class Answer:
    """What every kind of answer keeps. n_tokens: generated so far."""

    kind, chunk, id_start = "", "", ""

    def __init__(self, index: int, tokenizer: Tokenizer):
        self.index, self.tokenizer = index, tokenizer
        self.n_tokens, self.text, self.finish_reason = 0, "", None
        self.logprobs: list[TokenLogprob] = []

    def opening(self) -> Choice | None:
        """What a stream shows before the first piece."""
        return None


class TextAnswer(Answer):
    """A choice of /v1/completions.

    echo: the prompt's ids, which shall stand before the answer. told: the prompt's log-probabilities, which come once
    and which all answers to the prompt share. prompt_only: nothing else is wanted.
    """

    kind, chunk, id_start = "text_completion", "text_completion", "cmpl"

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        logprobs: int | None,
        echo: list[int] | None,
        told: list[TokenLogprob],
        prompt_only: bool,
    ):
        super().__init__(index, tokenizer)
        self.wanted, self.echo, self.told, self.prompt_only = logprobs, echo, told, prompt_only
        self.offset = 0  # characters that have log-probabilities

    def push(self, piece: Output) -> Choice | None:
        text, told, tokens = piece.text, piece.logprobs, piece.token_ids
        if self.prompt_only:
            text, told, tokens = "", [], []
        if piece.prompt_logprobs:
            self.told[:] = [TokenLogprob(self.echo[0], None), *piece.prompt_logprobs[1:]]
        if self.echo is not None:
            text, told = self.tokenizer.decode(self.echo) + text, [*self.told, *told]
            self.echo = None
        self.n_tokens += len(tokens)
        self.text += text
        self.logprobs += told
        self.finish_reason = "length" if self.prompt_only and piece.finish_reason else piece.finish_reason
        if not (text or told or self.finish_reason):
            return None
        return self._choice(text, self._shape(told))

    def whole(self) -> Choice:
        self.offset = 0
        return self._choice(self.text, self._shape(self.logprobs))

    def _choice(self, text: str, logprobs: Choice | None) -> Choice:
        return {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": self.finish_reason}

    def _shape(self, told: list[TokenLogprob]) -> Choice | None:
        if self.wanted is None:
            return None
        texts = [token_text(self.tokenizer, t.token)[0] for t in told]
        offsets = []
        for text in texts:
            offsets.append(self.offset)
            self.offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [shown(t.logprob) for t in told],
            "top_logprobs": [self._top(t) for t in told],
            "text_offset": offsets,
        }

    def _top(self, t: TokenLogprob) -> dict[str, float] | None:
        if t.logprob is None:
            return None
        return {token_text(self.tokenizer, token)[0]: shown(p) for token, p in [*t.top, (t.token, t.logprob)]}


class ChatAnswer(Answer):
    """A choice of /v1/chat/completions. reader: finds the tool calls in it."""

    kind, chunk, id_start = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, index: int, tokenizer: Tokenizer, logprobs: bool, reader: Reader | None):
        super().__init__(index, tokenizer)
        self.wanted, self.reader = logprobs, reader
        self.calls: Calls = {}

    def opening(self) -> Choice | None:
        return self._chunk({"role": "assistant", "content": ""}, None)

    def push(self, piece: Output) -> Choice | None:
        self.n_tokens += len(piece.token_ids)
        self.logprobs += piece.logprobs
        deltas = [{"content": piece.text}] if piece.text else []
        if self.reader:
            deltas = self.reader.push(piece.text) + (self.reader.finish() if piece.finish_reason else [])
        self.text += join(self.calls, deltas)
        self.finish_reason = "tool_calls" if self.calls and piece.finish_reason == "stop" else piece.finish_reason
        if not (deltas or piece.logprobs or self.finish_reason):
            return None
        calls: Calls = {}
        text = join(calls, deltas)
        delta = ({"content": text} if text else {}) | ({"tool_calls": list(calls.values())} if calls else {})
        return self._chunk(delta, self._shape(piece.logprobs))

    def whole(self) -> Choice:
        text = None if self.calls and not self.text.strip() else self.text
        message = {"role": "assistant", "content": text, "refusal": None}
        if self.calls:
            message["tool_calls"] = [{k: c[k] for k in ("id", "type", "function")} for c in self.calls.values()]
        chunk = self._chunk({}, self._shape(self.logprobs))
        return {"index": self.index, "message": message, **{k: chunk[k] for k in ("logprobs", "finish_reason")}}

    def _chunk(self, delta: dict[str, Any], logprobs: Choice | None) -> Choice:
        return {"index": self.index, "delta": delta, "logprobs": logprobs, "finish_reason": self.finish_reason}

    def _shape(self, told: list[TokenLogprob]) -> Choice | None:
        if not self.wanted:
            return None
        content = []
        for t in told:
            top = [self._token(*pair) for pair in t.top]
            content.append({**self._token(t.token, t.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text, data = token_text(self.tokenizer, token)
        return {"token": text, "logprob": shown(logprob), "bytes": list(data)}


def join(calls: Calls, deltas: list[dict[str, Any]]) -> str:
    """Adds to calls, by their numbers, what deltas say of them, and returns the text of the deltas."""
    for call in (call for delta in deltas for call in delta.get("tool_calls", [])):
        if call["index"] in calls:
            calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        else:
            calls[call["index"]] = {**call, "function": dict(call["function"])}
    return "".join(delta.get("content", "") for delta in deltas)


def shown(logprob: float | None) -> float | None:
    """JSON has no infinity: OpenAI says -9999. Nothing predicts a prompt's first token."""
    return logprob and max(logprob, -9999.0)


def token_text(tokenizer: Tokenizer, token: int) -> tuple[str, bytes]:
    """A token alone, as text and as bytes; the text of one that is part of a character lists its bytes."""
    piece, text = tokenizer.backend.id_to_token(token) or "", tokenizer.decode([token], skip_special_tokens=False)
    if piece.startswith("\u2581") and not text.startswith(" "):  # SentencePiece drops the space that begins a text
        text = " " + text
    if "\ufffd" not in text:
        return text, text.encode()
    if piece.startswith("<0x"):
        data = bytes.fromhex(piece[3:-1])
    else:
        data = b"".join(byte_alphabet().get(c, c.encode()) for c in piece)
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data


@lru_cache(maxsize=1)
def byte_alphabet() -> dict[str, bytes]:
    """The characters that stand for bytes in GPT-2's byte-level BPE."""
    return {character: bytes([byte]) for byte, character in enumerate(spelled_bytes())}


# Sending ------------------------------------------------------------------------------------------------------------


class Reply:
    """The answers to one HTTP request: `n` to each of several streams of the engine."""

    def __init__(self, model: str, streams: list[Stream], answers: list[Answer], metrics: Metrics):
        self.streams, self.answers, self.metrics = streams, answers, metrics
        self.n = len(answers) // len(streams)
        id = f"{answers[0].id_start}-{uuid.uuid4().hex}"
        self.head = {"id": id, "object": answers[0].kind, "created": int(time.time()), "model": model}
        self.cached = 0

    async def whole(self, http: Http) -> Response:
        """The answers as one JSON document. A client that goes away ends the work."""
        work = asyncio.ensure_future(self._collect())
        gone = asyncio.ensure_future(disconnected(http))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            return work.result() if work.done() else Response(status_code=499)
        finally:
            for task in (work, gone):
                task.cancel()
            self.cancel()

    def stream(self, include_usage: bool) -> Response:
        """The answers as server-sent events."""
        return EventStream(self, include_usage)

    def cancel(self) -> None:
        for stream in self.streams:
            stream.cancel()

    async def _collect(self) -> Response:
        async for _, piece in self._pushed():
            if piece.finish_reason in ("error", "abort"):
                return JSONResponse(*failed(piece))
        choices = [answer.whole() for answer in self.answers]
        return JSONResponse({**self.head, "choices": choices, "usage": self._usage()})

    async def events(self, include_usage: bool) -> AsyncIterator[bytes]:
        head = {**self.head, "object": self.answers[0].chunk}
        for answer in self.answers:
            if first := answer.opening():
                yield event({**head, "choices": [first]})
        async for choice, piece in self._pushed():
            if piece.finish_reason in ("error", "abort"):
                yield event(failed(piece)[0])
                return
            if choice:
                yield event({**head, "choices": [choice]})
        if include_usage:
            yield event({**head, "choices": [], "usage": self._usage()})
        yield b"data: [DONE]\n\n"

    async def _pushed(self) -> AsyncIterator[tuple[Choice | None, Output]]:
        clock = Clock(self.metrics)
        last = [clock.start] * len(self.answers)
        async for i, piece in merged(self.streams):
            place = i * self.n + piece.index
            answer = self.answers[place]
            last[place] = clock.saw(piece, last[place], answer.n_tokens == 0)
            self.cached += piece.cached_tokens
            yield answer.push(piece), piece
        clock.finished()

    def _usage(self) -> dict[str, Any]:
        prompt = sum(len(stream.request.prompt) for stream in self.streams)
        new = sum(answer.n_tokens for answer in self.answers)
        details = {"prompt_tokens_details": {"cached_tokens": self.cached}}
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new, **details}


class EventStream(StreamingResponse):
    """Ends the engine's work when it ends, and when nobody listens any more."""

    def __init__(self, reply: Reply, include_usage: bool):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(reply.events(include_usage), media_type="text/event-stream", headers=headers)
        self.reply = reply

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.reply.cancel()


async def merged(streams: list[Stream]) -> AsyncIterator[tuple[int, Output]]:
    """(which stream, piece) of all of them as they come."""
    if len(streams) == 1:
        async for piece in streams[0]:
            yield 0, piece
        return
    ready: asyncio.Queue[tuple[int, Output] | None] = asyncio.Queue()

    async def pump(i: int, stream: Stream) -> None:
        async for piece in stream:
            ready.put_nowait((i, piece))
        ready.put_nowait(None)

    tasks = [asyncio.ensure_future(pump(i, stream)) for i, stream in enumerate(streams)]
    try:
        open = len(tasks)
        while open:
            found = await ready.get()
            if found is None:
                open -= 1
            else:
                yield found
    finally:
        for task in tasks:
            task.cancel()


async def disconnected(http: Http) -> None:
    with suppress(RuntimeError):
        while (await http.receive())["type"] != "http.disconnect":
            pass


def event(content: dict[str, Any]) -> bytes:
    return b"data: " + encode(content).encode() + b"\n\n"


def failed(piece: Output) -> tuple[dict[str, Any], int]:
    """(body, status)"""
    status = 503 if piece.finish_reason == "abort" else 500
    return error_body(piece.error or "the answer was broken off", status), status
