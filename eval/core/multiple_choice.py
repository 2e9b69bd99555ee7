"""Questions with lettered options: prompts, records, and the letter that a free answer chooses."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from open_unitok.core.errors import UserError
from open_unitok.core.text_files import read_csv

from .annotations import require_mostly_valid
from .answering import PROMPT_TEMPLATES, answer_texts, answering_metadata, choose_prompt_template
from .benchmark import Metric, Options, Record, Sample, Scored, Task, malformed_sample
from .image_files import Base64Image
from .parquet import DEFAULT_CONFIGURATION, choose_split, find_splits, holds_parquet, read_parquet
from .records import cluster_of, mean_metric, mean_metrics_by, sample_record
from .release_files import describe_contents, find_file

OPTION_LETTERS = "ABCDE"

# where a letter may stand, and the rank of that place in `find_letter`
_PLACES = {"({})": 6, "{}.": 5, "{}:": 4, "{})": 3, "{} ": 2}
_START, _END, _PHRASE = 10, 9, 7
_PHRASES = (
    *(f"{the}{word}answer is" for the in ("", "the ") for word in ("", "correct ", "best ")),
    *(f"{the}{word} option is" for the in ("", "the ") for word in ("correct", "best")),
    *(f"{the}{word}choice is" for the in ("", "the ") for word in ("", "correct ")),
    *("my answer is", "my choice is", "i choose", "i select", "i pick"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)


class ChoiceQuestion(NamedTuple):
    """A question with lettered options; `answer` is the correct letter."""

    question_id: str
    question: str
    options: tuple[str, ...]
    answer: str
    kind: str  # SEED-Bench: the dimension; ScienceQA: the subject
    medium: str  # "image", "video" or "text"
    groups: tuple[str, ...] = ()  # published groups that it counts in: ScienceQA's NAT, IMG, G1-6, ...


def malformed_choice(name: str, medium: str = "", kind: str = "") -> ChoiceQuestion:
    """The placeholder of a malformed question; no answer is correct."""
    return ChoiceQuestion(name, "", (), "", kind, medium)


def lettered_options(question: str, options: Sequence[str]) -> str:
    """The question followed by its options, one per line."""
    # the prompt layout of LLaVA and of the published runs
    lines = (f"{letter}. {option}" for letter, option in zip(OPTION_LETTERS, options))
    return "\n".join([question, *lines])


def choice_records(task: Task, records: dict[int, Record], values: Sequence[float]) -> list[Record]:
    """Records of scores.jsonl; `task.truth` is the list of `ChoiceQuestion`."""
    return [
        sample_record(s, records, value, q.answer, q.kind, lettered_options(q.question, q.options))
        for s, q, value in zip(task.samples, task.truth, values)
    ]


def find_letter(text: str, letters: Sequence[str] = "ABCD") -> str:
    """The letter that a free answer chooses, "" for none; the ranking of lmms-eval's `extract_mcq_answer`.

    A letter at the start or the end of the answer comes first, then one after a phrase such as "the answer
    is", then "(A)", "A.", "A:", "A)" and "A "; of places of one rank the last in the text counts.
    """
    text = strip_marks(text.strip(), ",.!?;:'\"")
    bare, text = text.strip(), f" {text} "
    found = [
        (rank, text.rfind(place.format(letter)), letter)
        for place, rank in _PLACES.items()
        for letter in letters
    ]
    lower = text.lower()
    for phrase in _PHRASES:
        if (start := lower.find(phrase)) >= 0:
            found += [(_PHRASE, text.find(letter, start + len(phrase)), letter) for letter in letters]
    # a letter of a word, as in "Apple", does not stand at the start
    found += [(_START, 0, x) for x in letters if bare.startswith(x) and not bare[1:2].isalpha()]
    found += [(_END, len(text), x) for x in letters if bare.endswith(x) and not bare[-2:-1].isalpha()]
    if not (found := [place for place in found if place[1] >= 0]):
        # as published: with no other place, any letter of the text counts
        found = [(0, text.rfind(letter), letter) for letter in letters if letter in text]
    return max(found, key=lambda place: place[:2])[2] if found else ""


def strip_marks(text: str, marks: str) -> str:
    """Strip each mark from both ends, once and in this order: "A.," becomes "A" and "A,." becomes "A,"."""
    for mark in marks:
        text = text.strip(mark)
    return text


# ------------------------------------------------- data sets of the hub: AI2D, MMStar, RealWorldQA, MMMU


class ChoiceRow(NamedTuple):
    """A question as a prompt without its instruction, its image or images, and what a scorer needs of it.

    Without a question_id it is named by its number.
    """

    question: ChoiceQuestion
    prompt: str
    image: Any


class ChoiceSet(NamedTuple):
    """How a data set is laid out and prompted.

    Attributes:
        name: for error texts.
        splits: the splits to take without --split, the first that exists.
        columns: required columns.
        read: (row, location for the error text) -> the question; UserError if it is malformed.
        prompts: name -> template, in addition to `PROMPT_TEMPLATES`; the first is the default.
        length: longest answer in tokens.
        table: glob pattern of VLMEvalKit's table with base64 images, if it is read.
        by_subject: a split may be divided among configurations, which are read in the order of their names.
    """

    name: str
    splits: tuple[str, ...]
    columns: tuple[str, ...]
    read: Callable[[Record, str], ChoiceRow]
    prompts: Mapping[str, str]
    length: int
    table: str = ""
    by_subject: bool = False


def load_choices(data: Path, settings: Options, layout: ChoiceSet) -> Task:
    """One sample per row of a data set's parquet files, or of its table; `truth` is the list of questions.

    Raises:
        UserError: there is neither, a column is missing, or most rows are malformed.
    """
    template = choose_prompt_template(settings, next(iter(layout.prompts)), more=tuple(layout.prompts))
    split, rows = _choice_rows(data, settings, layout)
    samples: list[Sample] = []
    questions: list[ChoiceQuestion] = []
    for i, row in enumerate(rows):
        if i == settings.limit:
            break
        try:
            found = layout.read(row, row["#"])
            if found.image is None:
                raise UserError(f"{row['#']}: there is no image.")
            prompt = (PROMPT_TEMPLATES | dict(layout.prompts))[template].format(found.prompt)
            name = found.question.question_id or str(i)
            samples.append(Sample(i, name, prompt, found.image))
            questions.append(found.question._replace(question_id=name))
        except UserError as error:
            samples.append(malformed_sample(i, None, error))
            questions.append(malformed_choice(f"#{i}"))
    metadata = answering_metadata(split, template, settings, layout.length)
    return Task(require_mostly_valid(samples, data), questions, metadata)


def _choice_rows(data: Path, settings: Options, layout: ChoiceSet) -> tuple[str, Iterator[Record]]:
    """The split and its rows; an image is a `ParquetImage` or a `Base64Image`."""
    if holds_parquet(data):
        if layout.by_subject:
            name, files = _subject_files(data, settings.split or layout.splits[0])
        else:
            _, name, files = choose_split(data, settings.split, layout.splits)
        return name, read_parquet(files, layout.columns)
    if not layout.table:
        raise UserError(
            f"{data} is no {layout.name}: expected its parquet files as on the hub, such as "
            f"data/{layout.splits[0]}-00000-of-00001.parquet. {describe_contents(data, ())}"
        )
    table = find_file(data, (layout.table,), f"{layout.name} table, or parquet files as on the hub")
    return table.stem, _table_rows(table)


def _subject_files(data: Path, split: str) -> tuple[str, list[Path]]:
    """The files of one split of all configurations; where one configuration has several parts, choose one."""
    found = [s for s in find_splits(data) if s.split == split]
    whole = [s for s in found if s.configuration == DEFAULT_CONFIGURATION]
    # a folder with both has every question twice
    if len(found) < 2 or whole:
        return split, list(choose_split(data, split).files)
    return split, [file for s in sorted(found) for file in s.files]


def _table_rows(path: Path) -> Iterator[Record]:
    """The rows of a table with base64 images; a short text in place of an image is the index of its row."""
    images: dict[str, str] = {}
    for i, row in enumerate(read_csv(path, delimiter="\t")):
        name = str(row.get("index", i))
        text = row.get("image") or ""
        images[name] = images.get(text, "") if len(text) < 64 else text
        image = Base64Image(f"{name}.jpg", images[name]) if images[name] else None
        yield row | {"image": image, "#": f"{path}, row {i + 1}"}


def score_choices(
    task: Task,
    records: dict[int, Record],
    is_right: Callable[[str, ChoiceQuestion], bool],
    groups: Mapping[str, Callable[[ChoiceQuestion], str]],
    size: int,
) -> Scored:
    """Accuracy overall and by group; missing answers and malformed questions are wrong.

    Args:
        is_right: (answer, question) -> whether it is correct.
        groups: prefix of the metrics -> the group of a question.
        size: the number of questions of published results.
    """
    questions: list[ChoiceQuestion] = task.truth
    texts = answer_texts(records)
    values = [
        float(not s.malformed and s.index in texts and is_right(texts[s.index], q))
        for s, q in zip(task.samples, questions)
    ]
    clusters = [cluster_of(s) for s in task.samples]
    metrics: dict[str, Metric] = {"accuracy": mean_metric(values, clusters)}
    for prefix, group in groups.items():
        metrics |= mean_metrics_by(prefix, [group(q) for q in questions], values, clusters)
    reason = "" if len(values) == size else other_size(len(values), size)
    return Scored(metrics, {}, choice_records(task, records, values), not_comparable=reason)


def other_size(count: int, size: int) -> str:
    """The reason why a result over a part of a benchmark, or another split, is not comparable."""
    return f"{count} questions; published scores are of {size:,}"
