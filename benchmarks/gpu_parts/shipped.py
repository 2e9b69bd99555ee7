"""Correctness: every way to use the shipped model, and how often the host waits for the device."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import measure_seconds

from open_unitok import Pipeline
from open_unitok.cli.main import main as unitok
from open_unitok.generation import Sampling

from .budgets import beside_budget
from .data import square_image, write_tar
from .report import Report, count_waits

MODEL = "scenes"
PROMPTS = ["a red circle", "two blue squares"]
GREEDY, SAMPLED = Sampling(guidance=3.0, greedy=True), Sampling(guidance=3.0, temperature=0.3)


def run(report: Report) -> None:
    """A row per use of the model, and the share of codes that equal the CPU's."""
    pipes: dict[str, Pipeline] = {}
    images = [square_image(i, 64)[0] for i in range(2)]
    questions = ["What is this?", "Which colour has the square?"]

    def load() -> dict[str, Any]:
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            pipes[name] = Pipeline.from_pretrained(MODEL, device=report.device, dtype=dtype)
        return {"backend": pipes["bf16"].chosen_backend}

    if not report.row("load", load):
        return
    pipe = pipes["bf16"]
    uses: dict[str, Callable[[], Any]] = {
        "generate": lambda: pipe.generate(PROMPTS, SAMPLED, seed=1),
        "stream": lambda: list(pipe.stream(PROMPTS[:1], SAMPLED, seed=1)),
        "generate with prefix": lambda: pipe.generate(PROMPTS, SAMPLED, prefix=pipe.first_rows(images, 2)),
        "answer": lambda: pipe.answer(images, questions, 8),
        "answer sampled": lambda: pipe.answer(images, questions, 8, seed=3, do_sample=True, temperature=0.7),
        "answer_stream": lambda: list(pipe.answer_stream(images, questions, 8)),
        "chat": lambda: pipe.chat("Which colour?", images[0], [("What is this?", "a square")], 8),
        "chat_stream": lambda: list(pipe.chat_stream("Which colour?", images[0], (), 8)),
        "reconstruct": lambda: pipe.reconstruct(images),
    }
    for name, work in uses.items():
        report.row(name, use, report, name, work)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "images").mkdir()
        for number in range(8):
            square_image(number, 64)[0].save(root / "images" / f"{number}.png")
        write_tar(root / "a.tar", 8, 64)
        extract = ["extract-codes", "--tokenizer", MODEL, "--data", root / "a.tar", "--out", root / "codes",
                   "--device", report.device, "--batch-size", "4"]  # fmt: skip
        evaluate = ["eval", "run", "reconstruction", "--model", MODEL, "--data", root / "images",
                    "--out", root / "eval", "--device", report.device, "--batch-size", "4"]  # fmt: skip
        report.row("extract-codes", use, report, "extract-codes", lambda: unitok(list(map(str, extract))))
        command = "eval reconstruction"
        report.row(command, use, report, command, lambda: unitok(list(map(str, evaluate))))
    report.row("codes of images generated on the CPU and here", same_codes, pipes["fp32"])


def use(report: Report, name: str, work: Callable[[], Any]) -> dict[str, Any]:
    """Waits of the first call, and seconds of the second one; what the call returns must not be empty."""
    with count_waits(report.device) as waits:
        found = work()
    if isinstance(found, list) and not found:
        raise RuntimeError("it returned nothing")
    row: dict[str, Any] = beside_budget(name, len(waits))
    if isinstance(found, str | list) and all(isinstance(text, str) for text in found):
        row["text"] = found
    if found is not None:  # commands refuse to write the same results again
        row |= report.measured(seconds=measure_seconds(work, report.device))
    return row


def same_codes(pipe: Pipeline) -> dict[str, Any]:
    """Share of greedy fp32 codes that the CPU generates too; one difference changes all later codes."""
    here = pipe.generate_codes(PROMPTS, GREEDY).cpu()
    there = Pipeline.from_pretrained(MODEL, dtype=torch.float32, backend="torch").generate_codes(
        PROMPTS, GREEDY
    )
    return {"equal": (here == there).float().mean().item(), "images": len(there)}
