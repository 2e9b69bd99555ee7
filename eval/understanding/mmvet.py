"""MM-Vet (arXiv 2308.02490): open answers graded by a judge model, per capability and set of capabilities.

Published numbers use the judge `gpt-4-0613`; results of other judges are not comparable. Scorers select the
judge's prompt: `official` (default), or `lmms`, which differs in one word, a blank line and the length limit
of a reply.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from open_unitok.core.errors import UserError
from open_unitok.core.text_files import read_text

from ..core.annotations import (
    part_asked,
    read_json_as,
    read_llava_questions,
    require_key,
    require_mostly_valid,
    require_text,
)
from ..core.answering import (
    PROMPT_TEMPLATES,
    answer_questions,
    answer_texts,
    answering_metadata,
    choose_prompt_template,
)
from ..core.benchmark import Options, Record, Sample, Scored, Task, malformed_sample
from ..core.parquet import ParquetImage, choose_split, read_parquet, row_image
from ..core.records import cluster_of, mean_metric, sample_record, submittable, write_submission
from ..core.release_files import RELEASES, detect_layout, find_file, image_finder, image_folders
from ..judges.llm_judge import Judge, JudgeCall, JudgeFailed, ReplayJudge, load_judge

_ORIGINAL, _LLAVA = RELEASES["mmvet"].original, RELEASES["mmvet"].llava
_PUBLISHED_JUDGE = "gpt-4-0613"
# of the first request, and of the retries after replies without a grade
_TEMPERATURES = (0.0, 0.0, 0.5, 1.0, 1.5, 2.0)
RETRY_PROMPT = "\nPredict the correctness of the answer (digit): "
_REPLY_TOKENS = {"official": 3, "lmms": 128}  # max_tokens of a reply
MMVET_CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")


class MmvetQuestion(NamedTuple):
    """A question, its reference answer and the capabilities it requires."""

    name: str
    question: str
    answer: str
    capabilities: tuple[str, ...]


answer = answer_questions


def load(data: Path, settings: Options) -> Task:
    """One sample per entry of `mm-vet.json`, or per line of LLaVA's file."""
    layout = detect_layout(data, settings, _ORIGINAL, _LLAVA)
    images: dict[str, ParquetImage] = {}
    if layout == "parquet":
        path, entries, images = _read_parquet(data)
    else:
        path = find_file(data, _ORIGINAL, "MM-Vet annotation file")
        entries = read_json_as(dict, path)
    known: dict[str, tuple[MmvetQuestion, str]] = {}
    broken: dict[str, object] = {}
    for name, row in entries.items():
        try:
            known[name] = _read_question(row, name, f"{path}, {name}")
        except UserError as error:
            known[name], broken[name] = (MmvetQuestion(name, "", "", ()), ""), error
    template = choose_prompt_template(settings, "plain")
    entries = [(name, PROMPT_TEMPLATES[template].format(q.question)) for name, (q, _) in known.items()]
    part = ""
    if layout == "llava":
        released = [name for name in known if name not in broken]
        file = find_file(data, _LLAVA, "LLaVA question file")
        template, entries = f"as in {file.name}", []
        for i, row in enumerate(read_llava_questions(file)):
            good = isinstance(row, dict)
            # LLaVA: 0; MM-Vet: v1_0
            name = f"v1_{str(row['question_id']).removeprefix('v1_')}" if good else f"#{i}"
            entries.append((name, row["text"] if good else ""))
            if name not in known:
                reason = f"{file}, line {i + 1}: {path.name} has no question {name}."
                known[name], broken[name] = (MmvetQuestion(name, "", "", ()), ""), reason if good else row
        part = part_asked((name for name, _ in entries if name not in broken), released, file)
    find_image = image_finder(image_folders(data, path, ("images",)))
    samples = [
        malformed_sample(i, name, broken[name])
        if name in broken
        else Sample(i, name, prompt, images.get(name) or find_image(known[name][1]))
        for i, (name, prompt) in enumerate(entries[: settings.limit])
    ]
    return Task(
        require_mostly_valid(samples, path),
        [known[s.id][0] for s in samples],
        answering_metadata("v1", template, settings, 512),
        not_comparable=part,
    )


def _read_parquet(data: Path) -> tuple[Path, dict[str, Record], dict[str, ParquetImage]]:
    """The file, and question -> entry and image, of the hub's table (`lmms-lab/MMVet`)."""
    files = choose_split(data, defaults=("test",)).files
    entries, images = {}, {}
    for row in read_parquet(files, ("question_id", "image", "question", "answer", "capability")):
        name = str(row["question_id"])
        images[name] = row_image(row, f"{name}.png")
        # "ocr,math" in the table, a list in the release
        abilities = [ability.strip() for ability in str(row["capability"]).split(",")]
        entries[name] = row | {"imagename": images[name].name, "capability": abilities}
    return files[0], entries, images


