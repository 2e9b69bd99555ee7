"""`unitok convert bf16`: round the weights of an MLLM and its visual tokenizer to bfloat16.

Sampling options become defaults of the new model, in its sampling.json.
"""

import argparse
import dataclasses
import shutil

from open_unitok.core.errors import UserError
from open_unitok.core.files import SAMPLING_FILE, atomic_folder, existing, tokenizer_path, write_json

from ..options import add_decoder_option, add_sampling_options, new_path, quiet_loading, sampling_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL DST, another pixel decoder, and the sampling settings to save."""
    parser.add_argument("source", metavar="MODEL", help="model folder or hub id")
    parser.add_argument("target", metavar="DST", help="new folder")
    add_decoder_option(parser)
    add_sampling_options(parser)


def run(args: argparse.Namespace) -> None:
    """Round and save; sampling options that are given go into the new model's sampling.json."""
    import torch

    from open_unitok.generation.loading import find_model
    from open_unitok.generation.pipeline import Pipeline
    from open_unitok.tokenizer import UniTok

    target = new_path(args.target)
    quiet_loading()
    # a hub id is downloaded here
    source = find_model(args.source)
    sampling = sampling_of(args, str(source))
    pipe = Pipeline.from_pretrained(source, dtype=torch.float32)
    folder_of_unitok, unitok = source / "unitok", pipe.unitok
    if args.unitok:
        folder_of_unitok = existing(tokenizer_path(args.unitok))
        unitok = UniTok.from_pretrained(folder_of_unitok)
        if unitok.fingerprint() != pipe.unitok.fingerprint():
            raise UserError(f"--unitok {args.unitok} gives other codes than the tokenizer of {source}.")
    model = pipe.model.to(torch.bfloat16)  # pyright: ignore
    unitok = unitok.to(torch.bfloat16)  # pyright: ignore
    # the rounded tokenizer gives slightly different codes, so it has another fingerprint
    model.config.unitok_fingerprint = unitok.fingerprint()
    model.config.vocabulary_fingerprint = pipe.processor.vocabulary_fingerprint()
    with atomic_folder(target) as folder:
        model.save_pretrained(folder)
        unitok.save_pretrained(folder / "unitok")
        pipe.processor.save_pretrained(folder)  # after unitok/, which it would copy
        # save_pretrained does not write the caption tokenizer
        captions = folder_of_unitok / "caption_tokenizer"
        if captions.exists():
            shutil.copytree(captions, folder / "unitok" / captions.name)
        write_json(folder / SAMPLING_FILE, dataclasses.asdict(sampling))
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{source} -> {target}, {size / 1e6:.1f} MB")
