"""GenAI-Bench: VQAScore of generated images by skill (arXiv 2406.13743).

Published scores are exp(-mean cross-entropy) of "Yes" and the end token under clip-flant5-xxl. The judge pass
instead records the probability of "Yes" as the next token of an image-text model, which is not comparable.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing
from open_unitok.core.text_files import numbered_lines

from ..core.annotations import read_json_as, require_key, require_mostly_valid, require_text, require_type
from ..core.benchmark import Metric, Options, Record, Sample, Scored, Task, malformed_sample
from ..core.bootstrap import bootstrap, mean_columns
from ..core.generated_images import generation_metadata, require_generated_images, save_generated_images
from ..core.judge_pass import run_judge_pass, samples_with_images
from ..core.release_files import RELEASES, find_beside, find_file
from ..judges import vqa_model
from ..metrics.vqascore import ANSWER, QUESTION

_PUBLISHED_JUDGE = "clip-flant5-xxl"  # "model" in vqascore.jsonl of a comparable run
_BATCH = 8  # images per batch of the judge pass

answer = save_generated_images


def load(data: Path, settings: Options) -> Task:
    """An image per prompt of `prompts.txt` (527) or `genai_image.json` (1600), with `genai_skills.json`.

    A malformed prompt, and a missing one that a skill lists, counts as 0 in its skills.

    Raises:
        UserError: a file is missing or of another format.
    """
    path = find_file(data, RELEASES["genai_bench"].original, "list of the prompts of each skill")
    prompts, bad = _read_prompts(data, path)
    skills: dict[str, list[int]] = {}
    for tag, ids in read_json_as(dict, path).items():
        skills[tag] = []
        for k, i in enumerate(require_type(list, ids, f"{path}, {tag!r}")):
            number = _positive_integer(i)
            if number is None:
                number = -1 - len(bad)  # a unique key that no prompt has
                bad[number] = f"{path}: the skill {tag!r} has prompt {i!r} at index {k}; expected a number."
            elif number not in prompts and number not in bad:
                bad[number] = f"{path}: the skill {tag!r} lists prompt {number}, which does not exist."
            skills[tag].append(number)
    # malformed prompts last, so that --limit selects valid ones
    chosen = [*prompts.items(), *((number, "") for number in bad)][: settings.limit]
    samples = [
        malformed_sample(k, f"{number:05d}" if number > 0 else None, bad[number])
        if number in bad
        else Sample(k, f"{number:05d}", text, None, "generate", settings.seed + k)
        for k, (number, text) in enumerate(chosen)
    ]
    metadata = generation_metadata(settings, "jpg") | {
        "question": QUESTION,
        "split": f"{len(prompts)} prompts",
    }
    truth = {"numbers": [n for n, _ in chosen], "skills": skills}
    return Task(require_mostly_valid(samples, data), truth, metadata)


def _read_prompts(data: Path, skills: Path) -> tuple[dict[int, str], dict[int, str]]:
    """Prompts by number, and errors by number; an invalid number is replaced by a unique negative one.

    Numbers are the lines of `prompts.txt`, from 1, or the keys of `genai_image.json`.
    """
    prompts, bad = {}, {}
    # GenAI-Bench-527 is a text file, GenAI-Bench-1600 is JSON
    path = find_beside(data, skills, "prompts.txt")
    if path.exists():
        for number, line in numbered_lines(path):
            if line.strip():
                prompts[number] = line.strip()
            else:
                bad[number] = f"{path}, line {number}, is empty."
        return prompts, bad
    path = existing(
        find_beside(data, skills, "genai_image.json"), "GenAI-Bench is prompts.txt or genai_image.json."
    )
    for key, row in read_json_as(dict, path).items():
        number = _positive_integer(key)
        try:
            if number is None:
                raise UserError(f"{path}: the key {key!r} is not a number.")
            prompts[number] = require_text(row, "prompt", f"{path}, {key}")
        except UserError as error:
            bad[-1 - len(bad) if number is None else number] = str(error)
    return prompts, bad


def _positive_integer(value: Any) -> int | None:
    """A positive integer from a number or its digits, else None."""
    number = int(value) if str(value).isdecimal() else 0
    return number if number > 0 else None


def judge(
    task: Task, records: dict[int, Record], out: Path, scoring: Options, device: str, quiet: bool
) -> None:
    """Judge pass: the VQA model's probability that each image shows its prompt."""
    if not scoring.vqa_model:
        return
    model = vqa_model.VqaModel(scoring.vqa_model, device)

    def vqascores(batch: list[Sample], images: list[Any]) -> list[Record]:
        values = model.probabilities(images, [QUESTION.format(s.prompt) for s in batch], ANSWER)
        return [{"vqascore": value} for value in values]

    samples = samples_with_images(task.samples, records)
    run_judge_pass(out, "vqascore", model.about, samples, records, vqascores, _BATCH, quiet)


