"""Every refusal of the server in the shape that OpenAI's clients read: {"error": {"message", "type", "param", "code"}}.

The official client picks its exception by the status (400 BadRequestError, 429 RateLimitError, ...), reads `message`, `param` and `code` from the object, and
waits for `Retry-After` seconds before it tries again.
"""

from __future__ import annotations

import json
from http import HTTPStatus

from starlette.responses import Response

TYPES_BY_STATUS = {429: "rate_limit_error", 500: "server_error", 503: "overloaded_error", 504: "timeout_error"}
MAX_MESSAGE_CHARACTERS = 500  # a message may quote the client's own text, which may be long


class ServeError(Exception):
    """A request that cannot be answered: status, what was wrong, and which field."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after_seconds: int = 0) -> None:
        if len(message) > MAX_MESSAGE_CHARACTERS:
            message = message[:MAX_MESSAGE_CHARACTERS] + "..."
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_seconds = retry_after_seconds

    def data(self) -> dict[str, dict[str, str | None]]:
        """The error object that goes into a body or into an event of a stream."""
        error_type = TYPES_BY_STATUS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": error_type, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The answer; the connection closes on a client whose request never came to its end."""
        headers = {}
        if self.retry_after_seconds:
            headers["retry-after"] = str(self.retry_after_seconds)
        if self.status == HTTPStatus.REQUEST_TIMEOUT:
            headers["connection"] = "close"
        return json_response(self.data(), status=self.status, headers=headers)


def json_response(data: object, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Compact JSON in ASCII: an error may quote a lone surrogate of the client's, which has no UTF-8 form."""
    body = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False).encode("ascii")
    return Response(body, status_code=status, headers=headers, media_type="application/json")
