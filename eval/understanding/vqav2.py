"""VQAv2 (arXiv 1612.00837): open questions with ten answers each, and the three public accuracy variants.

Scorers: `lmms` (default) normalises the prediction and all answers; `official`, the public tool since March
2021, normalises both sides if the ten answers differ and compares raw strings otherwise; `official-2018` is
the tool before (answers lose only punctuation, and only if the ten differ).
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from open_unitok.core.errors import UserError

from ..core.annotations import (
    read_json_as,
    read_llava_questions,
    require_key,
    require_mostly_valid,
    require_text,
    require_type,
)
from ..core.answer_normalisation import normalise_m4c
from ..core.answering import (
    PROMPT_TEMPLATES,
    PUBLISHED_LENGTH,
    SCENES_LENGTH,
    answer_questions,
    answer_texts,
    answering_metadata,
    choose_prompt_template,
)
from ..core.benchmark import Options, Record, Sample, Scored, Task, malformed_sample
from ..core.open_answers import annotator_answers, vqa_accuracy, without_empty_answers
from ..core.parquet import ParquetImage, choose_split, read_parquet, row_image
from ..core.records import (
    mean,
    mean_by,
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
    find_files,
    holds_files,
    image_finder,
    image_folders,
)

_ORIGINAL, _LLAVA = RELEASES["vqav2"].original, RELEASES["vqav2"].llava
# names of splits in the release -> on the hub (`lmms-lab/VQAv2`)
_HUB_SPLITS = {
    "mscoco_val2014": "validation", "mscoco_test-dev2015": "testdev", "mscoco_test2015": "test",
}  # fmt: skip
_TEMPLATE_SUFFIX = PROMPT_TEMPLATES["short"].format("")

answer = answer_questions


class VqaQuestion(NamedTuple):
    """One question with its ten answers; `answers` is empty if they are not public."""

    question_id: int
    image_id: int | str
    question: str
    image: Path | ParquetImage
    answers: tuple[str, ...] = ()
    question_type: str = ""
    answer_type: str = ""
    common_answer: str = ""
    held_out: bool = False  # scenes: the image has a colour x shape pair that is absent from training
    malformed: str = ""  # the error in its annotation: the question is not answered and counts as wrong


# --------------------------------------------------------------------------------------------------- loading


def load(data: Path, settings: Options) -> Task:
    """One sample per question, in the order of the file."""
    layout = detect_layout(data, settings, _ORIGINAL, _LLAVA)
    if layout == "llava":
        return _load_llava(data, settings)
    if layout == "parquet":
        hub = choose_split(data, _HUB_SPLITS.get(settings.split, settings.split))
        names = {name: released for released, name in _HUB_SPLITS.items()}
        path, split = hub.files[0], names.get(hub.split, hub.split)
        questions = _read_parquet(hub.files, split)[: settings.limit]
    else:
        path = find_file(data, _ORIGINAL, "VQAv2 question file", settings.split)
        split = path.name.removeprefix("v2_OpenEnded_").removesuffix("_questions.json")
        questions = read_vqav2(data, settings.split)[: settings.limit]
    template = choose_prompt_template(settings, "short", data)
    samples = [
        malformed_sample(i, q.question_id, q.malformed)
        if q.malformed
        else Sample(i, q.question_id, PROMPT_TEMPLATES[template].format(q.question), q.image)
        for i, q in enumerate(questions)
    ]
    # answers about scenes are one word; a short limit keeps the demo fast
    length = SCENES_LENGTH if template == "plain" else PUBLISHED_LENGTH
    metadata = answering_metadata(split, template, settings, length)
    return Task(require_mostly_valid(samples, path), questions, metadata)


def _load_llava(data: Path, settings: Options) -> Task:
    """The task of LLaVA's question file, joined by question id with the released files if they exist."""
    path = find_file(data, _LLAVA, "LLaVA question file", settings.split, "test-dev")
    known = {}
    if holds_files(data if data.is_dir() else data.parent, _ORIGINAL):
        known = {q.question_id: q for q in read_vqav2(data)}
    find_image = image_finder(image_folders(data, path, ("test2015", "val2014", "images")))
    samples, questions = [], []
    for i, row in enumerate(read_llava_questions(path, settings.limit)):
        try:
            where = f"{path}, line {i + 1}"
            number, text = require_key(row, "question_id", path), row["text"].removesuffix(_TEMPLATE_SUFFIX)
            image = find_image(Path(require_text(row, "image", where)).name)
            # LLaVA's file may be of another split than the annotations
            if known and number not in known:
                raise UserError(f"{where}: question_id {number!r} is not in the released files.")
            question = known.get(number) or VqaQuestion(number, image.stem, text, image)
            if question.malformed:
                raise UserError(question.malformed)
            samples.append(Sample(i, number, row["text"], image))
            questions.append(question)
        except UserError as error:
            samples.append(malformed_sample(i, row["question_id"] if isinstance(row, dict) else None, error))
            questions.append(VqaQuestion(i, i, "", Path(), malformed=str(error)))
    metadata = answering_metadata(path.stem, f"as in {path.name}", settings)
    return Task(require_mostly_valid(samples, path), questions, metadata)


