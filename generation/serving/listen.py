"""The listening socket of a server, and the host names it accepts."""

import contextlib
import errno
import ipaddress
import logging
import os
import socket
from collections.abc import Sequence
from typing import Any

from open_unitok.core.errors import UserError

ACCEPTS = 16  # connections accepted per turn of the event loop, before a limit can act on them
_log = logging.getLogger(__name__)


def listen(host: str, port: int) -> "Listener":
    """Bind and listen. Call it before loading the model, so that a port in use is reported immediately.

    Raises:
        UserError: the address is invalid or in use.
    """
    if not 0 <= port < 65536:
        raise UserError(f"--port is {port}; it must be a whole number from 0 to 65535.")
    if not host:  # sockets interpret "" as all addresses
        raise UserError("--host is empty; it must be an address of this machine, or 0.0.0.0 for all of them.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY only if the protocol is given explicitly. Without it Nagle's algorithm delays
    # every response, which is written as head and body, until the client acknowledges the head (40 ms).
    sock = Listener(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen()
        return sock
    except (OSError, TypeError, UnicodeError) as error:  # the last two: a malformed host name
        sock.close()
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"Cannot listen on --host {host} --port {port}: {reason}; choose another --port."
        ) from error


def allowed_hosts(host: str, more: Sequence[str] = ()) -> frozenset[str] | None:
    """The names to accept in Host and Origin headers of a server that listens on `host`; None = any.

    Checking them on loopback prevents DNS rebinding: a web page whose name resolves to 127.0.0.1. On other
    addresses the names are not known, unless `more` has some.
    """
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if not local and not more:
        return None
    return frozenset(name.lower() for name in ("localhost", "127.0.0.1", "::1", host, *more))


class Listener(socket.socket):
    """A listening socket that never raises for want of descriptors.

    asyncio would log a traceback per failed accept, thousands per second.
    """

    _spare: int | None = None  # a descriptor to give up when there is no other

    def listen(self, backlog: int = 512) -> None:
        """Listen with the longest queue: asyncio's `backlog` is the number of accepts per turn."""
        self._reserve()
        super().listen(512)

    def accept(self) -> Any:
        """Accept a connection; without a free descriptor, close it at once."""
        try:
            return super().accept()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                raise
            _log.warning("connections are refused: %s", error.strerror)
            # the connection stays in the queue and would be reported again and again
            self._release()
            with contextlib.suppress(OSError):
                super().accept()[0].close()
            with contextlib.suppress(OSError):
                self._reserve()
            raise BlockingIOError from error

    def close(self) -> None:
        """Close the socket and the spare descriptor."""
        self._release()
        super().close()

    def _reserve(self) -> None:
        if self._spare is None:
            self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def _release(self) -> None:
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None
