"""MMBench (arXiv 2307.06281): circular accuracy, with letters parsed from answers without a judge model.

A question occurs once per rotation of its options (index = base + r * 1,000,000) and is correct only if all
rotations are. Scorer `static`: a letter on its own or in one of twelve notations, else the only option whose
text occurs, else the first option letter in the answer. The official server queries a language model if the
first two rules fail.
"""

import io
import itertools
import re
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing, write_atomic
from open_unitok.core.text_files import read_csv

from ..core.annotations import require_mostly_valid
from ..core.answering import (
    PROMPT_TEMPLATES,
    answer_questions,
    answer_texts,
    answering_metadata,
    choose_prompt_template,
)
from ..core.benchmark import Options, Record, Sample, Scored, Task, malformed_sample
from ..core.image_files import Base64Image
from ..core.parquet import ParquetImage, choose_split, holds_parquet, read_parquet
from ..core.records import mean_metric, mean_metrics_by, sample_record
from ..core.release_files import RELEASES, find_file, holds_files

_FILES = RELEASES["mmbench"].original
_COLUMNS = ("index", "question", "A", "B", "image", "category")  # the others may be missing
_LETTERS = "ABCDE"
ROTATION_STEP = 1_000_000  # between the index of a question and of its next rotation
_NOTATIONS = ("{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{}).")
_ABSENT = ("", "nan", "none")


class MmbenchQuestion(NamedTuple):
    """A row of the table: options by letter; `answer` is "" if it is not public."""

    index: int
    question: str
    hint: str
    options: dict[str, str]
    answer: str
    category: str
    group: str
    malformed: str = ""  # the error in its row: the question is not answered and counts as wrong


answer = answer_questions


def load(data: Path, settings: Options) -> Task:
    """One sample per row; LLaVA's archive contains the same table.

    A row without index, question or option is malformed, and its question is wrong in all rotations.

    Raises:
        UserError: no table or several, or required columns are missing.
    """
    if not holds_files(data, _FILES) and holds_parquet(data):
        # `lmms-lab/MMBench` has the configurations en, cn and cc, `lmms-lab/MMBench_EN` has the default one
        found = choose_split(data, settings.split, ("dev",), ("en",))
        path = found.files[0]
        name = found.split if found.configuration == "data" else f"{found.split}_{found.configuration}"
        table = (_text_cells(row) for row in read_parquet(found.files, (*_COLUMNS, "answer")))
    else:
        path = find_file(existing(data), _FILES, "MMBench table", settings.split, "_dev_2")
        name, table = path.stem.removeprefix("mmbench_"), read_csv(path, delimiter="\t", columns=_COLUMNS)
    questions, images = _read_table(table, path, settings.limit)
    first = {q.index: image for q, image in zip(questions, images)}
    # mmbench_dev_cn_...: the Chinese prompt, as published
    chinese = "_cn" in name or "_cn" in data.name.lower()
    template = choose_prompt_template(settings, "letter-cn" if chinese else "letter")
    samples = []
    for i, (q, image) in enumerate(zip(questions, images)):
        # a cell may hold the index of the row with the image; base64 is longer than any index
        if isinstance(image, str) and image.isdecimal() and len(image) < 64:
            image = first.get(int(image), "")
        file = f"{_base_index(q)}.jpg"
        encoded = image._replace(name=file) if isinstance(image, ParquetImage) else Base64Image(file, image)
        sample = Sample(i, q.index, PROMPT_TEMPLATES[template].format(mmbench_prompt(q)), encoded)
        samples.append(
            malformed_sample(i, q.index if q.index >= 0 else None, q.malformed) if q.malformed else sample
        )
    return Task(
        require_mostly_valid(samples, path),
        questions,
        answering_metadata(name, template, settings),
    )


def _text_cells(row: Record) -> Record:
    """A row of the hub's table as text, but for its image."""
    return {k: v if isinstance(v, ParquetImage) else "" if v is None else str(v) for k, v in row.items()}


