"""Speed: training steps of the MLLM on packed rows: tokens/s, MFU and memory."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from open_unitok.mllm.attention import VARLEN
from open_unitok.training.core import deepspeed_engine
from open_unitok.training.core.options import EngineOptions

from .budgets import beside_budget
from .plain_engine import use_plain_engine
from .report import Report, count_waits, load_script

ROWS, LENGTH = 4, 2048
# model, further options of mllm_training.py
CASES = [
    ("1b", ["--attention", VARLEN]),
    ("7b_lora", ["--attention", VARLEN]),
    ("1b", ["--attention", "sdpa"]),
    ("7b_lora", ["--attention", "sdpa"]),
    ("1b", ["--attention", VARLEN, "--compile"]),
    ("7b_lora", ["--attention", VARLEN, "--compile"]),
]
TOY_CASES = {"1b": "tiny", "7b_lora": "tiny_lora"}


def run(report: Report) -> None:
    """A row per case."""
    engine = use_plain_engine(report)
    device = torch.device(report.device)
    if not report.row("engine", lambda: {"engine": engine, "device": str(start())}):
        return
    for case, options in CASES:
        need = 45.0 if "--compile" in options else 12.0
        report.row(describe(case, options), measure, report, case, options, device, need=need)


def describe(case: str, options: list[str]) -> str:
    """The name of a row: "1b, 4 x 2048, sdpa"."""
    words = [option.removeprefix("--") for option in options if option != "--attention"]
    return ", ".join([case, f"{ROWS} x {LENGTH}", *words])


def start() -> torch.device:
    """Start the engine's process group."""
    return deepspeed_engine.init_distributed(EngineOptions(), 0)


@contextlib.contextmanager
def collect_waits(device: str, into: list[str]) -> Iterator[None]:
    """Add what makes the host wait to a list."""
    with count_waits(device) as waits:
        yield
    into += waits


def measure(report: Report, case: str, options: list[str], device: torch.device) -> dict[str, Any]:
    """The record of mllm_training.py, without its times in a toy run."""
    script = load_script("mllm_training")
    rows, length, steps = (2, 192, 1) if report.toy else (ROWS, LENGTH, 8)
    name = TOY_CASES[case] if report.toy else case
    sizes = ["--rows", rows, "--length", length, "--steps", steps, "--warmup", 1 if report.toy else 3]
    args = script.make_parser().parse_args([*map(str, sizes), *options])
    waits: list[str] = []
    record = script.measure(name, args, device, collect_waits(report.device, waits))
    masked = "" if VARLEN in options else ", with a mask"
    record |= beside_budget(f"MLLM train step{masked}", len(waits)) | {"where": sorted(set(waits))[:20]}
    clocked = {key: value for key, value in record.items() if key in script.MEASURED}
    return {key: value for key, value in record.items() if key not in clocked} | report.measured(**clocked)
