"""MMMU (arXiv 2311.16502): college questions of thirty subjects, with options or open, about images.

Scorers differ in how they read a letter: `official` (default) is that of MMMU's repository, `lmms` that of
lmms-eval. An answer without a letter is a guess, with the official generator's seed and order.
"""

import ast
import random
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from open_unitok.core.errors import UserError

from ..core.annotations import require_key, require_text
from ..core.answering import answer_questions, answer_texts
from ..core.benchmark import Options, Record, Scored, Task
from ..core.image_files import ImageList
from ..core.multiple_choice import (
    ChoiceQuestion,
    ChoiceRow,
    ChoiceSet,
    lettered_options,
    load_choices,
    score_choices,
    strip_marks,
)
from ..core.records import submittable, write_submission

MMMU_SUBJECTS = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}
_DOMAINS = {subject: domain for domain, subjects in MMMU_SUBJECTS.items() for subject in subjects}
MMMU_SIZE = 900  # the validation split
_GUESS_SEED = 42  # of MMMU's evaluation script
_MARKS = ",.!?;:'"
_INSTRUCTIONS = {
    "multiple-choice": "Answer with the option's letter from the given choices directly.",
    "open": "Answer the question using a single word or phrase.",
}
# words before the answer in a sentence of an open answer
_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
# numbers in lower-case text: with commas; with an exponent; others, which no comma or exponent may follow
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(,\d{3})+\b"),
    re.compile(r"-?\d+(\.\d+)?e[+-]?\d+"),
    re.compile(r"-?(\d*\.\d+|\d+\b)(?!e[+-]?\d|[,\d])"),
)

answer = answer_questions


def load(data: Path, settings: Options) -> Task:
    """One sample per row of the parquet files of all subjects (MMMU/MMMU, lmms-lab/MMMU).

    The default split is validation. Images come before the text, whose marks "<image 1>" stay, as in
    lmms-eval.
    """
    columns = ("id", "question", "options", "answer", "question_type", "image_1")
    # the instruction differs by kind of question and is part of the prompt
    layout = ChoiceSet("MMMU", ("validation",), columns, read_mmmu_row, {"lmms": "{}"}, 128, by_subject=True)
    return load_choices(data, settings, layout)


def read_mmmu_row(row: Record, where: str) -> ChoiceRow:
    """A question; `kind` is its subject, `medium` "multiple-choice" or "open"."""
    name, text = require_text(row, "id", where), require_text(row, "question", where)
    # e.g. validation_Clinical_Medicine_12
    subject = "_".join(name.split("_")[1:-1])
    if subject not in _DOMAINS:
        raise UserError(f"{where}: id is {name!r}; expected SPLIT_SUBJECT_NUMBER.")
    kind = "multiple-choice" if require_key(row, "question_type", where) == "multiple-choice" else "open"
    # a list of options is stored as text, as Python writes it
    options = tuple(map(str, _literal_list(row["options"]) or ())) if kind == "multiple-choice" else ()
    if kind == "multiple-choice" and not 2 <= len(options) <= 26:
        raise UserError(f"{where}: options is {row['options']!r}; expected a list of two or more.")
    question = ChoiceQuestion(name, text, options, require_text(row, "answer", where), subject, kind)
    body = lettered_options(text, options) if options else text
    images = []
    for number in sorted(set(re.findall(r"<image (\d+)>", body))):
        if row.get(f"image_{number}") is None:
            raise UserError(f"{where}: the question names <image {number}>, but image_{number} is empty.")
        images.append(row[f"image_{number}"])
    if not images:
        raise UserError(f"{where}: the question names no image.")
    image = images[0] if len(images) == 1 else ImageList(tuple(images))
    return ChoiceRow(question, f"{body}\n\n{_INSTRUCTIONS[kind]}", image)


def _literal_list(value: Any) -> list[Any] | None:
    """A list, or the list that a text holds as Python writes it; None for anything else."""
    try:
        with warnings.catch_warnings():
            # LaTeX in an option: Python warns of an unknown escape such as \s, and keeps it
            warnings.simplefilter("ignore")
            value = ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, list) else None


# --------------------------------------------------------------------------------------------------- scoring


def score(task: Task, records: dict[int, Record], folder: Path, run: Record, scoring: Options) -> Scored:
    """Accuracy overall, by domain, subject and kind of question; nothing without public answers."""
    questions: list[ChoiceQuestion] = task.truth
    letters, guesses = _chosen_letters(task, answer_texts(records), scoring.scorer)

    def is_right(text: str, question: ChoiceQuestion) -> bool:
        if question.medium == "multiple-choice":
            return letters[question.question_id] == question.answer
        return is_open_right(parse_open_answer(text), accepted_answers(question.answer, scoring.scorer))

    groups: dict[str, Callable[[ChoiceQuestion], str]] = {
        "domain": lambda q: _DOMAINS.get(q.kind, ""),
        "subject": lambda q: q.kind,
        "kind": lambda q: q.medium,
    }
    scored = score_choices(task, records, is_right, groups, MMMU_SIZE)
    # the test split has "?" in place of answers
    if all(q.answer in ("?", "") for q in questions):
        return Scored({}, {}, [row | {"score": None} for row in scored.per_sample])
    missing = len(_DOMAINS) - len({q.kind for q in questions} & _DOMAINS.keys())
    reason = f"{missing} of {len(_DOMAINS)} subjects are missing" if missing else scored.not_comparable
    note = [f"{guesses} answers hold no letter (guessed with seed {_GUESS_SEED}, as published)"] * bool(
        guesses
    )
    return scored._replace(not_comparable=reason, problems=note, details={"guesses": guesses})


