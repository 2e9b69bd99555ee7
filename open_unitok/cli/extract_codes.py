"""`unitok extract-codes`: encode image shards as code shards, from which the MLLM trains."""

import argparse
import sys
from pathlib import Path

from open_unitok.core.distributed import local_rank
from open_unitok.core.errors import UserError
from open_unitok.core.files import tokenizer_path
from open_unitok.training.data.captions import CAPTION_CHOICES
from open_unitok.training.data.tar_files import matching_shards

_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--tokenizer T --data TARS --out DIR."""
    parser.add_argument("--tokenizer", required=True, help="folder of the visual tokenizer or of an MLLM")
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        help="tar shards: files, https: URLs, pipe:COMMAND, - (stdin); globs and {000..127} allowed",
    )
    parser.add_argument("--out", required=True, help="output folder")
    parser.add_argument("--batch-size", type=int, default=64, help="images per batch (default: 64)")
    parser.add_argument(
        "--workers", type=int, default=0, help="threads that decode images (default: 0, the main thread)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:N or mps (default: cuda if available, else cpu)")
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        default="fp32",
        help="bf16 changes 2 to 5 %% of the codes (default: fp32)",
    )
    parser.add_argument(
        "--mode",
        choices=("crop", "pad", "pad_grey", "squash"),
        default="crop",
        help="how images become square (default: crop)",
    )
    parser.add_argument(
        "--ten-crop",
        type=float,
        nargs="?",
        const=1.1,
        metavar="RANGE",
        help="ten crops of each image scaled to RANGE x the tokenizer's size, of which training samples one; "
        "for class-conditional models, and to augment images that are read (default RANGE: 1.1)",
    )
    parser.add_argument(
        "--captions",
        choices=CAPTION_CHOICES,
        default="all",
        help="all lines of a .txt, its first line, or the words of the image's name (default: all)",
    )
    parser.add_argument(
        "--features",
        choices=("latents", "encoder", "tower"),
        help="also store continuous features of the images, for an MLLM with continuous or dual visual input",
    )
    parser.add_argument("--tower", help="for --features tower: folder or hub id of a vision model")
    parser.add_argument(
        "--max-bad-share",
        type=float,
        default=0.05,
        help="stop if more than this share of a shard is unreadable (default: 0.05)",
    )


def run(args: argparse.Namespace) -> None:
    """Write this rank's code shards; the last rank to finish writes codes.json."""
    import torch

    from open_unitok.core.devices import set_device
    from open_unitok.mllm.features import FeatureOptions, FeatureSource, feature_sizes
    from open_unitok.tokenizer import UniTok
    from open_unitok.training.data.code_shards import FeatureFacts
    from open_unitok.training.data.extract import LOW_PSNR, ExtractOptions, extract_codes

    if args.batch_size < 1 or args.workers < 0:
        raise UserError("--batch-size must be at least 1, --workers at least 0.")
    if args.ten_crop is not None and not 1 <= args.ten_crop <= 4:
        raise UserError(f"--ten-crop is {args.ten_crop:g}; it must be from 1 to 4.")
    if args.ten_crop is not None and args.mode != "crop":
        raise UserError(f"--ten-crop makes crops of its own, but --mode is {args.mode}: omit one of them.")
    if args.ten_crop is not None and (args.features or args.tower):
        raise UserError("--ten-crop is for class-conditional models, which read no features: omit one.")
    # before the model is loaded: report a wrong path at once
    tars = matching_shards(args.data, "--data")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = set_device(f"cuda:{local_rank()}" if device == "cuda" else device)
    unitok = UniTok.from_pretrained(tokenizer_path(args.tokenizer)).eval()
    source = features = None
    if args.features or args.tower:
        given = FeatureOptions.from_config({"source": args.features, "tower": args.tower}, "dual")
        source = FeatureSource(given, unitok)
        features = FeatureFacts(given.source, source.fingerprint(), *feature_sizes(given, unitok.config))
    if args.ten_crop is not None and len(set(unitok.config.image_shape)) > 1:
        raise UserError(f"--ten-crop needs square images, but {args.tokenizer} has {unitok.config.layout}.")
    # before the cast: the fingerprint is defined on fp32 weights
    options = ExtractOptions(
        fingerprint=unitok.fingerprint(),
        layout=unitok.config.layout.to_dict(),
        mode=args.mode,
        dtype=args.dtype,
        batch_size=args.batch_size,
        workers=args.workers,
        max_bad_share=args.max_bad_share,
        captions=args.captions,
        features=features,
        ten_crop=args.ten_crop,
    )
    unitok = unitok.to(device=device, dtype=getattr(torch, _DTYPES[args.dtype]))
    manifest = extract_codes(unitok, tars, Path(args.out), options, source=source)
    if manifest is None:
        print(f"{args.out}: this process has finished, others are still running")
        return
    notes = {"with transparent parts, which are put on white": manifest["transparent"], **manifest["notes"]}
    print(
        f"{args.out}: {manifest['images']:,} images in {len(manifest['shards'])} tar(s), "
        f"{manifest['num_tokens']} x {manifest['num_codebooks']} codes each; "
        f"{f'{features.tokens} x {features.width} features each; ' if features else ''}"
        f"{manifest['broken']} unreadable; "
        f"{''.join(f'{count:,} {reason}; ' for reason, count in notes.items() if count)}"
        f"reconstruction PSNR of {manifest['checked']} of them: {manifest['psnr']:.2f} dB"
    )
    if manifest["psnr"] < LOW_PSNR:
        print(
            f"warning: {manifest['psnr']:.2f} dB is less than {LOW_PSNR:g} dB: this tokenizer does not suit "
            "the images; train it on them first (unitok train, with init_from).",
            file=sys.stderr,
        )