def read_vqav2(data: str | Path, split: str | None = None) -> list[VqaQuestion]:
    """Read `v2_OpenEnded_*_questions.json` and its annotations from `data` or folders below it.

    Malformed entries, questions without annotation and annotations without question become `malformed`
    questions.

    Args:
        split: the middle part of the file name, e.g. `mscoco_val2014`; required if there are several files.

    Raises:
        UserError: no file or several, or a file of another kind.
    """
    data = Path(data)
    path = find_file(data, _ORIGINAL, "VQAv2 question file", split)
    content = read_json_as(dict, path)
    rows = require_type(list, require_key(content, "questions", path), f"{path}, questions")
    name = path.name.replace("OpenEnded_", "").replace("questions", "annotations")
    annotation_file = find_beside(data, path, name)
    annotations = _read_annotations(annotation_file)
    if annotations is None and "test" not in path.name:
        raise UserError(f"{annotation_file} does not exist: these questions have public answers.")
    locate = _image_locator(data, path, str(content.get("data_subtype", "")))
    result: list[VqaQuestion] = []
    seen: set[Any] = set()
    for i, row in enumerate(rows):
        try:
            question = _read_question(row, f"{path}, questions[{i}]", locate, seen)
            if annotations is not None:
                question = _with_annotation(question, annotations, f"{path}, questions[{i}]")
        except UserError as error:
            name = row.get("question_id") if isinstance(row, dict) else None
            question = VqaQuestion(name, name, "", Path(), malformed=str(error))  # pyright: ignore[reportArgumentType]
        seen.add(question.question_id if isinstance(question.question_id, int) else None)
        result.append(question)
    # an annotation without question means that the versions differ: it lowers the score
    for name in annotations or ():
        if name not in seen:
            reason = f"{annotation_file}: question_id {name!r} is not a question of {path.name}."
            result.append(VqaQuestion(name, name, "", Path(), malformed=reason))
    return result


def _read_parquet(files: Sequence[Path], split: str) -> list[VqaQuestion]:
    """The questions of the hub's table, in order."""
    name_of, seen = _image_name(split.removeprefix("mscoco_")), set()
    result: list[VqaQuestion] = []
    for row in read_parquet(files, ("question_id", "image_id", "question", "image", "answers")):
        try:
            where, row = row["#"], without_empty_answers(row)
            question = _read_question(row, where, lambda i: row_image(row, name_of(i)), seen)  # noqa: B023
            result.append(
                question._replace(**_annotation_fields(row, where)) if "answers" in row else question
            )
        except UserError as error:
            name = row["question_id"]
            result.append(VqaQuestion(name, name, "", Path(), malformed=str(error)))
        seen.add(row["question_id"])
    return result


def _read_question(
    row: Any, where: str, locate: Callable[[int], Path | ParquetImage], seen: set[Any]
) -> VqaQuestion:
    """A question of the released file, without answers; UserError if it is malformed."""
    question_id, image_id = require_key(row, "question_id", where), require_key(row, "image_id", where)
    for name, value in (("question_id", question_id), ("image_id", image_id)):
        if not isinstance(value, int):
            raise UserError(f"{where}: {name} is {value!r}; it must be an integer.")
    if question_id in seen:
        raise UserError(f"{where}: question_id {question_id} occurs twice; every question needs its own.")
    return VqaQuestion(question_id, image_id, require_text(row, "question", where), locate(image_id))


