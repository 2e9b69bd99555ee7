"""GenEval (arXiv 2310.11513): objects, counts, colours and positions of generated images."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from open_unitok.core.errors import UserError
from open_unitok.core.text_files import read_json, read_json_lines

from ..core.annotations import require_key, require_text, require_type
from ..core.benchmark import Metric, Options, Record, Sample, Scored, Task
from ..core.bootstrap import bootstrap, group_mean_columns, group_mean_statistic
from ..core.judge_pass import ExternalFindings
from ..core.records import mean, mean_by
from ..core.release_files import RELEASES, find_file
from ..judges import ceiling, detections
from ..judges.detections import Verdict
from ..judges.object_detector import COLOURS

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
CEILING_IMAGES = 2  # test images per prompt that are reconstructed for the ceiling


@dataclass(frozen=True)
class Rules:
    """The published thresholds; a box counts if float32(score) > float32(threshold)."""

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0  # 1 disables the suppression of overlapping boxes
    position_threshold: float = 0.1
    colours: tuple[str, ...] = COLOURS


answer = detections.generate_and_detect
judge = detections.run_detection_pass


def load(data: Path, settings: Options) -> Task:
    """The prompts; for scenes also test images that satisfy a prompt, for the ceiling."""
    prompts = read_prompts(data)[: settings.limit]
    detector = detections.choose_detector(data, settings)
    # four per prompt as published; the scenes data set has enough prompts for one
    per_prompt = settings.images_per_prompt or (1 if detector == "scenes" else 4)
    samples, owners = ceiling.generation_samples(prompts, per_prompt, settings.seed)
    rules, problems = Rules(), []
    if detector == "scenes":
        rules = _scene_rules(data)
        scenes, problems = ceiling.ceiling_scenes(data)
        truths = [(data / "test" / scene.file, detections.true_detections(scene.objects)) for scene in scenes]
        for i, row in enumerate(prompts):
            for path in () if "malformed" in row else _matching_images(truths, row, rules, start=i):
                samples.append(Sample(len(samples), path.name, row["prompt"], path, "reconstruct"))
                owners.append(i)
    truth = {"prompts": prompts, "owners": owners, "rules": rules}
    truth["detect"] = detections.scenes_detection(data) if detector == "scenes" else None
    metadata = detections.detection_metadata(settings, detector, per_prompt) | {"prompts": len(prompts)}
    return Task(samples, truth, metadata, problems)


def _scene_rules(data: Path) -> Rules:
    """GenEval's rules with the palette of the scenes."""
    palette = tuple(require_key(read_json(data / "scenes.json"), "palette", data / "scenes.json"))
    # no thresholds: the scenes detector applies its own
    return Rules(threshold=0.0, counting_threshold=0.0, colours=palette)


def _matching_images(
    truths: Sequence[tuple[Path, Record]], prompt: Record, rules: Rules, start: int
) -> list[Path]:
    """Up to two test images whose true scene satisfies the prompt; `start` varies them between prompts."""
    needed = {clause["class"] for clause in prompt["include"]}
    found = []
    for k in range(len(truths)):
        # prompts start at different images; 17 is coprime to most counts, so the starts spread evenly
        path, truth = truths[(start * 17 + k) % len(truths)]
        if needed <= truth["detections"].keys() and judge_image(prompt, truth, rules).correct:
            found.append(path)
            if len(found) == CEILING_IMAGES:
                break
    return found


