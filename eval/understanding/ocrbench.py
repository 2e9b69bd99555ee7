"""OCRBench (arXiv 2305.07895): 1,000 questions about text in images, scored by containment; a point each.

Scorers: `official` (default); `lmms` also takes full-width letters and digits for their ASCII forms.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from open_unitok.core.errors import UserError

from ..core.annotations import read_json_as, require_key, require_mostly_valid, require_text
from ..core.answering import (
    PROMPT_TEMPLATES,
    answer_questions,
    answer_texts,
    answering_metadata,
    choose_prompt_template,
)
from ..core.benchmark import Metric, Options, Record, Sample, Scored, Task, malformed_sample
from ..core.multiple_choice import other_size
from ..core.parquet import choose_split, holds_parquet, read_parquet
from ..core.records import cluster_of, mean_metric, mean_metrics_by, sample_record
from ..core.release_files import RELEASES, find_file, image_finder, image_folders

_FORMULAS = "HME100k"  # compared with case and without blanks
# six types form the group "Text Recognition"; the other four are groups of their own
_RECOGNITION = (
    *(f"{kind} Text Recognition" for kind in ("Regular", "Irregular", "Artistic", "Non-Semantic")),
    "Handwriting Recognition",
    "Digit String Recognition",
)
OCRBENCH_SIZE = 1000
# U+FF01 to U+FF5E are the printable ASCII characters in full width; U+3000 is the blank
_TO_ASCII = {0x3000: " "} | {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}


class OcrQuestion(NamedTuple):
    """A question, its accepted answers, its type and the data set that it is from."""

    question: str
    answers: tuple[str, ...]
    kind: str
    source: str


answer = answer_questions


def load(data: Path, settings: Options) -> Task:
    """One sample per entry of `OCRBench.json` with `OCRBench_Images/`, or of the hub's parquet file."""
    template = choose_prompt_template(settings, "plain")
    if holds_parquet(data):
        split = choose_split(data, settings.split, ("test",))
        rows = [
            (row, row["#"]) for row in read_parquet(split.files, ("dataset", "question", "answer", "image"))
        ]
    else:
        path = find_file(data, RELEASES["ocrbench"].original, "OCRBench annotation file")
        image_of = image_finder(image_folders(data, path, ("OCRBench_Images", "images")))
        rows = [
            (_with_image(row, image_of), f"{path}, entry {i}")
            for i, row in enumerate(read_json_as(list, path))
        ]
    samples, questions = [], []
    for i, (row, where) in enumerate(rows[: settings.limit]):
        try:
            question = _read_question(row, where)
            image = require_key(row, "image", where)
            if image is None:
                raise UserError(f"{where}: there is no image.")
            prompt = PROMPT_TEMPLATES[template].format(question.question.strip())
            samples.append(Sample(i, f"{question.source}/{i}", prompt, image))
        except UserError as error:
            question = OcrQuestion("", (), "", "")
            samples.append(malformed_sample(i, None, error))
        questions.append(question)
    metadata = answering_metadata("test", template, settings)
    return Task(require_mostly_valid(samples, data), questions, metadata)


def _with_image(row: Any, image_of: Callable[[str], Path]) -> Any:
    """A row of the release with the path of its image under "image", as in the parquet file."""
    name = row.get("image_path") if isinstance(row, dict) else None
    return row | {"image": image_of(name)} if isinstance(name, str) and name else row


def _read_question(row: Any, where: str) -> OcrQuestion:
    """A question in either layout, whose columns differ in name."""
    names = (
        ("answers", "type", "dataset_name")
        if "dataset_name" in row
        else ("answer", "question_type", "dataset")
    )
    answers = require_key(row, names[0], where)
    answers = answers if isinstance(answers, list) else [answers]
    if not answers or any(not isinstance(a, str | int | float) for a in answers):
        raise UserError(f"{where}: {names[0]} is {answers!r}; it must be a text or a list of texts.")
    kind, source = (require_text(row, name, where) for name in names[1:])
    return OcrQuestion(require_text(row, "question", where), tuple(map(str, answers)), kind, source)


def score(task: Task, records: dict[int, Record], folder: Path, run: Record, scoring: Options) -> Scored:
    """The number of correct answers, of 1,000; their fraction by type; missing answers are wrong."""
    questions: list[OcrQuestion] = task.truth
    texts = answer_texts(records)
    values = [
        float(s.index in texts and is_ocrbench_right(texts[s.index], q.answers, q.source, scoring.scorer))
        for s, q in zip(task.samples, questions)
    ]
    clusters = [cluster_of(s) for s in task.samples]
    accuracy = mean_metric(values, clusters)
    metrics = {"accuracy": accuracy, "score": Metric(sum(values), len(values), None, "points")}
    groups = ["Text Recognition" if q.kind in _RECOGNITION else q.kind for q in questions]
    metrics |= mean_metrics_by("group", groups, values, clusters)
    metrics |= mean_metrics_by(
        "type", [q.kind if q.kind in _RECOGNITION else "" for q in questions], values, clusters
    )
    per_sample = [
        sample_record(s, records, value, " | ".join(q.answers), q.kind, q.question)
        for s, q, value in zip(task.samples, questions, values)
    ]
    reason = "" if len(values) == OCRBENCH_SIZE else other_size(len(values), OCRBENCH_SIZE)
    return Scored(metrics, {}, per_sample, not_comparable=reason)


def is_ocrbench_right(text: str, answers: Sequence[str], source: str, scorer: str = "official") -> bool:
    """Whether an answer contains one of the accepted ones."""

    def normalise(string: str) -> str:
        if source == _FORMULAS:
            return string.strip().replace("\n", " ").replace(" ", "")
        string = string.translate(_TO_ASCII) if scorer == "lmms" else string
        return string.lower().strip().replace("\n", " ")

    prediction = normalise(text.strip())
    return any(normalise(answer) in prediction for answer in answers)
