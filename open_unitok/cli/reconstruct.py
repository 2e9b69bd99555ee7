"""`unitok reconstruct`: encode and decode images; original and reconstruction side by side, with PSNR."""

import argparse
from pathlib import Path

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing, make_folder

from .options import add_model_options, at_least_one, pick_device, quiet_loading


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """IMG ... --model M --out DIR."""
    parser.add_argument("images", metavar="IMG", nargs="+", help="image files")
    add_model_options(parser, adapter=False)
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="output folder: original left, reconstruction right"
    )
    parser.add_argument(
        "--size", type=int, help="side in pixels, a multiple of 16 (default: the tokenizer's image size)"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="images per batch (default: 16)")


def run(args: argparse.Namespace) -> None:
    """Write DIR/NAME.png for each image and print its PSNR."""
    from tqdm import tqdm

    from open_unitok.generation.image_files import grid_of, save_png
    from open_unitok.generation.loading import load_unitok
    from open_unitok.generation.reconstruction import iter_reconstructions
    from open_unitok.tokenizer.images import image_psnr

    at_least_one(args, "batch_size")
    # before the model is loaded: report a missing image at once
    for image in args.images:
        if existing(image).is_dir():
            raise UserError(f"{image} is a folder: give its image files, e.g. {image}/*.png.")
    quiet_loading()
    unitok = load_unitok(args.model, pick_device(args.device), args.dtype)
    make_folder(args.out)
    if not unitok.quantizer.discrete:  # numbers that no code counts are a free rate
        print(unitok.quantizer.describe_rate(unitok.config.layout) or "continuous latents, no codes")
    # images from different folders may have the same name
    names = _output_names(args.images)
    pairs = iter_reconstructions(unitok, args.images, args.batch_size, args.size)
    for name, source, (original, reconstruction) in zip(
        names, args.images, tqdm(pairs, total=len(names), disable=None)
    ):
        path = Path(args.out) / f"{name}.png"
        save_png(grid_of([original, reconstruction], columns=2), path, {"source": str(source)})
        tqdm.write(f"{path}  PSNR {image_psnr(original, reconstruction):.1f} dB")


def _output_names(images: list[str]) -> list[str]:
    """File names without suffix; a repeated name gets a number."""
    names: list[str] = []
    for image in images:
        stem, number = Path(image).stem, 2
        name = stem
        while name in names:
            name, number = f"{stem}-{number}", number + 1
        names.append(name)
    return names