def score(
    task: Task, records: dict[int, Record], folder: Path, run: dict[str, Any], scoring: Options
) -> Scored:
    """Fraction of correct images per tag and its mean over tags; ceiling and held-out pairs separately."""
    prompts = task.truth["prompts"]
    if any("correct" in record for record in records.values()):
        # results.jsonl of the published script: its verdicts in place of detections
        judged = {i: {"detections": {}} for i, record in records.items() if "correct" in record}
        found = ExternalFindings(judged, detections.PUBLISHED_DETECTOR, [])
    else:
        found = detections.read_detections(task, records, folder)
    per_sample = _verdicts(task, records, found)
    generated = [r for r in per_sample if r["kind"] == "generate" and not r["held_out"]]
    summary = summarise_verdicts(
        [prompts[r["owner"]] for r in generated],
        [bool(r["score"]) for r in generated],
        [r["owner"] for r in generated],
    )
    # the interval of the main metric needs its statistic: the mean over tags of means
    interval = bootstrap(
        group_mean_columns([r["score"] for r in generated], [r["group"] for r in generated]),
        [r["owner"] for r in generated],
        group_mean_statistic,
    )
    # the published overall score: every tag has the same weight
    metrics = {"overall": Metric(summary["overall"], len(generated), interval)}
    for tag in summary["per_tag"]:
        metrics[f"tag/{tag}"] = ceiling.prompt_mean([r for r in generated if r["group"] == tag])
    ceiling.add_held_out_and_ceiling(metrics, per_sample)
    # not in GenEval, which does not penalise additional objects
    exact = [r | {"score": r["exact"]} for r in per_sample if "exact" in r and not r["held_out"]]
    if exact:
        metrics["single objects: colour, shape and number"] = ceiling.prompt_mean(exact)
    by_tag = mean_by(
        (r["group"], r["score"]) for r in per_sample if r["kind"] == "reconstruct" and not r["held_out"]
    )
    details = {
        "ceiling": by_tag,
        "ceiling_overall": float(np.mean(list(by_tag.values()))) if by_tag else None,
        "images": summary["images"],
        "prompts": summary["prompts"],
        "detected by": found.by,
    }
    reason = detections.not_comparable_reason(task, found)
    return Scored(metrics, details, per_sample, "group mean", reason, found.problems)


def _verdicts(task: Task, records: dict[int, Record], found: ExternalFindings) -> list[Record]:
    """A record per image; prompts for one coloured object also have "exact": no other object is detected."""
    prompts, owners, rules = task.truth["prompts"], task.truth["owners"], task.truth["rules"]
    per_sample = []
    for sample in task.samples:
        prompt = prompts[owners[sample.index]]
        detected = None if sample.malformed else found.by_index.get(sample.index)
        known = records.get(sample.index, {})
        if "correct" in known and not sample.malformed:
            verdict = Verdict(known["correct"], known["reason"], {})
        else:
            verdict = detections.verdict_on(judge_image, prompt, detected, rules)
        held_out = prompt.get("held_out", False)
        record = ceiling.object_record(sample, records, verdict.correct, verdict.reason, held_out)
        # group and owner: `unitok eval compare` resamples prompts within tags
        record |= {"group": prompt["tag"], "owner": owners[sample.index]}
        one_object = prompt["tag"] == "colors" and len(prompt["include"]) == 1
        if one_object and sample.kind == "generate" and "correct" not in known:
            boxes = found.by_index.get(sample.index, {}).get("detections", {})
            nothing_else = sum(map(len, boxes.values())) == prompt["include"][0]["count"]
            record["exact"] = float(verdict.correct and nothing_else)
        per_sample.append(record)
    return per_sample


class _Box(NamedTuple):
    """A box (x0, y0, x1, y1, score) in float32 and its colour."""

    corners: np.ndarray
    colour: str


