"""GenEval's scorer on detections: does an image show the objects, number, colours and places of its prompt.

A detection file line holds boxes and colours per class name, whatever detector wrote them:
`{"detections": {class: [[x0, y0, x1, y1, score], ...]}, "colors": {class: [colour of each box]}}`.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing, read_jsonl_lenient

from ..core.annotations import entry, of_kind, text_of
from ..core.harness import Row
from ..understanding.vqav2 import mean

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")


@dataclass(frozen=True)
class Settings:
    """The published thresholds; boxes are kept where float32(score) > float32(threshold)."""

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0  # 1 switches the suppression of overlapping boxes off
    position_threshold: float = 0.1
    colours: tuple[str, ...] = COLOURS


class Verdict(NamedTuple):
    """One image's result; `reason` is empty where it is correct, `kept` counts the boxes used per class."""

    correct: bool
    reason: str
    kept: dict[str, int]


class Found(NamedTuple):
    """One kept box (x0, y0, x1, y1, score) in float32 and its colour."""

    box: np.ndarray
    colour: str


def load(data: str | Path) -> list[dict[str, Any]]:
    """Read `evaluation_metadata.jsonl` from `data`, `data/test/geneval` or `data/geneval`.

    A malformed line becomes a prompt that is "broken" with the reason; its tag, where it cannot be read, is
    that of the line before, since the released file goes tag by tag.

    Raises:
        UserError: no such file, or an empty one, or one of another kind.
    """
    data = existing(data)
    folders = (data, data / "test" / "geneval", data / "geneval", data / "prompts")
    path = next(
        (f / "evaluation_metadata.jsonl" for f in folders if (f / "evaluation_metadata.jsonl").exists()), None
    )
    if path is None:
        raise UserError(f"{data}: no evaluation_metadata.jsonl here, in geneval/ or in test/geneval/.")
    rows = read_jsonl_lenient(path)
    tags = [row["tag"] for row in rows if isinstance(row, dict) and row.get("tag") in TAGS]
    tag = tags[0] if tags else TAGS[0]
    for i, row in enumerate(rows):
        tag = row["tag"] if isinstance(row, dict) and row.get("tag") in TAGS else tag
        try:
            check_metadata(row, f"{path}, prompt {i + 1}")
        except UserError as error:
            rows[i] = {"tag": tag, "prompt": "", "include": [], "broken": str(error)}
    broken = [row["broken"] for row in rows if "broken" in row]
    if not rows or len(broken) > len(rows) / 2:
        raise UserError(f"{path} is {f'no list of prompts: {broken[0]}' if rows else 'empty.'}")
    return rows


def check_metadata(row: Any, where: str) -> None:
    """Raise UserError with the place where a prompt's description is not GenEval's."""
    text_of(row, "prompt", where)
    if entry(row, "tag", where) not in TAGS:
        raise UserError(f"{where}: tag is {row['tag']!r}; allowed: {', '.join(TAGS)}.")
    if not of_kind(list, entry(row, "include", where), f"{where}, include"):
        raise UserError(f"{where}: include is empty, so that every image would be right.")
    for key in ("include", "exclude"):
        for i, clause in enumerate(of_kind(list, row.get(key, []), f"{where}, {key}")):
            place = f"{where}, {key}[{i}]"
            text_of(clause, "class", place)
            if not isinstance(entry(clause, "count", place), int):
                raise UserError(f"{place}: count is {clause['count']!r}; expected a whole number.")
            if key == "include" and "position" in clause:
                relation = clause["position"]
                if not isinstance(relation, list) or len(relation) != 2 or not isinstance(relation[1], int):
                    raise UserError(f"{place}: position is {relation!r}; expected [relation, clause number].")
                if not 0 <= relation[1] < i:
                    raise UserError(f"{place}: position names clause {relation[1]}, not one before.")


def check_detections(row: Any, where: str) -> Row:
    """What a detector found in an image; UserError where boxes or colours are not as they should be."""
    colours = of_kind(dict, row.get("colors", {}), f"{where}, colors")
    for name, boxes in of_kind(dict, entry(row, "detections", where), f"{where}, detections").items():
        try:
            count = len(np.asarray(boxes, dtype=np.float32).reshape(-1, 5))
        except (ValueError, TypeError) as error:
            raise UserError(f"{where}: boxes of {name!r} must be [x0, y0, x1, y1, score]: {error}") from error
        named = of_kind(list, colours.get(name) or [""] * count, f"{where}, colors of {name!r}")
        if len(named) != count:
            raise UserError(f"{where}: detections of {name!r}: {count} boxes, but {len(named)} colours.")
    return row


def judge(metadata: dict[str, Any], seen: dict[str, Any], settings: Settings = Settings()) -> Verdict:
    """Compare one image's detections with its prompt's description; the wording of reasons is GenEval's."""
    kept = keep(metadata["tag"], seen, settings)
    reasons: list[str] = []
    targets: list[list[Found] | None] = []  # what each clause matched; None where it failed
    for clause in metadata.get("include", ()):
        found = kept.get(clause["class"], [])[: clause["count"]]
        failure = clause_failure(clause, found, targets, settings)
        if failure:
            reasons.append(failure)
        targets.append(None if failure else found)
    for clause in metadata.get("exclude", ()):
        count = len(kept.get(clause["class"], []))
        if count >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {count}")
    return Verdict(not reasons, "\n".join(reasons), {c: len(f) for c, f in kept.items()})


