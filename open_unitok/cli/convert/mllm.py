"""`unitok convert mllm`: convert a published MLLM (mini_gemini layout) to a model folder, or back."""

import argparse
import shutil
from pathlib import Path

from open_unitok.core.errors import UserError
from open_unitok.core.files import atomic_folder, existing, read_json


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
    from open_unitok.mllm import UniTokForConditionalGeneration, UniTokMLLMConfig, UniTokProcessor
    from open_unitok.mllm.convert import check_same_codebooks, read_published, save_published
    from open_unitok.mllm.visual_embedder import readable_code_table
    from open_unitok.tokenizer import UniTok

    source, target = existing(args.source), Path(args.target)
    if target.exists():
        raise UserError(f"{target} already exists: delete it or choose another name.")
    if read_json(source / "config.json").get("model_type") == UniTokMLLMConfig.model_type:
        model = UniTokForConditionalGeneration.from_pretrained(source)
        with atomic_folder(target) as folder:
            text_tokenizer = UniTokProcessor.from_pretrained(source).text_tokenizer
            save_published(model.config, model.state_dict(), text_tokenizer, folder)
        print(f"{source} -> {target}")
        return
    model = UniTokForConditionalGeneration.from_state(*read_published(source), source=source)
    unitok = UniTok.from_pretrained(args.unitok) if args.unitok else None
    fields = {"image_size": 256, "num_image_tokens": model.config.num_image_tokens, "legacy": True}
    if unitok is not None:
        check_same_codebooks(model.visual_embedder.codebooks, readable_code_table(unitok))
        model.config.unitok_fingerprint = unitok.fingerprint()
        model.config.num_image_tokens = fields["num_image_tokens"] = unitok.config.num_visual_tokens
        fields["image_size"] = unitok.config.image_size
        model.config.token_layout = fields["token_layout"] = unitok.config.token_layout
    processor = UniTokProcessor.from_text_tokenizer(args.text_tokenizer or source, **fields)
    if (processor.boi_token_id, processor.eoi_token_id) != (
        model.config.boi_token_id,
        model.config.eoi_token_id,
    ):
        raise UserError(
            f"The text tokenizer has <0x00> and <0x01> at {processor.boi_token_id} and "
            f"{processor.eoi_token_id}; the model expects {model.config.boi_token_id} and "
            f"{model.config.eoi_token_id}: use the text tokenizer it was trained with."
        )
    with atomic_folder(target) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        if unitok is not None:
            unitok.save_pretrained(folder / "unitok")
        for name in ("LICENSE", "NOTICE"):
            if (source / name).exists():
                shutil.copy(source / name, folder / name)
    print(f"{source} -> {target}")
    if unitok is None:
        print(
            "No --unitok was given: without a visual tokenizer the model neither reads nor generates images."
        )
