"""Emoji: name, style and category of an image, and which of two names it has."""

from pathlib import Path
from typing import Any

from ..core.annotations import require_mostly_valid
from ..core.answering import (
    PROMPT_TEMPLATES,
    answer_questions,
    answer_texts,
    answering_metadata,
    choose_prompt_template,
)
from ..core.benchmark import Metric, Options, Record, Sample, Scored, Task, malformed_sample
from ..core.bootstrap import bootstrap, mean_columns
from ..judges.emoji_originals import ITEMS, read_items

_LENGTH = 48  # max_new_tokens: names have up to 40 tokens

answer = answer_questions


def load(data: Path, settings: Options) -> Task:
    """One question of each kind per image of a split (train, validation, pairs or unseen)."""
    template = choose_prompt_template(settings, "plain")
    samples, truth = [], []
    for item in read_items(data):
        for asked in item["questions"] or [{}]:
            index = len(samples)
            if "malformed" in item or not all(isinstance(asked.get(k), str) for k in _KEYS):
                reason = item.get("malformed") or f"{data / ITEMS}, {item['file']}: a question lacks a text."
                samples.append(malformed_sample(index, None, reason))
                truth.append({"kind": "", "answer": "", "image": ""})
                continue
            prompt = PROMPT_TEMPLATES[template].format(asked["question"])
            samples.append(Sample(index, f"{item['file']} {asked['kind']}", prompt, data / item["file"]))
            truth.append({"kind": asked["kind"], "answer": asked["answer"], "image": item["file"]})
    samples, truth = samples[: settings.limit], truth[: settings.limit]
    require_mostly_valid(samples, data / ITEMS)
    return Task(samples, truth, answering_metadata(data.name, template, settings, _LENGTH))


_KEYS = ("kind", "question", "answer")


def score(
    task: Task, records: dict[int, Record], folder: Path, run: dict[str, Any], scoring: Options
) -> Scored:
    """The fraction of answers that are the right words, in any case; over all, and by kind of question."""
    texts, per_sample = answer_texts(records), []
    for sample, truth in zip(task.samples, task.truth):
        text = texts.get(sample.index, "")
        right = not sample.malformed and _words(text) == _words(truth["answer"])
        per_sample.append(
            {
                "index": sample.index, "image": str(sample.image), "question": sample.prompt, "answer": text,
                "truth": truth["answer"], "group": truth["kind"], "cluster": truth["image"],
                "score": float(right),
            }
        )  # fmt: skip
    metrics = {"accuracy": _mean(per_sample)}
    for kind in dict.fromkeys(row["group"] for row in per_sample if row["group"]):
        metrics[f"kind/{kind}"] = _mean([row for row in per_sample if row["group"] == kind])
    return Scored(metrics, {}, per_sample)


def _words(text: str) -> list[str]:
    return text.casefold().rstrip(". ").split()


def _mean(rows: list[Record]) -> Metric:
    scores = [row["score"] for row in rows]
    # the questions of one image form a cluster
    interval = bootstrap(mean_columns(scores), [row["cluster"] for row in rows])
    return Metric(sum(scores) / len(scores), len(scores), interval)