def read_prompts(data: str | Path) -> list[dict[str, Any]]:
    """Read `evaluation_metadata.jsonl` from `data` or folders below it.

    A malformed line becomes a prompt with the error under "malformed". An unreadable tag is replaced by that
    of the line before: the released file is ordered by tag.

    Raises:
        UserError: the file is missing or empty, or most of its lines are malformed.
    """
    path = find_file(Path(data), RELEASES["geneval"].original, "list of GenEval prompts")
    rows = read_json_lines(path, lenient=True)
    # malformed lines at the start take the first valid tag
    tags = [row["tag"] for row in rows if isinstance(row, dict) and row.get("tag") in TAGS]
    tag = tags[0] if tags else TAGS[0]
    for i, row in enumerate(rows):
        tag = row["tag"] if isinstance(row, dict) and row.get("tag") in TAGS else tag
        try:
            _check_prompt(row, f"{path}, prompt {i + 1}")
        except UserError as error:
            rows[i] = {"tag": tag, "prompt": "", "include": [], "malformed": str(error)}
    bad = [row["malformed"] for row in rows if "malformed" in row]
    if not rows or len(bad) > len(rows) / 2:
        # one wrong line in two: another file format
        raise UserError(f"{path} is {f'not a list of GenEval prompts: {bad[0]}' if rows else 'empty.'}")
    return rows


def _check_prompt(row: Any, where: str) -> None:
    """Raise UserError if a line is not a GenEval prompt."""
    require_text(row, "prompt", where)
    if require_key(row, "tag", where) not in TAGS:
        raise UserError(f"{where}: tag is {row['tag']!r}; allowed: {', '.join(TAGS)}.")
    if not require_type(list, require_key(row, "include", where), f"{where}, include"):
        raise UserError(f"{where}: include is empty, so every image would be correct.")
    for key in ("include", "exclude"):
        for i, clause in enumerate(require_type(list, row.get(key, []), f"{where}, {key}")):
            where_clause = f"{where}, {key}[{i}]"
            require_text(clause, "class", where_clause)
            if not isinstance(require_key(clause, "count", where_clause), int):
                raise UserError(f"{where_clause}: count is {clause['count']!r}; expected an integer.")
            if key == "include" and "position" in clause:
                relation = clause["position"]
                if not isinstance(relation, list) or len(relation) != 2 or not isinstance(relation[1], int):
                    raise UserError(
                        f"{where_clause}: position is {relation!r}; expected [relation, clause number]."
                    )
                if not 0 <= relation[1] < i:
                    raise UserError(
                        f"{where_clause}: position refers to clause {relation[1]}; it must be an earlier one."
                    )


def judge_image(metadata: dict[str, Any], detected: dict[str, Any], rules: Rules = Rules()) -> Verdict:
    """Compare the detections of an image with its prompt; reasons use the wording of GenEval's script."""
    kept = _filter_boxes(metadata["tag"], detected, rules)
    reasons: list[str] = []
    targets: list[list[_Box] | None] = []  # boxes that each clause matched, None if it failed
    for clause in metadata.get("include", ()):
        # the best `count` boxes: additional boxes of a class are ignored
        found = kept.get(clause["class"], [])[: clause["count"]]
        failure = _clause_failure(clause, found, targets, rules)
        if failure:
            reasons.append(failure)
        # a position refers to an earlier clause by index
        targets.append(None if failure else found)
    # counting prompts exclude count + 1 objects: this is what makes a surplus wrong
    for clause in metadata.get("exclude", ()):
        count = len(kept.get(clause["class"], []))
        if count >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {count}")
    return Verdict(not reasons, "\n".join(reasons), {c: len(f) for c, f in kept.items()})


def _clause_failure(
    clause: dict[str, Any], found: Sequence[_Box], targets: Sequence[list[_Box] | None], rules: Rules
) -> str:
    """The reason why `found` does not satisfy an include clause, or ""."""
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
        # published: the relation must hold for every pair of boxes
        for one in found:
            for other in target:
                actual = box_relations(one.corners, other.corners, rules.position_threshold)
                if relation not in actual:
                    return f"expected {name} {relation} target, found {' and '.join(actual)} target"
    return ""


