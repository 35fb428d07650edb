"""The routes: OpenAI's API, a few of vLLM's, and the page. `create_app` joins them with what stands around them."""

from __future__ import annotations

import asyncio
import base64
import http
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as Http
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.staticfiles import StaticFiles

from pagoda import __version__
from pagoda.common import PagodaError
from pagoda.engine.request import Request
from pagoda.serve.answer import ChatAnswer, Reply, TextAnswer
from pagoda.serve.errors import Refusal, handle_errors
from pagoda.serve.gate import Gate
from pagoda.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    LoadAdapterRequest,
    TokenizeRequest,
    UnloadAdapterRequest,
)
from pagoda.serve.service import Service
from pagoda.serve.tools import forced_guide, reader_for

PAGE = Path(__file__).parent / "page"
EMBED_TOKENS = 2048  # at once: between them the engine does its other work
STREAMS = ("/v1/completions", "/v1/chat/completions")
ERRORS = ("400", "401", "403", "404", "413", "429", "500", "503")
router = APIRouter()


def service(request: Http) -> Service:
    return request.app.state.service


Here = Annotated[Service, Depends(service)]


@router.get("/health")
async def health(here: Here) -> Response:
    """200 while the server takes requests, 503 when it does not."""
    if here.draining or not here.engine.thread.is_alive():
        raise Refusal(503, "shutting down" if here.draining else "the engine has stopped")
    return JSONResponse({"status": "ok"})


@router.get("/metrics")
async def metrics(here: Here) -> Response:
    """Figures for Prometheus."""
    return Response(here.metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})


@router.get("/v1/models")
async def models(here: Here) -> Response:
    """The served model and its adapters: each is a name to ask for."""
    return JSONResponse({"object": "list", "data": here.models()})


@router.get("/v1/models/{name:path}")
async def model(name: str, here: Here) -> Response:
    """One of them."""
    here.adapter(name)
    return JSONResponse(next(m for m in here.models() if m["id"] == name))


@router.post("/v1/completions")
async def completions(body: CompletionRequest, request: Http, here: Here) -> Response:
    """Go on from a text. Streams server-sent events if asked to."""
    adapter, n = here.adapter(body.model), body.n or 1
    prompts = await here.prompts(body.prompt)
    most = 16 if body.max_tokens is None else body.max_tokens
    if most == 0 and not body.echo:
        raise PagodaError("max_tokens must be at least 1, or 0 with echo")
    prompt_logprobs = body.logprobs if body.echo else None
    requests, answers = [], []
    for ids in prompts:
        sampling = body.sampling(
            here.defaults, here.room(ids), max_new_tokens=most, logprobs=body.logprobs, prompt_logprobs=prompt_logprobs
        )
        requests.append(Request(ids, sampling, adapter, body.priority or 0))
        told: list = []  # the prompt's log-probabilities: the engine gives them once, all n answers show them
        for _ in range(n):
            echo = ids if body.echo else None
            answers.append(TextAnswer(len(answers), here.tokenizer, body.logprobs, echo, told, most == 0))
    return await reply(body, request, here, requests, answers)


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatRequest, request: Http, here: Here) -> Response:
    """Answer a conversation. Streams server-sent events if asked to."""
    adapter = here.adapter(body.model)
    if body.top_logprobs and not body.logprobs:
        raise PagodaError("top_logprobs needs logprobs: true")
    forced = forced_guide(body)
    wanted = body.response_format.guided() if body.response_format else None
    if forced and wanted:
        raise PagodaError("response_format goes with no forced tool_choice")
    ids = await here.chat_ids(body.messages, body)
    room = here.room(ids)
    given = [most for most in (body.max_completion_tokens, body.max_tokens) if most is not None]
    if given and given[0] < 1:
        raise PagodaError("max_completion_tokens must be at least 1")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    sampling = body.sampling(here.defaults, room, forced or wanted, max_new_tokens=[*given, room][0], logprobs=logprobs)
    answers = [
        ChatAnswer(i, here.tokenizer, bool(body.logprobs), reader_for(body, here.tool_format))
        for i in range(sampling.n)
    ]
    return await reply(body, request, here, [Request(ids, sampling, adapter, body.priority or 0)], answers)


async def reply(
    body: CompletionRequest | ChatRequest, request: Http, here: Service, requests: list[Request], answers: list
) -> Response:
    if body.stream and (body.best_of or 1) > (body.n or 1):
        raise PagodaError("best_of cannot stream: the best is known when all have ended")
    sent = Reply(body.model or here.name, here.submit(requests), answers, here.metrics)
    if body.stream:
        return sent.stream(bool(body.stream_options and body.stream_options.include_usage))
    return await sent.whole(request)


