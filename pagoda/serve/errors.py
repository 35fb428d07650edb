"""Every error in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`, one clear message each."""

from __future__ import annotations

import http
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from pagoda.common import PagodaError
from pagoda.engine.async_engine import QueueFull

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
RETRY_SECONDS = 1
LONGEST = 500  # characters of a message


class Refusal(HTTPException):
    """An answer other than 400 to a request that cannot be served."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None, **headers: str):
        super().__init__(status, message, {name.replace("_", "-"): value for name, value in headers.items()})
        self.code, self.param = code, param


def error_body(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    message = message.encode("utf-8", "replace").decode()  # half a surrogate pair cannot be sent
    message = message if len(message) <= LONGEST else message[:LONGEST] + " ..."
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def handle_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        message, param = explain(error.errors())
        return JSONResponse(error_body(message, 400, param), 400)

    @app.exception_handler(PagodaError)
    async def mistaken(request: Request, error: PagodaError) -> Response:
        if isinstance(error, QueueFull):
            headers = {"Retry-After": str(RETRY_SECONDS)}
            return JSONResponse(error_body(str(error), 429, code="queue_full"), 429, headers)
        return JSONResponse(error_body(str(error), 400), 400)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        return refusal(error)


def refusal(error: HTTPException) -> Response:
    message = str(error.detail)
    if message == http.HTTPStatus(error.status_code).phrase:
        message = {404: "no such path: /openapi.json lists all", 405: "this path has other methods"}.get(
            error.status_code, message
        )
    body = error_body(message, error.status_code, getattr(error, "param", None), getattr(error, "code", None))
    return JSONResponse(body, error.status_code, error.headers)


def explain(errors: list[dict[str, Any]]) -> tuple[str, str | None]:
    """(message, field) of what pydantic found. Where a field takes several types it complains once for each."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return f"the body is no valid JSON: {first['ctx']['error']}", None
    path = [str(part) for part in first["loc"] if part != "body"]
    if not path:
        return "the body must be a JSON object, sent as application/json", None
    same = [e for e in errors if len(e["loc"]) > 1 and e["loc"][1] == first["loc"][1]]
    if len(same) > 1 and len({e["loc"][: len(first["loc"]) - 1] for e in same}) == 1:
        reasons = dict.fromkeys(e["msg"].removeprefix("Input should be ").replace("Input s", "s") for e in same)
        return f"{path[0]} should be {' or '.join(reasons)}", path[0]
    return f"{'.'.join(path)}: {first['msg']}", path[0]
