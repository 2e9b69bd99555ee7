"""`unitok convert tokenizer`: a published UniTok checkpoint to a folder of ours, or back."""

import argparse
from pathlib import Path

from open_unitok.core.errors import UserError
from open_unitok.core.files import atomic_folder, read_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`unitok convert tokenizer`."""
    parser.add_argument("source", metavar="SRC", help="published checkpoint (.pth), or a folder of ours")
    parser.add_argument("target", metavar="DST", help="new folder, or new .pth file where SRC is a folder")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="config.json with the sizes, where the file's name for them is unknown",
    )


def run(args: argparse.Namespace) -> None:
    """Convert one way or, from a folder, the other."""
    from open_unitok.tokenizer import UniTok, UniTokConfig
    from open_unitok.tokenizer.convert import write_published_tokenizer
    from open_unitok.tokenizer.loading import check_tokenizer_folder

    target = Path(args.target)
    if target.exists():
        raise UserError(f"{target} exists already: remove it or choose another name.")
    if Path(args.source).is_dir():
        check_tokenizer_folder(args.source)
        if target.suffix != ".pth":
            raise UserError(f"{target}: a folder of ours becomes a published file, whose name ends in .pth.")
        model = UniTok.from_pretrained(args.source)
        write_published_tokenizer(model.config, model.state_dict(), target)
    else:
        sizes = read_json(args.config) if args.config else None
        if not isinstance(sizes, dict | None):
            raise UserError(f"{args.config} holds no config: a mapping of names to sizes is wanted.")
        config = None if sizes is None else UniTokConfig(**sizes)
        model = UniTok.from_reference(args.source, config)
        with atomic_folder(target) as folder:
            model.save_pretrained(folder)
    print(f"{args.source} -> {target}")
