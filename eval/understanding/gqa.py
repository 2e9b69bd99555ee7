"""GQA (arXiv 1902.09506): accuracy and the other official measures, from released or LLaVA question files.

Scorers: `official` (default) compares literally after LLaVA's conversion (a trailing period is removed,
lower case), over balanced questions; `lenient` ignores case and punctuation, as lmms-eval does.
"""

import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing
from open_unitok.core.text_files import read_json

from ..core.annotations import (
    part_asked,
    read_json_as,
    read_llava_questions,
    require_key,
    require_mostly_valid,
    require_text,
    require_type,
)
from ..core.answering import (
    PROMPT_TEMPLATES,
    answer_questions,
    answer_texts,
    answering_metadata,
    choose_prompt_template,
)
from ..core.benchmark import Options, Record, Sample, Scored, Task, malformed_sample
from ..core.parquet import ParquetImage, choose_split, read_parquet, row_image
from ..core.records import (
    cluster_of,
    mean_metric,
    mean_metrics_by,
    sample_record,
    submittable,
    write_submission,
)
from ..core.release_files import (
    RELEASES,
    detect_layout,
    find_beside,
    find_file,
    image_finder,
    image_folders,
)

_ORIGINAL, _LLAVA = RELEASES["gqa"].original, RELEASES["gqa"].llava
_NOT_A_STEP = ("exist", "query: name", "choose name")
GqaQuestions = dict[str, Record]
# placeholder of a malformed question: wrong in the accuracy, and member of no group
_MALFORMED: Record = {
    "question": "", "answer": "", "isBalanced": True, "entailed": [], "semantic": [],
    "types": {"structural": "", "semantic": ""}, "groups": {"global": None},
}  # fmt: skip


answer = answer_questions


def load(data: Path, settings: Options) -> Task:
    """One sample per question of `{split}_questions.json`, or per line of LLaVA's file, in order.

    Malformed: a question without a required key, and a line of LLaVA's file whose question is not released.
    """
    layout = detect_layout(data, settings, _ORIGINAL, _LLAVA)
    images: dict[str, ParquetImage] = {}
    if layout == "parquet":
        split, path, released, images = _read_parquet(data, settings.split or "testdev_balanced")
    else:
        path = find_file(data, _ORIGINAL, "GQA question file", settings.split, "testdev_balanced")
        split, released = path.stem.removesuffix("_questions"), read_json_as(dict, path)
    questions, broken = {}, {}
    for name, row in released.items():
        try:
            _check_question(row, f"{path}, question {name}")
            questions[name] = row
        except UserError as error:
            questions[name], broken[name] = _MALFORMED, error
    # the full split has the balanced questions too, which alone count
    balanced, part = [n for n, row in questions.items() if row["isBalanced"]], ""
    if layout != "llava":
        template, file = choose_prompt_template(settings, "short"), path
        entries = [
            (name, PROMPT_TEMPLATES[template].format(row["question"])) for name, row in questions.items()
        ]
    else:
        file = find_file(data, _LLAVA, "LLaVA question file", settings.split)
        template, entries = f"as in {file.name}", []
        for i, row in enumerate(read_llava_questions(file)):
            good = isinstance(row, dict)
            name = str(row["question_id"]) if good else f"#{i}"
            entries.append((name, row["text"] if good else ""))
            if name not in questions:
                reason = f"{file}, line {i + 1}: question_id {name} is not in {path.name}."
                questions[name], broken[name] = _MALFORMED, reason if good else row
        counted = [name for name, _ in entries if name not in broken and questions[name]["isBalanced"]]
        part = part_asked(counted, (n for n in balanced if n not in broken), file)
    find_image = image_finder(image_folders(data, path, ("images",)))
    samples = [
        malformed_sample(i, name, broken[name])
        if name in broken
        else Sample(
            i,
            name,
            prompt,
            images.get(questions[name]["imageId"]) or find_image(f"{questions[name]['imageId']}.jpg"),
        )
        for i, (name, prompt) in enumerate(entries[: settings.limit])
    ]
    # one choices file serves the balanced and the full split
    tier = split.removesuffix("_balanced").removesuffix("_all")
    choices = find_beside(data, path, f"{tier}_choices.json")
    truth = {"questions": questions, "choices": read_json(choices) if choices.exists() else None}
    metadata = answering_metadata(split, template, settings)
    return Task(require_mostly_valid(samples, file), truth, metadata, not_comparable=part)


