"""Errors as OpenAI's API writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class ApiRefusal(Exception):
    """An answer that is an error: HTTP status, and `{"error": {message, type, param, code}}`."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, retry_after_s: int | None = None
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> Mapping[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> Mapping[str, str]:
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}


_TYPES = {401: "authentication_error", 429: "rate_limit_error", 503: "service_unavailable_error"}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiRefusal:
    return ApiRefusal(400, message, param=param, code=code)
