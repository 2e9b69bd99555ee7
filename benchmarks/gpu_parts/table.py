"""The Markdown table of a run of benchmarks/gpu.py, for the README."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

NOTHING = "-"


class Line(NamedTuple):
    """One line of the table: a row of a part, and how it reads."""

    label: str
    part: str
    row: str
    text: Callable[[Mapping[str, Any]], str]
    aim: str = ""


def number(value: Any, digits: int = 3, unit: str = "") -> str:
    """A number with its unit; text as it is: a dry run has the reason for missing numbers in their place."""
    if value is None:
        return NOTHING
    return f"{value:.{digits}g}{unit}" if isinstance(value, int | float) else str(value)


def percent(value: Any) -> str:
    """A share in per cent."""
    return f"{100 * value:.1f} %" if isinstance(value, int | float) else number(value)


def over_floor(row: Mapping[str, Any]) -> str:
    """Milliseconds per token, over the bandwidth floor."""
    value = row["ms_per_token"]
    if not isinstance(value, int | float):
        return number(value)
    return f"{number(value, unit=' ms')} per token, {number(row['over_floor'])} of the floor"


def rate(row: Mapping[str, Any]) -> str:
    """Images or tokens per second, MFU and memory."""
    value = row.get("images_per_second", row.get("tokens_per_second"))
    if not isinstance(value, int | float):
        return number(value)
    unit = " images/s" if "images_per_second" in row else " tokens/s"
    memory = row.get("peak_gib", row.get("memory_gb"))
    parts = [number(value, 4, unit), f"MFU {percent(row.get('mfu'))}"]
    parts += [number(memory, 3, " GiB" if "peak_gib" in row else " GB")] if memory is not None else []
    return ", ".join(parts)


def answers(row: Mapping[str, Any]) -> str:
    """Answers per second and milliseconds per token."""
    value = row["answers_per_second"]
    return (
        f"{number(value)} answers/s, {over_floor(row)}" if isinstance(value, int | float) else number(value)
    )


def unequal(row: Mapping[str, Any]) -> str:
    """Unequal codes; those that rounding cannot explain."""
    text = f"{row['unequal']} of {row['of']} unequal, {row['unequal_beyond_margin']} beyond 1e-5"
    return f"{text}; largest gap {row['largest_gap']:.1e}" if row["unequal"] else text


def tests(row: Mapping[str, Any]) -> str:
    """Counts of the GPU tests."""
    return ", ".join(f"{row[f'tests_{outcome}']} {outcome}" for outcome in ("passed", "failed", "skipped"))


LINES = [
    Line("bf16 product of 8192 x 8192", "facts", "rates", lambda r: number(r["bf16_tflops"], 3, " TFLOP/s")),
    Line("reading memory", "facts", "rates", lambda r: number(r["read_gb_per_second"], 4, " GB/s")),
    Line("GPU tests", "tests", "all", tests, "0 failed"),
    Line("codes CPU = GPU, large, fp32", "codes", "vitamin_large, random weights, fp32, as torch starts",
         unequal, "0 beyond 1e-5"),
    Line("codes CPU = GPU, `scenes`, fp32", "codes", "scenes, fp32, as torch starts",
         unequal, "0 beyond 1e-5"),
    *(Line(f"7B text to image, batch {n}", "generation", f"images, batch {n}", over_floor, "1.4 of the floor")
      for n in (1, 16, 64)),
    *(Line(f"7B answers, batch {n}", "generation", f"answers, batch {n}", answers) for n in (1, 64)),
    Line("7B answers, batch 1, transformers", "generation", "answers, batch 1, transformers", answers),
    Line("tokenizer encode, bf16, 64 images", "tokenizer", "encode, bf16, 64 images", rate),
    Line("tokenizer decode, bf16, 64 images", "tokenizer", "decode, bf16, 64 images", rate),
    Line("tokenizer encode, fp32, 64 images", "tokenizer", "encode, fp32, 64 images", rate),
    *(Line(f"tokenizer {name}", "tokenizer", name, rate, "MFU 45 %") for name in (
        "train, 32 images", "train, 64 images, convolutions recomputed", "train, 64 images, all recomputed",
        "train, 64 images, convolutions recomputed, compiled")),
    *(Line(f"MLLM {name}", "mllm", name, rate, "MFU 50 %") for name in (
        "1b, 4 x 2048, unitok_varlen", "1b, 4 x 2048, sdpa", "1b, 4 x 2048, unitok_varlen, compile",
        "7b_lora, 4 x 2048, unitok_varlen", "7b_lora, 4 x 2048, unitok_varlen, compile")),
]  # fmt: skip


def table(summary: Mapping[str, Any]) -> str:
    """The table with device, date and failures; what did not run or failed is a "-" with the reason."""
    about, parts = summary["about"], summary["parts"]
    title = [str(about.get(key)) for key in ("device", "timing", "started") if about.get(key)]
    lines = [", ".join(title), "", "| | measured | aim |", "|---|---|---|"]
    lines += [f"| {line.label} | {cell(line, parts)} | {line.aim} |" for line in LINES]
    failures = summary["failures"]
    lines += ["", f"{len(failures)} failures." if failures else "No failures."]
    lines += [f"- {failure}" for failure in failures]
    return "\n".join(lines) + "\n"


def cell(line: Line, parts: Mapping[str, Any]) -> str:
    """What was measured, or why nothing was."""
    part = parts.get(line.part)
    if part is None:
        return f"{NOTHING} (not run)"
    row = part["rows"].get(line.row)
    if row is None:
        reason = part["ran"].get("failed") or part["ran"].get("skipped") or "no such row"
        return f"{NOTHING} ({reason})"
    for key in ("failed", "skipped"):
        if key in row:
            return f"{NOTHING} ({key}: {row[key]})"
    return line.text(row)
