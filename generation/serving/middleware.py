"""ASGI middleware in front of every route: host check, authentication, load and size limits, metrics."""

import asyncio
import dataclasses
import hmac
import json
import time
from typing import Any

from .metrics import ServerMetrics

_UNLIMITED_PATHS = ("/health", "/metrics")  # never rejected for load


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of one server.

    Attributes:
        max_batch_size: images or answers per batch.
        max_queue_size: waiting images and answers; more are rejected with 429.
        max_body: bytes of a request body.
        max_side: pixels of an input image's longer side.
        max_new_tokens: of one answer.
        timeout: seconds from the arrival of a request to the end of its response; then 504.
        body_timeout: seconds for the body to arrive; then 408.
        batch_window: seconds that a batch waits for further requests.
    """

    max_batch_size: int = 16
    max_queue_size: int = 64
    max_body: int = 20 * 2**20
    max_side: int = 8192
    max_new_tokens: int = 1024
    timeout: float = 300.0
    body_timeout: float = 30.0
    batch_window: float = 0.01


class RequestRejected(Exception):
    """The request is rejected before it reaches a route."""

    def __init__(self, status: int, message: str, code: str, **headers: str):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers


class AccessMiddleware:
    """Checks host, token, load and body size, reads the body, and records request metrics.

    Args:
        routes: paths used as labels of the metrics; all others are counted as "other".
        token: clients must send `Authorization: Bearer TOKEN`; None = no authentication. `/health` is open.
        hosts: allowed names in the Host header; None = any (see `listen.loopback_names`).
    """

    def __init__(
        self,
        app: Any,
        limits: Limits,
        metrics: ServerMetrics,
        routes: frozenset[str],
        token: str | None = None,
        hosts: frozenset[str] | None = None,
    ):
        self.app, self.limits, self.metrics, self.routes = app, limits, metrics, routes
        self.token, self.hosts = token, hosts
        self.in_flight = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle one request; other ASGI scopes (lifespan) pass through."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # 499, as in nginx: the client disconnected before a response was sent
        started, status = time.monotonic(), 499

        async def send_and_note_status(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.in_flight += 1
        try:
            await self._check_and_forward(scope, receive, send_and_note_status)
        except RequestRejected as rejected:
            await _send_rejection(send_and_note_status, rejected)
        finally:
            self.in_flight -= 1
            # unknown paths share one label: clients must not create time series
            route = scope["path"] if scope["path"] in self.routes else "other"
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.request_seconds.labels(route).observe(time.monotonic() - started)

    async def _check_and_forward(self, scope: Any, receive: Any, send: Any) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        self._check_host(headers.get(b"host", b""))
        if scope["path"] != "/health":
            self._check_token(headers.get(b"authorization", b""))
        # no body to read, no job to queue
        if scope["method"] in ("GET", "HEAD") or scope["path"] in _UNLIMITED_PATHS:
            await self.app(scope, receive, send)
            return
        # every request needs at least one job: with more requests than running and queued jobs the queue is
        # full
        if self.in_flight > self.limits.max_batch_size + self.limits.max_queue_size:
            raise RequestRejected(
                429, "Too many concurrent requests: try again later.", "queue_full", **{"retry-after": "1"}
            )
        try:
            async with asyncio.timeout(self.limits.body_timeout):
                body = await self._read_body(headers.get(b"content-length"), receive)
        except TimeoutError as error:
            raise RequestRejected(
                408, f"The body did not arrive within {self.limits.body_timeout:g} s.", "timeout"
            ) from error
        if body is None:  # the client disconnected
            return
        replayed = False

        # the body has been consumed: pass it to the app as one message, then forward disconnects
        async def replay_body() -> Any:
            nonlocal replayed
            if replayed:
                return await receive()
            replayed = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay_body, send)

    def _check_host(self, host: bytes) -> None:
        name = host.decode("latin-1").lower()
        # [::1]:8000 or name:8000
        name = name[1 : name.find("]")] if name.startswith("[") else name.partition(":")[0]
        if self.hosts is not None and name not in self.hosts:
            raise RequestRejected(
                403, "The Host header is not a name of this server: see unitok serve --host.", "wrong_host"
            )

    def _check_token(self, given: bytes) -> None:
        if self.token is None:
            return
        scheme, _, token = given.partition(b" ")
        # constant time: the duration must not reveal how many characters of the token match
        matches = hmac.compare_digest(token.strip(), self.token.encode())
        if scheme.lower() != b"bearer" or not matches:
            raise RequestRejected(
                401,
                "Invalid or missing token: send Authorization: Bearer TOKEN.",
                "invalid_api_key",
                **{"www-authenticate": "Bearer"},
            )

    async def _read_body(self, content_length: bytes | None, receive: Any) -> bytes | None:
        """The whole body; None if the client disconnects first."""
        limit = self.limits.max_body
        too_large = RequestRejected(413, f"The body is larger than {limit} bytes.", "body_too_large")
        if content_length is not None and (not content_length.isdigit() or int(content_length[:20]) > limit):
            raise too_large
        body = bytearray()
        # a chunked body has no content-length: count while reading
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
    """An error in OpenAI's format."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


async def _send_rejection(send: Any, rejected: RequestRejected) -> None:
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
