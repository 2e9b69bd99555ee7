"""GenEval: does an image show the objects, number, colours and positions of its prompt (arXiv 2310.11513)."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing, read_json, read_jsonl_lenient

from ..core import ceiling
from ..core.annotations import require_key, require_text, require_type
from ..core.bootstrap import bootstrap, group_mean_columns, group_mean_statistic
from ..core.harness import Metric, Record, Sample, Scored, Scoring, Settings, Task
from ..core.records import mean, mean_by
from ..judges import detections
from ..judges.detections import Verdict
from ..judges.object_detector import COLOURS

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COPIES_PER_PROMPT = 2  # real images that fit a prompt, reconstructed for its ceiling


@dataclass(frozen=True)
class Rules:
    """The published thresholds; boxes are kept where float32(score) > float32(threshold)."""

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0  # 1 switches the suppression of overlapping boxes off
    position_threshold: float = 0.1
    colours: tuple[str, ...] = COLOURS


def load_geneval(data: Path, settings: Settings) -> Task:
    """Per prompt its drawings; for scenes also real images that fit the prompt, to be reconstructed."""
    prompts = read_prompts(data)[: settings.limit]
    detector = detections.detector_for(data, settings)
    each = settings.images_per_prompt or (1 if detector == "scenes" else 4)
    samples, owners = ceiling.to_draw(prompts, each, settings.seed)
    rules, problems = Rules(), []
    if detector == "scenes":
        rules = scene_rules(data)
        scenes, problems = ceiling.scenes_to_copy(data)
        known = [(data / "test" / scene.file, detections.truth_of(scene.objects)) for scene in scenes]
        for i, row in enumerate(prompts):
            for path in () if "broken" in row else fitting_images(known, row, rules, start=i):
                samples.append(Sample(len(samples), path.name, row["prompt"], path, "reconstruct"))
                owners.append(i)
    truth = {"prompts": prompts, "owners": owners, "rules": rules}
    about = ceiling.about_drawing(settings, detector, each) | {"prompts": len(prompts)}
    return Task(samples, truth, about, problems)


def scene_rules(data: Path) -> Rules:
    """GenEval's rules with the palette of the scenes; the detector alone decides what counts as found."""
    palette = tuple(require_key(read_json(data / "scenes.json"), "palette", data / "scenes.json"))
    return Rules(threshold=0.0, counting_threshold=0.0, colours=palette)


def fitting_images(
    scenes: Sequence[tuple[Path, Record]], prompt: Record, rules: Rules, start: int
) -> list[Path]:
    """A few test images whose true scene satisfies the prompt; `start` spreads prompts over images."""
    need = {clause["class"] for clause in prompt["include"]}
    found = []
    for k in range(len(scenes)):
        path, seen = scenes[(start * 17 + k) % len(scenes)]
        if need <= seen["detections"].keys() and judge(prompt, seen, rules).correct:
            found.append(path)
            if len(found) == COPIES_PER_PROMPT:
                break
    return found


def score_geneval(
    task: Task, rows: dict[int, Record], folder: Path, run: dict[str, Any], scoring: Scoring
) -> Scored:
    """The share of correct images per tag and their mean; the ceiling beside, held-out pairs apart."""
    prompts, owners, rules = task.truth["prompts"], task.truth["owners"], task.truth["rules"]
    found = detections.findings(task, rows, folder)
    per_sample = []
    for sample in task.samples:
        prompt = prompts[owners[sample.index]]
        seen = None if sample.malformed else found.by_index.get(sample.index)
        verdict = detections.judged(judge, prompt, seen, rules)
        per_sample.append(
            ceiling.describe(sample, rows, verdict.correct, verdict.reason, prompt.get("held_out", False))
            | {"group": prompt["tag"], "owner": owners[sample.index]}
        )
        if prompt["tag"] == "colors" and len(prompt["include"]) == 1 and sample.kind == "generate":
            seen = found.by_index.get(sample.index, {}).get("detections", {})
            alone = sum(map(len, seen.values())) == prompt["include"][0]["count"]
            per_sample[-1]["exact"] = float(verdict.correct and alone)
    drawn = [r for r in per_sample if r["kind"] == "generate" and not r["held_out"]]
    summary = summarise(
        [prompts[r["owner"]] for r in drawn], [bool(r["score"]) for r in drawn], [r["owner"] for r in drawn]
    )
    interval = bootstrap(
        group_mean_columns([r["score"] for r in drawn], [r["group"] for r in drawn]),
        [r["owner"] for r in drawn],
        group_mean_statistic,
    )
    metrics = {"overall": Metric(summary["overall"], len(drawn), interval)}
    for tag in summary["per_tag"]:
        metrics[f"tag/{tag}"] = ceiling.share([r for r in drawn if r["group"] == tag])
    ceiling.add_apart(metrics, per_sample)
    exact = [r | {"score": r["exact"]} for r in per_sample if "exact" in r and not r["held_out"]]
    if exact:
        metrics["single objects: colour, shape and number"] = ceiling.share(exact)
    by_tag = mean_by(
        (r["group"], r["score"]) for r in per_sample if r["kind"] == "reconstruct" and not r["held_out"]
    )
    details = {
        "ceiling": by_tag,
        "ceiling_overall": float(np.mean(list(by_tag.values()))) if by_tag else None,
        "images": summary["images"],
        "prompts": summary["prompts"],
    }
    details["detected by"] = found.by
    return Scored(metrics, details, per_sample, "group mean", detections.why_not(task, found), found.problems)


