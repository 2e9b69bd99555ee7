"""The benchmarks that ask: VQAv2 and POPE, from sample to score."""

from pathlib import Path
from typing import Any

import numpy as np

from open_unitok.errors import UserError, did_you_mean

from . import pope, vqa
from .harness import Metric, Row, Sample, Scored, Settings, Task
from .intervals import bootstrap, f1_of, with_ones

# The words around a question, by name: "short" is published, "plain" for models that never saw it.
RECIPES = {"short": "{}\nAnswer the question using a single word or phrase.", "plain": "{}"}


def recipe_for(data: Path, settings: Settings) -> str:
    """The recipe asked for, else "plain" for scenes (a folder with scenes.json), "short" for all others."""
    name = settings.recipe or ("plain" if (data / "scenes.json").exists() else "short")
    if name not in RECIPES:
        raise UserError(f"recipe is {name!r}." + did_you_mean(name, RECIPES))
    return name


def load_vqav2(data: Path, settings: Settings) -> Task:
    """One sample per question, in the file's order."""
    questions = vqa.load(data, settings.split)[: settings.limit]
    recipe = recipe_for(data, settings)
    samples = [
        Sample(i, q.question_id, RECIPES[recipe].format(q.question), q.image, "ask")
        for i, q in enumerate(questions)
    ]
    return Task(samples, questions, about_asking(settings.split or "the only one", recipe, settings))


def about_asking(split: str, recipe: str, settings: Settings) -> dict[str, Any]:
    """What the result says of how the answers came about; published runs let an answer have 128 tokens."""
    longest = settings.max_new_tokens or (16 if recipe == "plain" else 128)
    return {"split": split, "recipe": recipe, "decoding": "greedy", "max_new_tokens": longest}


def load_pope(data: Path, settings: Settings) -> Task:
    """One sample per question of the three categories, one after the other."""
    questions = pope.load(data)[: settings.limit]
    recipe = recipe_for(data, settings)
    samples = [
        Sample(i, f"{q.category}/{q.question_id}", RECIPES[recipe].format(q.text), q.image, "ask")
        for i, q in enumerate(questions)
    ]
    return Task(samples, questions, about_asking("all three", recipe, settings))


def ask(model: Any, batch: list[Sample], out: Path, task: Task) -> list[Row]:
    """Answer a batch; a sample whose picture or question cannot be used gets a row that says so."""
    rows: list[Row] = [{} for _ in batch]
    images, read = {}, {}
    for i, sample in enumerate(batch):
        try:
            if sample.image not in read:  # the same object again: the model encodes it once
                read[sample.image] = read_picture(sample.image)
            images[i] = read[sample.image]
        except UserError as error:
            rows[i] = {"text": "", "error": str(error)}
    places = list(images)
    if not places:
        return rows
    words = task.about["max_new_tokens"]
    try:
        texts = model.answer([images[i] for i in places], [batch[i].prompt for i in places], words)
        for i, text in zip(places, texts, strict=True):
            rows[i] = {"text": text}
    except UserError:
        for i in places:  # one of them is to blame: find it
            try:
                rows[i] = {"text": model.answer([images[i]], [batch[i].prompt], words)[0]}
            except UserError as error:
                rows[i] = {"text": "", "error": str(error)}
    return rows


def read_picture(path: Path | None):
    """A picture in RGB; UserError names the file that is missing or no picture."""
    from open_unitok.tokenizer.images import load_image

    assert path is not None
    if not path.exists():
        raise UserError(f"{path} does not exist.")
    return load_image(path)


def answered(rows: dict[int, Row]) -> dict[int, str]:
    """Index -> text, of the samples that could be asked."""
    return {i: row["text"] for i, row in rows.items() if not row.get("error")}


def score_vqav2(task: Task, rows: dict[int, Row], folder: Path, run: dict[str, Any], scorer: str) -> Scored:
    """Accuracy overall, per question type and per answer type, each beside the best constant answer's."""
    questions: list[vqa.Question] = task.truth
    scorer = scorer or "lmms"
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


def score_pope(task: Task, rows: dict[int, Row], folder: Path, run: dict[str, Any], scorer: str) -> Scored:
    """Mean F1 over the three categories, and each category's counts."""
    questions: list[pope.Question] = task.truth
    texts = answered(rows)
    result = pope.score(questions, texts, scorer or "official")
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
    details = {"scorer": scorer or "official", "per_category": result["per_category"]}
    return Scored(metrics, details, [
        {
            "index": i, "id": q.question_id, "image": str(q.image), "group": q.category,
            "question": q.text, "answer": texts.get(i), "truth": q.label, "score": float(right[i]),
        }
        for i, q in enumerate(questions)
    ])  # fmt: skip
