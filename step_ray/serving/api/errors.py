"""Errors as clients see them: OpenAI's error object with the right HTTP status.

Takes exceptions, gives responses. A message never repeats what the client sent but for names that
look like names, so that no prompt and no key comes back or lands in a log.
"""

import json
import logging
import re

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from step_ray.calls.endpoint import CONTEXT_CODE
from step_ray.errors import ContextLengthError, StepRayError

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./:-]{0,99}")


class ApiError(Exception):
    """An error that the client sees in OpenAI's form."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    @property
    def code(self) -> str | None:
        """The machine-readable name of the error."""
        return self.body["error"]["code"]

    @property
    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body, status_code=self.status, headers=self.headers)

    @property
    def event(self) -> str:
        """The error as a server-sent event, for answers that have begun."""
        return f"data: {json.dumps(self.body)}\n\n"


def shown_name(name: str) -> str:
    """A name that the client gave, if it looks like one."""
    return repr(name) if _NAME.fullmatch(name) else "that"


def refused(exc: Exception, param: str, timeout_s: float = 0.0) -> ApiError:
    """What a client sees of an exception from below the routes."""
    if isinstance(exc, ApiError):
        return exc
    if isinstance(exc, ContextLengthError):
        return ApiError(400, str(exc), code=CONTEXT_CODE, param=param)
    if isinstance(exc, StepRayError):
        return ApiError(400, str(exc), param=param)
    if isinstance(exc, TimeoutError):
        return ApiError(
            504,
            f"no answer within {timeout_s:g} s; ask for fewer tokens or try again later",
            kind="server_error",
            code="timeout",
        )
    logging.getLogger(__name__).error("a request failed", exc_info=exc)
    return ApiError(500, f"internal error: {type(exc).__name__}", kind="server_error")


def add_error_handlers(api: FastAPI) -> None:
    """Let every error of the application leave in OpenAI's form."""

    @api.exception_handler(ApiError)
    async def known(request: Request, exc: ApiError) -> JSONResponse:
        return exc.response

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, exc: RequestValidationError) -> JSONResponse:
        return _first_fault(exc).response

    @api.exception_handler(HTTPException)
    async def http(request: Request, exc: HTTPException) -> JSONResponse:
        fault = ApiError(exc.status_code, str(exc.detail))
        fault.headers.update(exc.headers or {})
        return fault.response

    @api.exception_handler(Exception)
    async def unknown(request: Request, exc: Exception) -> JSONResponse:
        return refused(exc, "").response


def _first_fault(exc: RequestValidationError) -> ApiError:
    """The first fault of a body, by the name of its field."""
    fault = exc.errors()[0]
    if fault["type"] == "json_invalid":  # its place is a number of characters, no field
        return ApiError(400, f"the body is not valid JSON, at character {fault['loc'][-1]}")
    if tuple(fault["loc"]) == ("body",):
        return ApiError(400, "the body must be a JSON object, with content-type application/json")
    param = ".".join(str(part) for part in fault["loc"] if part != "body")
    is_unknown = fault["type"] == "extra_forbidden"
    message = "not supported by this server" if is_unknown else fault["msg"]
    if not _NAME.fullmatch(param):
        param = ""
    return ApiError(400, f"{param}: {message}" if param else message, param=param or None)
