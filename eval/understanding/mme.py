"""MME (arXiv 2306.13394): yes/no questions in fourteen tasks, two per image, and two totals over the tasks.

The score of a task is 100 * (accuracy + accuracy+), where accuracy+ is the fraction of images with both
answers correct. Published tables quote the sum over the ten perception tasks, at most 2000. Scorers:
`official` (default) searches the first four characters for yes or no; `lmms` strips blanks and periods first
and also accepts a single y or n.
"""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from open_unitok.core.errors import UserError
from open_unitok.core.image_names import is_image_name
from open_unitok.core.text_files import read_lines

from ..core.annotations import part_asked, read_llava_questions, require_mostly_valid, require_text
from ..core.answering import (
    PROMPT_TEMPLATES,
    answer_questions,
    answer_texts,
    answering_metadata,
    choose_prompt_template,
)
from ..core.benchmark import Metric, Options, Record, Sample, Scored, Task, malformed_sample
from ..core.bootstrap import bootstrap, question_pair_columns, question_pair_statistic
from ..core.image_files import image_path_by_stem
from ..core.parquet import ParquetImage, choose_split, holds_parquet, read_parquet, row_image
from ..core.records import cluster_of, sample_record, write_submission
from ..core.release_files import MME_TASK_FOLDERS, RELEASES, find_file, walk_folders, wrong_place

MME_TASKS = MME_TASK_FOLDERS
PERCEPTION_TASKS, COGNITION_TASKS = MME_TASKS[:10], MME_TASKS[10:]
_YES_NO = "Please answer yes or no."


class MmeQuestion(NamedTuple):
    """A question with its truth, "yes" or "no"."""

    task: str
    image: Any  # a Path or a ParquetImage
    question: str
    label: str
    malformed: str = ""  # the error in its line: the question is not answered and counts as wrong


answer = answer_questions


def load(data: Path, settings: Options) -> Task:
    """Two samples per image, task by task; `split` selects a single task.

    In LLaVA's layout the prompts come from LLaVA's file and the truth from the released folders. Malformed:
    a line that is not a question with Yes or No, and the missing second question of an image.

    Raises:
        UserError: the folder of a task is missing or has no questions.
    """
    tasks = (settings.split,) if settings.split else MME_TASKS
    for name in tasks:
        if name not in MME_TASKS:
            raise UserError(f"split is {name!r}; allowed: {', '.join(MME_TASKS)}.")
    root, part = _release_root(data), ""
    if settings.layout == "parquet" or (root is None and holds_parquet(data)):
        questions, root = _read_parquet(data, tasks), data
    elif root is None:
        raise wrong_place(data, RELEASES["mme"].original, RELEASES["mme"].llava)
    else:
        questions = [question for name in tasks for question in _read_task(root, name)]
        part = _without_questions(questions)
    template = choose_prompt_template(settings, "short")
    prompts = [PROMPT_TEMPLATES[template].format(without_yes_no_request(q.question)) for q in questions]
    if settings.layout == "llava":
        file = find_file(data, RELEASES["mme"].llava, "LLaVA question file")
        template = f"as in {file.name}"
        released = questions
        questions, prompts = _join_llava(released, file, tasks)
        asked, known = (
            [(q.task, q.image.stem, q.question) for q in side if not q.malformed]
            for side in (questions, released)
        )
        part = part_asked(asked, known, file) or part
    questions, prompts = questions[: settings.limit], prompts[: settings.limit]
    samples = [
        malformed_sample(i, f"{q.task}/{q.image.name}", q.malformed, q.image if q.image.name else None)  # pyright: ignore
        if q.malformed
        else Sample(i, f"{q.task}/{q.image.name}", prompt, q.image)
        for i, (q, prompt) in enumerate(zip(questions, prompts))
    ]
    return Task(
        require_mostly_valid(samples, root),
        questions,
        answering_metadata(settings.split or "all tasks", template, settings),
        not_comparable=part,
    )


def _release_root(data: Path) -> Path | None:
    """The nearest folder with folders of tasks; its own name differs between archives."""
    if not data.is_dir() and data.suffix not in (".txt", ".jsonl"):
        return None
    for level in walk_folders(data if data.is_dir() else data.parent):
        for folder in level:
            if any(any((folder / task).rglob("*.txt")) for task in MME_TASKS if (folder / task).is_dir()):
                return folder
    return None


