"""The answers for errors: in OpenAI's form, one line of ours, and nothing of this machine."""

import logging
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from engines.errors import EngineMemoryError, UserError, in_one_line
from runtime import NonFiniteError, PlanError, RequestError
from serving.errors import BodyError, BusyError, KeyRefusedError, LateError, StoppingError, UnknownModelError

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.responses import JSONResponse

__all__ = ["GONE", "add_handlers", "answer", "without_paths"]

_LOG = logging.getLogger(__name__)
GONE = 499
"""Of a request whose caller has left: nobody reads it, but the log and the metrics do (nginx's number)."""
_OURS = r"/(?:docs|generate)(?![\w./-])"
"""Addresses of this service, which messages send callers to."""
_PATH = re.compile(rf"(?<![\w./])(?!{_OURS})(?:~?/|[A-Za-z]:\\)[^\s'\",;:()]+")
_HIDDEN = "[path]"
_COMMAND = re.compile(r"[,;]?( or)? build [^;:]*: python -m .*")
"""Advice that ends a message."""
_FAULT = "this service failed at the request; its log says why"
_STATUS: dict[type[BaseException], tuple[int, str, str | None]] = {
    RequestError: (400, "invalid_request_error", None),
    PlanError: (400, "invalid_request_error", "plan"),
    KeyRefusedError: (401, "invalid_request_error", "invalid_api_key"),
    UnknownModelError: (404, "invalid_request_error", "model_not_found"),
    BusyError: (429, "rate_limit_error", "queue_full"),
    NonFiniteError: (422, "invalid_request_error", "not_finite"),
    EngineMemoryError: (503, "server_error", "out_of_memory"),
    StoppingError: (503, "server_error", "stopping"),
    LateError: (504, "server_error", "timeout"),
}
"""HTTP's number for an error of ours, OpenAI's type, and a code. Others are faults, and told to the log alone."""


def answer(error: BaseException, hidden: Mapping[str, str] | None = None) -> "JSONResponse":
    """The answer to a request that an error ended.

    Args:
        error: of any kind; of those that a caller cannot mend, no text is passed on.
        hidden: what stands instead of texts that are not for callers, such as the folders of bundles.
    """
    headers = {"Retry-After": str(error.retry_after)} if isinstance(error, BusyError) else {}
    if isinstance(error, BodyError):
        headers["Connection"] = "close"  # the rest of it is not read
        return _response(error.status, "invalid_request_error", None, str(error), headers)
    if isinstance(error, KeyRefusedError):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, StoppingError):
        headers["Retry-After"] = "10"
    found = next((found for kind, found in _STATUS.items() if isinstance(error, kind)), None)
    if found is None:
        _LOG.error("a request failed", exc_info=error)
        return _response(500, "server_error", None, _FAULT, headers)
    status, kind, code = found
    if isinstance(error, EngineMemoryError | LateError):
        _LOG.warning("%d: %s", status, error.line)
    return _response(status, kind, code, without_paths(str(error), hidden), headers)


def without_paths(text: str, hidden: Mapping[str, str] | None = None) -> str:
    """A message in one line without names of files and folders, and without the commands for whoever has this machine.

    Args:
        text: a message without its notes, which are such commands.
        hidden: what stands instead of texts that are not for callers.
    """
    for secret, instead in sorted((hidden or {}).items(), key=lambda each: -len(each[0])):
        text = text.replace(secret, instead)
    return in_one_line(_PATH.sub(_HIDDEN, _COMMAND.sub("", text)))


def _response(status: int, kind: str, code: str | None, message: str, headers: dict[str, str]) -> "JSONResponse":
    from starlette.responses import JSONResponse

    error = {"message": message, "type": kind, "param": None, "code": code}
    return JSONResponse({"error": error}, status, headers or None)


def add_handlers(app: "FastAPI", hidden: Mapping[str, str]) -> None:
    """Have an app answer every error in this form."""
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import Response

    async def ours(http: Request, error: Exception) -> Response:
        return answer(error, hidden)

    async def of_http(http: Request, error: Any) -> Response:
        return _response(error.status_code, "invalid_request_error", None, in_one_line(str(error.detail)), error.headers or {})

    app.add_exception_handler(UserError, ours)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(Exception, ours)