def clause_failure(
    clause: dict[str, Any], found: Sequence[Found], targets: Sequence[list[Found] | None], settings: Settings
) -> str:
    """Why `found` does not satisfy an include clause; empty if it does."""
    name, count = clause["class"], clause["count"]
    if len(found) < count:
        return f"expected {name}>={count}, found {len(found)}"
    if "color" in clause:
        colours = [f.colour for f in found]
        right = colours.count(clause["color"])
        if right < count:
            listing = ", ".join(f"{colours.count(c)} {c}" for c in settings.colours if c in colours)
            return (
                f"expected {clause['color']} {name}>={count}, found {right} {clause['color']}; and {listing}"
            )
    if "position" in clause:
        relation, index = clause["position"]
        target = targets[index]
        if target is None:
            return f"no target for {name} to be {relation}"
        for one in found:
            for other in target:
                there = relations(one.box, other.box, settings.position_threshold)
                if relation not in there:
                    return f"expected {name} {relation} target, found {' and '.join(there)} target"
    return ""


def keep(tag: str, seen: dict[str, Any], settings: Settings) -> dict[str, list[Found]]:
    """Per class the boxes above the threshold, best first, at most `max_objects`, overlaps suppressed."""
    threshold = np.float32(settings.counting_threshold if tag == "counting" else settings.threshold)
    kept = {}
    for name, rows in seen["detections"].items():
        boxes = np.asarray(rows, dtype=np.float32).reshape(-1, 5)
        colours = seen.get("colors", {}).get(name) or [""] * len(boxes)
        if len(colours) != len(boxes):
            raise UserError(f"detections of {name!r}: {len(boxes)} boxes, but {len(colours)} colours.")
        order = np.argsort(boxes[:, 4], kind="stable")[::-1]
        best = [Found(boxes[i], colours[i]) for i in order if boxes[i, 4] > threshold][: settings.max_objects]
        if settings.max_overlap < 1:
            best = suppress(best, settings.max_overlap)
        if best:
            kept[name] = best
    return kept


def suppress(found: Iterable[Found], max_overlap: float) -> list[Found]:
    """Greedy: a box stays if it overlaps no better one by `max_overlap` or more."""
    result: list[Found] = []
    for one in found:
        if all(overlap(one.box, other.box) < max_overlap for other in result):
            result.append(one)
    return result


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boxes whose far corner is a pixel of theirs."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    sides = np.maximum(0, np.minimum(a[2:4], b[2:4]) - np.maximum(a[:2], b[:2]) + 1)
    shared = sides.prod()
    areas = (a[2:4] - a[:2] + 1).prod() + (b[2:4] - b[:2] + 1).prod()
    union = areas - shared
    return float(shared / union) if union else 0.0


def relations(a: np.ndarray, b: np.ndarray, threshold: float = 0.1) -> list[str]:
    """Where a stands as seen from b, in the order left, right, above, below; two of them may hold."""
    corners_a, corners_b = np.reshape(a[:4], (2, 2)), np.reshape(b[:4], (2, 2))
    offset = corners_a.mean(axis=0) - corners_b.mean(axis=0)
    sizes = np.abs(np.diff(corners_a, axis=0))[0] + np.abs(np.diff(corners_b, axis=0))[0]
    # Overlap is forgiven first; the direction is then measured against the raw offset's length.
    moved = np.maximum(np.abs(offset) - threshold * sizes, 0) * np.sign(offset)
    if np.all(np.abs(moved) < 1e-3):
        return []
    x, y = moved / np.linalg.norm(offset)
    words = (("left of", x < -0.5), ("right of", x > 0.5), ("above", y < -0.5), ("below", y > 0.5))
    return [word for word, holds in words if holds]


def summarise(
    metadata: Sequence[dict[str, Any]], correct: Sequence[bool], prompts: Sequence[int]
) -> dict[str, Any]:
    """Share of correct images per tag, their mean, of all images, of prompts with any correct image.

    `prompts[i]` is the prompt that image i was drawn from; images of one prompt are grouped by it.
    """
    by_tag: dict[str, list[float]] = defaultdict(list)
    by_prompt: dict[int, bool] = defaultdict(bool)
    for row, good, prompt in zip(metadata, correct, prompts):
        by_tag[row["tag"]].append(float(good))
        by_prompt[prompt] |= bool(good)
    per_tag = {tag: {"value": mean(by_tag[tag]), "n": len(by_tag[tag])} for tag in TAGS if tag in by_tag}
    return {
        "per_tag": per_tag,
        "overall": mean([t["value"] for t in per_tag.values()]),
        "images": mean([float(c) for c in correct]),
        "prompts": mean([float(c) for c in by_prompt.values()]),
    }