def _read_question(row: Any, name: str, where: str) -> tuple[MmvetQuestion, str]:
    """A question and its image name; UserError if the entry is malformed."""
    abilities = require_key(row, "capability", where)
    if (
        not isinstance(abilities, list)
        or not abilities
        or any(a not in MMVET_CAPABILITIES for a in abilities)
    ):
        raise UserError(f"{where}: capability is {abilities!r}; allowed: {', '.join(MMVET_CAPABILITIES)}.")
    texts = (require_text(row, "question", where), str(require_key(row, "answer", where)))
    return MmvetQuestion(name, *texts, tuple(abilities)), require_text(row, "imagename", where)


# --------------------------------------------------------------------------------------------------- judging


@functools.cache
def judge_examples(scorer: str = "official") -> str:
    """The instruction and the seven graded examples (data file `mmvet_judge.txt`, published with MM-Vet)."""
    text = read_text(Path(__file__).with_name("mmvet_judge.txt"))
    if scorer == "lmms":
        text = text.replace("\n\nQuestion |", "\ngpt_query_prompt |")
    return text


def judge_prompt(question: MmvetQuestion, answer: str, scorer: str = "official") -> str:
    """The judge's prompt: the examples, then a line with the grade left blank."""
    # blanks around the operators, as in the examples
    truth = question.answer.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    line = f"\n{question.question} | {truth} | {answer} |"
    return judge_examples(scorer) + line + (" " if scorer == "official" else "")


def parse_grade(reply: str) -> float | None:
    """The grade in [0, 1] at the start of a reply, or None."""
    try:
        grade = float(reply.split(" ")[0].strip())
    except ValueError:
        return None
    return grade if 0.0 <= grade <= 1.0 and not math.isnan(grade) else None


def grade_answer(ask: Callable[[str, float, int], str], prompt: str) -> tuple[float, str, int]:
    """(grade, last reply, number of requests); retries at rising temperature while replies have no grade.

    Args:
        ask: (prompt, temperature, attempt) -> reply.
    """
    reply = ""
    for attempt, temperature in enumerate(_TEMPERATURES):
        reply = ask(prompt + (RETRY_PROMPT if attempt else ""), temperature, attempt)
        found = parse_grade(reply)
        content = reply.split(" ")[0].strip()
        # the published tool stores the sixth reply without parsing it: grade 0
        if attempt == len(_TEMPERATURES) - 1:
            return 0.0, content, attempt + 1
        if found is not None:
            return found, content, attempt + 1
    raise AssertionError("unreachable")


class Grades(NamedTuple):
    """Grades and replies of every run by sample index, and counts of failures."""

    by_index: dict[int, list[float]]
    replies: dict[int, list[str]]
    nonsense: int  # answers without a grade in six replies: 0
    failed: dict[int, str]  # samples without a reply -> reason: 0


def _grade_all(judge: Judge, task: Task, texts: dict[int, str], scoring: Options) -> Grades:
    """Grade every answer `scoring.judge_runs` times, in parallel."""

    def one(sample: Sample) -> tuple[list[float], list[str], int, str]:
        question: MmvetQuestion = task.truth[sample.index]
        prompt = judge_prompt(question, texts[sample.index], scoring.scorer)
        longest, nonsense = _REPLY_TOKENS[scoring.scorer], 0
        grades: list[float] = []
        replies: list[str] = []
        for run in range(scoring.judge_runs):

            def ask(text: str, temperature: float, attempt: int, run: int = run) -> str:
                return judge.reply(JudgeCall(sample.id, text, temperature, longest, run, attempt))

            try:
                value, reply, calls = grade_answer(ask, prompt)
            except JudgeFailed as error:
                # a failed request scores 0 in every run of its sample
                return [0.0] * scoring.judge_runs, replies, nonsense, str(error)
            nonsense += calls == len(_TEMPERATURES)
            grades.append(value)
            replies.append(reply)
        return grades, replies, nonsense, ""

    answered = [s for s in task.samples if s.index in texts]
    # threads: the time is spent waiting for the endpoint
    with ThreadPoolExecutor(max_workers=8) as pool:
        found = dict(zip([s.index for s in answered], pool.map(one, answered)))
    return Grades(
        {i: row[0] for i, row in found.items()},
        {i: row[1] for i, row in found.items()},
        sum(row[2] for row in found.values()),
        {i: row[3] for i, row in found.items() if row[3]},
    )


