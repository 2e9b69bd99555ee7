"""Reads request bodies within limits on size, time, and the memory of all of them together."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from .errors import RequestRejected
from .limits import Limits

_HELD_BODIES = 16  # of the largest size, at the same time


class BodyReader:
    """The bodies of all current requests of one server."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self._held = 0  # bytes of complete and incomplete bodies
        self._incomplete: dict[asyncio.Timeout, None] = {}  # the deadlines of incomplete bodies, oldest first
        self._draining = False

    @contextlib.asynccontextmanager
    async def read(self, content_length: bytes | None, receive: Any) -> AsyncIterator[list[Any]]:
        """The body as one ASGI message in a list, for the app to take; [] if the client disconnects first.

        Raises:
            RequestRejected: the body is too large or too slow, memory is short, or the server shuts down.
        """
        limit = self.limits.max_body
        if content_length is not None and (not content_length.isdigit() or int(content_length[:20]) > limit):
            raise self._too_large()
        body = bytearray()
        try:
            complete = await self._fill(body, receive)
        except BaseException:
            self._held -= len(body)
            raise
        size = len(body)
        messages = [{"type": "http.request", "body": bytes(body), "more_body": False}] if complete else []
        body.clear()
        try:
            yield messages
        finally:
            self._held -= size

    def drain(self) -> None:
        """Reject incomplete bodies, now and later, with 503."""
        self._draining = True
        for deadline in list(self._incomplete):
            _expire(deadline)

    async def _fill(self, body: bytearray, receive: Any) -> bool:
        """Append to `body` until it is complete; False if the client disconnects first."""
        deadline = asyncio.timeout(0 if self._draining else self.limits.body_timeout)
        try:
            async with deadline:
                self._incomplete[deadline] = None
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return False
                    chunk = message.get("body", b"")
                    body += chunk
                    self._held += len(chunk)
                    # a chunked body has no content-length: count while reading
                    if len(body) > self.limits.max_body:
                        raise self._too_large()
                    if not message.get("more_body"):
                        return True
                    if self._held > _HELD_BODIES * self.limits.max_body:
                        self._make_room(deadline)
        except TimeoutError as error:
            if self._draining:
                raise RequestRejected(503, "The server is shutting down.", "shutting_down") from error
            raise RequestRejected(
                408, f"The body did not arrive within {self.limits.body_timeout:g} s.", "timeout"
            ) from error
        finally:
            self._incomplete.pop(deadline, None)

    def _make_room(self, own: asyncio.Timeout) -> None:
        """Give up the oldest incomplete body: the slowest client must not keep out the others."""
        oldest = next(iter(self._incomplete))
        if oldest is own:
            raise RequestRejected(
                429, "The server holds too many large requests: try again later.", "queue_full",
                **{"retry-after": "1"},
            )  # fmt: skip
        _expire(oldest)

    def _too_large(self) -> RequestRejected:
        return RequestRejected(
            413, f"The body is larger than {self.limits.max_body} bytes.", "body_too_large"
        )


def _expire(deadline: asyncio.Timeout) -> None:
    if not deadline.expired():  # raises RuntimeError on one that is expiring
        deadline.reschedule(asyncio.get_running_loop().time())