def _filter_boxes(tag: str, detected: dict[str, Any], rules: Rules) -> dict[str, list[_Box]]:
    """The boxes of each class above the threshold, best first, at most `max_objects`, without overlaps."""
    # counting uses a higher threshold; float32 as in mmdet, so that ties at the threshold agree
    threshold = np.float32(rules.counting_threshold if tag == "counting" else rules.threshold)
    kept = {}
    for name, rows in detected["detections"].items():
        boxes = np.asarray(rows, dtype=np.float32).reshape(-1, 5)
        colours = detected.get("colors", {}).get(name) or [""] * len(boxes)
        if len(colours) != len(boxes):
            raise UserError(f"detections of {name!r}: {len(boxes)} boxes, but {len(colours)} colours.")
        # stable sort, then reversed, as in the published script: ties go to the later box
        order = np.argsort(boxes[:, 4], kind="stable")[::-1]
        best = [_Box(boxes[i], colours[i]) for i in order if boxes[i, 4] > threshold][: rules.max_objects]
        if rules.max_overlap < 1:
            best = _suppress_overlaps(best, rules.max_overlap)
        if best:
            kept[name] = best
    return kept


def _suppress_overlaps(found: Iterable[_Box], max_overlap: float) -> list[_Box]:
    """Greedy suppression: a box stays if its IoU with every better one is below `max_overlap`."""
    result: list[_Box] = []
    for one in found:
        if all(box_iou(one.corners, other.corners) < max_overlap for other in result):
            result.append(one)
    return result


def box_iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boxes that include the pixel of their far corner, as in GenEval."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    # + 1: corners are inclusive in the published script
    sides = np.maximum(0, np.minimum(a[2:4], b[2:4]) - np.maximum(a[:2], b[:2]) + 1)
    shared = sides.prod()
    areas = (a[2:4] - a[:2] + 1).prod() + (b[2:4] - b[:2] + 1).prod()
    union = areas - shared
    return float(shared / union) if union else 0.0


def box_relations(a: np.ndarray, b: np.ndarray, threshold: float = 0.1) -> list[str]:
    """The position of a relative to b: left of, right of, above, below; up to two of them hold."""
    corners_a, corners_b = np.reshape(a[:4], (2, 2)), np.reshape(b[:4], (2, 2))
    offset = corners_a.mean(axis=0) - corners_b.mean(axis=0)
    sizes = np.abs(np.diff(corners_a, axis=0))[0] + np.abs(np.diff(corners_b, axis=0))[0]
    # published quirk: the offset is shrunk by the threshold, then divided by the length of the raw offset
    moved = np.maximum(np.abs(offset) - threshold * sizes, 0) * np.sign(offset)
    if np.all(np.abs(moved) < 1e-3):
        return []
    x, y = moved / np.linalg.norm(offset)
    # |component| > 0.5: within 60 degrees of the axis; y grows downwards
    words = (("left of", x < -0.5), ("right of", x > 0.5), ("above", y < -0.5), ("below", y > 0.5))
    return [word for word, holds in words if holds]


def summarise_verdicts(
    metadata: Sequence[dict[str, Any]], correct: Sequence[bool], prompts: Sequence[int]
) -> dict[str, Any]:
    """Fractions: correct images per tag, mean over tags, all images, and prompts with a correct image.

    `prompts[i]` is the index of the prompt of image i.
    """
    by_tag: dict[str, list[float]] = defaultdict(list)
    by_prompt: dict[int, bool] = defaultdict(bool)
    for row, good, prompt in zip(metadata, correct, prompts):
        by_tag[row["tag"]].append(float(good))
        # a prompt counts as solved if any of its images is correct
        by_prompt[prompt] |= bool(good)
    per_tag = {tag: {"value": mean(by_tag[tag]), "n": len(by_tag[tag])} for tag in TAGS if tag in by_tag}
    return {
        "per_tag": per_tag,
        "overall": mean([t["value"] for t in per_tag.values()]),
        "images": mean([float(c) for c in correct]),
        "prompts": mean([float(c) for c in by_prompt.values()]),
    }
