"""WISE (arXiv 2503.07265): images of prompts that take world knowledge, graded by a model that sees them.

WiScore is (0.7 consistency + 0.2 realism + 0.1 aesthetic quality) / 2, with grades from 0 to 2. Scorers:
`official` (default) counts a grade that a reply lacks as 0; `lmms` asks up to three times for all grades.
"""

import ast
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from open_unitok.core.errors import UserError
from open_unitok.core.text_files import read_text

from ..core.annotations import read_json_as, require_key, require_mostly_valid, require_text
from ..core.benchmark import Metric, Options, Record, Sample, Scored, Task, malformed_sample
from ..core.bootstrap import bootstrap, group_mean_columns
from ..core.generated_images import (
    generation_metadata,
    require_generated_images,
    save_generated_images,
    unscored_records,
)
from ..core.records import mean_metric
from ..core.release_files import WISE_FILES, find_file, find_files
from ..judges.llm_judge import Judge, JudgeCall, JudgeFailed, load_judge

_PUBLISHED_JUDGE = "gpt-4o-2024-05-13"
_SCRIPT = "gpt_eval.py"  # holds the judge's prompt
_REPLY_TOKENS = {"official": 2000, "lmms": 128}
_ATTEMPTS = {"official": 1, "lmms": 3}
_THREADS = 8
WISE_GRADES = {"consistency": 0.7, "realism": 0.2, "aesthetic_quality": 0.1}
# category -> last prompt_id and weight in the overall score
WISE_CATEGORIES = {
    "culture": (400, 0.4),
    "time": (567, 0.167),
    "space": (700, 0.133),
    "biology": (800, 0.1),
    "physics": (900, 0.1),
    "chemistry": (1000, 0.1),
}
# such as "**Consistency**: 2"
_GRADE = re.compile(r"(consistency|realism|aesthetic quality)\*{0,2}\s*:?\s*(\d)", re.IGNORECASE)


class WisePrompt(NamedTuple):
    """The columns of a prompt that the judge is shown, and its category."""

    row: Record
    category: str


answer = save_generated_images


def load(data: Path, settings: Options) -> Task:
    """An image per prompt of the release's three JSON files, named by prompt_id and in its order."""
    paths = [find_file(data, (name,), "WISE prompt file") for name in WISE_FILES]
    rows = [(row, f"{path}, entry {i}") for path in paths for i, row in enumerate(read_json_as(list, path))]
    found: list[tuple[int, str, WisePrompt | UserError]] = []
    for row, where in rows:
        try:
            number = require_key(row, "prompt_id", where)
            if not isinstance(number, int) or not 1 <= number <= 1000:
                raise UserError(f"{where}: prompt_id is {number!r}; expected a number from 1 to 1000.")
            require_text(row, "Prompt", where)
            require_text(row, "Explanation", where)
            found.append((number, row["Prompt"].strip(), WisePrompt(row, wise_category(number))))
        except UserError as error:
            found.append((1001, "", error))
    found.sort(key=lambda entry: entry[0])
    found = found[: settings.limit]
    samples = [
        malformed_sample(k, None, prompt)
        if isinstance(prompt, UserError)
        else Sample(k, str(number), text, None, "generate", settings.seed + k)
        for k, (number, text, prompt) in enumerate(found)
    ]
    prompts = [WisePrompt({}, "") if isinstance(prompt, UserError) else prompt for _, _, prompt in found]
    metadata = generation_metadata(settings, "png") | {"split": f"{len(samples)} prompts"}
    return Task(require_mostly_valid(samples, data), {"prompts": prompts, "data": data}, metadata)


def wise_category(number: int) -> str:
    """The category of a prompt_id."""
    return next(name for name, (last, _) in WISE_CATEGORIES.items() if number <= last)


# --------------------------------------------------------------------------------------------------- judging


class JudgePrompt(NamedTuple):
    """The system message, and the parts of the user's: texts, and names of columns of the prompt."""

    system: str
    parts: list[tuple[str, bool]]  # (text or column, whether it is a column)

    def text(self, row: Record) -> str:
        """The user's message for one prompt."""
        return "".join(str(row[part]) if is_column else part for part, is_column in self.parts)


