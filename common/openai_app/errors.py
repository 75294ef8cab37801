"""Every error is sent in OpenAI's format, with the status for its type."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from common.errors import FieldError, openai_error
from common.serving import GenerationError, QueueFullError, ShutdownError

CLIENT_GONE = 499  # nginx's status for a disconnected client, which never reads it
RETRY_AFTER_S = 1


class ApiError(Exception):
    """An error of the HTTP API. The message names field, value and limit if there are any; param is the field."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        error_type: str = "invalid_request_error",
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        self.body = openai_error(message, param, error_type, code)


def as_api_error(error: Exception) -> ApiError:
    """Convert an error to an API error. An unexpected one shows only its type: its message may be private."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, FieldError):
        return ApiError(400, str(error), error.field, code=error.code)
    if isinstance(error, QueueFullError):
        headers = {"Retry-After": str(RETRY_AFTER_S)}
        return ApiError(429, str(error), error_type="rate_limit_error", headers=headers)
    if isinstance(error, ShutdownError):
        return ApiError(503, str(error), error_type="service_unavailable")
    if isinstance(error, GenerationError):
        return ApiError(500, str(error), error_type="internal_error")
    if isinstance(error, HTTPException):  # the router's 404 and 405
        return ApiError(error.status_code, error.detail, headers=error.headers)
    # uvicorn closes the connection after such an error. Without this header, the client's next request is lost.
    message, headers = f"{type(error).__name__} in the server, see its log", {"Connection": "close"}
    return ApiError(500, message, error_type="internal_error", headers=headers)


def add_error_handlers(app: FastAPI) -> None:
    """Answer every exception with `as_api_error`. Unexpected ones are also logged, with a traceback."""

    async def answer_error(_: Request, error: Exception) -> Response:
        api_error = as_api_error(error)
        return JSONResponse(api_error.body, api_error.status, headers=api_error.headers)

    async def client_gone(_: Request, __: Exception) -> Response:
        return Response(status_code=CLIENT_GONE)

    for kind in (ApiError, FieldError, QueueFullError, GenerationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer_error)
    app.add_exception_handler(ClientDisconnect, client_gone)
