"""The benchmarks that ask: VQAv2 and POPE, from sample to score."""

from pathlib import Path
from typing import Any

import numpy as np

from . import pope, vqa
from .asking import RECIPES, about_asking, answered, recipe_for
from .harness import Metric, Row, Sample, Scored, Scoring, Settings, Task
from .intervals import bootstrap, f1_of, with_ones


def load_vqav2(data: Path, settings: Settings) -> Task:
    """One sample per question, in the file's order."""
    questions = vqa.load(data, settings.split)[: settings.limit]
    recipe = recipe_for(settings, "short", data)
    samples = [
        Sample(i, q.question_id, RECIPES[recipe].format(q.question), q.image, "ask")
        for i, q in enumerate(questions)
    ]
    return Task(samples, questions, about_asking(settings.split or "the only one", recipe, settings))


def load_pope(data: Path, settings: Settings) -> Task:
    """One sample per question of the three categories, one after the other."""
    questions = pope.load(data)[: settings.limit]
    recipe = recipe_for(settings, "short", data)
    samples = [
        Sample(i, f"{q.category}/{q.question_id}", RECIPES[recipe].format(q.text), q.image, "ask")
        for i, q in enumerate(questions)
    ]
    return Task(samples, questions, about_asking("all three", recipe, settings))


def score_vqav2(
    task: Task, rows: dict[int, Row], folder: Path, run: dict[str, Any], scoring: Scoring
) -> Scored:
    """Accuracy overall, per question type and per answer type, each beside the best constant answer's."""
    questions: list[vqa.Question] = task.truth
    scorer = scoring.scorer
    texts = answered(rows)
    result = vqa.score(questions, {questions[i].question_id: t for i, t in texts.items()}, scorer)
    values = np.array(result["per_question"])
    clusters = [q.image_id for q in questions]

    def metric(keep: np.ndarray) -> Metric:
        chosen = [c for c, k in zip(clusters, keep) if k]
        return Metric(float(values[keep].mean()), int(keep.sum()), bootstrap(with_ones(values[keep]), chosen))

    metrics = {"accuracy": metric(np.ones(len(values), bool))}
    for name in result["per_question_type"]:
        metrics[f"type/{name}"] = metric(np.array([q.question_type == name for q in questions]))
    for name in result["per_answer_type"]:
        metrics[f"answer/{name}"] = metric(np.array([q.answer_type == name for q in questions]))
    held_out = np.array([q.held_out for q in questions])
    if held_out.any():
        metrics["pictures with held-out pairs"] = metric(held_out)
    constant = result["constant"]
    margins = {t: result["per_question_type"][t] - c["accuracy"] for t, c in constant.items()}
    details = {
        "scorer": scorer,
        "constant": constant,
        "constant_overall": result["constant_overall"],
        "above_constant": margins,
        "above_constant_overall": result["overall"] - result["constant_overall"],
    }
    return Scored(metrics, details, [
        {
            "index": i, "id": q.question_id, "image": str(q.image), "group": q.question_type,
            "question": q.question, "answer": texts.get(i), "truth": q.common_answer,
            "score": float(values[i]),
        }
        for i, q in enumerate(questions)
    ])  # fmt: skip


def score_pope(
    task: Task, rows: dict[int, Row], folder: Path, run: dict[str, Any], scoring: Scoring
) -> Scored:
    """Mean F1 over the three categories, and each category's counts."""
    questions: list[pope.Question] = task.truth
    texts = answered(rows)
    result = pope.score(questions, texts, scoring.scorer)
    names = list(result["per_category"])
    columns = np.zeros((len(questions), len(names), 3))
    right = np.zeros(len(questions))
    for i, (question, parsed) in enumerate(zip(questions, result["parsed"])):
        hits = (parsed == "yes" == question.label, parsed == "yes" != question.label)
        missed = parsed != "yes" and question.label == "yes"
        columns[i, names.index(question.category)] = [*hits, missed]
        right[i] = parsed == question.label
    clusters = [q.image.name for q in questions]
    interval = bootstrap(columns.reshape(len(questions), -1), clusters, f1_of)
    metrics = {
        "f1": Metric(result["f1"], len(questions), interval),
        "accuracy": Metric(result["accuracy"], len(questions), bootstrap(with_ones(right), clusters)),
    }
    for k, (name, ratios) in enumerate(result["per_category"].items()):
        interval = bootstrap(columns[:, k], clusters, f1_of)
        metrics[f"f1/{name}"] = Metric(ratios["f1"], int(ratios["n"]), interval)
    details = {"scorer": scoring.scorer, "per_category": result["per_category"]}
    return Scored(metrics, details, [
        {
            "index": i, "id": q.question_id, "image": str(q.image), "group": q.category,
            "question": q.text, "answer": texts.get(i), "truth": q.label, "score": float(right[i]),
        }
        for i, q in enumerate(questions)
    ])  # fmt: skip
