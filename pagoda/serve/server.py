"""`pagoda serve`: load a model, answer on a port, and leave in order when told to."""

from __future__ import annotations

import logging
import socket
import sys
import time
from pathlib import Path

from pagoda.common import PagodaError
from pagoda.engine.options import EngineOptions, Weights
from pagoda.serve.options import Serving

try:
    import fastapi  # noqa: F401
    import llguidance  # noqa: F401
    import prometheus_client  # noqa: F401
    import uvicorn
except ImportError as error:
    raise PagodaError(f'the server needs {error.name}: pip install "pagoda-llm[serve]"') from None

from pagoda.data.chat_template import use_template
from pagoda.data.tokenizer import load_tokenizer
from pagoda.engine.async_engine import AsyncEngine
from pagoda.engine.engine import Engine
from pagoda.engine.llm import load_model
from pagoda.serve.app import create_app
from pagoda.serve.follow import follower, latest_of
from pagoda.serve.service import Service


def serve(model: str, serving: Serving, options: EngineOptions, weights: Weights) -> None:
    """Serve a model until SIGTERM or SIGINT. Both let requests end for `shutdown` seconds; a second one does not."""
    name, listener, checkpoint = name_of(model, serving), listen(serving.host, serving.port), latest_of(model)
    here = Service(AsyncEngine(build(model, serving, options, weights)), name, serving, checkpoint or "")
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of every client that has gone
    watch = [follower(model, weights)] if checkpoint and serving.follow else []
    Server(here, watch).run(sockets=[listener])


def build(model: str, serving: Serving, options: EngineOptions, weights: Weights) -> Engine:
    """The engine with its model, tokenizer, draft model and adapters."""
    gpt, cache_dtype, path = load_model(model, weights)
    tokenizer = load_tokenizer(path)
    if serving.template:
        use_template(tokenizer, serving.template)
    draft = load_model(options.speculate, weights)[0] if options.speculate not in ("", "ngram") else None
    engine = Engine(gpt, tokenizer, options, cache_dtype, draft)
    for name, adapter in serving.adapter_paths.items():
        engine.load_adapter(name, adapter)
    return engine


def name_of(model: str, serving: Serving) -> str:
    """What the API calls the model."""
    name = serving.served_model_name or (Path(model).resolve().name if Path(model).exists() else model)
    if name in serving.adapter_paths:
        raise PagodaError(f"an adapter cannot be called '{name}', as the model is")
    return name


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound; clients are refused until the server listens on it."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        return listener
    except OSError as e:
        raise PagodaError(f"cannot listen on {host} port {port}: {e.strerror}; give another --host or --port") from None


class Server(uvicorn.Server):
    """uvicorn, which first lets running requests finish."""

    def __init__(self, here: Service, background: list):
        app = create_app(here, background)
        super().__init__(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=2))
        self.here, self.deadline = here, float("inf")

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        print(f"{self.here.name} on {address} (a page to chat on; OpenAI's API: {address}/v1)", file=sys.stderr)
        if not host.startswith("127.") and host != "::1" and not self.here.options.api_key:
            print("anybody who reaches this machine can use it: give --api_key", file=sys.stderr)

    def handle_exit(self, sig: int, frame: object) -> None:
        if self.here.draining:
            self.should_exit = self.force_exit = True
        else:
            self.here.draining = True
            self.deadline = time.monotonic() + self.here.options.shutdown

    async def on_tick(self, counter: int) -> bool:
        if self.here.draining and not self.should_exit:
            if late := time.monotonic() > self.deadline:
                await self.here.engine.close(0)  # who waits still is told that the answer breaks off
            self.should_exit = late or not self.here.active
        return await super().on_tick(counter)