class Found(NamedTuple):
    """One kept box (x0, y0, x1, y1, score) in float32 and its colour."""

    box: np.ndarray
    colour: str


def read_prompts(data: str | Path) -> list[dict[str, Any]]:
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
    require_text(row, "prompt", where)
    if require_key(row, "tag", where) not in TAGS:
        raise UserError(f"{where}: tag is {row['tag']!r}; allowed: {', '.join(TAGS)}.")
    if not require_type(list, require_key(row, "include", where), f"{where}, include"):
        raise UserError(f"{where}: include is empty, so that every image would be right.")
    for key in ("include", "exclude"):
        for i, clause in enumerate(require_type(list, row.get(key, []), f"{where}, {key}")):
            place = f"{where}, {key}[{i}]"
            require_text(clause, "class", place)
            if not isinstance(require_key(clause, "count", place), int):
                raise UserError(f"{place}: count is {clause['count']!r}; expected a whole number.")
            if key == "include" and "position" in clause:
                relation = clause["position"]
                if not isinstance(relation, list) or len(relation) != 2 or not isinstance(relation[1], int):
                    raise UserError(f"{place}: position is {relation!r}; expected [relation, clause number].")
                if not 0 <= relation[1] < i:
                    raise UserError(f"{place}: position names clause {relation[1]}, not one before.")


def judge(metadata: dict[str, Any], seen: dict[str, Any], rules: Rules = Rules()) -> Verdict:
    """Compare one image's detections with its prompt's description; the wording of reasons is GenEval's."""
    kept = keep(metadata["tag"], seen, rules)
    reasons: list[str] = []
    targets: list[list[Found] | None] = []  # what each clause matched; None where it failed
    for clause in metadata.get("include", ()):
        found = kept.get(clause["class"], [])[: clause["count"]]
        failure = clause_failure(clause, found, targets, rules)
        if failure:
            reasons.append(failure)
        targets.append(None if failure else found)
    for clause in metadata.get("exclude", ()):
        count = len(kept.get(clause["class"], []))
        if count >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {count}")
    return Verdict(not reasons, "\n".join(reasons), {c: len(f) for c, f in kept.items()})


def clause_failure(
    clause: dict[str, Any], found: Sequence[Found], targets: Sequence[list[Found] | None], rules: Rules
) -> str:
    """Why `found` does not satisfy an include clause; empty if it does."""
    name, count = clause["class"], clause["count"]
    if len(found) < count:
        return f"expected {name}>={count}, found {len(found)}"
    if "color" in clause:
        colours = [f.colour for f in found]
        right = colours.count(clause["color"])
        if right < count:
            listing = ", ".join(f"{colours.count(c)} {c}" for c in rules.colours if c in colours)
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
                there = relations(one.box, other.box, rules.position_threshold)
                if relation not in there:
                    return f"expected {name} {relation} target, found {' and '.join(there)} target"
    return ""


def keep(tag: str, seen: dict[str, Any], rules: Rules) -> dict[str, list[Found]]:
    """Per class the boxes above the threshold, best first, at most `max_objects`, overlaps suppressed."""
    threshold = np.float32(rules.counting_threshold if tag == "counting" else rules.threshold)
    kept = {}
    for name, rows in seen["detections"].items():
        boxes = np.asarray(rows, dtype=np.float32).reshape(-1, 5)
        colours = seen.get("colors", {}).get(name) or [""] * len(boxes)
        if len(colours) != len(boxes):
            raise UserError(f"detections of {name!r}: {len(boxes)} boxes, but {len(colours)} colours.")
        order = np.argsort(boxes[:, 4], kind="stable")[::-1]
        best = [Found(boxes[i], colours[i]) for i in order if boxes[i, 4] > threshold][: rules.max_objects]
        if rules.max_overlap < 1:
            best = suppress(best, rules.max_overlap)
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