def read_judge_prompt(data: Path) -> JudgePrompt:
    """The judge's messages in WISE's own `gpt_eval.py`, which is parsed and never run.

    Raises:
        UserError: the script is missing, or does not build its messages as the published one does.
    """
    paths = find_files(data, (_SCRIPT,)) or [p for p in (data.parent / _SCRIPT,) if p.is_file()]
    if not paths:
        raise UserError(
            f"{data}: expected {_SCRIPT} of WISE's repository, which holds the judge's prompt, here, above "
            "or below; clone the repository and pass its folder."
        )
    try:
        tree = ast.parse(read_text(paths[0]))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{paths[0]} is not valid Python: {error}") from error
    # {"role": ROLE, "content": [{"type": "text", "text": TEXT}, ...]}
    texts = {}
    for node in ast.walk(tree):
        fields = _string_keys(node)
        role = getattr(fields.get("role"), "value", None)
        inner = [_string_keys(item).get("text") for item in getattr(fields.get("content"), "elts", [])]
        if isinstance(role, str) and (text := next((t for t in inner if t is not None), None)):
            texts[role] = text
    system, user = texts.get("system"), texts.get("user")
    if not isinstance(system, ast.Constant) or not isinstance(user, ast.JoinedStr):
        raise UserError(f"{paths[0]} has no messages of the judge where WISE's {_SCRIPT} has them.")
    return JudgePrompt(str(system.value), [_message_part(part, paths[0]) for part in user.values])


def _string_keys(node: ast.AST) -> dict[str, ast.expr]:
    """The entries of a dict display whose keys are strings; {} for other nodes."""
    if not isinstance(node, ast.Dict):
        return {}
    pairs = zip(node.keys, node.values)
    return {str(k.value): value for k, value in pairs if isinstance(k, ast.Constant)}


def _message_part(part: ast.expr, path: Path) -> tuple[str, bool]:
    """A text of an f-string, or the column in a field such as {row['Prompt']}."""
    if isinstance(part, ast.Constant):
        return str(part.value), False
    inner = getattr(part, "value", None)
    key = getattr(getattr(inner, "slice", None), "value", None)
    if key not in ("Prompt", "Explanation"):
        raise UserError(f"{path}: the judge's prompt has a field other than Prompt and Explanation.")
    return key, True


def parse_grades(reply: str, scorer: str = "official") -> dict[str, float]:
    """The grades in a reply by name; `lmms` also takes three lines with a digit each."""
    found = {name.lower().replace(" ", "_"): float(digit) for name, digit in _GRADE.findall(reply)}
    bare = [line.strip() for line in reply.split("\n") if line.strip() in ("0", "1", "2")]
    if found or scorer == "official" or len(bare) < len(WISE_GRADES):
        return found
    return dict(zip(WISE_GRADES, map(float, bare)))


class Grading(NamedTuple):
    """The grades of an image, the last reply, and why there is none."""

    grades: dict[str, float]
    reply: str
    failed: str = ""

    @property
    def score(self) -> float:
        """WiScore in [0, 1]; a missing grade counts as 0, and one above 2 is none."""
        return sum(w * self.grades.get(name, 0.0) for name, w in WISE_GRADES.items()) / 2


def _grade_all(
    judge: Judge, task: Task, records: dict[int, Record], folder: Path, scorer: str
) -> dict[int, Grading]:
    """The grades of every image, in parallel."""
    prompt = read_judge_prompt(task.truth["data"])

    def grade(sample: Sample) -> Grading:
        text, image = (
            prompt.text(task.truth["prompts"][sample.index].row),
            folder / records[sample.index]["file"],
        )
        if not image.is_file():
            return Grading({}, "", f"{image} does not exist")
        grades, reply = {}, ""
        for attempt in range(_ATTEMPTS[scorer]):
            call = JudgeCall(
                sample.id,
                text,
                0.0,
                _REPLY_TOKENS[scorer],
                attempt=attempt,
                system=prompt.system,
                image=image,
            )
            try:
                reply = judge.reply(call)
            except JudgeFailed as error:
                return Grading({}, reply, str(error))
            grades = {k: v for k, v in parse_grades(reply, scorer).items() if v <= 2}
            if len(grades) == len(WISE_GRADES):
                break
        # lmms-eval: all grades or none
        return Grading(grades if scorer == "official" or len(grades) == len(WISE_GRADES) else {}, reply)

    there = [s for s in task.samples if not s.malformed and records.get(s.index, {}).get("file")]
    # threads: the time is spent waiting for the endpoint
    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        return dict(zip([s.index for s in there], pool.map(grade, there)))


