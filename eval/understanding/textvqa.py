"""TextVQA and VizWiz: ten answers per question, normalised as the M4C/EvalAI processor does.

The published TextVQA numbers are of prompts that hold the words that an OCR system read ("ocr", the default);
without them (`--prompt-template short`) a score is some ten points lower.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from open_unitok.core.errors import UserError

from ..core.annotations import (
    OCR_TEMPLATE,
    PROMPT_TEMPLATES,
    annotator_answers,
    answer_texts,
    answering_metadata,
    choose_prompt_template,
    detect_layout,
    find_file,
    image_path,
    image_path_by_stem,
    read_json_as,
    read_llava_questions,
    require_key,
    require_mostly_valid,
    require_text,
    validate_record,
)
from ..core.answer_normalisation import normalise_m4c
from ..core.harness import Record, Sample, Scored, Scoring, Settings, Task, malformed_sample
from ..core.records import (
    cluster_of,
    mean_metric,
    mean_metrics_by,
    sample_record,
    submittable,
    write_submission,
)

SCORERS = ("m4c",)
ORIGINAL, LLAVA = ("TextVQA_0.5.1_*.json",), ("*textvqa*.jsonl",)
OCR_FILE = "TextVQA_Rosetta_OCR_v0.2_{}.json"
VIZWIZ_ORIGINAL, VIZWIZ_LLAVA = (
    ("val.json", "test.json", "train.json", "Annotations/*.json"),
    ("llava_*.jsonl",),
)


class Question(NamedTuple):
    """A question and its ten answers; none where they are not public."""

    question_id: Any
    question: str
    answers: tuple[str, ...] = ()
    kind: str = ""  # VizWiz: yes/no, number, other, unanswerable


def accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Leave-one-out accuracy over the answers, both sides normalised."""
    return of_normalised(normalise_m4c(prediction), tuple(map(normalise_m4c, answers)))


@functools.lru_cache(maxsize=100_000)
def of_normalised(prediction: str, answers: tuple[str, ...]) -> float:
    """The mean over annotators of min(1, matches among the others / 3)."""
    matches, total = answers.count(prediction), len(answers)
    return (matches * min(1.0, (matches - 1) / 3) + (total - matches) * min(1.0, matches / 3)) / total


# --------------------------------------------------------------------------------------------------- TextVQA


def load(data: Path, settings: Settings) -> Task:
    """One sample per question of `TextVQA_0.5.1_{split}.json`, or of LLaVA's question file."""
    layout = detect_layout(data, settings, ORIGINAL, LLAVA)
    path = find_file(data, ORIGINAL, "TextVQA annotation file", settings.split, "_val.")
    split = path.stem.removeprefix("TextVQA_0.5.1_")
    folders = [data / name for name in ("train_images", "test_images", "images")]
    rows = with_answers(
        [
            validate_record(row, f"{path}, data[{i}]", ("question_id", "image_id"), ("question",))
            for i, row in enumerate(read_json_as(list, path, "data"))
        ],
        lambda i: f"{path}, data[{i}]",
    )
    if layout == "llava":
        return load_llava(data, settings, path, rows, folders, split)
    template = choose_prompt_template(settings, "ocr", more=("ocr",))
    tokens, problems = ocr_tokens(data, split, rows) if template == "ocr" else ({}, [])
    samples, questions = [], []
    for i, row in enumerate(rows[: settings.limit]):
        if isinstance(row, UserError):
            samples.append(malformed_sample(i, None, row))
            questions.append(Question(None, ""))
            continue
        text = (
            PROMPT_TEMPLATES[template].format(row["question"]) if template != "ocr" else with_ocr(row, tokens)
        )
        samples.append(
            Sample(i, row["question_id"], text, image_path_by_stem(folders, str(row["image_id"])), "ask")
        )
        questions.append(question_of(row))
    return Task(
        require_mostly_valid(samples, path),
        questions,
        answering_metadata(split, template, settings),
        problems,
    )


def with_answers(rows: Sequence[Any], where: Callable[[int], str]) -> list[Any]:
    """The rows with their answers as texts; the UserError in the place of a row whose answers are malformed.

    A test set has no answers at all; where some rows have them, one without is malformed.
    """
    public = any(isinstance(row, dict) and "answers" in row for row in rows)
    result = []
    for i, row in enumerate(rows):
        try:
            result.append(row | {"answers": annotator_answers(row, where(i))} if public else row)
        except UserError as error:
            result.append(error)
        except TypeError:  # no object: what it lacks stands there already
            result.append(row)
    return result