def _read_table(
    table: Iterable[Record], path: Path, limit: int | None
) -> tuple[list[MmbenchQuestion], list[str | ParquetImage]]:
    """The questions of a table and their images."""
    # rotations repeat an image: keep one copy in memory
    shared: dict[str | ParquetImage, str | ParquetImage] = {}
    questions, images = [], []
    for i, row in enumerate(itertools.islice(table, limit)):
        try:
            questions.append(_read_row(row, f"{path}, row {i + 1}"))
        except UserError as error:
            number = str(row["index"] or "")
            index = int(number) if number.isdecimal() else -1 - i
            questions.append(MmbenchQuestion(index, "", "", {}, "", "", "", str(error)))
        images.append(shared.setdefault(row["image"] or "", row["image"] or ""))
    # a test set has no answers at all; otherwise a row without one is malformed
    if any(q.answer for q in questions):
        for i, q in enumerate(questions):
            if not q.answer and not q.malformed:
                reason = f"{path}, row {i + 1}: it has no answer, but other rows do."
                questions[i] = q._replace(malformed=reason)
    return questions, images


def _base_index(question: MmbenchQuestion) -> int:
    """The index shared by all rotations of a question; negative for a row without a valid index."""
    return question.index % ROTATION_STEP if question.index >= 0 else question.index


def _read_row(row: dict[str, Any], where: str) -> MmbenchQuestion:
    """Parse a row; options end at the first empty cell."""
    # tables written by pandas have "nan" in empty cells
    cells = {
        key: "" if str(value or "").strip().lower() in _ABSENT else str(value) for key, value in row.items()
    }
    if not cells["index"].isdecimal():
        raise UserError(f"{where}: index is {row['index']!r}; it must be an integer.")
    options: dict[str, str] = {}
    for letter in _LETTERS:
        if not cells.get(letter):
            break
        options[letter] = cells[letter]
    answer = cells.get("answer", "")
    if not cells["question"] or not options:
        raise UserError(f"{where}: a question and its options A, B, ... are needed.")
    if answer and answer not in options:
        raise UserError(f"{where}: answer is {answer!r}; allowed: {', '.join(options)}.")
    group = cells.get("l2-category") or cells.get("L2-category") or ""
    return MmbenchQuestion(
        int(cells["index"]),
        cells["question"],
        cells.get("hint", ""),
        options,
        answer,
        cells["category"],
        group,
    )


def mmbench_prompt(question: MmbenchQuestion) -> str:
    """Hint, question and options in LLaVA's layout."""
    lines = [question.hint] if question.hint else []
    return "\n".join([*lines, question.question, *(f"{k}. {v}" for k, v in question.options.items())])


# --------------------------------------------------------------------------------------------------- reading


def named_letter(answer: str) -> str:
    """The letter that an answer names, any of A-E; "" if there is none or more than one."""
    if "Failed to obtain answer via API" in answer:
        return ""
    words = answer.split()
    alone = [letter for letter in _LETTERS if letter in words]
    # "A cat sits there": in a longer text, "A" is an article
    if len(alone) == 1 and not ("A" in words and len(words) > 3):
        return alone[0]
    for notation in _NOTATIONS:
        found = [letter for letter in _LETTERS if notation.format(letter) in words]
        if len(found) == 1:
            return found[0]
    return ""


def letter_by_text(answer: str, options: dict[str, str]) -> str:
    """The letter of the only option whose text occurs in the answer, "" if none or several do."""
    found = [letter for letter, text in options.items() if text.lower() in answer.lower()]
    return found[0] if len(found) == 1 else ""


def first_option_letter(answer: str, options: dict[str, str]) -> str:
    """The first character of the answer that is an option's letter."""
    return next((character for character in answer if character in options), "")


def chosen_letter(answer: str, options: dict[str, str]) -> str:
    """The chosen letter, "" if the answer cannot be parsed."""
    return named_letter(answer) or letter_by_text(answer, options) or first_option_letter(answer, options)


# --------------------------------------------------------------------------------------------------- scoring


