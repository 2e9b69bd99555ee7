"""`unitok data convert`: data sets in common layouts to the tars that `unitok extract-codes` reads."""

import argparse
from pathlib import Path

from open_unitok.cli import extract_codes
from open_unitok.training.data.convert import convert
from open_unitok.training.data.formats import LAYOUTS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to convert, and where to."""
    parser.add_argument("kind", help=f"layout of SRC: {', '.join(LAYOUTS)} (see training/README.md)")
    parser.add_argument("src", help="folder or file to read")
    parser.add_argument("dst", help="folder to write")
    parser.add_argument("--images", help="folder that image names are relative to (default: that of SRC)")
    parser.add_argument("--column", help="column or key with the caption (default: caption, text, prompt)")
    parser.add_argument("--shard", type=int, default=1000, help="samples per tar (default: 1000)")
    parser.add_argument(
        "--max-bad-share", type=float, default=0.05, help="unusable share that stops (default: 0.05)"
    )
    parser.add_argument(
        "--tokenizer", help="go on and extract codes with this visual tokenizer, to DST/codes"
    )


def run(args: argparse.Namespace) -> None:
    """Convert and say what came out."""
    counts = convert(
        args.kind,
        args.src,
        args.dst,
        images=args.images,
        column=args.column,
        shard=args.shard,
        max_bad_share=args.max_bad_share,
    )
    print(f"{args.dst}: {', '.join(f'{n:,} {name}' for name, n in counts.items())}")
    if args.tokenizer:
        extract_into(Path(args.dst), args.tokenizer, "pad" if args.kind == "llava" else "crop")


def extract_into(folder: Path, tokenizer: str, mode: str) -> None:
    """`unitok extract-codes` of the tars in `folder` to `folder`/codes; `mode` as suits what they are for."""
    parser = argparse.ArgumentParser()
    extract_codes.add_arguments(parser)
    told = ["--tokenizer", tokenizer, "--data", str(folder / "*.tar"), "--out", str(folder / "codes")]
    extract_codes.run(parser.parse_args([*told, "--mode", mode]))
