"""Host and Origin checks against web pages of other sites: DNS rebinding and cross-site requests."""

import re
from collections.abc import Collection, Sequence
from typing import Any
from urllib.parse import urlsplit

from .errors import RequestRejected, send_rejection

_HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:\d{1,5})?")


class OriginMiddleware:
    """ASGI middleware that rejects requests with 403 as `check_origin` says.

    Args:
        hosts: see `listen.allowed_hosts`.
    """

    def __init__(self, app: Any, hosts: Collection[str] | None):
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Check one request or web socket; other ASGI scopes (lifespan) pass through."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        try:
            check_origin(scope["headers"], self.hosts)
        except RequestRejected as rejected:
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008, "reason": rejected.code})
            else:
                await send_rejection(send, rejected)
            return
        await self.app(scope, receive, send)


def check_origin(headers: Sequence[tuple[bytes, bytes]], hosts: Collection[str] | None) -> None:
    """Check the headers of one request.

    Args:
        hosts: allowed names in Host and Origin; None = any Host, and an Origin equal to it.

    Raises:
        RequestRejected: the Host is another name: a web page whose name was made to resolve to this address;
            or the Origin is: a web page of another site sends the request.
    """
    found = [value.decode("latin-1").lower() for name, value in headers if name.lower() == b"host"]
    host = _HOST.fullmatch(found[0]) if len(found) == 1 else None
    if hosts is not None and (host is None or host["name"].strip("[]") not in hosts):
        raise RequestRejected(
            403, "The Host header is not a name of this server: see --host and --allow-host.", "wrong_host"
        )
    for name, value in headers:
        # browsers send it with every POST; other clients send none
        if name.lower() == b"origin" and not _is_own(value.decode("latin-1").lower(), found, hosts):
            raise RequestRejected(
                403, "The Origin header is a page of another site: see --allow-host.", "wrong_origin"
            )


def _is_own(origin: str, found: list[str], hosts: Collection[str] | None) -> bool:
    try:
        parts = urlsplit(origin)
        name = parts.hostname
    except ValueError:
        return False
    if hosts is None:
        return parts.netloc in found
    # another port of this machine is a page of the user's own
    return parts.scheme in ("http", "https") and name in hosts
