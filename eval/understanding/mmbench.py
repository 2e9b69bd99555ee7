"""MMBench: reader of the released table, letters read from answers without a judge, circular accuracy.

A question is asked once per rotation of its options (index = base + r * 1,000,000) and counts only if all are
right. Scorer `static`: a letter that stands alone or in one of twelve notations, else the only option whose
text occurs, else the first option letter in the answer. The official server asks a language model where the
first two rules fail.
"""

import csv
import itertools
from pathlib import Path
from typing import Any, NamedTuple

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing

from ..core.annotations import (
    PROMPT_TEMPLATES,
    Base64Image,
    answer_texts,
    answering_metadata,
    choose_prompt_template,
    find_file,
    require_mostly_valid,
)
from ..core.harness import Record, Sample, Scored, Scoring, Settings, Task, malformed_sample
from ..core.records import mean_metric, mean_metrics_by, sample_record
from ..core.xlsx import write_xlsx

SCORERS = ("static",)
FILES = ("mmbench*.tsv", "MMBench*.tsv")
LETTERS, TURN = "ABCDE", 1_000_000
NOTATIONS = ("{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{}).")
ABSENT = ("", "nan", "none")


class Question(NamedTuple):
    """A row of the table; options by letter, `answer` "" where it is not public."""

    index: int
    question: str
    hint: str
    options: dict[str, str]
    answer: str
    category: str
    group: str
    malformed: str = ""  # why its row is malformed: it is not asked and counts as wrong


def load(data: Path, settings: Settings) -> Task:
    """One sample per row. LLaVA reads the same table; `mmbench_dev_cn_...` is asked in Chinese.

    A row without number, question or option is malformed, and its question wrong in every rotation.

    Raises:
        UserError: no table or several, or one without the columns.
    """
    path = find_file(existing(data), FILES, "MMBench table", settings.split, "_dev_2")
    questions, images = read_table(path, settings.limit)
    first = {q.index: image for q, image in zip(questions, images)}
    template = choose_prompt_template(settings, "letter-cn" if "_cn" in path.name else "letter")
    samples = []
    for i, (q, image) in enumerate(zip(questions, images)):
        if image.isdigit() and len(image) < 64:  # a rotation may name the row that holds the image
            image = first.get(int(image), "")
        picture = Base64Image(f"{base(q)}.jpg", image)
        asked = Sample(i, q.index, PROMPT_TEMPLATES[template].format(prompt(q)), picture, "ask")
        samples.append(
            malformed_sample(i, q.index if q.index >= 0 else None, q.malformed) if q.malformed else asked
        )
    return Task(
        require_mostly_valid(samples, path),
        questions,
        answering_metadata(path.stem.removeprefix("mmbench_"), template, settings),
    )


def read_table(path: Path, limit: int | None) -> tuple[list[Question], list[str]]:
    """The rows and their images.

    A row without an answer is malformed where others have one; where none has, it is a test set.
    """
    csv.field_size_limit(2**31 - 1)  # images stand in cells
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t")
        if missing := {"index", "question", "A", "B", "image", "category"} - set(reader.fieldnames or ()):
            raise UserError(f"{path}: the columns {', '.join(sorted(missing))} are missing.")
        pictures: dict[str, str] = {}  # rotations share an image: one copy in memory
        questions, images = [], []
        for i, row in enumerate(itertools.islice(reader, limit)):
            try:
                questions.append(read_row(row, f"{path}, row {i + 1}"))
            except UserError as error:
                number = str(row["index"] or "")
                index = int(number) if number.isdigit() else -1 - i
                questions.append(Question(index, "", "", {}, "", "", "", str(error)))
            images.append(pictures.setdefault(row["image"] or "", row["image"] or ""))
    if any(q.answer for q in questions):
        for i, q in enumerate(questions):
            if not q.answer and not q.malformed:
                reason = f"{path}, row {i + 1}: it has no answer, but others have."
                questions[i] = q._replace(malformed=reason)
    return questions, images


def base(question: Question) -> int:
    """The number that a question's rotations share; a negative one stands for a row without a number."""
    return question.index % TURN if question.index >= 0 else question.index


def read_row(row: dict[str, Any], where: str) -> Question:
    """A row of the table; empty and "nan" cells are absent, and options end at the first absent one."""
    cells = {
        key: "" if str(value or "").strip().lower() in ABSENT else str(value) for key, value in row.items()
    }
    if not cells["index"].isdigit():
        raise UserError(f"{where}: index is {row['index']!r}; it must be a whole number.")
    options: dict[str, str] = {}
    for letter in LETTERS:
        if not cells.get(letter):
            break
        options[letter] = cells[letter]
    answer = cells.get("answer", "")
    if not cells["question"] or not options:
        raise UserError(f"{where}: a question and its options A, B, ... are needed.")
    if answer and answer not in options:
        raise UserError(f"{where}: answer is {answer!r}; allowed: {', '.join(options)}.")
    group = cells.get("l2-category") or cells.get("L2-category") or ""
    return Question(
        int(cells["index"]),
        cells["question"],
        cells.get("hint", ""),
        options,
        answer,
        cells["category"],
        group,
    )


