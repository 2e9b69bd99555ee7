"""`unitok serve`: an HTTP server with OpenAI's shapes for one model, for this machine alone unless told."""

import argparse
import contextlib
import ipaddress
import os
import socket
import sys
from pathlib import Path

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing

from .options import add_model_options, load_pipeline, need_extra

TOKEN = "UNITOK_TOKEN"  # the environment variable that may hold the bearer token


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--model M [--host H] [--port P] and the limits."""
    add_model_options(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: this machine alone)"
    )
    parser.add_argument("--port", type=int, default=8000, help="0 takes any free one and prints it")
    parser.add_argument("--name", help="what clients call the model (default: the last part of --model)")
    parser.add_argument(
        "--token-file", metavar="FILE", help=f"holds the bearer token that clients must send (or set {TOKEN})"
    )
    parser.add_argument(
        "--files", metavar="DIR", help="images in DIR may be named as file: URLs (default: none)"
    )
    parser.add_argument("--max-batch", type=int, default=16, help="images or answers worked on together")
    parser.add_argument("--max-waiting", type=int, default=64, help="more that wait are refused with 429")
    parser.add_argument("--max-body", type=float, default=20, metavar="MB", help="of a request")
    parser.add_argument("--max-side", type=int, default=8192, metavar="PIXELS", help="of an image sent in")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="of one answer")
    parser.add_argument("--timeout", type=float, default=300, metavar="SECONDS", help="for one request")


def run(args: argparse.Namespace) -> None:
    """Serve until stopped."""
    need_extra("serve", "fastapi", "uvicorn")
    import uvicorn

    from open_unitok.generation.serving.app import create_app

    limits = limits_of(args)
    token = read_token(args)
    files = None if args.files is None else existing(args.files)
    if files is not None and not files.is_dir():
        raise UserError(f"--files {files} is no folder.")
    listening = listen(args.host, args.port)
    pipe = load_pipeline(args)
    name = args.name or Path(args.model).resolve().name
    app = create_app(pipe, name, limits, token, files, own_names(args.host))
    shown = f"[{args.host}]" if ":" in args.host else args.host
    print(f"Serving {name} at http://{shown}:{listening.getsockname()[1]}/v1 (Ctrl-C ends)", file=sys.stderr)
    if own_names(args.host) is None and token is None:
        print("Anyone who reaches this address may use it: --token-file asks for a token.", file=sys.stderr)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5, ws="none")
    # uvicorn ends everything in order and passes the signal on, where the caller has not ignored it
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])
    print("Stopped.", file=sys.stderr)


def limits_of(args: argparse.Namespace):
    """The limits that the options ask for.

    Raises:
        UserError: one of them is no number above 0.
    """
    from open_unitok.generation.serving.middleware import Limits

    for name in ("max_batch", "max_waiting", "max_body", "max_side", "max_new_tokens", "timeout"):
        value = getattr(args, name)
        if not 0 < value < 2**31:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be a number above 0.")
    return Limits(
        max_batch=args.max_batch,
        max_waiting=args.max_waiting,
        max_body=max(1, int(args.max_body * 2**20)),
        max_side=args.max_side,
        max_new_tokens=args.max_new_tokens,
        timeout=args.timeout,
    )


def read_token(args: argparse.Namespace) -> str | None:
    """The bearer token; None = everyone may ask.

    Raises:
        UserError: the file is missing, a folder, or empty.
    """
    if args.token_file is None:
        return os.environ.get(TOKEN) or None
    path = existing(args.token_file)
    token = "" if path.is_dir() else path.read_text(encoding="utf-8", errors="replace").strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(f"--token-file {args.token_file} must hold one line of ASCII without spaces.")
    return token


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there: before the model is loaded, so that a port in use shows at once.

    Raises:
        UserError: it cannot be had.
    """
    if not 0 <= port < 65536:
        raise UserError(f"--port is {port}; it must be a whole number from 0 to 65535.")
    if not host:  # which sockets take for all addresses
        raise UserError("--host is empty; it must be an address of this machine, or 0.0.0.0 for all of them.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only where the protocol is named; with it every answer, written as
    # head and body, would wait 40 ms for the client to acknowledge the head
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(512)
        return listening
    except (OSError, TypeError, UnicodeError) as error:  # of another kind where the name is malformed
        listening.close()
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--host {host} --port {port} cannot be had: {reason}; choose another --port."
        ) from error


def own_names(host: str) -> frozenset[str] | None:
    """The names that a Host header may hold where the server is for this machine alone; else None = any."""
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    return frozenset({"localhost", "127.0.0.1", "::1", host.lower()}) if local else None
