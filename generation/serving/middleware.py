"""What stands before every route: who may ask, how much at once, and how large a body may be."""

import asyncio
import dataclasses
import hmac
import json
import time
from typing import Any

from .metrics import Metrics

OPEN_PATHS = ("/health", "/metrics")  # answered however busy the server is


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much one server takes.

    Attributes:
        max_batch_size: images or answers worked on together.
        max_queue_size: images and answers that wait; more are refused with 429.
        max_body: bytes of a request.
        max_side: pixels of an image's longer side.
        max_new_tokens: of one answer.
        timeout: seconds for one request from its arrival to its end; 504 after that.
        body_timeout: seconds for the body to arrive; 408 after that.
        window: seconds that a batch waits for others to join.
    """

    max_batch_size: int = 16
    max_queue_size: int = 64
    max_body: int = 20 * 2**20
    max_side: int = 8192
    max_new_tokens: int = 1024
    timeout: float = 300.0
    body_timeout: float = 30.0
    window: float = 0.01


class Refused(Exception):
    """A request that gets no further; carries the status and what to say."""

    def __init__(self, status: int, message: str, code: str, **headers: str):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers


class Guard:
    """ASGI middleware: checks host, token, load and size; reads the body; counts what comes and goes.

    Args:
        token: what clients must send as `Authorization: Bearer TOKEN`; None = nothing. `/health` is open.
        hosts: names that the Host header may hold, None = any. A page on the web that has its own name lead
            to 127.0.0.1 would otherwise reach a server that listens there alone.
    """

    def __init__(
        self,
        app: Any,
        limits: Limits,
        metrics: Metrics,
        routes: frozenset[str],
        token: str | None = None,
        hosts: frozenset[str] | None = None,
    ):
        self.app, self.limits, self.metrics, self.routes = app, limits, metrics, routes
        self.token, self.hosts = token, hosts
        self.busy = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One connection's request; anything that is not HTTP goes straight on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), 499  # what nginx calls a client that left

        async def watched(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.busy += 1
        try:
            await self._pass(scope, receive, watched)
        except Refused as refused:
            await respond(watched, refused)
        finally:
            self.busy -= 1
            route = scope["path"] if scope["path"] in self.routes else "other"
            self.metrics.count("unitok_requests_total", route=route, status=str(status))
            self.metrics.observe("unitok_request_seconds", time.monotonic() - started, route=route)

    async def _pass(self, scope: Any, receive: Any, send: Any) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        self._check_host(headers.get(b"host", b""))
        if scope["path"] != "/health":
            self._check_token(headers.get(b"authorization", b""))
        if scope["method"] in ("GET", "HEAD") or scope["path"] in OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        # every request is at least one image or answer: more could not be queued anyway
        if self.busy > self.limits.max_batch_size + self.limits.max_queue_size:
            raise Refused(
                429, "Too many requests at once: try again later.", "queue_full", **{"retry-after": "1"}
            )
        try:
            async with asyncio.timeout(self.limits.body_timeout):
                body = await self._read(headers.get(b"content-length"), receive)
        except TimeoutError as error:
            raise Refused(
                408, f"The body did not arrive within {self.limits.body_timeout:g} s.", "timeout"
            ) from error
        if body is None:  # the client left
            return
        given = False

        async def replay() -> Any:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)

    def _check_host(self, host: bytes) -> None:
        name = host.decode("latin-1").lower()
        name = name[1 : name.find("]")] if name.startswith("[") else name.partition(":")[0]
        if self.hosts is not None and name not in self.hosts:
            raise Refused(
                403, "This server answers only to its own name: see unitok serve --host.", "wrong_host"
            )

    def _check_token(self, given: bytes) -> None:
        if self.token is None:
            return
        kind, _, token = given.partition(b" ")
        right = hmac.compare_digest(token.strip(), self.token.encode())
        if kind.lower() != b"bearer" or not right:
            raise Refused(
                401,
                "A bearer token is needed: Authorization: Bearer TOKEN.",
                "invalid_api_key",
                **{"www-authenticate": "Bearer"},
            )

    async def _read(self, announced: bytes | None, receive: Any) -> bytes | None:
        """The whole body; None where the client leaves before its end."""
        limit = self.limits.max_body
        too_large = Refused(413, f"The body is larger than {limit} bytes.", "body_too_large")
        if announced is not None and (not announced.isdigit() or int(announced[:20]) > limit):
            raise too_large
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > limit:
                raise too_large
            if not message.get("more_body"):
                return bytes(body)


def error_body(
    message: str, status: int, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


async def respond(send: Any, refused: Refused) -> None:
    """Send a refusal and close: what is left of the body is not read."""
    body = json.dumps(error_body(str(refused), refused.status, refused.code)).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        **refused.headers,
    }
    await send(
        {
            "type": "http.response.start",
            "status": refused.status,
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": body})
