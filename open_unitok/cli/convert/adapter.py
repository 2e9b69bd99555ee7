"""`unitok convert adapter`: merge a LoRA adapter into its MLLM and save the result as one model folder."""

import argparse
import shutil

from open_unitok.core.files import (
    REPLAY_FOLDER,
    SAMPLING_FILE,
    atomic_folder,
    existing,
    model_path,
    tokenizer_path,
)

from ..options import add_decoder_option, new_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """BASE ADAPTER DST."""
    parser.add_argument("base", metavar="BASE", help="MLLM folder that the adapter was trained on")
    parser.add_argument("adapter", metavar="ADAPTER", help="adapter folder, e.g. runs/lora/model, or hub id")
    parser.add_argument("target", metavar="DST", help="new MLLM folder")
    add_decoder_option(parser)


def run(args: argparse.Namespace) -> None:
    """Merge and save."""
    from open_unitok.generation.loading import check_parts_match
    from open_unitok.mllm import UniTokForConditionalGeneration, UniTokProcessor
    from open_unitok.mllm.loading import check_vocabulary
    from open_unitok.mllm.lora import merge_adapter
    from open_unitok.tokenizer import UniTok

    source, target = existing(model_path(args.base)), new_path(args.target)
    unitok = existing(tokenizer_path(args.unitok)) if args.unitok else source / "unitok"
    model = merge_adapter(UniTokForConditionalGeneration.from_pretrained(source), args.adapter)
    processor = UniTokProcessor.from_pretrained(source)
    check_vocabulary(model.config, processor.vocabulary_fingerprint(), source)
    model.config.vocabulary_fingerprint = processor.vocabulary_fingerprint()
    # another pixel decoder is fine, other codes are not
    if args.unitok:
        check_parts_match(model, UniTok.from_pretrained(unitok), processor, unitok)
    # a killed conversion leaves no half-written model
    with atomic_folder(target) as folder:
        model.save_pretrained(folder)
        if unitok.exists():
            shutil.copytree(unitok, folder / "unitok")
        processor.save_pretrained(folder)  # after unitok/, which it would copy
        if (source / SAMPLING_FILE).exists():
            shutil.copy(source / SAMPLING_FILE, folder / SAMPLING_FILE)
        if (source / REPLAY_FOLDER).exists():
            shutil.copytree(source / REPLAY_FOLDER, folder / REPLAY_FOLDER)
    print(f"{source} + {args.adapter} -> {target}")
