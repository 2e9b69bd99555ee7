"""`unitok reconstruct`: images through the visual tokenizer and back, original beside copy."""

import argparse
import os
from pathlib import Path
from typing import Any

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing, make_folder, tokenizer_path

from .options import add_model_options, pick_device, quiet_loading


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """IMG ... --model M --out DIR."""
    parser.add_argument("images", metavar="IMG", nargs="+", help="images to encode and decode")
    add_model_options(parser, adapter=False)
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="where the PNGs go: original left, copy right"
    )
    parser.add_argument(
        "--size", type=int, help="side in pixels, a multiple of 16 (default: the tokenizer's)"
    )
    parser.add_argument("--batch-size", type=int, default=16)


def run(args: argparse.Namespace) -> None:
    """Write NAME.png into DIR for each image and print its PSNR."""
    from tqdm import tqdm

    from open_unitok.generation.image_files import grid_of, save_png
    from open_unitok.generation.pipeline import reconstruct
    from open_unitok.tokenizer.images import psnr

    names = output_names(args.images)
    for image in args.images:
        existing(image)
    if args.batch_size < 1:
        raise UserError(f"--batch-size is {args.batch_size}; it must be a whole number >= 1.")
    unitok = load_tokenizer(args)
    make_folder(args.out)
    pairs = reconstruct(unitok, args.images, args.batch_size, args.size)
    for name, source, (original, copy) in zip(
        names, args.images, tqdm(pairs, total=len(names), disable=None)
    ):
        path = Path(args.out) / f"{name}.png"
        save_png(grid_of([original, copy], columns=2), path, {"source": str(source)})
        tqdm.write(f"{path}  PSNR {psnr(original, copy):.1f} dB")


def load_tokenizer(args: argparse.Namespace) -> Any:
    """The visual tokenizer of `args.model`: its own folder, a published .pth, or inside an MLLM folder."""
    from open_unitok.core.devices import check_device, check_dtype
    from open_unitok.generation.loading import download
    from open_unitok.tokenizer import UniTok

    quiet_loading()
    device = check_device(pick_device(args.device))
    path = tokenizer_path(args.model)
    if not os.path.exists(path):
        path = tokenizer_path(download(args.model))
    return UniTok.from_pretrained(path).to(device=device, dtype=check_dtype(args.dtype, device)).eval()


def output_names(images: list[str]) -> list[str]:
    """File names without ending; where two images share one, a number makes the difference."""
    names: list[str] = []
    for image in images:
        stem, number = Path(image).stem, 2
        name = stem
        while name in names:
            name, number = f"{stem}-{number}", number + 1
        names.append(name)
    return names