@router.post("/v1/embeddings")
async def embeddings(body: EmbeddingRequest, here: Here) -> Response:
    """Texts as vectors of length 1: the mean of the last hidden states, or the last one."""
    if here.adapter(body.model):
        raise PagodaError("embeddings come from the model without adapters")
    prompts = await here.prompts(body.input)
    for ids in prompts:
        here.room(ids)
    rows: list[np.ndarray] = []
    while len(rows) < len(prompts):
        some = [prompts[len(rows)]]
        for ids in prompts[len(rows) + 1 :]:
            if sum(map(len, some)) + len(ids) > EMBED_TOKENS:
                break
            some.append(ids)
        rows += list((await here.engine.run(lambda engine, some=some: engine.embed(some, body.pooling))).numpy())
    if body.dimensions not in (None, len(rows[0])):
        raise PagodaError(f"this model's embeddings have {len(rows[0])} dimensions")
    in_base64 = body.encoding_format == "base64"
    data = [
        {
            "object": "embedding",
            "index": i,
            "embedding": base64.b64encode(row.astype("<f4").tobytes()).decode() if in_base64 else row.tolist(),
        }
        for i, row in enumerate(rows)
    ]
    n = sum(map(len, prompts))
    usage = {"prompt_tokens": n, "total_tokens": n}
    return JSONResponse({"object": "list", "data": data, "model": body.model or here.name, "usage": usage})


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, here: Here) -> Response:
    """The tokens of a prompt, or of a conversation as the chat template writes it."""
    if (body.prompt is None) == (body.messages is None):
        raise PagodaError("give prompt or messages, one of them")
    if body.prompt is not None:
        ids = await here.encode(body.prompt, body.add_special_tokens)
    else:
        ids = await here.chat_ids(body.messages)
    return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": here.inner.context})


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, here: Here) -> Response:
    """The text of tokens."""
    return JSONResponse({"prompt": here.tokenizer.decode(body.tokens, skip_special_tokens=False)})


@router.post("/v1/load_lora_adapter")
async def load_adapter(body: LoadAdapterRequest, here: Here) -> Response:
    """Take up an adapter, a directory on the server's disk, as another model name. Wants an API key."""
    if body.lora_name == here.name or body.lora_name in here.inner.adapters.names:
        raise PagodaError(f"there is a model '{body.lora_name}' already")
    await here.engine.run(lambda engine: engine.load_adapter(body.lora_name, body.lora_path))
    return JSONResponse({"status": "ok", "models": [m["id"] for m in here.models()]})


@router.post("/v1/unload_lora_adapter")
async def unload_adapter(body: UnloadAdapterRequest, here: Here) -> Response:
    """Drop an adapter that nobody is using. Wants an API key."""
    if here.adapter(body.lora_name) is None:
        raise PagodaError("this is the served model itself")
    await here.engine.run(lambda engine: engine.drop_adapter(body.lora_name))
    return JSONResponse({"status": "ok", "models": [m["id"] for m in here.models()]})


@router.get("/", include_in_schema=False)
async def page() -> Response:
    return FileResponse(PAGE / "index.html")


def documented(schema: dict[str, Any]) -> dict[str, Any]:
    """FastAPI's own document says 422 for what is 400 here, and nothing of the other errors."""
    text = {"type": "string"}
    error = {"type": "object", "required": ["message", "type"], "properties": {"message": text, "type": text}}
    shape = {"type": "object", "required": ["error"], "properties": {"error": error}}
    event = {"type": "object", "required": ["data"], "properties": {"data": text}}  # of a stream, each
    for path, methods in schema["paths"].items():
        for method in methods.values():
            answers = method["responses"]
            answers.pop("422", None)
            if path in STREAMS:
                answers["200"]["content"]["text/event-stream"] = {"schema": event}
            for status in ERRORS:
                phrase = http.HTTPStatus(int(status)).phrase
                answers[status] = {"description": phrase, "content": {"application/json": {"schema": shape}}}
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)
    return schema


def create_app(here: Service, background: list[Callable[[Service], Awaitable[None]]] = ()) -> FastAPI:
    """The application over a service whose engine it starts and closes. background: what else runs meanwhile."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        here.engine.start()
        tasks = [asyncio.ensure_future(each(here)) for each in background]
        yield
        for task in tasks:
            task.cancel()
        await here.engine.close(0)

    app = FastAPI(
        title="Pagoda", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    app.state.service = here
    app.include_router(router)
    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    handle_errors(app)
    app.openapi = lambda own=app.openapi: documented(own())
    paths = {route.path for route in router.routes} | {"/openapi.json"}
    app.add_middleware(Gate, service=here, paths=paths)
    if here.options.cors:
        app.add_middleware(CORSMiddleware, allow_origins=here.options.cors, allow_methods=["*"], allow_headers=["*"])
    return app