def _score_of(record: Record, where: str) -> float:
    """The score of a line of `vqascore.jsonl`."""
    value = require_key(record, "score", where)
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise UserError(f"{where}: score is {value!r}; expected a number from 0 to 1.")
    return float(value)


def summarise_skills(
    scores: Sequence[float], numbers: Sequence[int], skills: dict[str, list[int]]
) -> dict[str, Record]:
    """Mean, sample standard deviation and n of each skill, and of "all" prompts that have one."""
    by_number = dict(zip(numbers, scores))
    groups = {tag: [i for i in ids if i in by_number] for tag, ids in skills.items()}
    # a prompt with several skills counts once
    groups["all"] = sorted({i for ids in groups.values() for i in ids})
    result = {}
    for tag, ids in groups.items():
        # float32 as in the published script
        values = np.array([by_number[i] for i in ids], np.float32)
        if len(values):
            deviation = float(values.std(ddof=1)) if len(values) > 1 else 0.0
            result[tag] = {"mean": float(values.mean()), "std": deviation, "n": len(values)}
    return result


def score(
    task: Task, records: dict[int, Record], folder: Path, run: dict[str, Any], scoring: Options
) -> Scored:
    """The mean score of advanced prompts (published as "overall"), of all prompts, and of each skill."""
    require_generated_images(task, records, folder)
    found, by, problems = vqa_model.read_vqa_findings(
        task, records, folder, "vqascore", "vqascore", "vqascore.jsonl", _score_of
    )
    # a missing score counts as 0, so that a failed image cannot raise the mean
    scores = [0.0 if s.malformed else found.get(s.index, 0.0) for s in task.samples]
    numbers, skills = task.truth["numbers"], task.truth["skills"]
    summary = summarise_skills(scores, numbers, skills)
    index_of = {n: k for k, n in enumerate(numbers)}
    # the first is the main metric: papers quote "advanced"
    order = [t for t in ("advanced", "all") if t in summary] + [
        t for t in summary if t not in ("advanced", "all")
    ]
    metrics = {}
    for tag in order:
        members = sorted({i for ids in skills.values() for i in ids}) if tag == "all" else skills[tag]
        values = [scores[index_of[i]] for i in members if i in index_of]
        metrics[tag] = Metric(summary[tag]["mean"], len(values), bootstrap(mean_columns(values)), "score")
    formula = "the file's own" if (folder / "vqascore.jsonl").exists() else 'P("Yes")'
    missing = sum(s.index not in found for s in task.samples)
    problems = problems + [f"{missing} images have no score (counted as 0)"] * (missing > 0)
    reasons = [f"VQAScore by {by}, not by {_PUBLISHED_JUDGE} with its own formula"] * (by != _PUBLISHED_JUDGE)
    reasons += [f"{missing} images have no score"] * (missing > 0)
    # basic and advanced overlap with all skills, so they are not groups
    tags = {n: tag for tag, ids in skills.items() for n in ids if tag not in ("basic", "advanced")}
    return Scored(metrics, {"per_tag": summary, "vqa model": by, "formula": formula}, [
        {
            "index": s.index, "id": s.id, "prompt": s.prompt, "file": records.get(s.index, {}).get("file"),
            "score": scores[k], "group": tags.get(numbers[k], "untagged"),
        }
        for k, s in enumerate(task.samples)
    ], not_comparable="; ".join(reasons), problems=problems)  # fmt: skip
