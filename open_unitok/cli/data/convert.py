"""`unitok data convert`: convert common formats to the tar shards that `unitok extract-codes` reads."""

import argparse
from pathlib import Path

from open_unitok.cli import extract_codes
from open_unitok.training.data.captions import CAPTION_CHOICES
from open_unitok.training.data.formats import SOURCE_FORMATS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """KIND SRC DST."""
    parser.add_argument("kind", help=f"format of SRC: {', '.join(SOURCE_FORMATS)} (see training/README.md)")
    parser.add_argument("src", help="source folder or file")
    parser.add_argument("dst", help="output folder")
    parser.add_argument("--images", help="folder that image paths are relative to (default: that of SRC)")
    parser.add_argument("--column", help="column or key with the caption (default: caption, text, prompt)")
    parser.add_argument(
        "--captions",
        choices=CAPTION_CHOICES,
        default="all",
        help="of a folder: all lines of a .txt, its first line, or the words of the image's folders and name",
    )
    parser.add_argument("--shard", type=int, default=1000, help="samples per tar (default: 1000)")
    parser.add_argument(
        "--max-bad-share",
        type=float,
        default=0.05,
        help="stop if more than this share is unusable (default: 0.05)",
    )
    parser.add_argument(
        "--size",
        type=int,
        metavar="N",
        help="scale larger images down so that the shorter side has N pixels (default: keep them)",
    )
    parser.add_argument("--tokenizer", help="also extract codes with this visual tokenizer, to DST/codes")


def run(args: argparse.Namespace) -> None:
    """Convert and print the counts."""
    from open_unitok.training.data.convert import convert_dataset

    counts = convert_dataset(
        args.kind,
        args.src,
        args.dst,
        images=args.images,
        column=args.column,
        captions=args.captions,
        shard=args.shard,
        max_bad_share=args.max_bad_share,
        size=args.size,
    )
    print(f"{args.dst}: {', '.join(f'{n:,} {name}' for name, n in counts.items())}")
    if args.tokenizer:
        _extract_codes(Path(args.dst), args.tokenizer, "pad" if args.kind == "llava" else "crop")


def _extract_codes(folder: Path, tokenizer: str, mode: str) -> None:
    """Run `unitok extract-codes` on `folder`; `mode` crops for generation and pads for conversations."""
    # through its parser, so that all other options have their defaults
    parser = argparse.ArgumentParser()
    extract_codes.add_arguments(parser)
    arguments = ["--tokenizer", tokenizer, "--data", str(folder / "*.tar"), "--out", str(folder / "codes")]
    extract_codes.run(parser.parse_args([*arguments, "--mode", mode]))