def _chosen_letters(task: Task, texts: dict[int, str], scorer: str) -> tuple[dict[str, str], int]:
    """Question id -> letter of every answered question with options, and how many are guesses."""
    generator, guesses, letters = random.Random(_GUESS_SEED), 0, {}
    answered = [(s, q) for s, q in zip(task.samples, task.truth) if s.index in texts and q.options]
    # the official script goes through the subjects in this order, with one generator
    for sample, question in sorted(answered, key=lambda pair: pair[1].kind):
        letter = parse_choice(texts[sample.index], question.options, scorer)
        guesses += not letter
        letters[question.question_id] = letter or generator.choice(_letters(question.options))
    return letters, guesses


def _letters(options: Sequence[str]) -> list[str]:
    return [chr(ord("A") + i) for i in range(len(options))]


def parse_choice(text: str, options: Sequence[str], scorer: str = "official") -> str:
    """The letter of an answer, "" for none: "(A)", then a bare letter, then the text of an option.

    Of several, the one that stands last; `lmms` also takes "A " after another character and "A.".
    """
    text = text.strip() if scorer == "lmms" else text
    text = f" {strip_marks(text, _MARKS)} "
    letters = _letters(options)
    places = ("({})", " {} ") if scorer == "official" else ("({})", "{} ", "{}.")
    for place in places:
        if found := [x for x in letters if place.format(x) in text]:
            # lmms-eval orders letters by " A " even where they are not written so; -1 then counts as equal
            last = place if scorer == "official" or place == "({})" else " {} "
            return max(found, key=lambda letter: text.rfind(last.format(letter)))
    if len(text.split()) <= 5:
        return ""
    lower = text.lower()
    by_text = {letter: option.lower() for letter, option in zip(letters, options) if option.lower() in lower}
    return max(by_text, key=lambda letter: lower.rfind(by_text[letter]), default="")


def parse_open_answer(text: str) -> set[str | float]:
    """The candidates for the answer in a free text: what follows certain words, and its numbers."""
    text = text.strip().strip(".").lower()
    # lower-case text has no capital after a period, so in effect lines are split
    sentences = re.split(r"\.\s(?=[A-Z])|\n", text)
    ends = []
    for i, sentence in enumerate(sentences):
        # the last sentence may be an equation
        keys = (*_KEYS, "=") if i == len(sentences) - 1 else _KEYS
        parts = [sentence.split(key)[-1].strip() for key in keys if key in sentence]
        end = _shortest(parts)
        if end and end not in (":", ",", ".", "!", "?", ";", "'"):
            ends.append(end)
    ends = ends or [text]
    numbers = [match[0] for end in ends for pattern in _NUMBERS for match in pattern.finditer(end)]
    return {value for candidate in (*ends, *numbers) for value in normalise_open(candidate)}


def _shortest(parts: Sequence[str]) -> str:
    """The shortest part, the first of several; an empty part gives way to any later one, as published."""
    end = ""
    for part in parts:
        if not end or len(part) < len(end):
            end = part
    return end


def normalise_open(text: str) -> list[str | float]:
    """A number rounded to two decimals, or lower-case text; a single character only counts beside a blank."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def accepted_answers(truth: str, scorer: str = "official") -> list[str | float]:
    """The normalised answers of a question; lmms-eval takes a list of them as one text."""
    answers = _literal_list(truth) if scorer == "official" else None
    return [value for answer in answers or [truth] for value in normalise_open(str(answer))]


def is_open_right(candidates: set[str | float], accepted: Sequence[str | float]) -> bool:
    """Whether a candidate text contains an accepted text, or a candidate number is one."""
    texts = [value for value in accepted if isinstance(value, str)]
    return any(
        any(text in candidate for text in texts) if isinstance(candidate, str) else candidate in accepted
        for candidate in candidates
    )


def submit(task: Task, records: dict[int, Record], folder: Path, data: Path) -> list[Path]:
    """The upload file of the EvalAI challenge: id -> letter or answer."""
    texts = answer_texts(records)
    letters, _ = _chosen_letters(task, texts, "official")
    kept = {s.index for s in submittable(task.samples)}
    content: Mapping[str, str] = {
        q.question_id: letters.get(q.question_id, texts.get(s.index, ""))
        for s, q in zip(task.samples, task.truth)
        if s.index in kept
    }
    return [write_submission(folder, "mmmu_answers.json", content)]
