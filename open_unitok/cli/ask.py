"""`unitok ask`: questions about an image, or a file of them, which torchrun's processes share."""

import argparse
import os
from pathlib import Path
from typing import Any

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing, make_folder, read_jsonl, write_jsonl

from .options import add_model_options, load_pipeline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """IMAGE "QUESTION" ... --model M, or --questions FILE --out FILE --model M."""
    parser.add_argument("image", metavar="IMAGE", nargs="?", help="image to look at")
    parser.add_argument("words", metavar="QUESTION", nargs="*", help="what to ask; several get a line each")
    parser.add_argument(
        "--questions", metavar="FILE", help='JSON lines {"image": PATH, "question": TEXT}, PATHs beside FILE'
    )
    parser.add_argument("--out", metavar="FILE", help="JSON lines with image, question and answer")
    add_model_options(parser)
    parser.add_argument("--max-new-tokens", type=int, default=64, help="an answer is cut there at the latest")
    parser.add_argument("--batch-size", type=int, default=128, help="questions answered together")


def run(args: argparse.Namespace) -> None:
    """Print or write the answers. Under torchrun each process answers its share."""
    from open_unitok.core.distributed import rank, world_size
    from open_unitok.generation.validation import check_texts, check_whole
    from open_unitok.tokenizer.images import load_image

    check_whole("--max-new-tokens", args.max_new_tokens)
    check_whole("--batch-size", args.batch_size)
    rows = read_questions(args)
    check_texts([row["question"] for row in rows], "question")
    if world_size() > 1 and args.out is None:
        raise UserError("Several processes need --out FILE: their answers would be printed in disorder.")
    if args.out is not None:
        begin_share(Path(args.out), rank(), world_size())
    mine = rows[rank() :: world_size()]
    for image in {row["image"] for row in mine}:
        existing(image)
    if args.image is not None:
        load_image(args.image)  # before the model, so that what is no image shows at once
    pipe = load_pipeline(args)
    images, questions = ([row[key] for row in mine] for key in ("image", "question"))
    answers = pipe.answer(images, questions, args.max_new_tokens, args.batch_size)
    done = [{**row, "answer": answer} for row, answer in zip(mine, answers)]
    if args.out is None:
        print("\n".join(row["answer"] for row in done))
    else:
        write_share(Path(args.out), done, rank(), world_size())


def read_questions(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows with image and question.

    Raises:
        UserError: there are none, or a line of the file lacks one of them.
    """
    if (args.questions is None) == (args.image is None):
        raise UserError('Give IMAGE and "QUESTION" ..., or --questions FILE.')
    if args.questions is None:
        if not args.words:
            raise UserError('There is nothing to answer: give a "QUESTION" behind the image.')
        return [{"image": args.image, "question": question} for question in args.words]
    path = existing(args.questions)
    if not path.is_file():
        raise UserError(f"--questions {path} is a folder; it must be a file of JSON lines.")
    rows = read_jsonl(path)
    for i, row in enumerate(rows):
        given = [row.get(key) for key in ("image", "question")] if isinstance(row, dict) else [None]
        if not all(isinstance(text, str) for text in given):
            raise UserError(f"{path}, row {i}, is {row!r}; it must hold image and question, two texts.")
    if not rows:
        raise UserError(f"{path} holds no question.")
    return [{**row, "image": str(path.parent / row["image"])} for row in rows]


def begin_share(out: Path, rank: int, world: int) -> None:
    """Forget the share that a launch which was killed has left: its answers are to other questions.

    Raises:
        UserError: `out` cannot be a file.
    """
    if os.path.isdir(out):
        raise UserError(f"--out {out} is a folder; it must be a file of JSON lines.")
    make_folder(out.parent)
    shares_of(out, world)[rank].unlink(missing_ok=True)


def shares_of(out: Path, world: int) -> list[Path]:
    """Where each process leaves its rows."""
    return [out.with_name(f".{out.name}.{i}-of-{world}") for i in range(world)]


def write_share(out: Path, rows: list[dict[str, Any]], rank: int, world: int) -> None:
    """Write one process's rows; the one that finds all shares there joins them in the questions' order."""
    if world == 1:
        write_jsonl(out, rows)
        return
    parts = shares_of(out, world)
    write_jsonl(parts[rank], rows)
    try:
        shares = [read_jsonl(part) for part in parts]
    except UserError:  # another one is still at work, or has joined them already
        return
    whole = [shares[i % world][i // world] for i in range(sum(map(len, shares)))]
    write_jsonl(out, whole)
    for part in parts:
        part.unlink(missing_ok=True)
