"""`unitok ui`: a page in the browser to draw, to ask about images and to look at their codes."""

import argparse
import os
import sys
from pathlib import Path

from open_unitok.core.errors import UserError

from .options import add_model_options, load_pipeline, need_extra


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--model M [--host H] [--port P]."""
    add_model_options(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: this machine alone)"
    )
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--open", action="store_true", help="open the page in the browser")


def run(args: argparse.Namespace) -> None:
    """Show the page until stopped."""
    need_extra("ui", "gradio")
    from .serve import listen

    if args.port == 0:
        raise UserError("--port is 0; the page needs a number from 1 to 65535.")
    listen(args.host, args.port).close()  # a port in use shows before the model is loaded
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio loads: nothing is sent anywhere
    from open_unitok.generation.ui.page import build, launch

    page = build(load_pipeline(args), Path(args.model).resolve().name)
    url = launch(page, args.host, args.port, args.open)
    print(f"The page is at {url} (Ctrl-C ends)", file=sys.stderr)
    page.block_thread()
