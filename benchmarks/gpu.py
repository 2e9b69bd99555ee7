"""Everything that a GPU has to say about this project, in one run: correctness first, then speed.

    python benchmarks/gpu.py --out OUT --seconds 600      # on a CUDA device; nothing is downloaded
    python benchmarks/gpu.py --out OUT --dry-run          # all of it, at toy sizes on an emulated device
    python benchmarks/gpu.py --table OUT/summary.json     # the Markdown table of a run, for the README

Parts run in this order, each in a process of its own that is killed at its limit: a share of the seconds that
are left, so that what one part saves goes to the next ones. OUT/summary.json holds the rows of all finished
parts after each of them, OUT/PART.json those of the running part after each row: whatever kills the run
leaves what it has measured. OUT/table.md is the table, OUT/log.txt the output of all parts.

The exit status is 0 whatever failed inside: summary.json lists failed rows and parts under "failures", and
the last line of the output counts them. 2 = the run did not start (arguments, no device).

Not run on a GPU yet: tests/device runs it on the emulated device.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
EMULATED = ROOT / "tests" / "device" / "on_emulated_cuda.py"  # runs a script on the emulated device
RESERVE = 8.0  # seconds for the summary
START = time.monotonic()


class Part(NamedTuple):
    """A part of the run: its module in gpu_parts/ and its share of the time."""

    module: str
    seconds: float  # of a run of 600
    least: float  # not started with less


PARTS = {
    "facts": Part("facts", 15, 5),
    "tests": Part("gpu_tests", 75, 20),
    "shipped": Part("shipped", 40, 15),
    "codes": Part("codes", 25, 15),
    "engine": Part("engine", 75, 20),
    "tokenizer": Part("tokenizer", 130, 30),
    "mllm": Part("mllm", 130, 30),
    "generation": Part("generation", 100, 30),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--seconds", type=float, default=600, help="for everything (default: 600)")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, metavar="PART",
                        help=f"of {', '.join(PARTS)} (default: all)")  # fmt: skip
    parser.add_argument("--toy", action="store_true", help="tiny sizes, untimed; on a CPU if there is no GPU")
    parser.add_argument("--dry-run", action="store_true", help="--toy on the emulated CUDA device")
    parser.add_argument("--table", type=Path, metavar="SUMMARY", help="print the table of a finished run")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # for the process of one part
    args = parser.parse_args()
    if args.table:
        print_table(parser, args.table)
        return
    if args.out is None:
        parser.error("--out DIR is required")
    if args.part:
        run_part(args)
        return
    if not 30 <= args.seconds < float("inf"):
        parser.error(f"--seconds is {args.seconds:g}; it must be 30 or more")
    if not (args.out.is_dir() or not args.out.exists()):
        parser.error(f"--out {args.out} is not a folder")
    if not args.toy and not args.dry_run and not cuda_available():
        parser.error("there is no CUDA device: --dry-run goes through all parts without one")
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` ends the running part
    failures = run_all(args)
    print(f"{len(failures)} failures" + "".join(f"\n  {failure}" for failure in failures))


def print_table(parser: argparse.ArgumentParser, summary: Path) -> None:
    """Print the table of a finished run."""
    from gpu_parts.table import table

    try:
        print(table(json.loads(summary.read_text())))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        parser.error(f"--table {summary} is not the summary.json of a run")


def cuda_available() -> bool:
    """True if torch finds a CUDA device; asked in another process, because a CUDA context takes memory."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code]).returncode == 0


def run_part(args: argparse.Namespace) -> None:
    """Run one part in this process."""
    import importlib

    import torch
    from gpu_parts.report import Report

    part, toy = PARTS[args.part], args.toy or args.dry_run
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    # the limit counts from the start of the process: imports take seconds of it
    left = args.seconds - (time.monotonic() - START)
    report = Report(args.part, args.out, device, left, toy)
    importlib.import_module(f"gpu_parts.{part.module}").run(report)


# ---- all parts ---------------------------------------------------------------------------------------------


