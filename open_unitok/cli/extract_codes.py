"""`unitok extract-codes`: turn image shards into code shards."""

import argparse
from pathlib import Path

from open_unitok.core import distributed
from open_unitok.core.errors import UserError
from open_unitok.core.files import tokenizer_path
from open_unitok.training.data.extract import DTYPES, Options, extract
from open_unitok.training.data.tar_index import tars_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenizer", required=True, help="folder of the visual tokenizer (or a hub id)")
    parser.add_argument("--data", required=True, nargs="+", help="tars of images: globs, {000..127} braces")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--batch-size", type=int, default=64, help="images at a time (default: 64)")
    parser.add_argument(
        "--workers", type=int, default=0, help="threads that read images (default: 0, no others)"
    )
    parser.add_argument("--device", default=None, help="cpu, cuda, ... (default: a GPU if there is one)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="bf16 changes 2 to 5 %% of the codes")
    parser.add_argument(
        "--mode", choices=("crop", "pad", "squash"), default="crop", help="how images become square"
    )
    parser.add_argument(
        "--max-bad-share", type=float, default=0.05, help="unreadable share that stops (default: 0.05)"
    )


def run(args: argparse.Namespace) -> None:
    import torch

    from open_unitok.core.devices import check_device
    from open_unitok.tokenizer import UniTok

    if args.batch_size < 1 or args.workers < 0:
        raise UserError("--batch-size is 1 or more, --workers 0 or more.")
    tars = tars_of(args.data)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = check_device(f"cuda:{distributed.local_rank()}" if device == "cuda" else device)
    unitok = UniTok.from_pretrained(tokenizer_path(args.tokenizer)).eval()
    options = Options(
        unitok.fingerprint(), args.mode, args.dtype, args.batch_size, args.workers, args.max_bad_share
    )
    if unitok.config.codebook_size > 1 << 16:
        raise UserError(
            f"{args.tokenizer} has {unitok.config.codebook_size} codes per sub-codebook: code shards hold "
            "at most 65536 (uint16)."
        )
    unitok = unitok.to(device=device, dtype=getattr(torch, DTYPES[args.dtype]))
    manifest = extract(unitok, tars, Path(args.out), options)
    if manifest is None:
        print(f"{args.out}: this process is done, others are still at work")
        return
    print(
        f"{args.out}: {manifest['images']:,} images in {len(manifest['shards'])} tar(s), "
        f"{manifest['num_tokens']} x {manifest['num_codebooks']} codes each; "
        f"{manifest['broken']} unreadable; "
        f"decoding {manifest['checked']} of them again gives {manifest['psnr']:.2f} dB"
    )
