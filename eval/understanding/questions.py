"""VQAv2 and POPE, from files to samples and from answers to numbers."""

from pathlib import Path
from typing import Any

import numpy as np

from open_unitok.core.errors import UserError

from ..core.annotations import (
    PROMPT_TEMPLATES,
    answer_texts,
    answering_metadata,
    choose_prompt_template,
    detect_layout,
    find_file,
    image_path,
    read_json_as,
    read_llava_questions,
    require_key,
    require_mostly_valid,
    require_text,
)
from ..core.answer_normalisation import normalise_m4c
from ..core.bootstrap import bootstrap, f1_statistic, mean_columns
from ..core.harness import Metric, Record, Sample, Scored, Scoring, Settings, Task, malformed_sample
from ..core.records import (
    cluster_of,
    mean_metric,
    mean_metrics_by,
    sample_record,
    submittable,
    write_submission,
)
from . import pope, vqav2

VQA_ORIGINAL = ("v2_OpenEnded_*_questions.json", "test/v2_OpenEnded_*_questions.json")
VQA_LLAVA = ("*vqav2*.jsonl",)
POPE_ORIGINAL = ("*_pope_random.json", "test/*_pope_random.json", "coco/*_pope_random.json")
POPE_LLAVA = ("*pope*.jsonl",)
SUFFIX = PROMPT_TEMPLATES["short"].format("")


def longest(template: str) -> int:
    """Tokens that an answer may have: 128 as published, 16 where nothing asks for a long one."""
    return 16 if template == "plain" else 128


def load_vqav2(data: Path, settings: Settings) -> Task:
    """One sample per question, in the file's order."""
    if detect_layout(data, settings, VQA_ORIGINAL, VQA_LLAVA) == "llava":
        return load_vqav2_llava(data, settings)
    path = vqav2.find_questions(data, settings.split)
    questions = vqav2.load(data, settings.split)[: settings.limit]
    template = choose_prompt_template(settings, "short", data)
    samples = [
        malformed_sample(i, q.question_id, q.malformed)
        if q.malformed
        else Sample(i, q.question_id, PROMPT_TEMPLATES[template].format(q.question), q.image, "ask")
        for i, q in enumerate(questions)
    ]
    split = path.name.removeprefix("v2_OpenEnded_").removesuffix("_questions.json")
    return Task(
        require_mostly_valid(samples, path),
        questions,
        answering_metadata(split, template, settings, longest(template)),
    )


def load_vqav2_llava(data: Path, settings: Settings) -> Task:
    """LLaVA's question file; its questions are joined by id with the released files where those are there."""
    path = find_file(data, VQA_LLAVA, "LLaVA question file", settings.split, "test-dev")
    known = {}
    if any(next(data.glob(pattern), None) for pattern in VQA_ORIGINAL):
        known = {q.question_id: q for q in vqav2.load(data, None)}
    folders = [data / name for name in ("test2015", "val2014", "images")] + [data]
    samples, questions = [], []
    for i, row in enumerate(read_llava_questions(path, settings.limit)):
        try:
            number, text = require_key(row, "question_id", path), row["text"].removesuffix(SUFFIX)
            image = image_path(folders, Path(require_text(row, "image", f"{path}, line {i + 1}")).name)
            if known and number not in known:
                raise UserError(f"{path}, line {i + 1}: question_id {number!r} is not in the released files.")
            question = known.get(number) or vqav2.Question(number, image.stem, text, image)
            if question.malformed:
                raise UserError(question.malformed)
            samples.append(Sample(i, number, row["text"], image, "ask"))
            questions.append(question)
        except UserError as error:
            samples.append(malformed_sample(i, row["question_id"] if isinstance(row, dict) else None, error))
            questions.append(vqav2.Question(i, i, "", Path(), malformed=str(error)))
    return Task(
        require_mostly_valid(samples, path),
        questions,
        answering_metadata(path.stem, f"as in {path.name}", settings),
    )


def load_pope(data: Path, settings: Settings) -> Task:
    """One sample per question of the three categories, one after the other.

    In LLaVA's layout the released files lie in `data/coco`; its questions follow theirs in order, category by
    category, as LLaVA's own scorer takes for granted.
    """
    if detect_layout(data, settings, POPE_ORIGINAL, POPE_LLAVA) == "original":
        questions = pope.load(data)[: settings.limit]
        template = choose_prompt_template(settings, "short", data)
        prompts, path = [PROMPT_TEMPLATES[template].format(q.text) for q in questions], data
        about = answering_metadata("all three", template, settings, longest(template))
    else:
        path = find_file(data, POPE_LLAVA, "LLaVA question file")
        rows = read_llava_questions(path)
        questions = pope.in_order(pope.load(data), rows, path)[: settings.limit]
        prompts = [row["text"] if isinstance(row, dict) else "" for row in rows]
        about = answering_metadata("all three", f"as in {path.name}", settings)
    samples = [
        malformed_sample(i, None, q.malformed)
        if q.malformed
        else Sample(i, f"{q.category}/{q.question_id}", prompt, q.image, "ask")
        for i, (q, prompt) in enumerate(zip(questions, prompts))
    ]
    return Task(require_mostly_valid(samples, path), questions, about)


