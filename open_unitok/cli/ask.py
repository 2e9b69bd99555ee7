"""`unitok ask`: answer questions about an image, or a file of questions about many images."""

import argparse
from pathlib import Path

from open_unitok.core.distributed import rank, world_size
from open_unitok.core.errors import UserError
from open_unitok.core.files import existing

from .options import add_model_options, at_least_one, load_pipeline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """IMAGE "QUESTION" ... --model M, or --questions FILE --out FILE --model M."""
    parser.add_argument("image", metavar="IMAGE", nargs="?", help="path of the image")
    parser.add_argument(
        "words", metavar="QUESTION", nargs="*", help="question; several are answered one per line"
    )
    parser.add_argument(
        "--questions",
        metavar="FILE",
        help='JSON lines {"image": PATH, "question": TEXT}, PATHs relative to FILE',
    )
    parser.add_argument("--out", metavar="FILE", help="write JSON lines with image, question and answer")
    add_model_options(parser)
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, help="longest answer in tokens (default: 64)"
    )
    parser.add_argument("--batch-size", type=int, default=128, help="questions per batch (default: 128)")


def run(args: argparse.Namespace) -> None:
    """Print or write the answers; under torchrun, every process answers its share."""
    from open_unitok.generation.question_files import prepare_answer_file, read_questions, write_answers
    from open_unitok.generation.validation import check_texts
    from open_unitok.tokenizer.images import load_image

    # all checks come before the model, which takes seconds to load
    at_least_one(args, "max_new_tokens", "batch_size")
    if (args.questions is None) == (args.image is None):
        raise UserError('Give IMAGE and "QUESTION" ..., or --questions FILE.')
    if args.image is not None and not args.words:
        raise UserError('No question: give a "QUESTION" after the image.')
    if world_size() > 1 and args.out is None:
        raise UserError("Several processes need --out FILE: they would print their answers out of order.")
    if args.questions is not None:
        records = read_questions(args.questions)
    else:
        records = [{"image": args.image, "question": question} for question in args.words]
    check_texts([record["question"] for record in records], "question")
    if args.out is not None:
        prepare_answer_file(Path(args.out), rank(), world_size())
    # strided, so that ranks get equal shares
    share = records[rank() :: world_size()]
    # report missing or broken images before the model loads
    for image in {record["image"] for record in share}:
        existing(image)
    if args.image is not None:
        load_image(args.image)
    # write_answers merges the shares of all ranks in the order of the questions
    images, questions = ([record[key] for record in share] for key in ("image", "question"))
    answers = load_pipeline(args).answer(images, questions, args.max_new_tokens, args.batch_size)
    if args.out is None:
        print("\n".join(answers))
    else:
        answered = [{**record, "answer": answer} for record, answer in zip(share, answers)]
        write_answers(Path(args.out), answered, rank(), world_size())