def _read_parquet(data: Path, tasks: Sequence[str]) -> list[MmeQuestion]:
    """The questions of the hub's table (`lmms-lab/MME`), in the order of the release."""
    images: dict[str, dict[str, ParquetImage]] = {name: {} for name in MME_TASKS}
    lines: dict[tuple[str, str], list[str]] = {}
    columns = ("question_id", "image", "question", "answer", "category")
    for row in read_parquet(choose_split(data, defaults=("test",)).files, columns):
        name = str(row["category"])
        if name not in images:
            raise UserError(f"{row['#']}: category is {name!r}; allowed: {', '.join(MME_TASKS)}.")
        # question_id is the path of the image in the release, the same for both questions about it
        file = PurePosixPath(str(row["question_id"])).name
        images[name].setdefault(file, row_image(row, file))
        lines.setdefault((name, file), []).append(f"{row['question']}\t{row['answer']}")
    if absent := [name for name in tasks if not images[name]]:
        raise UserError(f"{data}: there are no questions of the tasks {', '.join(absent)}.")
    return [
        question
        for name in tasks
        # the release orders by the names of its text files
        for file in sorted(images[name], key=lambda file: f"{PurePosixPath(file).stem}.txt")
        for question in _image_questions(
            name, images[name][file], lines[name, file], f"{data}, {name}/{file}"
        )
    ]


def _read_task(root: Path, name: str) -> list[MmeQuestion]:
    """The questions of one folder: flat, or with `images/` and `questions_answers_YN/`."""
    folder = root / name
    if not folder.is_dir():
        present = ", ".join(task for task in MME_TASKS if (root / task).is_dir())
        raise UserError(
            f"{root}: MME has a folder for each of its 14 tasks; {name} is missing, there are {present}. "
            "--split TASK runs one of them."
        )
    texts = folder / "questions_answers_YN" if (folder / "questions_answers_YN").is_dir() else folder
    images = [folder / "images", folder]
    result = []
    for path in sorted(texts.glob("*.txt")):
        # .jpg in some tasks, .png in others
        image = image_path_by_stem(images, path.stem)
        try:
            lines = read_lines(path)
        except UserError as error:
            result += [MmeQuestion(name, image, "", "", str(error))] * 2
            continue
        result += _image_questions(name, image, lines, str(path))
    if not result:
        raise UserError(f"{texts}: found no questions (*.txt).")
    return result


def _without_questions(questions: Sequence[MmeQuestion]) -> str:
    """Why the folders are a part of the release: images whose questions are missing; "" if there are none."""
    asked = {(q.image.parent, q.image.stem) for q in questions}
    folders = dict.fromkeys(folder for folder, _ in asked if isinstance(folder, Path) and folder.is_dir())
    left = [p for f in folders for p in sorted(f.iterdir()) if is_image_name(p) and (f, p.stem) not in asked]
    names = ", ".join(f"{path.parent.parent.name}/{path.parent.name}/{path.name}" for path in left[:3])
    return f"{len(left)} images have no questions ({names})" if left else ""


def _image_questions(
    name: str, image: Path | ParquetImage, lines: Sequence[str], where: str
) -> list[MmeQuestion]:
    """The two questions about an image, from lines of a question, a tab and its answer."""
    result = []
    for i, line in enumerate(lines):
        question, tab, label = line.rpartition("\t")
        broken = ""
        if not tab or label.strip().lower() not in ("yes", "no") or not question.strip():
            broken = f"{where}, line {i + 1}: expected a question, a tab and Yes or No: {line!r}."
        elif i > 1:
            broken = f"{where}: expected two questions, found {len(lines)}."
        result.append(MmeQuestion(name, image, question, label.strip().lower(), broken))
    # a missing second question lowers accuracy+ instead of raising it
    for _ in range(len(lines), 2):
        broken = f"{where}: expected two questions, found {len(lines)}."
        result.append(MmeQuestion(name, image, "", "", broken))
    return result


def without_yes_no_request(question: str) -> str:
    """The question without the released "Please answer yes or no.": the prompt template replaces it."""
    return question.replace(_YES_NO, "").strip()


def _join_llava(
    questions: list[MmeQuestion], file: Path, tasks: tuple[str, ...]
) -> tuple[list[MmeQuestion], list[str]]:
    """The released questions in the order of LLaVA's file, and LLaVA's prompts.

    A line that is unreadable or matches no released question counts as wrong in its task, or in the first
    task if the line names none.
    """
    known = {(q.task, Path(q.image.name).stem, without_yes_no_request(q.question)): q for q in questions}
    found, prompts = [], []
    for i, row in enumerate(read_llava_questions(file)):
        where, name, image = f"{file}, line {i + 1}", tasks[0], Path()
        try:
            image = Path(require_text(row, "image", where))
            name = next((part for part in (row.get("category"), image.parts[0]) if part in MME_TASKS), name)
            if require_text(row, "category", where) not in MME_TASKS:
                raise UserError(f"{where}: category is {row['category']!r}; allowed: {', '.join(MME_TASKS)}.")
            # LLaVA's file has no question ids: match by task, image and text
            key = (name, image.stem, row["text"].split("\n")[0].strip())
            if name in tasks and key not in known:
                raise UserError(f"{where}: the folder {name} has no such question about {key[1]}.")
            question, prompt = known.get(key), row["text"]
        except UserError as error:
            question, prompt = MmeQuestion(name, image, "", "", str(error)), ""
        # a line of a task outside --split is skipped
        if name in tasks and question is not None:
            found.append(question)
            prompts.append(prompt)
    return found, prompts


