"""`unitok eval score`: score answers on disk, of a run or of another program, without a model."""

import argparse
import tempfile
from pathlib import Path

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing
from open_unitok.eval.registry import BENCHMARKS, find_benchmark, select_options
from open_unitok.eval.report.tables import result_table

from .run import add_benchmark_options, given_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options, and the scoring options of every benchmark."""
    parser.usage = (
        f"{parser.prog} RUN [options]\n       {parser.prog} NAME --answers FILE --data DIR [options]"
    )
    parser.add_argument(
        "target",
        metavar="RUN or NAME",
        help="a run: the folder of one benchmark, or one of several; with --answers a benchmark",
    )
    parser.add_argument(
        "--partial", action="store_true", help="score an incomplete run; missing answers are wrong"
    )
    others = parser.add_argument_group(
        "answers of another program (LLaVA's answers; results of VQA, GQA, ScienceQA, SEED-Bench, MM-Vet; "
        "MMBench's upload; Your_Results of MME; results.jsonl of GenEval)"
    )
    others.add_argument("--answers", metavar="FILE", help="the answers: a file, or the folder Your_Results")
    others.add_argument("--data", metavar="DIR", help="the benchmark's questions, as for `unitok eval run`")
    others.add_argument("--out", metavar="DIR", help="keep results and scores per sample in DIR/NAME")
    others.add_argument("--split", default=argparse.SUPPRESS, help="split, if the data has several")
    others.add_argument(
        "--layout",
        default=argparse.SUPPRESS,
        help="layout of the data, if it has several (default: the fitting)",
    )
    add_benchmark_options(parser, scoring_only=True)


def run(args: argparse.Namespace) -> None:
    """Score and print one table per benchmark."""
    if args.answers:
        _score_others(args)
        return
    from open_unitok.eval.core.harness import read_run_metadata, score_run

    for name in ("data", "out", "split", "layout"):
        if getattr(args, name, None) is not None:
            raise UserError(f"--{name} is for the answers of another program: it needs --answers FILE.")
    folder = existing(args.target, _hint(args.target))
    if not folder.is_dir():
        raise UserError(f"{folder} is a file. {_hint(folder)}")
    folders = (
        [folder] if (folder / "run.json").exists() else sorted(p.parent for p in folder.glob("*/run.json"))
    )
    if not folders:
        raise UserError(f"{folder} holds no answers of `unitok eval run` (no run.json).")
    runs, failed = {}, []
    # one damaged or incomplete run does not hide the others
    for path in folders:
        try:
            # run.json, not the name of the folder: a run may have been renamed
            runs[path] = find_benchmark(read_run_metadata(path)["benchmark"])
        except UserError as error:
            failed.append(f"{path.name}: {error}")
    options = select_options(given_options(args), runs.values()) if runs else {}
    for path, benchmark in runs.items():
        try:
            print(result_table(score_run(benchmark, path, options[benchmark.name], args.partial)))
        except UserError as error:
            failed.append(f"{path.name}: {error}")
    if failed and len(folders) == 1:
        raise UserError(failed[0].partition(": ")[2])
    if failed:
        gap = "\n  " if len(failed) > 1 else " "
        raise UserError(gap.join([f"{len(failed)} of {len(folders)} runs have no result.", *failed]))


def _hint(target: str | Path) -> str:
    """How to score answers of another program, if that is what is meant."""
    name = str(target) if str(target) in BENCHMARKS else "NAME"
    return f"To score answers of another program: unitok eval score {name} --answers FILE --data DIR."


def _score_others(args: argparse.Namespace) -> None:
    """Score a file of answers; without --out only the table is kept."""
    from open_unitok.eval.answers.scoring import score_answers

    benchmark = find_benchmark(args.target)
    if not args.data:
        raise UserError("--answers needs --data DIR, the questions that they answer.")
    options = select_options(given_options(args), [benchmark])[benchmark.name]
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(args.out or temporary) / benchmark.name
        result = score_answers(benchmark, args.answers, args.data, out, options, args.partial)
        if not args.out:
            result.pop("submission", None)  # removed with the temporary folder
        print(result_table(result))
