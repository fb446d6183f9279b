"""What goes wrong, as OpenAI's clients read it."""

from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from lorary.errors import (
    AdapterError,
    BaseModelError,
    BusyError,
    EngineError,
    LibraryError,
    LoraryError,
    NoSuchAdapterError,
    RouterError,
    UsageError,
)
from lorary.serve.api_error import ApiError

# Kinds of errors by status, in OpenAI's words.
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    421: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "unavailable_error",
    504: "timeout_error",
}


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of an error."""
    kind = TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(error: Exception) -> JSONResponse:
    """The response to an error. What is none of ours says nothing of itself: its text may hold a prompt."""
    known = api_error(error)
    return JSONResponse(
        error_body(known.status, message_of(known), known.param, known.code), known.status, known.headers
    )


def message_of(error: LoraryError) -> str:
    """Rule, value found and remedy on one line."""
    parts = [error.rule, error.found and f"found: {error.found}", error.remedy and f"remedy: {error.remedy}"]
    return "; ".join(part for part in parts if part)


def api_error(error: Exception) -> ApiError:
    """An error with its status."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, TimeoutError):
        return ApiError(504, "an answer must be made in time", remedy="ask for fewer tokens", code="timeout")
    if isinstance(error, RequestValidationError):
        return _of_validation(error)
    if isinstance(error, HTTPException):
        if isinstance(error.__cause__, ApiError):  # while the body was read
            return error.__cause__
        detail = {404: "no such path", 405: "the path does not take this method"}.get(error.status_code)
        return ApiError(error.status_code, detail or str(error.detail), headers=dict(error.headers or {}))
    status = next((status for kind, status in _STATUS if isinstance(error, kind)), 500)
    if status == 500 or not isinstance(error, LoraryError):
        return ApiError(500, "the server failed, and its log says why", code="internal")
    param = "model" if isinstance(error, RouterError) else None
    return ApiError(status, error.rule, found=error.found, remedy=error.remedy, param=param)


# The first class that fits.
_STATUS = (
    (BusyError, 429),
    (EngineError, 503),
    (NoSuchAdapterError, 404),
    (UsageError, 400),
    (RouterError, 400),
    (AdapterError, 400),
    (BaseModelError, 400),
    (LibraryError, 409),
)


def _of_validation(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body, by its place; never the value, which may be a prompt."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return ApiError(400, "the body must be JSON", found=first.get("ctx", {}).get("error"), code="invalid_json")
    place = ".".join(str(part) for part in first["loc"][1:] if not _is_branch(part))
    rule = f"{place or 'the body'}: {first['msg']}"
    return ApiError(400, rule, param=place or None, code=str(first["type"]))


def _is_branch(part: object) -> bool:
    """Whether a part of a place names an alternative of a type, and no field."""
    return isinstance(part, str) and ("[" in part or part in ("str", "int", "float"))