def run_all(args: argparse.Namespace) -> list[str]:
    """Run the parts one after the other; returns the failures."""
    from gpu_parts.table import table

    end = START + args.seconds - RESERVE
    summary: dict[str, Any] = {"about": about(args), "parts": {}, "failures": []}
    log = args.out / "log.txt"
    log.write_text("")
    for name in args.parts:
        # of an earlier run that was killed
        (args.out / f"{name}.json").unlink(missing_ok=True)
        limit = time_limit(name, args.parts, end - time.monotonic())
        if limit < PARTS[name].least and not (args.toy or args.dry_run):
            merge_part(summary, name, {"skipped": f"{limit:.0f} s left"}, args.out)
            continue
        print(f"{name} (limit {limit:.0f} s) ...", flush=True)
        try:
            ran = run_limited(part_command(name, args, limit), limit, log, part_environment())
        except BaseException:  # this process is being stopped: keep the rows of the part
            merge_part(summary, name, {"failed": "stopped from outside"}, args.out)
            (args.out / "table.md").write_text(table(summary))
            raise
        merge_part(summary, name, ran, args.out)
        (args.out / "table.md").write_text(table(summary))
    return summary["failures"]


def about(args: argparse.Namespace) -> dict[str, Any]:
    """What a reader must know of the run as a whole."""
    words = {"device": "the emulated CUDA device", "timing": "dry run: no timing"} if args.dry_run else {}
    if args.toy and not args.dry_run:
        words = {"timing": "toy sizes: no timing"}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {**words, "seconds": args.seconds, "commit": commit.stdout.strip() or None,
            "started": time.strftime("%F %T")}  # fmt: skip


def time_limit(name: str, parts: Sequence[str], left: float) -> float:
    """Seconds for a part: its share of what is left, among the parts that follow."""
    following = [PARTS[other].seconds for other in parts[parts.index(name) :]]
    return max(left, 0.0) * following[0] / sum(following)


def part_command(name: str, args: argparse.Namespace, limit: float) -> list[str]:
    """The command of one part's process."""
    runner = [str(EMULATED)] if args.dry_run else []
    options = ["--part", name, "--out", str(args.out.resolve()), "--seconds", f"{limit:.1f}"]
    options += [flag for flag, on in (("--toy", args.toy), ("--dry-run", args.dry_run)) if on]
    return [sys.executable, *runner, str(Path(__file__).resolve()), *options]


def part_environment() -> dict[str, str]:
    """The environment of a part: imports from this checkout, no downloads, compiled kernels kept."""
    paths = [str(ROOT / "benchmarks"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(ROOT / "build" / "inductor"))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false", "TORCHINDUCTOR_CACHE_DIR": cache}  # fmt: skip


def run_limited(
    command: Sequence[str], limit: float, log: Path, environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """Run a command, append its output to `log`, kill it with its children at the limit.

    Returns:
        "seconds" and "rc", with "failed" and "last" (the last lines) if it failed or was killed.
    """
    start, position = time.monotonic(), log.stat().st_size if log.exists() else 0
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
        try:
            killed = False
            process.wait(limit)
        except subprocess.TimeoutExpired:
            killed = True
        finally:
            # its children, too: they would keep the device's memory
            kill_group(process)
    ran: dict[str, Any] = {"seconds": round(time.monotonic() - start, 1), "rc": process.returncode}
    if killed or process.returncode:
        reason = f"killed at its limit of {limit:.0f} s" if killed else f"exit status {process.returncode}"
        text = log.read_bytes()[position:].decode(errors="replace")
        ran |= {"failed": reason, "last": text.strip().splitlines()[-12:]}
    return ran


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a session, and all its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def merge_part(summary: dict[str, Any], name: str, ran: dict[str, Any], out: Path) -> None:
    """Move OUT/PART.json into the summary and write it."""
    file = out / f"{name}.json"
    rows: dict[str, Any] = {}
    if file.exists():
        try:
            rows = json.loads(file.read_text())
        except json.JSONDecodeError as error:  # killed while writing
            ran = {**ran, "failed": f"{file.name} is cut off: {error}"}
        file.unlink()
    summary["parts"][name] = {"ran": ran, "rows": rows}
    failed = [("", ran), *rows.items()]
    summary["failures"] += [
        f"{name}{': ' if row else ''}{row}: {x['failed']}" for row, x in failed if "failed" in x
    ]
    device = rows.get("device", {}).get("name")
    if device and "device" not in summary["about"]:
        summary["about"]["device"] = device
    temporary = out / "summary.json.part"
    temporary.write_text(json.dumps(summary, indent=1) + "\n")
    temporary.replace(out / "summary.json")


if __name__ == "__main__":
    main()
