"""ASGI middleware in front of every route: host check, authentication, load and size limits, metrics."""

import hmac
import time
from typing import Any

from .body_reader import BodyReader
from .errors import RequestRejected, send_rejection
from .limits import Limits
from .metrics import ServerMetrics
from .origin import check_origin

_UNLIMITED_PATHS = ("/health", "/metrics")  # never rejected for load


class AccessMiddleware:
    """Checks host, token, load and body size, reads the body, and records request metrics.

    Args:
        routes: paths used as labels of the metrics; all others are counted as "other".
        token: clients must send `Authorization: Bearer TOKEN`; None = no authentication. `/health` is open.
        hosts: allowed names in Host and Origin headers; None = no check (see `listen.allowed_hosts`).
    """

    def __init__(
        self,
        app: Any,
        limits: Limits,
        metrics: ServerMetrics,
        bodies: BodyReader,
        routes: frozenset[str],
        token: str | None = None,
        hosts: frozenset[str] | None = None,
    ):
        self.app, self.limits, self.metrics, self.routes = app, limits, metrics, routes
        self.token, self.hosts = token, hosts
        self.bodies = bodies
        self.in_flight = 0  # requests with a complete body

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

        try:
            await self._check_and_forward(scope, receive, send_and_note_status)
        except RequestRejected as rejected:
            await send_rejection(send_and_note_status, rejected)
        finally:
            # unknown paths share one label: clients must not create time series
            route = scope["path"] if scope["path"] in self.routes else "other"
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.request_seconds.labels(route).observe(time.monotonic() - started)

    async def _check_and_forward(self, scope: Any, receive: Any, send: Any) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self.hosts is not None:
            check_origin(scope["headers"], self.hosts)
        if scope["path"] != "/health":
            self._check_token(headers.get(b"authorization", b""))
        # no body to read, no job to queue
        if scope["method"] in ("GET", "HEAD") or scope["path"] in _UNLIMITED_PATHS:
            await self.app(scope, receive, send)
            return
        self._check_load()
        async with self.bodies.read(headers.get(b"content-length"), receive) as messages:
            if not messages:  # the client disconnected
                return
            # others may have come while the body arrived
            self._check_load()

            # the body has been consumed: pass it to the app as one message, then forward disconnects
            async def replay_body() -> Any:
                return messages.pop() if messages else await receive()

            self.in_flight += 1
            try:
                await self.app(scope, replay_body, send)
            finally:
                self.in_flight -= 1

    def _check_load(self) -> None:
        # every request needs at least one job: with more requests than running and queued jobs the queue is
        # full
        if self.in_flight >= self.limits.max_batch_size + self.limits.max_queue_size:
            raise RequestRejected(
                429, "Too many concurrent requests: try again later.", "queue_full", **{"retry-after": "1"}
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