# --------------------------------------------------------------------------------------------------- scoring


def mmvet_summary(capabilities: Sequence[Sequence[str]], grades: np.ndarray) -> dict[str, Any]:
    """The published report in per cent, from grades (M samples, R runs)."""
    mean = grades.mean(axis=1)
    sets = ["_".join(sorted(row)) for row in capabilities]

    def over(keep: Iterable[bool]) -> float:
        return 100 * float(mean[np.array(list(keep))].mean())

    present = [name for name in MMVET_CAPABILITIES if any(name in row for row in capabilities)]
    # rounded to 0.1 as in the published report
    totals = [round(100 * float(total), 1) for total in grades.mean(axis=0)]
    return {
        "per_capability": {name: over(name in row for row in capabilities) for name in present},
        "total": 100 * float(mean.mean()),
        "run_totals": totals,
        "std_over_runs": round(float(np.std(100 * grades.mean(axis=0))), 1),
        "per_capability_set": {
            name: round(over(other == name for other in sets), 1) for name in dict.fromkeys(sets) if name
        },
    }


def score(task: Task, records: dict[int, Record], folder: Path, run: Record, scoring: Options) -> Scored:
    """Mean grade, overall and per capability; without a judge, no metrics but the submission file."""
    questions: list[MmvetQuestion] = task.truth
    texts = answer_texts(records)
    judge = load_judge(scoring, folder)
    if judge is None:
        note = "no --judge: the answers are in submission/ for upload to the official page"
        lines = [
            sample_record(s, records, None, q.answer, "_".join(sorted(q.capabilities)))
            for s, q in zip(task.samples, questions)
        ]
        return Scored({}, {}, lines, problems=[note])
    # a grade file holds all gradings of its evaluator
    if isinstance(judge, ReplayJudge) and judge.runs and scoring.judge_runs == 1:
        scoring = Options(**vars(scoring) | {"judge_runs": judge.runs})
    grades = _grade_all(judge, task, texts, scoring)
    # not a single reply: an error of the endpoint, not a score of 0
    if texts and len(grades.failed) == len(texts):
        reason = next(iter(grades.failed.values()))
        raise UserError(f"The judge {judge.model} graded no answer: {reason}")
    table = np.array([grades.by_index.get(s.index, [0.0] * scoring.judge_runs) for s in task.samples])
    values, names = table.mean(axis=1), [cluster_of(s) for s in task.samples]
    metrics = {"total": mean_metric(values, names)}
    for ability in MMVET_CAPABILITIES:
        kept = [i for i, q in enumerate(questions) if ability in q.capabilities]
        if kept:
            metrics[f"capability/{ability}"] = mean_metric(values[kept], [names[i] for i in kept])
    details = {"judge": judge.model, "runs": scoring.judge_runs}
    details |= mmvet_summary([q.capabilities for q in questions], table)
    per_sample = [
        sample_record(
            s, records, float(value), q.answer, "_".join(sorted(q.capabilities)), q.question,
            grades=grades.by_index.get(s.index), replies=grades.replies.get(s.index),
        )
        for s, q, value in zip(task.samples, questions, values)
    ]  # fmt: skip
    unjudged = "some answers could not be judged" if grades.failed else ""
    reason = "; ".join(filter(None, (_not_comparable(judge, scoring), unjudged)))
    return Scored(metrics, details, per_sample, "mean", reason, _judge_problems(grades, task))


def _not_comparable(judge: Judge, scoring: Options) -> str:
    """The reason why a result is not comparable with published ones, else ""."""
    if judge.model != _PUBLISHED_JUDGE:
        return f"the judge is {judge.model}, the published one is {_PUBLISHED_JUDGE}"
    return (
        ""
        if scoring.scorer == "official"
        else f"the judge's prompt is {scoring.scorer!r}, not the official one"
    )


def _judge_problems(grades: Grades, task: Task) -> list[str]:
    """Warnings about failed requests and replies without a grade."""
    problems = []
    if grades.nonsense:
        problems.append(f"{grades.nonsense} answers got no grade in six replies (counted as 0, as published)")
    if grades.failed:
        index, reason = next(iter(grades.failed.items()))
        problems.append(
            f"{len(grades.failed)} answers could not be judged, the first {task.samples[index].id} because "
            f"{reason} (counted as 0)"
        )
    return problems


def submit(task: Task, records: dict[int, Record], folder: Path, data: Path) -> list[Path]:
    """The input of the official tool and upload page."""
    texts = answer_texts(records)
    return [
        write_submission(
            folder, "mmvet_results.json", {s.id: texts.get(s.index, "") for s in submittable(task.samples)}
        )
    ]
