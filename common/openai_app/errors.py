"""Every error goes out in OpenAI's form, with the status that its kind asks for."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from common.errors import FieldError, openai_error
from common.serving import GenerationError, QueueFullError

CLIENT_GONE = 499  # nginx's status for a client that went away; nobody reads it
RETRY_AFTER_S = 1


class ApiError(Exception):
    """An error of the HTTP API. The message names field, value and limit where there are any; param is the field."""

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
    """How an error is told to the client. One that nobody expected is named by its type alone: the rest is private."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, FieldError):
        return ApiError(400, str(error), error.field)
    if isinstance(error, QueueFullError):
        headers = {"Retry-After": str(RETRY_AFTER_S)}
        return ApiError(429, str(error), error_type="rate_limit_error", headers=headers)
    if isinstance(error, GenerationError):
        return ApiError(500, str(error), error_type="internal_error")
    if isinstance(error, HTTPException):  # the router's 404 and 405
        return ApiError(error.status_code, error.detail, headers=error.headers)
    # uvicorn ends the connection after such an error: a client that is not told loses its next request.
    message, headers = f"{type(error).__name__} in the server, see its log", {"Connection": "close"}
    return ApiError(500, message, error_type="internal_error", headers=headers)


def add_error_handlers(app: FastAPI) -> None:
    """Answer every exception with `as_api_error`. What nobody expected is logged as well, with its traceback."""

    async def answer_error(_: Request, error: Exception) -> Response:
        api_error = as_api_error(error)
        return JSONResponse(api_error.body, api_error.status, headers=api_error.headers)

    async def client_gone(_: Request, __: Exception) -> Response:
        return Response(status_code=CLIENT_GONE)

    for kind in (ApiError, FieldError, QueueFullError, GenerationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer_error)
    app.add_exception_handler(ClientDisconnect, client_gone)