def _with_annotation(
    question: VqaQuestion, annotations: dict[int, dict[str, Any] | UserError], where: str
) -> VqaQuestion:
    """The question with its annotation; UserError if the annotation is missing or malformed."""
    annotation = annotations.get(question.question_id)
    if annotation is None:
        raise UserError(
            f"{where}: question_id {question.question_id} has no annotation: "
            "questions and annotations differ."
        )
    if isinstance(annotation, UserError):
        raise annotation
    return question._replace(**annotation)


def _read_annotations(path: Path) -> dict[int, dict[str, Any] | UserError] | None:
    """Question id -> the fields of its annotation, or the error in it; None without annotation file."""
    # the answers of test-dev and test-std are not public
    if not path.exists():
        return None
    result: dict[int, dict[str, Any] | UserError] = {}
    for i, row in enumerate(read_json_as(list, path, "annotations")):
        where, name = f"{path}, annotations[{i}]", row.get("question_id") if isinstance(row, dict) else None
        # skipped: its question is then reported as one without annotation
        if not isinstance(name, int):
            continue
        try:
            if name in result:
                raise UserError(
                    f"{where}: question_id {name} occurs twice; every question has one annotation."
                )
            result[name] = _annotation_fields(row, where)
        except UserError as error:
            result[name] = error
    return result