def prompt(question: Question) -> str:
    """Hint, question and options, as LLaVA asks."""
    lines = [question.hint] if question.hint else []
    return "\n".join([*lines, question.question, *(f"{k}. {v}" for k, v in question.options.items())])


# -------------------------------------------------------------------------------------------------- reading


def letter_in(answer: str) -> str:
    """The letter that an answer names, "" if none or several; any of A-E, whatever options there are."""
    if "Failed to obtain answer via API" in answer:
        return ""
    words = answer.split()
    alone = [letter for letter in LETTERS if letter in words]
    # "A cat sits there": a lone A in a longer text is taken for an article
    if len(alone) == 1 and not ("A" in words and len(words) > 3):
        return alone[0]
    for notation in NOTATIONS:
        found = [letter for letter in LETTERS if notation.format(letter) in words]
        if len(found) == 1:
            return found[0]
    return ""


def text_in(answer: str, options: dict[str, str]) -> str:
    """The letter of the only option whose text occurs in the answer, "" if none or several do."""
    found = [letter for letter, text in options.items() if text.lower() in answer.lower()]
    return found[0] if len(found) == 1 else ""


def first_letter(answer: str, options: dict[str, str]) -> str:
    """The first character of the answer that is an option's letter."""
    return next((character for character in answer if character in options), "")


def read(answer: str, options: dict[str, str]) -> str:
    """The letter chosen, "" where nothing can be read."""
    return letter_in(answer) or text_in(answer, options) or first_letter(answer, options)


# -------------------------------------------------------------------------------------------------- scoring


def score(task: Task, rows: dict[int, Record], folder: Path, run: dict[str, Any], scoring: Scoring) -> Scored:
    """Circular accuracy per question, category and group; `vanilla` looks at the unrotated row alone."""
    questions: list[Question] = task.truth
    texts = answer_texts(rows)
    chosen = [read(texts.get(s.index, ""), q.options) for s, q in zip(task.samples, questions)]
    if not any(q.answer for q in questions):
        return Scored(
            {},
            {},
            [
                sample_record(s, rows, None, None, q.category, prompt(q))
                for s, q in zip(task.samples, questions)
            ],
        )
    right: dict[int, list[bool]] = {}
    for q, letter in zip(questions, chosen):
        right.setdefault(base(q), []).append(letter == q.answer and not q.malformed)
    values, plain, kept = [], [], []
    for s, q, letter in zip(task.samples, questions, chosen):
        if q.index < TURN:
            kept.append((s, q, letter))
            values.append(float(all(right[q.index])))
            plain.append(float(letter == q.answer and not q.malformed))
    pictures: dict[str, int] = {}  # an image's text -> the first question about it
    clusters = [pictures.setdefault(s.image.text, q.index) if s.image else q.index for s, q, _ in kept]
    metrics = {"circular": mean_metric(values, clusters), "vanilla": mean_metric(plain, clusters)}
    for name, scores in (("category", values), ("vanilla category", plain)):
        metrics |= mean_metrics_by(name, [q.category for _, q, _ in kept], scores, clusters)
    for name, scores in (("group", values), ("vanilla group", plain)):
        metrics |= mean_metrics_by(name, [q.group for _, q, _ in kept], scores, clusters)
    lost = len(right) - len(kept)
    problems = [f"{lost} questions have rotations but no unrotated row (not counted)"] if lost else []
    unreadable = sum(s.index in texts and not letter for s, letter in zip(task.samples, chosen))
    if unreadable:
        problems.append(f"{unreadable} answers name no option (wrong)")
    per_sample = [
        sample_record(
            s, rows, v, q.answer, q.category, prompt(q), parsed=letter, rotations=len(right[q.index])
        )
        | {"cluster": str(cluster)}
        for (s, q, letter), v, cluster in zip(kept, values, clusters)
    ]
    return Scored(metrics, {}, per_sample, problems=problems)


def submit(task: Task, rows: dict[int, Record], folder: Path, data: Path) -> list[Path]:
    """The spreadsheet that the official server takes."""
    texts = answer_texts(rows)
    letters = [letter for letter in LETTERS if any(letter in q.options for q in task.truth)]
    table: list[list[Any]] = [["index", "question", *letters, "prediction"]]
    for sample, q in zip(task.samples, task.truth):
        if q.malformed:
            continue
        options = [q.options.get(letter, "") for letter in letters]
        table.append([q.index, q.question, *options, texts.get(sample.index, "")])
    path = folder / "submission" / f"mmbench_{task.metadata['split']}.xlsx"
    write_xlsx(path, table)
    return [path]
