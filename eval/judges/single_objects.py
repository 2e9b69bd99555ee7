"""Scenes of one object: judging and scoring of prompts for exactly one object of a shape and colour."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..core.benchmark import Record, Task
from ..core.judge_pass import ExternalFindings
from . import ceiling, detections
from .detections import Verdict


def judge_single_object(prompt: Record, detected: Record) -> Verdict:
    """Correct: exactly one object, with the prompt's "class" (its shape) and "color"."""
    names = [name for name, rows in detected["detections"].items() for _ in rows]
    if len(names) != 1:
        return Verdict(False, f"expected one object, found {len(names)}", {})
    colour = (detected.get("colors", {}).get(names[0]) or [""])[0]
    if (names[0], colour) != (prompt["class"], prompt["color"]):
        return Verdict(False, f"found a {colour} {names[0]}", {names[0]: 1})
    return Verdict(True, "", {names[0]: 1})


def only_box(detected: Record) -> list[float]:
    """x0, y0, x1, y1, score of the only object of an image."""
    return next(row for rows in detected["detections"].values() for row in rows)


def judge_images(
    task: Task,
    records: dict[int, Record],
    folder: Path,
    judge: Callable[..., Verdict],
    group: str,
    *more: Any,
) -> tuple[list[Record], ExternalFindings]:
    """The records of `scores.jsonl`, and the detections that they were judged by.

    Args:
        judge: (prompt, detections of the image, *more) -> verdict.
        group: the key of a prompt that groups it.
    """
    prompts, owners = task.truth["prompts"], task.truth["owners"]
    found, per_sample = detections.read_detections(task, records, folder), []
    for sample in task.samples:
        prompt = prompts[owners[sample.index]]
        detected = None if sample.malformed else found.by_index.get(sample.index)
        verdict = detections.verdict_on(judge, prompt, detected, *more)
        held_out = prompt.get("held_out", False)
        record = ceiling.object_record(sample, records, verdict.correct, verdict.reason, held_out)
        per_sample.append(record | {"owner": owners[sample.index], "group": prompt[group]})
    return per_sample, found