def score_vqav2(
    task: Task, rows: dict[int, Record], folder: Path, run: dict[str, Any], scoring: Scoring
) -> Scored:
    """Accuracy overall, per question type and per answer type, each beside the best constant answer's."""
    questions: list[vqav2.Question] = task.truth
    texts = answer_texts(rows)
    if not any(q.answers for q in questions if not q.malformed):  # test splits: upload the submission
        return Scored({}, {}, [
            sample_record(s, rows, None, None, "", q.question) for s, q in zip(task.samples, questions)
        ])  # fmt: skip
    result = vqav2.score(questions, {questions[i].question_id: t for i, t in texts.items()}, scoring.scorer)
    values = np.array(result["per_question"])
    clusters = [s.id if q.malformed else q.image_id for s, q in zip(task.samples, questions)]
    metrics = {"accuracy": mean_metric(values, clusters)}
    metrics |= mean_metrics_by("type", [q.question_type for q in questions], values, clusters)
    metrics |= mean_metrics_by("answer", [q.answer_type for q in questions], values, clusters)
    apart = [i for i, q in enumerate(questions) if q.held_out]
    if apart:
        metrics["images with held-out pairs"] = mean_metric(values[apart], [clusters[i] for i in apart])
    constant = result["constant"]
    margins = {t: result["per_question_type"][t] - c["accuracy"] for t, c in constant.items()}
    details = {
        "constant": constant,
        "constant_overall": result["constant_overall"],
        "above_constant": margins,
        "above_constant_overall": result["overall"] - result["constant_overall"],
    }
    return Scored(metrics, details, [
        sample_record(s, rows, float(v), q.common_answer, q.question_type, q.question)
        for s, q, v in zip(task.samples, questions, values)
    ])  # fmt: skip


def submit_vqav2(task: Task, rows: dict[int, Record], folder: Path, data: Path) -> list[Path]:
    """What EvalAI takes: test2015's ids in its order, an empty answer where test-dev does not ask.

    The list of ids comes from test2015's question file, LLaVA's or the released one, where it lies in `data`.
    """
    texts = answer_texts(rows)
    known = submittable(task.samples)
    answers = {s.id: normalise_m4c(texts[s.index]) if s.index in texts else "" for s in known}
    ids = [s.id for s in known]
    if "test" in str(task.metadata["split"]):
        ids = all_test_ids(data) or ids
    content = [{"question_id": i, "answer": answers.get(i, "")} for i in ids]
    return [write_submission(folder, "vqav2_answers.json", content)]


def all_test_ids(data: Path) -> list[int]:
    """The question ids of test2015 in its order, [] where its file is not there."""
    for path in data.glob("*vqav2*test2015.jsonl"):
        if "test-dev" not in path.name:
            return [row["question_id"] for row in read_llava_questions(path) if isinstance(row, dict)]
    path = data / "v2_OpenEnded_mscoco_test2015_questions.json"
    rows = read_json_as(list, path, "questions") if path.exists() else []
    return [row["question_id"] for row in rows if isinstance(row, dict) and "question_id" in row]


def score_pope(
    task: Task, rows: dict[int, Record], folder: Path, run: dict[str, Any], scoring: Scoring
) -> Scored:
    """Mean F1 over the three categories, and each category's counts."""
    questions: list[pope.Question] = task.truth
    result = pope.score(questions, answer_texts(rows), scoring.scorer)
    names = list(result["per_category"])
    columns = pope.columns(
        [(parsed, q.label, q.category) for parsed, q in zip(result["parsed"], questions)], names
    )
    right = [float(parsed == q.label) for parsed, q in zip(result["parsed"], questions)]
    clusters = [cluster_of(s) for s in task.samples]
    metrics = {
        "f1": Metric(result["f1"], len(questions), bootstrap(columns, clusters, f1_statistic)),
        "accuracy": Metric(result["accuracy"], len(questions), bootstrap(mean_columns(right), clusters)),
    }
    for k, (name, ratios) in enumerate(result["per_category"].items()):
        interval = bootstrap(columns[:, 3 * k : 3 * k + 3], clusters, f1_statistic)
        metrics[f"f1/{name}"] = Metric(ratios["f1"], int(ratios["n"]), interval)
    return Scored(metrics, {"per_category": result["per_category"]}, [
        sample_record(s, rows, score, q.label, q.category, q.text, parsed=parsed)
        for s, q, score, parsed in zip(task.samples, questions, right, result["parsed"])
    ], "f1")  # fmt: skip
