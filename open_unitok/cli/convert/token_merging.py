"""`unitok convert token-merging`: a copy of a visual tokenizer whose encoder merges tokens.

The weights are the same, the codes are not: the copy has another fingerprint, so code shards and MLLMs of the
original do not fit it.
"""

import argparse
import shutil
from pathlib import Path

import yaml

from open_unitok.core.errors import UserError
from open_unitok.core.files import atomic_folder, tokenizer_path

from ..options import new_path, quiet_loading


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """SRC DST key=value ..."""
    parser.add_argument("source", metavar="SRC", help="tokenizer folder, hub id or published .pth")
    parser.add_argument("target", metavar="DST", help="new folder")
    parser.add_argument(
        "options",
        metavar="key=value",
        nargs="+",
        help="e.g. method=tome r=4, method=cluster at=2 keep=0.5, method=none (off); see docs/systems.md",
    )


def run(args: argparse.Namespace) -> None:
    """Load with `encoder_options.merge` and save, with the caption tokenizer."""
    from open_unitok.tokenizer import UniTok

    merge = {}
    for option in args.options:
        key, equals, value = option.partition("=")
        if not equals:
            raise UserError(f"{option!r} is not key=value, such as method=tome.")
        try:
            merge[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"{option!r}: {value!r} is not a valid value.") from error
    target = new_path(args.target)
    source = tokenizer_path(args.source)
    quiet_loading()
    off = merge == {"method": "none"}
    model = UniTok.from_pretrained(source, encoder_options={"merge": None if off else merge})
    with atomic_folder(target) as folder:
        model.save_pretrained(folder)
        captions = Path(source) / "caption_tokenizer"  # save_pretrained does not write it
        if captions.is_dir():
            shutil.copytree(captions, folder / captions.name)
    print(f"{source} -> {target}, fingerprint {model.fingerprint()[:12]}")
