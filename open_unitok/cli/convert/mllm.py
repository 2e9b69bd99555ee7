"""`unitok convert mllm`: convert a published MLLM (mini_gemini layout) to a model folder, or back."""

import argparse

from open_unitok.core.files import existing
from open_unitok.core.text_files import read_json

from ..options import new_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """SRC DST [--unitok U] [--text-tokenizer T]."""
    parser.add_argument("source", metavar="SRC", help="published folder, or a model folder to convert back")
    parser.add_argument("target", metavar="DST", help="new folder")
    parser.add_argument(
        "--unitok", metavar="PATH", help="its visual tokenizer: published .pth or tokenizer folder"
    )
    parser.add_argument(
        "--text-tokenizer", metavar="PATH", help="tokenizer.model or its folder, if SRC has none"
    )


def run(args: argparse.Namespace) -> None:
    """Convert; the direction follows from SRC."""
    from open_unitok.mllm import UniTokMLLMConfig
    from open_unitok.mllm.convert_folder import from_published_folder, to_published_folder
    from open_unitok.tokenizer import UniTok

    source, target = existing(args.source), new_path(args.target)
    # our folders have our model type, published ones mini_gemini
    if read_json(source / "config.json").get("model_type") == UniTokMLLMConfig.model_type:
        to_published_folder(source, target)
        print(f"{source} -> {target}")
        return
    unitok = UniTok.from_pretrained(args.unitok) if args.unitok else None
    from_published_folder(source, target, unitok, args.text_tokenizer)
    print(f"{source} -> {target}")
    if unitok is None:
        print(
            "Without --unitok the new folder has no visual tokenizer: it neither reads nor generates images."
        )