def question_of(row: Record) -> Question:
    """An entry of the annotation file; test sets have no answers."""
    return Question(row["question_id"], row["question"], row.get("answers", ()))


def with_ocr(row: Record, tokens: dict[str, list[str]]) -> str:
    """The published prompt: the question, the words read in the image, what kind of answer is wanted."""
    return OCR_TEMPLATE.format(row["question"], ", ".join(tokens.get(row["image_id"], ())))


def ocr_tokens(data: Path, split: str, rows: Sequence[Any]) -> tuple[dict[str, list[str]], list[str]]:
    """Image id -> the words that Rosetta read, from the release's file or from the rows; what went wrong.

    An image without an entry is asked about without words, which lowers the score.
    """
    good = [row for row in rows if isinstance(row, dict)]
    if all("ocr_tokens" in row for row in good):
        return words_by_image(good)
    path = data / OCR_FILE.format(split)
    if not path.exists():
        raise UserError(
            f"{path} does not exist: the published prompt holds OCR words. Put it there, or leave them "
            "out with --prompt-template short, which scores some ten points lower."
        )
    tokens, problems = words_by_image(read_json_as(list, path, "data"), path.name)
    lost = [row["image_id"] for row in good if row["image_id"] not in tokens]
    if lost:
        problems.append(
            f"{len(lost)} questions have no words in {path.name}, for instance of image {lost[0]}"
        )
    return tokens, problems


def words_by_image(rows: Sequence[Any], name: str = "") -> tuple[dict[str, list[str]], list[str]]:
    """Image id -> words, and a line about the rows that do not say."""
    tokens, broken = {}, 0
    for row in rows:
        words = row.get("ocr_tokens") if isinstance(row, dict) else None
        if not isinstance(words, list) or not isinstance(row.get("image_id"), str | int):
            broken += 1
        else:
            tokens[row["image_id"]] = [str(word) for word in words]
    return tokens, [f"{broken} entries of OCR words {name} are malformed (no words there)"] * (broken > 0)


def load_llava(
    data: Path, settings: Settings, path: Path, rows: list[Record], folders: list[Path], split: str
) -> Task:
    """LLaVA's file, whose question ids are image ids: joined by image and question, as its scorer does."""
    file = find_file(data, LLAVA, "LLaVA question file", settings.split)
    places = {
        (str(row["image_id"]), row["question"].lower()): i
        for i, row in enumerate(rows)
        if isinstance(row, dict)
    }
    samples, questions = [], []
    for i, asked in enumerate(read_llava_questions(file, settings.limit)):
        where = f"{file}, line {i + 1}"
        try:
            key = (str(require_key(asked, "question_id", where)), question_in(asked["text"], where))
            if key not in places:
                raise UserError(f"{where}: {path.name} has no question {key[1]!r} about image {key[0]}.")
            row = rows[places[key]]
            image = (
                image_path(folders, Path(require_text(asked, "image", where)).name)
                if "image" in asked
                else None
            )
            image = image or image_path_by_stem(folders, str(row["image_id"]))
            samples.append(Sample(i, row["question_id"], asked["text"], image, "ask"))
            questions.append(question_of(row))
        except UserError as error:
            samples.append(malformed_sample(i, None, error))
            questions.append(Question(None, ""))
    return Task(
        require_mostly_valid(samples, file),
        questions,
        answering_metadata(split, f"as in {file.name}", settings),
    )


def question_in(prompt: str, where: str) -> str:
    """The bare question, in lower case, of one of the four prompt layouts that circulate."""
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: ") and "Question: " in prompt and " Short answer:" in prompt:
        return prompt.split("Question: ")[1].split(" Short answer:")[0].lower()
    if "Reference OCR token: " in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith("Reference OCR token:") else 0].lower()
    if len(lines) == 2:
        return lines[0].lower()
    raise UserError(f"{where}: the prompt has none of the known layouts: {prompt!r}.")


