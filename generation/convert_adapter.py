"""`unitok convert adapter`: an MLLM and a LoRA adapter of it, written as one model folder."""

import argparse
import shutil
from pathlib import Path

from open_unitok.errors import UserError
from open_unitok.files import atomic_folder, existing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`unitok convert adapter`."""
    parser.add_argument("base", metavar="BASE", help="the MLLM folder that the adapter was trained on")
    parser.add_argument("adapter", metavar="ADAPTER", help="adapter folder, e.g. runs/lora/model, or hub id")
    parser.add_argument("target", metavar="DST", help="new folder, a whole MLLM")


def run(args: argparse.Namespace) -> None:
    """Write base and adapter as one model."""
    from open_unitok.mllm import UniTokForConditionalGeneration, UniTokProcessor
    from open_unitok.mllm.adapters import merge_adapter

    from .sampling import FILE

    source, target = existing(args.base), Path(args.target)
    if target.exists():
        raise UserError(f"{target} exists already: remove it or choose another name.")
    model = merge_adapter(UniTokForConditionalGeneration.from_pretrained(source), args.adapter)
    with atomic_folder(target) as folder:
        UniTokProcessor.from_pretrained(source).save_pretrained(folder)
        model.save_pretrained(folder)
        if (source / "unitok").exists():
            shutil.copytree(source / "unitok", folder / "unitok")
        if (source / FILE).exists():
            shutil.copy(source / FILE, folder / FILE)
    print(f"{source} + {args.adapter} -> {target}")
