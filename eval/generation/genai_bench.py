"""VQAScore: how sure an image-text model is that a drawing shows its prompt (arXiv 2404.01291); GenAI-Bench.

Published numbers are clip-flant5-xxl's exp(-mean cross-entropy) of "Yes" and the end token. The score here is
the probability of "Yes" as the next token of any image-text model, which is another number: never comparable.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing

from ..core.annotations import read_json_as, require_key, require_mostly_valid, require_text, require_type
from ..core.bootstrap import bootstrap, mean_columns
from ..core.generated_images import generation_metadata, require_generated_images
from ..core.harness import Metric, Record, Sample, Scored, Scoring, Settings, Task, malformed_sample
from ..core.judge_pass import (
    ExternalFindings,
    judge_findings,
    read_external_findings,
    read_judge_pass,
    run_judge_pass,
    samples_with_images,
)
from ..metrics.vqascore import ANSWER, QUESTION

PUBLISHED = "clip-flant5-xxl"  # what vqascore.jsonl has to say to be comparable


def load_genai(data: Path, settings: Settings) -> Task:
    """A drawing per prompt of `prompts.txt` (527) or `genai_image.json` (1600), with `genai_skills.json`.

    A prompt that is malformed, or that a skill names and that is not there, counts as 0 in its skills.

    Raises:
        UserError: neither is there, or one is of another kind.
    """
    prompts, broken = read_prompts(data)
    path = existing(data / "genai_skills.json", "It says which prompts need which skill.")
    skills: dict[str, list[int]] = {}
    for tag, ids in read_json_as(dict, path).items():
        skills[tag] = []
        for place, i in enumerate(require_type(list, ids, f"{path}, {tag!r}")):
            number = whole(i)
            if number is None:
                number = -1 - len(broken)
                broken[number] = f"{path}: the skill {tag!r} names prompt {i!r} at place {place}, no number."
            elif number not in prompts and number not in broken:
                broken[number] = f"{path}: the skill {tag!r} names prompt {number}, which is not there."
            skills[tag].append(number)
    chosen = [*prompts.items(), *((number, "") for number in broken)][: settings.limit]
    samples = [
        malformed_sample(k, f"{number:05d}" if number > 0 else None, broken[number])
        if number in broken
        else Sample(k, f"{number:05d}", text, None, "generate", settings.seed + k)
        for k, (number, text) in enumerate(chosen)
    ]
    about = generation_metadata(settings, "jpg") | {"question": QUESTION, "split": f"{len(prompts)} prompts"}
    truth = {"numbers": [n for n, _ in chosen], "skills": skills}
    return Task(require_mostly_valid(samples, data), truth, about)


def read_prompts(data: Path) -> tuple[dict[int, str], dict[int, str]]:
    """Prompt by number: the line of `prompts.txt`, from 1, or the key of `genai_image.json`; what is wrong.

    The second gives by number why there is no prompt; a key that is no number gets a negative one.
    """
    prompts, broken = {}, {}
    if (data / "prompts.txt").exists():
        lines = (data / "prompts.txt").read_text(encoding="utf-8", errors="replace").splitlines()
        for number, line in enumerate(lines, 1):
            if line.strip():
                prompts[number] = line.strip()
            else:
                broken[number] = f"{data / 'prompts.txt'}, line {number}, is empty."
        return prompts, broken
    path = existing(data / "genai_image.json", "GenAI-Bench is prompts.txt or genai_image.json.")
    for key, row in read_json_as(dict, path).items():
        number = whole(key)
        try:
            if number is None:
                raise UserError(f"{path}: the key {key!r} is no number.")
            prompts[number] = require_text(row, "prompt", f"{path}, {key}")
        except UserError as error:
            broken[-1 - len(broken) if number is None else number] = str(error)
    return prompts, broken


def whole(value: Any) -> int | None:
    """A whole number above 0, also as digits."""
    number = int(value) if str(value).isdigit() else 0
    return number if number > 0 else None


def look_genai(
    task: Task, rows: dict[int, Record], out: Path, scoring: Scoring, device: str, quiet: bool
) -> None:
    """Ask the VQA model about every drawing."""
    if not scoring.vqa_model:
        return
    from ..judges.vqa_model import VqaModel

    model = VqaModel(scoring.vqa_model, device)

    def work(batch: list[Sample], images: list[Any]) -> list[Record]:
        values = model.probabilities(images, [QUESTION.format(s.prompt) for s in batch], ANSWER)
        return [{"vqascore": value} for value in values]

    run_judge_pass(
        out, "vqascore", model.about, samples_with_images(task.samples, rows), rows, work, 8, quiet
    )


def score_in(row: Record, where: str) -> float:
    """The score of a line of `vqascore.jsonl`."""
    value = require_key(row, "score", where)
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise UserError(f"{where}: score is {value!r}; a number from 0 to 1 is needed.")
    return float(value)


def read_scores(task: Task, rows: dict[int, Record], folder: Path) -> ExternalFindings:
    """Scores, and whose: `vqascore.jsonl` (a line {"index", "score", "model"}) comes first."""
    path = folder / "vqascore.jsonl"
    if path.exists():
        return read_external_findings(path, task.samples, score_in, "model", "a model without a name")
    seen = read_judge_pass(folder, "vqascore", samples_with_images(task.samples, rows))
    if seen is None:
        raise UserError(
            f"{folder}: the images are drawn, but nothing has scored them. Run again with "
            f"--vqa-model FOLDER (nothing is drawn again), or write another model's scores to {path}."
        )
    found, problems = judge_findings(seen[0])
    return ExternalFindings({i: row["vqascore"] for i, row in found.items()}, seen[1]["model"], problems)


def summarise(
    scores: Sequence[float], numbers: Sequence[int], skills: dict[str, list[int]]
) -> dict[str, Record]:
    """Per tag, and over all tagged prompts, the mean, the sample deviation and n, in float32 as published."""
    by_number = dict(zip(numbers, scores))
    groups = {tag: [i for i in ids if i in by_number] for tag, ids in skills.items()}
    groups["all"] = sorted({i for ids in groups.values() for i in ids})
    result = {}
    for tag, ids in groups.items():
        values = np.array([by_number[i] for i in ids], np.float32)
        if len(values):
            deviation = float(values.std(ddof=1)) if len(values) > 1 else 0.0
            result[tag] = {"mean": float(values.mean()), "std": deviation, "n": len(values)}
    return result


def score_genai(
    task: Task, rows: dict[int, Record], folder: Path, run: dict[str, Any], scoring: Scoring
) -> Scored:
    """The mean score of the advanced prompts (the published table's overall), of all, and of each skill."""
    require_generated_images(task, rows, folder)
    found, by, problems = read_scores(task, rows, folder)
    scores = [0.0 if s.malformed else found.get(s.index, 0.0) for s in task.samples]
    numbers, skills = task.truth["numbers"], task.truth["skills"]
    summary = summarise(scores, numbers, skills)
    place = {n: k for k, n in enumerate(numbers)}
    order = [t for t in ("advanced", "all") if t in summary] + [
        t for t in summary if t not in ("advanced", "all")
    ]
    metrics = {}
    for tag in order:
        members = sorted({i for ids in skills.values() for i in ids}) if tag == "all" else skills[tag]
        values = [scores[place[i]] for i in members if i in place]
        metrics[tag] = Metric(summary[tag]["mean"], len(values), bootstrap(mean_columns(values)), "score")
    formula = "the file's own" if (folder / "vqascore.jsonl").exists() else 'P("Yes")'
    missing = sum(s.index not in found for s in task.samples)
    problems = problems + [f"{missing} drawings have no score (counted as 0)"] * (missing > 0)
    why = "" if by == PUBLISHED else f"VQAScore by {by}, not by {PUBLISHED} with its own formula"
    tags = {n: tag for tag, ids in skills.items() for n in ids if tag not in ("basic", "advanced")}
    return Scored(metrics, {"per_tag": summary, "vqa model": by, "formula": formula}, [
        {
            "index": s.index, "id": s.id, "prompt": s.prompt, "file": rows.get(s.index, {}).get("file"),
            "score": scores[k], "group": tags.get(numbers[k], "untagged"),
        }
        for k, s in enumerate(task.samples)
    ], not_comparable=why, problems=problems)  # fmt: skip
