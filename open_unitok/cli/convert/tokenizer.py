"""`unitok convert tokenizer`: convert a published tokenizer to a model folder, or UniTok's back."""

import argparse
from pathlib import Path

from open_unitok.core.errors import UserError
from open_unitok.core.files import atomic_folder, existing
from open_unitok.core.text_files import read_json

from ..options import new_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """SRC DST [--config FILE | --system SYSTEM [--image-size PIXELS]]."""
    parser.add_argument("source", metavar="SRC", help="published checkpoint, or a tokenizer folder of UniTok")
    parser.add_argument("target", metavar="DST", help="new folder, or new .pth file where SRC is a folder")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="config.json with the sizes, if UniTok's checkpoint names an unknown model",
    )
    parser.add_argument(
        "--system",
        choices=("unitok", "vqgan", "ibq", "llamagen"),
        default="unitok",
        help="whose checkpoint SRC is (default: unitok)",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="side of the other systems' images (default: 256)",
    )


def run(args: argparse.Namespace) -> None:
    """Convert; a folder is converted back to a .pth file."""
    from open_unitok.tokenizer import UniTok, UniTokConfig
    from open_unitok.tokenizer.convert import write_published_tokenizer
    from open_unitok.tokenizer.loading import check_tokenizer_folder

    target = new_path(args.target)
    if args.system == "unitok" and args.image_size is not None:
        raise UserError("--image-size is for the other systems (--system): UniTok's checkpoint holds it.")
    if args.system != "unitok" and (args.config or Path(args.source).is_dir()):
        what = "--config" if args.config else f"{args.source}, a folder,"
        raise UserError(f"--system {args.system} converts a checkpoint file; {what} is for UniTok's.")
    if args.system != "unitok":
        from open_unitok.tokenizer.vqgan.published import load_published_vqgan

        model = load_published_vqgan(args.system, existing(args.source), args.image_size or 256)
        with atomic_folder(target) as folder:
            model.save_pretrained(folder)
    elif Path(args.source).is_dir():
        check_tokenizer_folder(args.source)
        if target.suffix != ".pth":
            raise UserError(
                f"{target} must end in .pth: a tokenizer folder is converted to a published checkpoint."
            )
        model = UniTok.from_pretrained(args.source)
        write_published_tokenizer(model.config, model.state_dict(), target)
    else:
        sizes = read_json(args.config) if args.config else None
        if not isinstance(sizes, dict | None):
            raise UserError(f"{args.config} is not a config: expected a JSON object of names and sizes.")
        # published checkpoints store a model name, not sizes
        config = None if sizes is None else UniTokConfig(**sizes)
        model = UniTok.from_reference(args.source, config)
        with atomic_folder(target) as folder:
            model.save_pretrained(folder)
    print(f"{args.source} -> {target}")
