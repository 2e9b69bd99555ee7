"""`unitok data text-tokenizer`: a sentencepiece model of a data set's words, for both training stages."""

import argparse
from pathlib import Path

from open_unitok.core.errors import UserError
from open_unitok.core.files import write_atomic
from open_unitok.training.data.captions import CAPTION_CHOICES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """DATA ... --out FILE."""
    parser.add_argument(
        "data",
        nargs="+",
        help="tars, globs or folders of tars, code folders, conversations, texts",
    )
    parser.add_argument("--out", required=True, help="file X.model, or a folder for tokenizer.model")
    parser.add_argument("--vocab-size", type=int, default=2000, help="largest number of ids (default: 2000)")
    parser.add_argument(
        "--captions",
        choices=CAPTION_CHOICES,
        default="all",
        help="of tars: all lines of a .txt, its first line, or the words of the image's name (default: all)",
    )
    parser.add_argument(
        "--max-lines",
        type=int,
        default=2_000_000,
        help="train on a sample of so many lines (default: 2000000)",
    )


def run(args: argparse.Namespace) -> None:
    """Train and write the model, which stage 1 names in `caption_tokenizer` and stage 2 in
    `model.text_tokenizer`."""
    from open_unitok.training.core.text_tokenizer import prompt_lines, train_text_tokenizer
    from open_unitok.training.data.text import dataset_texts

    if args.vocab_size < 1 or args.max_lines < 1:
        raise UserError("--vocab-size and --max-lines must be 1 or more.")
    out = Path(args.out)
    out = out if out.suffix == ".model" else out / "tokenizer.model"
    lines = [
        line
        for path in args.data
        for text in dataset_texts(path, args.captions)
        for line in text.split("\n")
        if line.strip()
    ]
    if not lines:
        raise UserError(f"{' '.join(args.data)}: there is no caption and no text.")
    # rare characters become bytes: with all of them CJK texts would fill a small vocabulary
    model = train_text_tokenizer(lines + prompt_lines(len(lines)), args.vocab_size, 0.9995, args.max_lines)
    write_atomic(out, model)
    print(f"{out}: {_size(model):,} ids from {len(lines):,} lines")


def _size(model: bytes) -> int:
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_proto=model).get_piece_size()
