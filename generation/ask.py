"""`unitok ask`: questions about a picture, one answer a line."""

import argparse

from .options import add_model_options, load_pipeline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """IMAGE "QUESTION" ... --model M."""
    parser.add_argument("image", metavar="IMAGE", help="picture to look at")
    parser.add_argument(
        "questions", metavar="QUESTION", nargs="+", help="what to ask; several get a line each"
    )
    add_model_options(parser)
    parser.add_argument("--max-new-tokens", type=int, default=64, help="an answer is cut there at the latest")


def run(args: argparse.Namespace) -> None:
    """Print the answers."""
    from open_unitok.tokenizer.images import load_image

    image = load_image(args.image)  # before the model, so that a wrong path shows at once
    pipe = load_pipeline(args)
    for answer in pipe.answer(
        [image] * len(args.questions), args.questions, max_new_tokens=args.max_new_tokens
    ):
        print(answer)
