"""`unitok eval run`: answer benchmarks with a model and score them; a killed run is resumed."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from open_unitok.core import distributed
from open_unitok.core.errors import UserError
from open_unitok.eval.core.benchmark import Benchmark, Option
from open_unitok.eval.core.harness import run_benchmark
from open_unitok.eval.registry import (
    BENCHMARKS,
    detect_benchmarks,
    find_benchmark,
    incomplete_benchmarks,
    options_of,
    select_options,
)
from open_unitok.eval.report.tables import result_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options, and those of every benchmark."""
    names = "; ".join(f"{name}: {benchmark.description}" for name, benchmark in BENCHMARKS.items())
    names = names.replace("%", "%%")  # argparse formats help texts
    parser.add_argument(
        "names", nargs="+", metavar="NAME", help=f"benchmarks, or `all` for those found in DATA ({names})"
    )
    parser.add_argument(
        "--model",
        required=True,
        help="a tokenizer or MLLM folder, or images of another system (a folder or .npz)",
    )
    parser.add_argument(
        "--data",
        required=True,
        help="the benchmark's folder as released, or a folder that contains NAME",
    )
    parser.add_argument("--out", required=True, help="answers and results go to OUT/NAME")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps (default: cpu)")
    parser.add_argument("--batch-size", type=int, help="samples per call of the model")
    add_benchmark_options(parser)


def add_benchmark_options(parser: argparse.ArgumentParser, scoring_only: bool = False) -> None:
    """One flag per option of a benchmark; an option that is not given is absent from the namespace."""
    group = parser.add_argument_group("options of benchmarks")
    for name, option in options_of(BENCHMARKS.values(), scoring_only).items():
        kind: dict[str, Any] = {"type": option.type}
        if option.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(flag, default=argparse.SUPPRESS, help=_help_of(option), **kind)


def _help_of(option: Option) -> str:
    """The option's line, its default, and the benchmarks that have it unless all do."""
    # one flag serves several benchmarks, so the help lists them
    owners = [b for b in BENCHMARKS.values() if option.name in {o.name for o in b.all_options}]
    if option.name == "scorer":
        variants = [f"{b.name}: {', '.join(b.scorers)}" for b in owners if len(b.scorers) > 1]
        return f"{option.help}, the first is the default ({'; '.join(variants)})"
    default = f" (default: {option.default})" if option.default not in (None, "") else ""
    names = "" if len(owners) == len(BENCHMARKS) else f" [{', '.join(b.name for b in owners)}]"
    return (option.help + default + names).replace("%", "%%")


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of benchmarks that the command line gives."""
    return {name: getattr(args, name) for name in options_of(BENCHMARKS.values()) if hasattr(args, name)}


def run(args: argparse.Namespace) -> None:
    """Run the benchmarks and print one table for each."""
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"--batch-size is {args.batch_size}; it must be at least 1.")
    # all options are validated before the model is loaded, which takes minutes for a large one
    everything = args.names == ["all"]
    names = detect_benchmarks(args.data) if everything else args.names
    benchmarks = [find_benchmark(name) for name in names]
    options = select_options(given_options(args), benchmarks)
    for benchmark in benchmarks:
        benchmark.resolve(options[benchmark.name])  # errors come before the model is loaded
    with _joined_ranks(args.device) as (device, section):
        with section():
            model = load_model(args.model, device, benchmarks, given_options(args), options)
            benchmarks = _supported(benchmarks, model, everything)
        unfinished = incomplete_benchmarks(args.data) if everything else []
        for benchmark in benchmarks:
            out = Path(args.out) / benchmark.name
            try:
                with section():
                    result = run_benchmark(
                        benchmark, model, args.data, out, options[benchmark.name], args.batch_size
                    )
            except UserError as error:
                if len(benchmarks) == 1 and not unfinished:
                    raise
                # the others are run all the same
                unfinished.append(f"{benchmark.name}: {str(error).removeprefix(f'{benchmark.name}: ')}")
                continue
            if result:
                print(result_table(result))
        if unfinished:
            # a line each: some name what to download
            gap = "\n  " if len(unfinished) > 1 else " "
            raise UserError(gap.join([f"{len(unfinished)} benchmarks have no result.", *unfinished]))


def _supported(benchmarks: list[Benchmark], model: Any, everything: bool) -> list[Benchmark]:
    """The benchmarks that the model can run; with `all` the others are named and left out."""
    kept, problems = [], []
    for benchmark in benchmarks:
        try:
            model.check_needs(benchmark.needs, benchmark.name)
            kept.append(benchmark)
        except UserError as error:
            problems.append(error)
    if problems and not (everything and kept):
        raise problems[0]
    if problems and distributed.is_main():
        names = ", ".join(b.name for b in benchmarks if b not in kept)
        print(f"Not run, since --model is of another kind: {names}.", file=sys.stderr)
    return kept


def load_model(
    path: str,
    device: str,
    benchmarks: list[Benchmark],
    given: dict[str, Any],
    options: dict[str, dict[str, Any]],
) -> Any:
    """The model or external images; the model's sampling settings are added to `options`."""
    from open_unitok.eval.core.generated_images import SAMPLING_KEYS, ExternalImages, holds_external_images
    from open_unitok.eval.core.model import Model

    is_model = (Path(path) / "config.json").exists()  # cheap test first: the other scans the folder
    if not is_model and holds_external_images(path):
        model = ExternalImages(Path(path), device, given.get("grid"))
    elif "grid" in given:
        raise UserError("--grid is for external images, but --model is a model.")
    else:
        sampling = {name: given[name] for name in SAMPLING_KEYS if name in given}
        model = Model(path, device, given.get("dtype", "float32"), given.get("crop"), sampling)
        # run.json must record the settings in use, also those from sampling.json
        for benchmark in benchmarks:
            if benchmark.needs == "generator":
                options[benchmark.name] |= {key: getattr(model.sampling, key) for key in SAMPLING_KEYS}
    return model


@contextlib.contextmanager
def _joined_ranks(device: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Join the ranks of a launch; yields this rank's device, and the sections that fail on all ranks or none.

    An error is printed by the main rank alone.
    """
    if distributed.world_size() == 1:
        yield device, contextlib.nullcontext
        return
    import torch.distributed as dist

    try:
        store, rank, world_size = next(dist.rendezvous("env://"))
    except ValueError as error:
        raise UserError(
            f"WORLD_SIZE is {distributed.world_size()}, but the ranks cannot be joined: {error}. Launch with "
            "torchrun, or unset RANK and WORLD_SIZE."
        ) from error
    guard = distributed.RankGuard.current = distributed.RankGuard(store, rank, world_size)
    code = 0
    try:
        yield f"cuda:{distributed.local_rank()}" if device == "cuda" else device, guard.section
    except UserError as error:
        # every rank has the error, see RankGuard
        code = 2
        if distributed.is_main():
            print(f"unitok: error: {error}", file=sys.stderr)
    finally:
        distributed.RankGuard.current = None
    sys.stdout.flush()
    sys.stderr.flush()
    # a launcher ends all ranks when the first one fails: the main rank has printed by now
    guard.close()
    if code:
        sys.exit(code)
