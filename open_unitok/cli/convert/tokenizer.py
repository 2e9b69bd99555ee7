"""`unitok convert tokenizer`: convert a published UniTok checkpoint to a model folder, or back."""

import argparse
from pathlib import Path

from open_unitok.core.errors import UserError
from open_unitok.core.files import atomic_folder
from open_unitok.core.text_files import read_json

from ..options import new_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """SRC DST [--config FILE]."""
    parser.add_argument("source", metavar="SRC", help="published checkpoint (.pth), or a tokenizer folder")
    parser.add_argument("target", metavar="DST", help="new folder, or new .pth file where SRC is a folder")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="config.json with the sizes, if the checkpoint names an unknown model",
    )


def run(args: argparse.Namespace) -> None:
    """Convert; a folder is converted back to a .pth file."""
    from open_unitok.tokenizer import UniTok, UniTokConfig
    from open_unitok.tokenizer.convert import write_published_tokenizer
    from open_unitok.tokenizer.loading import check_tokenizer_folder

    target = new_path(args.target)
    if Path(args.source).is_dir():
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
