"""`pagoda serve`: load a model, then answer on a port until told to leave."""

from __future__ import annotations

import logging
import socket
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from pagoda.common import PagodaError
from pagoda.data.chat_template import use_template
from pagoda.data.tokenizer import load_tokenizer
from pagoda.engine.engine import Engine
from pagoda.engine.llm import load_model
from pagoda.engine.options import EngineOptions, Weights
from pagoda.serve.options import Serving

WEB = ("fastapi", "uvicorn", "prometheus_client", "llguidance")


def serve(model: str, serving: Serving, options: EngineOptions, weights: Weights) -> None:
    """Serve a model until SIGTERM or SIGINT. Both let requests end for `shutdown` seconds; a second one does not."""
    for package in WEB:
        if find_spec(package) is None:
            raise PagodaError(f'the server needs {package}: pip install "pagoda-llm[serve]"')
    name, listener, checkpoint = name_of(model, serving), listen(serving.host, serving.port), latest_of(model)
    with ThreadPoolExecutor(1) as pool:  # the web's packages are imported while the weights are read
        imported = [pool.submit(import_module, package) for package in WEB]
        engine = build(model, serving, options, weights)
        for package in imported:
            package.result()
    from pagoda.engine.async_engine import AsyncEngine
    from pagoda.serve.follow import follower
    from pagoda.serve.server import Server
    from pagoda.serve.service import Service

    here = Service(AsyncEngine(engine), name, serving, checkpoint or "")
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


def latest_of(run: str) -> str | None:
    """The name of a run's newest checkpoint; None for what is no run."""
    try:
        return (Path(run) / "latest").read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
