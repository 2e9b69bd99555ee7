"""`unitok chat`: a conversation about images in the terminal; answers are streamed."""

import argparse
import io
import sys
from typing import TYPE_CHECKING, Any

from open_unitok.core.errors import UserError

from .options import add_model_options, at_least_one, load_pipeline

if TYPE_CHECKING:
    from PIL import Image

    from open_unitok.generation.pipeline import Pipeline

HELP = "An empty line or Ctrl-D ends, /new clears the conversation, /image PATH adds an image."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """IMAGE ... --model M."""
    parser.add_argument("images", metavar="IMAGE", nargs="*", help="images to talk about")
    add_model_options(parser)
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        help="longest answer in tokens (default: 256, or the rest of the context)",
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = greedy (default: 0)")
    parser.add_argument("--seed", type=int, help="seed of sampling, if the temperature is not 0")


def run(args: argparse.Namespace) -> None:
    """Read questions from the terminal or a pipe and print the answers."""
    from open_unitok.tokenizer.images import load_image

    images = [load_image(path) for path in args.images]  # before the model: report a wrong path at once
    options = _answer_options(args)
    session = ChatSession(load_pipeline(args), images, options)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a line that is not UTF-8 must not end the conversation
    interactive = sys.stdin.isatty()
    if interactive:
        print(HELP)
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            return
        # a blank line in a pipe is skipped instead
        if not line and interactive:
            return
        if line:
            try:
                session.handle(line)
            except UserError as error:  # an invalid question must not end the conversation
                print(f"unitok: error: {error}", file=sys.stderr)


def _answer_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `Pipeline.chat_stream`.

    Raises:
        UserError: the temperature or the answer's length is out of range.
    """
    from open_unitok.generation.sampling import Sampling

    if args.max_new_tokens is not None:
        at_least_one(args, "max_new_tokens")
    options: dict[str, Any] = {"max_new_tokens": args.max_new_tokens}
    if args.temperature != 0:
        Sampling(1.0, args.temperature)  # checks the temperature
        options |= {"do_sample": True, "temperature": args.temperature, "seed": args.seed}
    return options


class ChatSession:
    """Images, the earlier questions and answers about them, and the answer options."""

    def __init__(self, pipe: "Pipeline", images: "list[Image.Image]", options: dict[str, Any]):
        self.pipe, self.images, self.options = pipe, images, options
        self.history: list[tuple[str, str]] = []

    def handle(self, line: str) -> None:
        """Answer a question or run a command.

        Raises:
            UserError: the conversation exceeds the context, an image cannot be read, an unknown command.
        """
        if line == "/new":
            self.history = []
        elif line.startswith("/image"):
            from open_unitok.tokenizer.images import load_image

            self.images.append(load_image(line.removeprefix("/image").strip()))
            # images come before the first question, so the earlier answers no longer match the prompt
            self.history = []
        elif line.startswith("/"):
            raise UserError(f"Unknown command {line.split()[0]!r}. {HELP}")
        else:
            self.answer(line)

    def answer(self, question: str) -> None:
        """Print the answer while it is generated, then append it to the history."""
        pieces = []  # joined for the history after the last piece
        for piece in self.pipe.chat_stream(question, self.images, self.history, **self.options):
            print(piece, end="", flush=True)
            pieces.append(piece)
        print()
        self.history.append((question, "".join(pieces)))
