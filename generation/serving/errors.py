"""Errors in OpenAI's format, and requests that are rejected before they reach a route."""

import json
from typing import Any


class RequestRejected(Exception):
    """The request is rejected before it reaches a route."""

    def __init__(self, status: int, message: str, code: str, **headers: str):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers


def error_body(
    message: str, status: int, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """An error in OpenAI's format."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


async def send_rejection(send: Any, rejected: RequestRejected) -> None:
    """Send the error and close the connection; the rest of the body is not read."""
    body = json.dumps(error_body(str(rejected), rejected.status, rejected.code)).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        **rejected.headers,
    }
    await send(
        {
            "type": "http.response.start",
            "status": rejected.status,
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": body})