# --------------------------------------------------------------------------------------------------- scoring


def parse_mme(answer: str, scorer: str = "official") -> str:
    """Returns "yes", "no", or "other", which is always wrong."""
    text = answer.lower()
    if scorer == "lmms":
        text = text.strip().replace(".", "")
        if text in ("y", "n"):
            return "yes" if text == "y" else "no"
    # published: a substring match, so "know" in the first four characters is a "no"
    return next((word for word in ("yes", "no") if word in text[:4]), "other")


def score(task: Task, records: dict[int, Record], folder: Path, run: Record, scoring: Options) -> Scored:
    """The perception and cognition totals, and the score of each task; its parts go into the details."""
    questions: list[MmeQuestion] = task.truth
    texts = answer_texts(records)
    parsed = [
        parse_mme(texts[s.index], scoring.scorer) if s.index in texts else "missing" for s in task.samples
    ]
    right = [float(p == q.label) for p, q in zip(parsed, questions)]
    pairs: dict[tuple[str, str], list[float]] = {}
    for s, q, hit in zip(task.samples, questions, right):
        pairs.setdefault((q.task, cluster_of(s)), []).append(hit)
    # accuracy+ needs both questions of an image: one correct answer out of one does not count
    both = {key: min(hits) if len(hits) > 1 else 0.0 for key, hits in pairs.items()}
    # a split of a single cognition task has no perception total
    main = PERCEPTION_TASKS if any(q.task in PERCEPTION_TASKS for q in questions) else COGNITION_TASKS
    per_sample = [
        sample_record(
            s, records, hit, q.label, q.task, q.question, parsed=p, pair=both[q.task, cluster_of(s)],
            in_main_metric=q.task in main,
        )
        for s, q, hit, p in zip(task.samples, questions, right, parsed)
    ]  # fmt: skip
    parts = {"perception": PERCEPTION_TASKS, "cognition": COGNITION_TASKS}
    parts |= {f"task/{name}": (name,) for name in MME_TASKS}
    metrics = {name: found for name, names in parts.items() if (found := _total(per_sample, names))}
    return Scored(metrics, {"tasks": mme_tasks(per_sample)}, per_sample, "question pairs")


def _total(rows: list[Record], tasks: tuple[str, ...]) -> Metric | None:
    """The sum of the scores of these tasks, None without questions of them."""
    rows = [row for row in rows if row["group"] in tasks]
    if not rows:
        return None
    columns, clusters = question_pair_columns(rows), [(row["group"], row["cluster"]) for row in rows]
    value = float(question_pair_statistic(columns.sum(axis=0)))
    return Metric(value, len(rows), bootstrap(columns, clusters, question_pair_statistic), "points")


def mme_tasks(rows: list[Record]) -> dict[str, Record]:
    """Task -> score, accuracy, accuracy+, number of unreadable answers and of images."""
    result = {}
    for name in dict.fromkeys(row["group"] for row in rows):
        chosen = [row for row in rows if row["group"] == name]
        right, count, both, images = question_pair_columns(chosen).sum(axis=0)
        result[name] = {
            "score": 100 * (right / count + both / images),
            "acc": right / count, "acc_plus": both / images,
            "other": sum(row["parsed"] == "other" for row in chosen), "images": round(images),
        }  # fmt: skip
    return result


def submit(task: Task, records: dict[int, Record], folder: Path, data: Path) -> list[Path]:
    """The input of the official tool: a file per task with image, question, truth and answer."""
    texts = answer_texts(records)
    lines: dict[str, list[str]] = {}
    for sample, question in zip(task.samples, task.truth):
        if question.malformed:
            continue
        # tabs and newlines separate fields and lines of the file
        answer = " ".join(texts.get(sample.index, "").split())
        fields = (question.image.name, question.question, question.label.capitalize(), answer)
        lines.setdefault(question.task, []).append("\t".join(fields) + "\n")
    return [write_submission(folder, f"{name}.txt", "".join(rows)) for name, rows in lines.items()]
