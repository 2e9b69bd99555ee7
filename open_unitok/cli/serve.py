"""`unitok serve`: an OpenAI-compatible HTTP server for one model, by default on 127.0.0.1 only."""

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing
from open_unitok.core.text_files import read_text

from .options import add_address_options, add_model_options, load_pipeline, require_extra

if TYPE_CHECKING:
    from open_unitok.generation.serving.limits import Limits

TOKEN_VARIABLE = "UNITOK_TOKEN"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--model M [--host H] [--port P] and the limits."""
    add_model_options(parser)
    add_address_options(parser, port=8000, help="0 = any free port, printed at the start (default: 8000)")
    parser.add_argument("--name", help="model name in the API (default: the last part of --model)")
    parser.add_argument(
        "--token-file",
        metavar="FILE",
        help=f"file with the bearer token that clients must send (or set {TOKEN_VARIABLE})",
    )
    parser.add_argument(
        "--files", metavar="DIR", help="allow file: URLs of images in DIR (default: data: URLs only)"
    )
    parser.add_argument(
        "--max-batch-size", type=int, default=16, help="images or answers per batch (default: 16)"
    )
    parser.add_argument(
        "--max-queue-size",
        type=int,
        default=64,
        help="waiting images or answers; more are rejected with 429 (default: 64)",
    )
    parser.add_argument(
        "--max-body", type=float, default=20, metavar="MB", help="size of a request body (default: 20)"
    )
    parser.add_argument(
        "--max-side", type=int, default=8192, metavar="PIXELS", help="side of an input image (default: 8192)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=1024, help="length of an answer (default: 1024)"
    )
    parser.add_argument(
        "--timeout", type=float, default=300, metavar="SECONDS", help="of one request (default: 300)"
    )


def run(args: argparse.Namespace) -> None:
    """Serve until interrupted."""
    require_extra("serve", "fastapi", "uvicorn", "prometheus_client")
    from open_unitok.generation.serving.app import create_app
    from open_unitok.generation.serving.http_server import HttpServer
    from open_unitok.generation.serving.listen import allowed_hosts, listen

    # all checks come before the model, which takes seconds to load
    limits, token = _limits(args), _read_token(args)
    files = None if args.files is None else existing(args.files)
    if files is not None and not files.is_dir():
        raise UserError(f"--files {files} is not a folder.")
    # before the model loads: a port in use is reported at once
    sock = listen(args.host, args.port)
    pipe = load_pipeline(args)
    name = args.name or Path(args.model).resolve().name
    hosts = allowed_hosts(args.host, args.allow_host)
    app = create_app(pipe, name, limits, token, files, hosts)

    def announce() -> None:
        # IPv6 addresses need brackets in a URL
        host = f"[{args.host}]" if ":" in args.host else args.host
        address = f"http://{host}:{sock.getsockname()[1]}/v1"
        print(f"Serving {name} at {address} (Ctrl-C stops it)", file=sys.stderr, flush=True)
        if hosts is None and token is None:
            print(
                "Warning: everyone who reaches this address can use it; set --token-file to require a token.",
                file=sys.stderr,
            )

    # uvicorn shuts down gracefully, then raises the signal again
    with contextlib.suppress(KeyboardInterrupt):
        HttpServer(app, on_start=announce).run(sockets=[sock])
    print("Stopped.", file=sys.stderr)


def _limits(args: argparse.Namespace) -> "Limits":
    """
    Raises:
        UserError: a limit is not a number above 0.
    """
    from open_unitok.generation.serving.limits import Limits

    for name in ("max_batch_size", "max_queue_size", "max_body", "max_side", "max_new_tokens", "timeout"):
        value = getattr(args, name)
        if not 0 < value < 2**31:  # also rejects NaN
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be a number above 0.")
    return Limits(
        max_batch_size=args.max_batch_size,
        max_queue_size=args.max_queue_size,
        max_body=max(1, int(args.max_body * 2**20)),
        max_side=args.max_side,
        max_new_tokens=args.max_new_tokens,
        timeout=args.timeout,
    )


def _read_token(args: argparse.Namespace) -> str | None:
    """The bearer token; None = no authentication.

    Raises:
        UserError: the file is missing or a folder, or it or the variable does not hold exactly one token.
    """
    # a file or variable, not an option: options are visible to every user in `ps`
    if args.token_file is not None:
        text = read_text(args.token_file)
        name = f"--token-file {args.token_file}"
    elif not (text := os.environ.get(TOKEN_VARIABLE, "")):
        return None
    else:  # a blank one must not mean "no authentication"
        name = f"The variable {TOKEN_VARIABLE}"
    token = text.strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(f"{name} must hold one line of ASCII without spaces.")
    return token