def score(task: Task, records: dict[int, Record], folder: Path, run: Record, scoring: Options) -> Scored:
    """Circular accuracy overall, per category and per group; `vanilla` counts unrotated rows only."""
    questions: list[MmbenchQuestion] = task.truth
    texts = answer_texts(records)
    chosen = [chosen_letter(texts.get(s.index, ""), q.options) for s, q in zip(task.samples, questions)]
    if not any(q.answer for q in questions):
        return Scored(
            {},
            {},
            [
                sample_record(s, records, None, None, q.category, mmbench_prompt(q))
                for s, q in zip(task.samples, questions)
            ],
        )
    # circular accuracy: all rotations of a question must be correct
    right: dict[int, list[bool]] = {}
    for q, letter in zip(questions, chosen):
        right.setdefault(_base_index(q), []).append(letter == q.answer and not q.malformed)
    lacking = _lacking_rotations(questions)
    values, plain, kept = [], [], []
    for s, q, letter in zip(task.samples, questions, chosen):
        if q.index < ROTATION_STEP:
            kept.append((s, q, letter))
            values.append(float(all(right[q.index]) and q.index not in lacking))
            plain.append(float(letter == q.answer and not q.malformed))
    first_question: dict[str, int] = {}  # base64 image -> index of the first question about it
    # the table has no image ids, so equal image data forms a cluster
    clusters = [
        first_question.setdefault(_image_content(s.image), q.index) if s.image else q.index
        for s, q, _ in kept
    ]
    # both as in published tables, which quote circular accuracy
    rotated = any(q.index >= ROTATION_STEP for q in questions)
    kinds = (("circular", "", values),) * rotated + (("vanilla", "vanilla ", plain),)
    metrics = {name: mean_metric(scores, clusters) for name, _, scores in kinds}
    for group in ("category", "group"):
        names = [getattr(q, group) for _, q, _ in kept]
        for _, prefix, scores in kinds:
            metrics |= mean_metrics_by(prefix + group, names, scores, clusters)
    lost = len(right) - len(kept)
    problems = [f"{lost} questions have rotations but no unrotated row (not counted)"] if lost else []
    reasons = [f"{len(lacking)} questions lack some of their rotations (wrong in circular accuracy)"]
    reasons = reasons if lacking else problems[:]
    if not rotated:
        reasons = ["the table has no rotated questions, so there is no circular accuracy"]
    unreadable = sum(s.index in texts and not letter for s, letter in zip(task.samples, chosen))
    if unreadable:
        problems.append(f"{unreadable} answers name no option (wrong)")
    per_sample = [
        sample_record(
            s,
            records,
            v,
            q.answer,
            q.category,
            mmbench_prompt(q),
            parsed=letter,
            rotations=len(right[q.index]),
        )
        | {"cluster": str(cluster)}
        for (s, q, letter), v, cluster in zip(kept, values if rotated else plain, clusters)
    ]
    return Scored(metrics, {}, per_sample, not_comparable="; ".join(reasons), problems=problems)


def _lacking_rotations(questions: Sequence[MmbenchQuestion]) -> set[int]:
    """The base indices of the questions with fewer rotations than options."""
    rotations: dict[int, set[int]] = {}
    options: dict[int, int] = {}
    for q in questions:
        base = _base_index(q)
        rotations.setdefault(base, set()).add(q.index)
        options[base] = max(options.get(base, 0), len(q.options))
    return {base for base, found in rotations.items() if len(found) < options[base]}


def _image_content(image: Base64Image | ParquetImage) -> str:
    """Equal for equal images."""
    return image.text if isinstance(image, Base64Image) else image.digest()


def submit(task: Task, records: dict[int, Record], folder: Path, data: Path) -> list[Path]:
    """The spreadsheet for the official server."""
    texts = answer_texts(records)
    letters = [letter for letter in _LETTERS if any(letter in q.options for q in task.truth)]
    table: list[list[Any]] = [["index", "question", *letters, "prediction"]]
    for sample, q in zip(task.samples, task.truth):
        if q.malformed:
            continue
        options = [q.options.get(letter, "") for letter in letters]
        table.append([q.index, q.question, *options, texts.get(sample.index, "")])
    path = folder / "submission" / f"mmbench_{task.metadata['split']}.xlsx"
    _write_xlsx(path, table)
    return [path]


# characters that XML, and therefore xlsx, does not allow
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


def _write_xlsx(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    """Write rows of cells (int, float or text) as one sheet; the bytes depend on the cells only."""
    try:
        from openpyxl import Workbook
    except ImportError as error:
        raise UserError("MMBench's upload needs openpyxl: pip install 'open-unitok[eval]'.") from error
    book = Workbook()
    sheet = book.worksheets[0]
    for i, row in enumerate(rows, 1):
        for j, value in enumerate(row, 1):
            cell = sheet.cell(i, j, _FORBIDDEN.sub("", value) if isinstance(value, str) else value)
            if isinstance(value, str):
                cell.data_type = "s"  # an answer that starts with "=" is text, not a formula
    saved, fixed = io.BytesIO(), io.BytesIO()
    book.save(saved)
    # remove the time of saving, which openpyxl writes into the zip entries and docProps/core.xml
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(fixed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            content = source.read(name)
            if name == "docProps/core.xml":
                content = re.sub(
                    rb">[^<]*(</dcterms:(?:created|modified)>)", rb">2000-01-01T00:00:00Z\1", content
                )
            target.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    write_atomic(path, fixed.getvalue())
