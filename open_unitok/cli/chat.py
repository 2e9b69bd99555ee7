"""`unitok chat`: a conversation about images; words appear as they are written."""

import argparse
import io
import sys
from typing import Any

from open_unitok.core.errors import UserError

from .options import add_model_options, load_pipeline

HELP = "An empty line or Ctrl-D ends, /new forgets the conversation, /image PATH shows one more image."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """IMAGE ... --model M."""
    parser.add_argument("images", metavar="IMAGE", nargs="*", help="images to talk about")
    add_model_options(parser)
    parser.add_argument(
        "--max-new-tokens", type=int, help="an answer is cut there at the latest (default: 256, or what fits)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = always the likeliest word")
    parser.add_argument("--seed", type=int, help="of the words drawn, where the temperature is not 0")


def run(args: argparse.Namespace) -> None:
    """Read questions from the terminal or a pipe and write answers."""
    from open_unitok.tokenizer.images import load_image

    images = [load_image(path) for path in args.images]  # before the model: a wrong path shows at once
    options = answer_options(args)
    pipe = load_pipeline(args)
    talk = Conversation(pipe, images, options)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a line that is no UTF-8 does not end the conversation
    asks = sys.stdin.isatty()
    if asks:
        print(HELP)
    while True:
        try:
            line = input("> " if asks else "").strip()
        except EOFError:
            return
        if not line and asks:
            return
        if line:
            try:
                talk.take(line)
            except UserError as error:  # one question that cannot be asked does not end the conversation
                print(f"unitok: error: {error}", file=sys.stderr)


def answer_options(args: argparse.Namespace) -> dict[str, Any]:
    """How words are chosen.

    Raises:
        UserError: the temperature is no number >= 0, or the answer's length no whole number >= 1.
    """
    from open_unitok.generation.sampling import Sampling
    from open_unitok.generation.validation import check_whole

    if args.max_new_tokens is not None:
        check_whole("max_new_tokens", args.max_new_tokens)
    options: dict[str, Any] = {"max_new_tokens": args.max_new_tokens}
    if args.temperature != 0:
        Sampling(1.0, args.temperature)
        options |= {"do_sample": True, "temperature": args.temperature, "seed": args.seed}
    return options


class Conversation:
    """Images, what was said about them, and how the next answer is written."""

    def __init__(self, pipe: Any, images: list[Any], options: dict[str, Any]):
        self.pipe, self.images, self.options = pipe, images, options
        self.history: list[tuple[str, str]] = []

    def take(self, line: str) -> None:
        """A question, which is answered, or a command.

        Raises:
            UserError: a question too long for what the model can still read, an image that is none.
        """
        if line == "/new":
            self.history = []
        elif line.startswith("/image"):
            from open_unitok.tokenizer.images import load_image

            self.images.append(load_image(line.removeprefix("/image").strip()))
            self.history = []  # the places of the images are before the first question
        elif line.startswith("/"):
            raise UserError(f"There is no command {line.split()[0]!r}. {HELP}")
        else:
            self.answer(line)

    def answer(self, question: str) -> None:
        """Write the answer as it comes and remember it."""
        pieces = []
        for piece in self.pipe.chat_stream(question, self.images, self.history, **self.options):
            print(piece, end="", flush=True)
            pieces.append(piece)
        print()
        self.history.append((question, "".join(pieces)))