def _annotation_fields(row: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of `VqaQuestion` that come from an annotation."""
    texts = annotator_answers(row, where)
    return {
        "answers": texts,
        "question_type": require_text(row, "question_type", where),
        "answer_type": require_text(row, "answer_type", where),
        "common_answer": str(row.get("multiple_choice_answer") or Counter(texts).most_common(1)[0][0]),
        "held_out": bool(row.get("held_out", False)),
    }


def _image_locator(data: Path, file: Path, subtype: str) -> Callable[[int], Path]:
    """Returns image_id -> path, in the folder of the images of the split."""
    name_of, split = _image_name(subtype), _image_split(subtype)
    find_image = image_finder(image_folders(data, file, ("images", split, subtype)))
    return lambda image_id: find_image(name_of(image_id))


def _image_name(subtype: str) -> Callable[[int], str]:
    """Returns image_id -> file name: COCO's for COCO splits, else `{subtype}_{id}.png`."""
    if subtype.startswith(("train20", "val20", "test")):
        return lambda image_id: f"COCO_{_image_split(subtype)}_{image_id:012d}.jpg"
    return lambda image_id: f"{subtype}_{image_id:012d}.png"


def _image_split(subtype: str) -> str:
    """test-dev2015 is a subset of the questions of test2015, with the same images."""
    return subtype.replace("test-dev2015", "test2015")


# --------------------------------------------------------------------------------------------------- scoring


def score(task: Task, records: dict[int, Record], folder: Path, run: Record, scoring: Options) -> Scored:
    """Accuracy overall, by question type and by answer type; details compare with constant answers."""
    questions: list[VqaQuestion] = task.truth
    texts = answer_texts(records)
    if not any(q.answers for q in questions if not q.malformed):  # test splits: upload the submission
        lines = [
            sample_record(s, records, None, None, "", q.question) for s, q in zip(task.samples, questions)
        ]
        return Scored({}, {}, lines)
    predictions = {questions[i].question_id: text for i, text in texts.items()}
    result = vqav2_accuracies(questions, predictions, scoring.scorer)
    values = np.array(result["per_question"])
    # questions about one image are not independent: resample images
    clusters = [s.id if q.malformed else q.image_id for s, q in zip(task.samples, questions)]
    metrics = {"accuracy": mean_metric(values, clusters)}
    metrics |= mean_metrics_by("type", [q.question_type for q in questions], values, clusters)
    metrics |= mean_metrics_by("answer", [q.answer_type for q in questions], values, clusters)
    held_out = [i for i, q in enumerate(questions) if q.held_out]
    if held_out:
        metrics["images with held-out pairs"] = mean_metric(values[held_out], [clusters[i] for i in held_out])
    constant = result["constant"]
    # accuracy above the constant answer: how much the image contributes
    margins = {t: result["per_question_type"][t] - c["accuracy"] for t, c in constant.items()}
    details = {
        "constant": constant,
        "constant_overall": result["constant_overall"],
        "above_constant": margins,
        "above_constant_overall": result["overall"] - result["constant_overall"],
    }
    return Scored(metrics, details, [
        sample_record(s, records, float(v), q.common_answer, q.question_type, q.question)
        for s, q, v in zip(task.samples, questions, values)
    ])  # fmt: skip


def vqav2_accuracies(
    questions: Sequence[VqaQuestion], predictions: dict[int, str], scorer: str = "lmms"
) -> dict[str, Any]:
    """Accuracies in [0, 1]: overall, per answer type, per question type and per question.

    A missing answer scores 0, a malformed question scores 0 and has no type. `constant` is the baseline that
    ignores the image: per question type, the most frequent answer and its accuracy.

    Raises:
        UserError: a prediction for an unknown question id, or questions without public answers.
    """
    unknown = predictions.keys() - {q.question_id for q in questions}
    if unknown:
        raise UserError(
            f"{len(unknown)} answers belong to no question of this split, for instance id {min(unknown)}."
        )
    if any(not q.answers for q in questions if not q.malformed):
        raise UserError(
            "This split has no public answers: upload the answers file to the challenge server instead."
        )
    values = [
        vqa_accuracy(predictions[q.question_id], q.answers, scorer)
        if q.question_id in predictions and not q.malformed
        else 0.0
        for q in questions
    ]
    valid = [q for q in questions if not q.malformed]
    kept = [v for q, v in zip(questions, values) if not q.malformed]
    constant = _constant_answers(valid)
    # the baseline: always the most frequent answer of the question type
    blind = [vqa_accuracy(constant[q.question_type], q.answers, scorer) for q in valid]
    blind_by_type = mean_by(zip([q.question_type for q in valid], blind))
    return {
        "overall": mean(values),
        "per_answer_type": mean_by(zip([q.answer_type for q in valid], kept)),
        "per_question_type": mean_by(zip([q.question_type for q in valid], kept)),
        "per_question": values,
        "constant": {t: {"answer": constant[t], "accuracy": blind_by_type[t]} for t in blind_by_type},
        "constant_overall": mean(blind),
    }


def _constant_answers(questions: Iterable[VqaQuestion]) -> dict[str, str]:
    """Question type -> its most frequent answer; ties are broken alphabetically."""
    counts: dict[str, Counter] = defaultdict(Counter)
    for question in questions:
        counts[question.question_type][question.common_answer] += 1
    return {t: min(c, key=lambda answer: (-c[answer], answer)) for t, c in counts.items()}


# ------------------------------------------------------------------------------------------------ submission


def submit(task: Task, records: dict[int, Record], folder: Path, data: Path) -> list[Path]:
    """The upload file of EvalAI."""
    texts = answer_texts(records)
    known = submittable(task.samples)
    answers = {s.id: normalise_m4c(texts[s.index]) if s.index in texts else "" for s in known}
    ids = [s.id for s in known]
    if "test" in str(task.metadata["split"]):
        # the test-dev phase requires all ids of test2015; those outside of test-dev get an empty answer
        ids = all_test_ids(data) or ids
    content = [{"question_id": i, "answer": answers.get(i, "")} for i in ids]
    return [write_submission(folder, "vqav2_answers.json", content)]


def all_test_ids(data: Path) -> list[int]:
    """The question ids of test2015 from LLaVA's or the released file; [] if `data` has neither."""
    for path in find_files(data, ("*vqav2*test2015.jsonl",)):
        if "test-dev" not in path.name:
            return [row["question_id"] for row in read_llava_questions(path) if isinstance(row, dict)]
    paths = find_files(data, ("v2_OpenEnded_mscoco_test2015_questions.json",))
    rows = read_json_as(list, paths[0], "questions") if paths else []
    return [row["question_id"] for row in rows if isinstance(row, dict) and "question_id" in row]
