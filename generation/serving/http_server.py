"""uvicorn with limits on connections and idle time, and a graceful shutdown."""

import asyncio
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from .limits import Limits
from .listen import ACCEPTS
from .log_limit import limit_logs

_SPARE_FILES = 64 + 4 * ACCEPTS  # descriptors kept for files, threads and connections being accepted
_BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\nretry-after: 1\r\ncontent-length: 0\r\n\r\n"
)


class HttpServer(uvicorn.Server):
    """Serves the application of `create_app`.

    The first SIGTERM or SIGINT answers waiting requests with 503 and ends when the running ones are
    finished; the second ends the process at once.

    Args:
        grace: seconds for the running requests; None = the server's timeout of a request.
        on_start: called when the server answers and handles signals.
    """

    def __init__(self, app: FastAPI, grace: float | None = None, on_start: Callable[[], None] = lambda: None):
        self.limits: Limits = app.state.server.limits
        self.app, self.on_start = app, on_start
        self.max_connections = self.limits.max_connections or _connections_for_descriptors()
        modules = [f"{__package__}.{name}" for name in ("batcher", "handlers", "listen")]
        limit_logs("uvicorn.error", "asyncio", *modules)
        config = uvicorn.Config(
            app,
            log_level="warning",
            ws="none",
            # the installed extras must not change these: the limits are in subclasses of the plain ones
            http=type("Connection", (_Connection,), {"http_server": self}),
            loop="asyncio",
            # asyncio accepts this many connections per turn
            backlog=ACCEPTS,
            # the requests have their own timeout
            timeout_graceful_shutdown=grace or self.limits.timeout + 1,  # type: ignore[arg-type]
        )
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to accept connections."""
        await super().startup(sockets)
        if self.started:
            self.on_start()

    async def on_tick(self, counter: int) -> bool:
        """Close connections that have been idle for too long; called every 0.1 s."""
        self._abort_idle()
        return await super().on_tick(counter)

    def _abort_idle(self) -> None:
        now = asyncio.get_running_loop().time()
        connections: set[Any] = self.server_state.connections
        for connection in list(connections):
            if now - connection.idle_since > self.limits.idle_timeout:
                connection.abort()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer waiting requests with 503, then wait for the running ones."""
        self.app.state.server.drain()
        sweep = asyncio.create_task(self._sweep())
        try:
            await super().shutdown(sockets)
        finally:
            sweep.cancel()

    async def _sweep(self) -> None:
        # uvicorn ticks no more: a client that does not read must not keep the server from ending
        while True:
            await asyncio.sleep(0.1)
            self._abort_idle()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to shut down, or quit if that has begun."""
        if self.should_exit:
            print("Stopped at once.", file=sys.stderr, flush=True)
            os._exit(128 + sig)  # threads may be decoding or generating for minutes
        # SIGTERM ends as SIGINT does, with exit status 0: uvicorn would raise it again
        super().handle_exit(signal.SIGINT, frame)

    def make_room(self, newest: "_Connection") -> bool:
        """Keep the number of connections within the limit; False if `newest` is the one that has to go."""
        connections: set[Any] = self.server_state.connections
        if len(connections) <= self.max_connections:
            return True
        # one that waits for a request head or that does not read, else one whose body is incomplete
        for candidates in (
            [other for other in connections if other is not newest and other.idle_since < float("inf")],
            [other for other in connections if other.reads_body],
        ):
            if candidates:
                min(candidates, key=lambda other: other.opened).abort()
                return True
        return False


class _Connection(H11Protocol):
    """One connection.

    Attributes:
        opened: the loop's time when it was accepted.
        idle_since: the loop's time since when the server waits for the client to complete a request head or
            to read; infinity while it does not.
    """

    http_server: HttpServer
    opened = idle_since = float("inf")

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.opened = self.idle_since = self.loop.time()
        if not self.http_server.make_room(self):
            transport.write(_BUSY)
            transport.close()

    def handle_events(self) -> None:
        cycle = self.cycle
        super().handle_events()
        # a request head is complete; a response to it may be too, or earlier ones are still unread
        if self.cycle is not cycle and not self.cycle.response_complete and not self.flow.write_paused:
            self.idle_since = float("inf")

    def on_response_complete(self) -> None:
        self.idle_since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.idle_since = self.loop.time()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.cycle is not None and not self.cycle.response_complete:
            self.idle_since = float("inf")

    @property
    def reads_body(self) -> bool:
        """Whether a request's body is incomplete."""
        return self.cycle is not None and self.cycle.more_body and not self.cycle.response_complete

    def abort(self) -> None:
        """Close without waiting for the client to read what was sent."""
        # closing waits for the client as well, and may never end
        self.connections.discard(self)
        self.transport.abort()


def _connections_for_descriptors() -> int:
    """Connections that leave the process enough file descriptors."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 64
    free = 1024 if soft == resource.RLIM_INFINITY else soft - used - _SPARE_FILES
    return max(8, min(1024, free))