# --------------------------------------------------------------------------------------------------- scoring


def score(task: Task, records: dict[int, Record], folder: Path, run: Record, scoring: Options) -> Scored:
    """The weighted WiScore, that of each category, and mean grades; without a judge, no metrics."""
    require_generated_images(task, records, folder)
    per_sample = unscored_records(task, records)
    judge = load_judge(scoring, folder)
    if judge is None:
        note = f"no --judge: images/ can be graded by WISE's {_SCRIPT} (--image_dir)"
        return Scored({}, {}, per_sample, problems=[note])
    found = _grade_all(judge, task, records, folder, scoring.scorer)
    failed = {i: g.failed for i, g in found.items() if g.failed}
    # not a single reply: an error of the endpoint, not a score of 0
    if found and len(failed) == len(found):
        raise UserError(f"The judge {judge.model} graded no image: {next(iter(failed.values()))}")
    # an image that is missing or was not graded counts as 0
    gradings = [found.get(s.index, Grading({}, "")) for s in task.samples]
    values = [g.score for g in gradings]
    categories = [p.category for p in task.truth["prompts"]]
    metrics = wise_metrics(values, categories)
    for name in WISE_GRADES:
        grades = [g.grades.get(name, 0.0) for g in gradings]
        metrics[f"grade/{name}"] = mean_metric(grades, list(range(len(grades))), "score")
    rows = [
        row
        | {"score": value, "group": category, "cluster": row["prompt"], "grades": g.grades, "reply": g.reply}
        for row, value, category, g in zip(per_sample, values, categories, gradings)
    ]
    problems = _problems(gradings, failed, task)
    reason = _not_comparable(judge, scoring, len(values), problems)
    return Scored(metrics, {"judge": judge.model}, rows, not_comparable=reason, problems=problems)


def wise_metrics(values: Sequence[float], categories: Sequence[str]) -> dict[str, Metric]:
    """The overall WiScore and that of each category; weights of absent categories are left out."""
    present = [name for name in dict.fromkeys(categories) if name in WISE_CATEGORIES]
    weights = np.array([WISE_CATEGORIES[name][1] for name in present])
    kept = [i for i, name in enumerate(categories) if name in WISE_CATEGORIES]
    columns = group_mean_columns([values[i] for i in kept], [categories[i] for i in kept])

    def overall(sums: np.ndarray) -> np.ndarray:
        value, count = np.moveaxis(sums.reshape(*sums.shape[:-1], -1, 2), -1, 0)
        # a resample may lack a category
        used = weights * (count > 0)
        return (used * value / np.maximum(count, 1)).sum(axis=-1) / used.sum(axis=-1)

    value = float(overall(columns.sum(axis=0)))
    metrics = {"overall": Metric(value, len(kept), bootstrap(columns, None, overall))}
    for name in present:
        own = [values[i] for i in kept if categories[i] == name]
        metrics[f"category/{name}"] = mean_metric(own, list(range(len(own))))
    return metrics


def _problems(gradings: Sequence[Grading], failed: dict[int, str], task: Task) -> list[str]:
    """Warnings about images that were not graded, and replies without all grades."""
    problems = []
    if failed:
        index, reason = next(iter(failed.items()))
        problems.append(
            f"{len(failed)} images could not be graded, the first {task.samples[index].id} because {reason} "
            "(counted as 0)"
        )
    partial = sum(bool(g.reply) and len(g.grades) < len(WISE_GRADES) for g in gradings)
    if partial:
        problems.append(f"{partial} replies lack a grade from 0 to 2 (a missing grade counts as 0)")
    absent = sum(not g.reply and not g.failed for g in gradings)
    return problems + [f"{absent} prompts have no image (counted as 0)"] * (absent > 0)


def _not_comparable(judge: Judge, scoring: Options, n: int, problems: Sequence[str]) -> str:
    """The reason why a result is not comparable with published ones, else ""."""
    if judge.model != _PUBLISHED_JUDGE:
        return f"the judge is {judge.model}, the published one is {_PUBLISHED_JUDGE}"
    if scoring.scorer != "official":
        return f"the scorer is {scoring.scorer!r}, not the official one"
    if n != 1000:
        return f"{n} prompts; published scores are of 1,000"
    return problems[0] if problems else ""