def _read_parquet(data: Path, split: str) -> tuple[str, Path, dict[str, Any], dict[str, ParquetImage]]:
    """Split, file, question id -> question, and image id -> image, of the hub's tables (`lmms-lab/GQA`).

    Questions and images are two configurations, `{split}_instructions` and `{split}_images`.
    """
    # a file or a folder of questions: the images are in the folder next to it
    folder = data.parent if data.is_file() else data
    root = folder.parent if folder.name.endswith("_instructions") else folder
    files = [choose_split(existing(root / f"{split}_{part}")).files for part in ("instructions", "images")]
    images = {
        row["id"]: row_image(row, f"{row['id']}.jpg") for row in read_parquet(files[1], ("id", "image"))
    }
    questions = {}
    for row in read_parquet(
        files[0], ("id", "imageId", "question", "answer", "isBalanced", "types", "groups")
    ):
        # a list in the release, its text in the table
        entailed = row.get("entailed") or []
        row["entailed"] = re.findall(r"\w+", entailed) if isinstance(entailed, str) else entailed
        row["semantic"] = row.get("semantic") or []
        questions[str(row["id"])] = row
        if row["imageId"] not in images:
            questions[str(row["id"])] = UserError(f"{row['#']}: there is no image {row['imageId']}.")
    return split, files[0][0], questions, images


def _check_question(row: Any, where: str) -> None:
    """Raise UserError if a released question lacks a key."""
    require_text(row, "question", where)
    for key in ("answer", "imageId", "isBalanced"):
        require_key(row, key, where)
    for key, kind in (("types", dict), ("groups", dict), ("semantic", list), ("entailed", list)):
        require_type(kind, require_key(row, key, where), f"{where}, {key}")
    for kind in ("structural", "semantic"):
        require_text(row["types"], kind, f"{where}, types")
    require_key(row["groups"], "global", f"{where}, groups")
    for step in row["semantic"]:
        for key in ("operation", "argument"):
            require_key(step, key, f"{where}, semantic")


def convert_answer(text: str) -> str:
    """An answer in the form that LLaVA's conversion passes to the official scorer."""
    return text.rstrip(".").lower()


def is_gqa_right(text: str, label: str, scorer: str = "official") -> bool:
    """Whether the raw answer is correct."""
    if scorer == "official":
        return convert_answer(text) == label
    return _without_punctuation(text.strip()) == _without_punctuation(label)


def _without_punctuation(text: str) -> str:
    """Lower case, without punctuation."""
    return text.lower().translate(str.maketrans("", "", string.punctuation))


# ------------------------------------------------------------------------------------- the official measures


def gqa_measures(
    questions: GqaQuestions, predictions: dict[str, str], choices: dict[str, Record] | None = None
) -> dict[str, Any]:
    """The measures of the official scorer in per cent over balanced questions; a missing prediction is wrong.

    `validity` and `plausibility` are None without the choices file, `consistency` without predictions for all
    entailed questions. Groups are {name: [per cent, n]}.
    """
    # accuracy counts balanced questions only; all others are used for consistency
    balanced = {name: q for name, q in questions.items() if q["isBalanced"]}
    right = {name: predictions.get(name) == q["answer"] for name, q in balanced.items()}

    def by(key: Callable[[Record], Any], keep: Callable[[Record], bool] = lambda q: True) -> dict[str, list]:
        groups: dict[str, list[bool]] = defaultdict(list)
        for name, q in balanced.items():
            if q is not _MALFORMED and keep(q):
                groups[str(key(q))].append(right[name])
        return {group: [100 * _mean(hits), len(hits)] for group, hits in sorted(groups.items())}

    open_or_binary = by(lambda q: "open" if q["types"]["structural"] == "query" else "binary")
    return {
        "accuracy": 100 * _mean(right.values()),
        "binary": open_or_binary.get("binary", [0])[0],
        "open": open_or_binary.get("open", [0])[0],
        "validity": _fraction_within(balanced, predictions, choices, "valid"),
        "plausibility": _fraction_within(balanced, predictions, choices, "plausible"),
        "consistency": gqa_consistency(questions, predictions),
        "distribution": gqa_distribution(balanced, predictions),
        "accuracyPerStructuralType": by(lambda q: q["types"]["structural"]),
        "accuracyPerSemanticType": by(lambda q: q["types"]["semantic"]),
        "accuracyPerLength": by(lambda q: len(q["question"].split())),
        "accuracyPerSteps": by(reasoning_steps),
    }


