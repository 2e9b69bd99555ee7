"""`unitok convert class-conditional`: convert a checkpoint of LlamaGen or of UniTok's fork, or back."""

import argparse
from pathlib import Path

from ..options import new_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """SRC DST [--unitok U] [--heads N] [--classes N] [--grid N]."""
    parser.add_argument("source", metavar="SRC", help="published checkpoint (.pt), or a model folder")
    parser.add_argument("target", metavar="DST", help="new folder, or new .pt file where SRC is a folder")
    parser.add_argument(
        "--unitok", metavar="PATH", help="its visual tokenizer: published .pth or tokenizer folder"
    )
    parser.add_argument(
        "--heads", type=int, metavar="N", help="attention heads, if the width is not a published one"
    )
    parser.add_argument(
        "--classes", type=int, metavar="N", help="number of classes (default: rows of the table, less null)"
    )
    parser.add_argument(
        "--grid",
        type=int,
        default=16,
        metavar="N",
        help="rows of the grid without --unitok (default: 16)",
    )


def run(args: argparse.Namespace) -> None:
    """Convert; a folder is converted back to a .pt file."""
    from open_unitok.mllm.class_conditional.convert import from_llamagen_file, to_llamagen_file
    from open_unitok.tokenizer import UniTok

    target = new_path(args.target)
    if Path(args.source).is_dir():
        to_llamagen_file(Path(args.source), target)
        print(f"{args.source} -> {target}")
        return
    unitok = UniTok.from_pretrained(args.unitok) if args.unitok else None
    fields = {} if args.classes is None else {"num_classes": args.classes}
    if unitok is None:
        fields["num_image_tokens"] = args.grid**2
    from_llamagen_file(Path(args.source), target, unitok, args.heads, **fields)
    print(f"{args.source} -> {target}")
    if unitok is None:
        print("Without --unitok the new folder has no visual tokenizer: it generates no images.")
