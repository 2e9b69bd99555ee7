"""`unitok convert bf16`: a model with its weights rounded to bfloat16, half the bytes, as models ship."""

import argparse
import dataclasses
import shutil
from pathlib import Path

from open_unitok.core.errors import UserError
from open_unitok.core.files import atomic_folder, write_json

from ..options import add_sampling_options, quiet_loading, sampling_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL DST, and the settings that it shall draw with."""
    parser.add_argument("source", metavar="MODEL", help="model folder or hub id")
    parser.add_argument("target", metavar="DST", help="new folder")
    add_sampling_options(parser)


def run(args: argparse.Namespace) -> None:
    """Round model and visual tokenizer; the sampling settings that are given become the model's own."""
    import torch

    from open_unitok.core.files import SAMPLING_FILE
    from open_unitok.generation.loading import find_model
    from open_unitok.generation.pipeline import Pipeline

    if Path(args.target).exists():
        raise UserError(f"{args.target} exists already: remove it or choose another name.")
    quiet_loading()
    source = find_model(args.source)
    sampling = sampling_of(args, str(source))
    pipe = Pipeline.from_pretrained(source, dtype=torch.float32)
    model, unitok = pipe.model.to(torch.bfloat16), pipe.unitok.to(torch.bfloat16)
    # rounding has made it a tokenizer of slightly other codes
    model.config.unitok_fingerprint = unitok.fingerprint()
    with atomic_folder(args.target) as folder:
        model.save_pretrained(folder)
        pipe.processor.save_pretrained(folder)
        unitok.save_pretrained(folder / "unitok")
        captions = source / "unitok" / "caption_tokenizer"
        if captions.exists():
            shutil.copytree(captions, folder / "unitok" / captions.name)
        write_json(folder / SAMPLING_FILE, dataclasses.asdict(sampling))
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{source} -> {args.target}, {size / 1e6:.1f} MB")
