"""The listening socket of a server, and the host names it accepts."""

import ipaddress
import socket

from open_unitok.core.errors import UserError


def listen(host: str, port: int) -> socket.socket:
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
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(512)
        return sock
    except (OSError, TypeError, UnicodeError) as error:  # the last two: a malformed host name
        sock.close()
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"Cannot listen on --host {host} --port {port}: {reason}; choose another --port."
        ) from error


def loopback_names(host: str) -> frozenset[str] | None:
    """The Host headers to accept if `host` is a loopback address; None = any.

    Checking them on loopback prevents DNS rebinding: a web page whose name resolves to 127.0.0.1.
    """
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    return frozenset({"localhost", "127.0.0.1", "::1", host.lower()}) if local else None
