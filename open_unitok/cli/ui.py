"""`unitok ui`: a page in the browser that generates, answers questions and shows codes."""

import argparse
import os
import sys
from pathlib import Path

from open_unitok.core.errors import UserError

from .options import add_address_options, add_model_options, load_pipeline, require_extra


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--model M [--host H] [--port P]."""
    add_model_options(parser)
    add_address_options(parser, port=7860)
    parser.add_argument("--open", action="store_true", help="open the page in the browser")


def run(args: argparse.Namespace) -> None:
    """Serve the page until interrupted."""
    require_extra("ui", "gradio")
    from open_unitok.generation.serving.listen import listen

    # gradio treats 0 as its default range of ports
    if args.port == 0:
        raise UserError("--port is 0; it must be a number from 1 to 65535.")
    # before the model is loaded: report a port in use at once
    listen(args.host, args.port).close()
    # gradio reads it at import: no analytics are sent
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from open_unitok.generation.ui.page import build_page, launch

    page = build_page(load_pipeline(args), Path(args.model).resolve().name)
    url = launch(page, args.host, args.port, args.open, args.allow_host)
    print(f"The page is at {url} (Ctrl-C stops it)", file=sys.stderr)
    page.block_thread()