def score(task: Task, rows: dict[int, Record], folder: Path, run: dict[str, Any], scoring: Scoring) -> Scored:
    """Accuracy, and per kind of answer where the questions have kinds; a malformed question is wrong."""
    questions: list[Question] = task.truth
    texts = answer_texts(rows)
    public = any(q.answers for q in questions)
    values = [
        (accuracy(texts[s.index], q.answers) if s.index in texts else 0.0) if public else None
        for s, q in zip(task.samples, questions)
    ]
    per_sample = [
        sample_record(s, rows, v, most_common(q.answers), q.kind, q.question)
        for s, q, v in zip(task.samples, questions, values)
    ]
    if not public:
        return Scored({}, {}, per_sample)
    clusters = [cluster_of(s) for s in task.samples]
    metrics = {"accuracy": mean_metric(values, clusters)}
    metrics |= mean_metrics_by("answer", [q.kind for q in questions], values, clusters)
    return Scored(metrics, {}, per_sample)


def most_common(answers: Sequence[str]) -> str | None:
    """The most frequent answer, of several the first."""
    return max(answers, key=answers.count) if answers else None


def submit(task: Task, rows: dict[int, Record], folder: Path, data: Path) -> list[Path]:
    """TextVQA's challenge file."""
    texts = answer_texts(rows)
    content = [
        {"question_id": s.id, "answer": normalise_m4c(texts.get(s.index, ""))}
        for s in submittable(task.samples)
    ]
    return [write_submission(folder, "textvqa_answers.json", content)]


# ---------------------------------------------------------------------------------------------------- VizWiz


def load_vizwiz(data: Path, settings: Settings) -> Task:
    """One sample per entry of `{split}.json`, or of LLaVA's question file; ids are file names."""
    layout = detect_layout(data, settings, VIZWIZ_ORIGINAL, VIZWIZ_LLAVA)
    known: dict[str, Any] = {}
    split = settings.split or ("val" if layout == "original" else "test")
    file = None
    if layout == "original" or any(next(data.glob(p), None) for p in VIZWIZ_ORIGINAL):
        file = find_file(data, VIZWIZ_ORIGINAL, "VizWiz annotation file", settings.split, f"{split}.json")
        found = [
            validate_record(row, f"{file}, entry {i + 1}", (), ("question", "image"))
            for i, row in enumerate(read_json_as(list, file))
        ]
        for i, row in enumerate(with_answers(found, lambda i: f"{file}, entry {i + 1}")):
            known[row["image"] if isinstance(row, dict) else f"#{i}"] = row
    folders = [data / name for name in (file.stem if file else split, split, "images")] + [data]
    template = choose_prompt_template(settings, "unanswerable")
    asked = [
        (name, PROMPT_TEMPLATES[template].format(row["question"]) if isinstance(row, dict) else "", row)
        for name, row in known.items()
    ]
    if layout == "llava":
        file_asked = find_file(data, VIZWIZ_LLAVA, "LLaVA question file", settings.split, split)
        template = f"as in {file_asked.name}"
        lines = read_llava_questions(file_asked)
        names = {Path(str(row.get("image"))).name for row in lines if isinstance(row, dict)}
        if not names & known.keys():  # the annotations are of another split: the answers are not public
            known = {}
        asked = [vizwiz_asked(row, known, f"{file_asked}, line {i + 1}") for i, row in enumerate(lines)]
    samples, questions = [], []
    for i, (name, prompt, row) in enumerate(asked[: settings.limit]):
        if isinstance(row, UserError):
            samples.append(malformed_sample(i, name, row))
            questions.append(Question(name, ""))
            continue
        samples.append(Sample(i, name, prompt, image_path(folders, name), "ask"))
        kind = str(row.get("answer_type", ""))
        questions.append(Question(name, row["question"], row.get("answers", ()), kind))
    about = answering_metadata(file.stem if file else split, template, settings)
    return Task(require_mostly_valid(samples, file or data), questions, about)


def vizwiz_asked(row: Any, known: dict[str, Any], where: str) -> tuple[str | None, str, Any]:
    """Name, prompt and truth of a line of LLaVA's file; the truth may be the UserError that says why not."""
    try:
        name = Path(require_text(row, "image", where)).name
    except UserError as error:
        return None, "", error
    if known and name not in known:
        return name, "", UserError(f"{where}: the released file has no question about {name}.")
    return name, row["text"], known.get(name, {"question": row["text"].split("\n")[0]})


def submit_vizwiz(task: Task, rows: dict[int, Record], folder: Path, data: Path) -> list[Path]:
    """VizWiz' challenge file."""
    texts = answer_texts(rows)
    content = [
        {"image": s.id, "answer": normalise_m4c(texts.get(s.index, ""))} for s in submittable(task.samples)
    ]
    return [write_submission(folder, "vizwiz_answers.json", content)]
