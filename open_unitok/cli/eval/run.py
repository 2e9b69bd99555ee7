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

_KINDS = {
    "tokenizer": "a tokenizer",
    "mllm": "questions about images",
    "generator": "generated images",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options, and those of every benchmark."""
    parser.usage = f"{parser.prog} NAME [NAME ...] --model MODEL --data DATA --out OUT [options]"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _list_of_benchmarks()
    parser.add_argument(
        "names", nargs="+", metavar="NAME", help="benchmarks, listed below; `all`: those found in DATA"
    )
    parser.add_argument(
        "--model",
        required=True,
        help="a tokenizer or MLLM folder, or images of another system (a folder or .npz)",
    )
    parser.add_argument(
        "--data",
        required=True,
        help="the benchmark's folder as released, a file of it, or a folder that contains NAME",
    )
    parser.add_argument("--out", required=True, help="answers and results go to OUT/NAME")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps (default: cpu)")
    parser.add_argument("--batch-size", metavar="N", type=int, help="samples per call of the model")
    add_benchmark_options(parser)


def _list_of_benchmarks() -> str:
    """A line per benchmark, by what it needs."""
    width = max(map(len, BENCHMARKS))
    lines = []
    for needs, title in _KINDS.items():
        lines += ["", f"benchmarks of {title}:"]
        lines += [f"  {b.name:<{width}}  {b.description}" for b in BENCHMARKS.values() if b.needs == needs]
    lines += ["", "eval/README.md: the files that each one reads, its scorers, and what is comparable."]
    return "\n".join(lines[1:])


def add_benchmark_options(parser: argparse.ArgumentParser, scoring_only: bool = False) -> None:
    """One flag per option of a benchmark; an option that is not given is absent from the namespace."""
    groups: dict[str, Any] = {}
    for name, option in options_of(BENCHMARKS.values(), scoring_only).items():
        kind: dict[str, Any] = {"type": option.type, "metavar": _metavar(option)}
        if option.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        # one flag serves several benchmarks: the help lists them
        owners = [b for b in BENCHMARKS.values() if option.name in {o.name for o in b.all_options}]
        kinds = {b.needs for b in owners}
        several = "options of several kinds of benchmarks"
        title = f"options of {_KINDS[kinds.pop()]}" if len(kinds) == 1 else several
        group = groups.get(title) or groups.setdefault(title, parser.add_argument_group(title))
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(flag, default=argparse.SUPPRESS, help=_help_of(option, owners), **kind)


def _metavar(option: Option) -> str:
    """The word for an option's value."""
    if option.choices:
        return "|".join(option.choices)
    if option.type in (int, float):
        return "N"
    last = option.name.rpartition("_")[2]
    return {"weights": "FILE", "model": "FOLDER", "replay": "FILE", "url": "URL"}.get(last, "NAME")


def _help_of(option: Option, owners: list[Benchmark]) -> str:
    """The option's line, its default, and the benchmarks that have it unless all of a kind do."""
    if option.name == "scorer":
        variants: dict[tuple[str, ...], list[str]] = {}
        for b in owners:
            variants.setdefault(b.scorers, []).append(b.name)
        lists = [f"{', '.join(names)}: {', '.join(s)}" for s, names in variants.items() if len(s) > 1]
        return f"{option.help}, the first is the default ({'; '.join(lists)})"
    default = f" (default: {option.default})" if option.default not in (None, "") else ""
    named = []
    for needs, title in _KINDS.items():
        own, every = ([b.name for b in side if b.needs == needs] for side in (owners, BENCHMARKS.values()))
        if own == every:
            # the group's title says so already
            named += [title] * (len(own) < len(owners))
        elif own:
            named += own
    names = f" [{', '.join(named)}]" if named and len(owners) < len(BENCHMARKS) else ""
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
    from open_unitok.core.devices import set_device
    from open_unitok.eval.core.generated_images import SAMPLING_KEYS, ExternalImages, holds_external_images
    from open_unitok.eval.core.model import Model

    set_device(device)  # external images have judges, which run there too
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
