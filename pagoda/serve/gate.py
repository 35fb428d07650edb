"""What stands before every route: the API key, the largest body, the end of service, bugs, and a count."""

from __future__ import annotations

import hmac
import logging

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pagoda.serve.errors import Refusal, refusal
from pagoda.serve.service import Service

GUARDED = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")  # not even without a key
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
log = logging.getLogger("pagoda.serve")


class Gate:
    def __init__(self, app: ASGIApp, service: Service, paths: set[str]):
        """paths: those that metrics tell apart"""
        self.app, self.service, self.paths = app, service, paths
        self.most = int(service.options.max_body_mb * 1e6)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path, headers, size, begun = scope["path"], Headers(scope=scope), 0, False
        page = path == "/" or path.startswith("/page/")

        async def bounded() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.most:
                raise self.too_large()
            return message

        async def counted(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                own = MutableHeaders(scope=message)
                own["X-Content-Type-Options"] = "nosniff"
                for name, value in PAGE_HEADERS.items() if page else ():
                    own[name] = value
                known = path if path in self.paths else "page" if page else "other"
                self.service.metrics.requests.labels(known, str(message["status"])).inc()
            await send(message)

        self.service.active += 1
        try:
            if refused := self.refused(path, page, headers):
                await refused(scope, receive, counted)
            else:
                await self.app(scope, bounded, counted)
        except Exception:
            if begun:
                raise  # the connection breaks, so that the client does not take a part for the whole
            log.exception("%s %s failed", scope["method"], path)
            await refusal(Refusal(500, "something went wrong in the server; its log says what"))(
                scope, receive, counted
            )
        finally:
            self.service.active -= 1

    def refused(self, path: str, page: bool, headers: Headers) -> Response | None:
        key = self.service.options.api_key
        # The page holds no secrets, and must be there to ask for a key.
        if key and path != "/health" and not page and not self.has_key(headers, key):
            return refusal(
                Refusal(401, "this server wants its API key, as Authorization: Bearer KEY", "invalid_api_key")
            )
        if path in GUARDED and not key:
            return refusal(Refusal(403, "adapters can be changed only on a server that was started with an API key"))
        if self.service.draining and path not in ("/health", "/metrics"):
            return refusal(Refusal(503, "the server is shutting down", "shutting_down", Retry_After="5"))
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.most:
            return refusal(self.too_large())
        return None

    def has_key(self, headers: Headers, key: str) -> bool:
        kind, _, given = headers.get("authorization", "").partition(" ")
        return kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), key.encode())

    def too_large(self) -> Refusal:
        return Refusal(413, f"the body is larger than {self.service.options.max_body_mb:g} MB", "body_too_large")