def reasoning_steps(question: Record) -> int:
    """The number of reasoning steps of a question by the official count."""
    # existence checks and look-ups of a name do not count as steps
    steps = (f"{step['operation']}: {step['argument']}" for step in question["semantic"])
    return sum(not any(word in text for word in _NOT_A_STEP) for text in steps)


def _fraction_within(
    questions: GqaQuestions, predictions: dict[str, str], choices: dict[str, Record] | None, kind: str
) -> float | None:
    """Per cent of predictions among the valid or plausible answers; None without choices."""
    if choices is None:
        return None
    return 100 * _mean(predictions.get(name) in choices.get(name, {}).get(kind, ()) for name in questions)


def gqa_consistency(questions: GqaQuestions, predictions: dict[str, str]) -> float | None:
    """Per cent of correct answers to questions that correct ones entail; None if an answer is missing."""
    shares = []
    for name, question in questions.items():
        entailed = [e for e in question["entailed"] if e != name]
        if not question["isBalanced"] or not entailed or predictions.get(name) != question["answer"]:
            continue
        # they may be unbalanced questions, which a balanced split does not contain
        if any(e not in questions or e not in predictions for e in entailed):
            return None
        shares.append(_mean(predictions[e] == questions[e]["answer"] for e in entailed))
    return 100 * _mean(shares)


def gqa_distribution(questions: GqaQuestions, predictions: dict[str, str]) -> float:
    """Distance between predicted and true answer distributions: chi-square / 100, weighted by group size."""
    gold: dict[str, Counter] = defaultdict(Counter)
    found: dict[str, Counter] = defaultdict(Counter)
    for name, question in questions.items():
        group = question["groups"]["global"]
        if group is not None:
            gold[group][question["answer"]] += 1
            found[group][predictions.get(name)] += 1
    total = weight = 0.0
    for group, counts in gold.items():
        size = counts.total()
        # chi-square over true answers only, as published: predictions outside of them are not penalised
        total += size * sum((found[group][answer] - n) ** 2 / n for answer, n in counts.items())
        weight += size
    return total / weight / 100 if weight else 0.0


def _mean(values: Iterable[float]) -> float:
    """Arithmetic mean, 0 for no values."""
    values = list(values)
    return sum(values) / len(values) if values else 0.0


# --------------------------------------------------------------------------------------------------- scoring


def score(task: Task, records: dict[int, Record], folder: Path, run: Record, scoring: Options) -> Scored:
    """Accuracy over balanced questions, overall and per type; the official measures go into the details."""
    questions: GqaQuestions = {s.id: task.truth["questions"][s.id] for s in task.samples}
    texts = answer_texts(records)
    predictions = {s.id: convert_answer(texts[s.index]) for s in task.samples if s.index in texts}
    kept = [s for s in task.samples if questions[s.id]["isBalanced"]]
    values = {
        s.index: float(
            s.index in texts and is_gqa_right(texts[s.index], questions[s.id]["answer"], scoring.scorer)
        )
        for s in kept
    }
    scores, clusters = list(values.values()), [cluster_of(s) for s in kept]
    kinds = [questions[s.id]["types"] for s in kept]
    metrics = {"accuracy": mean_metric(scores, clusters)}
    # the official scorer calls "query" questions open; a malformed one ("") is in neither half
    halves = [("open" if k["structural"] == "query" else "binary") * bool(k["structural"]) for k in kinds]
    metrics |= mean_metrics_by("half", halves, scores, clusters)
    metrics |= mean_metrics_by("structural", [k["structural"] for k in kinds], scores, clusters)
    metrics |= mean_metrics_by("semantic", [k["semantic"] for k in kinds], scores, clusters)
    details = {"official": gqa_measures(questions, predictions, task.truth["choices"])}
    per_sample = [
        sample_record(
            s, records, values.get(s.index), questions[s.id]["answer"],
            questions[s.id]["types"]["structural"], questions[s.id]["question"],
        )
        for s in task.samples
    ]  # fmt: skip
    return Scored(metrics, details, per_sample)


def submit(task: Task, records: dict[int, Record], folder: Path, data: Path) -> list[Path]:
    """The input file of the official scorer."""
    # the scorer fails if a question has no prediction, so a missing one is ""
    texts = answer_texts(records)
    content = [
        {"questionId": s.id, "prediction": convert_answer(texts.get(s.index, ""))}
        for s in submittable(task.samples)
    ]
    name = f"{task.metadata['split']}_predictions.json"
    return [write_submission(folder, name, content)]
