"""Score answers of another program: match them with the questions, and write the files of a run."""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing, sha256

from ..core.answering import OCR_TEMPLATE, PROMPT_TEMPLATES
from ..core.benchmark import Benchmark, Options, Record, Sample, Task
from ..core.harness import AnswerStore, score_run
from ..core.release_files import benchmark_data
from ..core.results import open_run_dir, run_metadata
from .formats import GRADED, GivenAnswer, read_answers

GENEVAL_IMAGES = 4  # images per prompt of published results


class Matched(NamedTuple):
    """Records by sample index, and the answers that could not be used."""

    records: dict[int, Record]
    unknown: list[str]  # why an answer belongs to no question
    duplicates: int


def score_answers(
    benchmark: Benchmark,
    answers: str | Path,
    data: str | Path,
    out: str | Path,
    options: Mapping[str, Any],
    partial: bool = False,
) -> Record:
    """Score a file of answers on the questions in `data`; `out` becomes a run folder with its results.

    Missing, unknown and duplicate answers are counted, and the result is then not comparable.

    Args:
        partial: accept answers to less than half of the questions.

    Raises:
        UserError: the answers do not match the questions.
    """
    path, data, out = existing(answers), benchmark_data(data, benchmark), Path(out)
    given, malformed = read_answers(path)
    options, notes = _fitting_options(benchmark, path, given, options)
    task, settings, matched = _load_and_match(benchmark, given, data, options)
    _require_match(matched, task, len(given), benchmark.name, path, data, partial)
    run = run_metadata(benchmark.name, settings, _describe(path), data)
    run["answers"] = {
        "file": str(path),
        "unknown": matched.unknown[:1] and [f"{len(matched.unknown)} answers", matched.unknown[0]],
        "malformed": malformed[:1] and [f"{len(malformed)} entries", malformed[0]],
        "duplicates": matched.duplicates,
        "notes": notes,
    }
    open_run_dir(out, run)
    store = AnswerStore(out, benchmark.name)
    done = store.done(task.samples)
    fresh = [s for s in task.samples if s.index in matched.records and s.key not in done]
    store.append(fresh, [{"error": s.malformed} if s.malformed else matched.records[s.index] for s in fresh])
    return score_run(benchmark, out, options, partial=True, task=task)


def _describe(path: Path) -> Record:
    """The answers in place of the model in run.json; another file is another model."""
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    digest = hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()
    return {"path": str(path), "kind": "answers", "fingerprint": digest}


def _fitting_options(
    benchmark: Benchmark, path: Path, given: Sequence[GivenAnswer], options: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """The options, with what the file itself decides, and why its numbers are not comparable."""
    options, notes = dict(options), []
    if benchmark.name == "mmvet" and all(a.text == GRADED for a in given):
        options.setdefault("judge_replay", str(path))
    verdicts = [a for a in given if "correct" in a.more]
    if (benchmark.name == "geneval") != bool(verdicts):
        raise UserError(
            f"{path} holds verdicts of GenEval, which only geneval has."
            if verdicts
            else f"{path}: expected GenEval's results.jsonl, lines with filename and correct."
        )
    if benchmark.name == "textvqa":
        options["prompt_template"] = "short"  # the other program had its own; the default needs the OCR file
    if verdicts:
        numbers = {a.id.rpartition("/")[2] for a in verdicts}
        if not all(number.isdecimal() for number in numbers):
            raise UserError(
                f"{path}: expected file names .../00000/samples/0000.png, got {verdicts[0].id!r}."
            )
        count = 1 + max(map(int, numbers))
        options |= {"images_per_prompt": count, "detector": "none"}
        notes += [f"{count} images per prompt instead of {GENEVAL_IMAGES}"] * (count != GENEVAL_IMAGES)
    return options, notes


def _load_and_match(
    benchmark: Benchmark, given: Sequence[GivenAnswer], data: Path, options: Mapping[str, Any]
) -> tuple[Task, Options, Matched]:
    """The task in the layout whose ids fit best, its settings, and the matched answers."""
    found, first_error = [], None
    has_layouts = any(option.name == "layout" for option in benchmark.all_options)
    # POPE and VizWiz are numbered anew in LLaVA's question files
    for layout in (
        (options["layout"],) if "layout" in options else (None, "llava") if has_layouts else (None,)
    ):
        settings, _ = benchmark.resolve({**options, "layout": layout} if has_layouts else options)
        try:
            task = benchmark.code.load(data, settings)
        except UserError as error:
            first_error = first_error or error
            continue
        found.append((task, settings, match_answers(task, given, benchmark.name)))
        if len(found[-1][2].records) == len(task.samples) and not found[-1][2].unknown:
            break
    if not found:
        assert first_error is not None
        raise first_error
    return max(found, key=lambda entry: (len(entry[2].records), -len(entry[2].unknown)))


def _require_match(
    matched: Matched, task: Task, count: int, name: str, path: Path, data: Path, partial: bool
) -> None:
    """UserError if the answers are of other questions: a wrong file must not become a score."""
    if 2 * len(matched.unknown) > count:
        raise UserError(
            f"{path} does not fit {name} in {data}: {len(matched.unknown)} of {count} answers belong to no "
            f"question. The first: {matched.unknown[0]}"
        )
    if 2 * len(matched.records) < len(task.samples) and not partial:
        raise UserError(
            f"{path} answers {len(matched.records)} of the {len(task.samples)} questions of {name} in "
            f"{data}: if that is intended, add --partial; missing answers count as wrong."
        )


# -------------------------------------------------------------------------------------------------- matching


def match_answers(task: Task, given: Iterable[GivenAnswer], name: str) -> Matched:
    """Match answers with samples by id and, where the file has it, by the question."""
    samples, by_id = task.samples, {}
    for i, sample in enumerate(samples):
        for key in dict.fromkeys(_sample_ids(sample, name, task.aliases[i] if task.aliases else None)):
            by_id.setdefault(key, []).append(i)
    records: dict[int, Record] = {}
    unknown, duplicates = [], 0
    for answer in given:
        found = by_id.get(_answer_id(answer.id, name), [])
        asked = [i for i in found if _is_about(answer.prompt, samples[i])] if answer.prompt else found
        if not asked:
            why = (
                "there is no such id"
                if not found
                else f"it asks {answer.prompt[:80]!r}, which is another question"
            )
            unknown.append(f"{answer.where}: id {answer.id}: {why}.")
            continue
        # one question about one image under several numbers (POPE's categories) has one answer
        if len({(str(samples[i].image), samples[i].prompt) for i in asked}) > 1:
            if len({samples[i].id for i in asked}) > 1:
                unknown.append(
                    f"{answer.where}: id {answer.id}: {len(asked)} questions have it. The file "
                    "that numbers them (LLaVA's question file) must be in --data."
                )
                continue
            # SEED-Bench has one id twice: in the order of the file
            asked = [i for i in asked if samples[i].index not in records][:1] or asked[:1]
        fresh = [samples[i].index for i in asked if samples[i].index not in records]
        duplicates += not fresh
        for i in fresh:
            records[i] = answer.more or {"text": answer.text}
    return Matched(records, unknown, duplicates)


def _sample_ids(sample: Sample, name: str, alias: Any) -> list[str]:
    """The ids under which files of answers list a sample."""
    # an id of a LLaVA question file replaces the released one: the numbers overlap
    if alias is not None:
        return [str(alias)]
    own, image = str(sample.id), sample.image.name if sample.image else ""
    if name == "mmvet":
        return [own, own.removeprefix("v1_")]
    if name == "mme":
        return [_answer_id(own, name)]
    if name == "textvqa":
        return [own, image.split(".")[0]]
    if name in ("pope", "vizwiz"):
        return [own, own.rpartition("/")[2], image.split(".")[0] if name == "vizwiz" else own]
    return [own]


def _answer_id(text: str, name: str) -> str:
    """The id of an answer; MME's, TASK/images/FILE.png or TASK/FILE.jpg, becomes TASK/FILE."""
    return f"{text.split('/')[0]}/{PurePosixPath(text).stem}" if name == "mme" else text


# lines of prompts that are not the question
_FIXED_LINES = {
    line.strip().casefold()
    for template in (*PROMPT_TEMPLATES.values(), OCR_TEMPLATE)
    for line in template.replace("{}", "").split("\n")
    if line.strip()
}
_BESIDE = re.compile(
    r"<image>|context:|hint:|reference ocr token:|ocr tokens:|[a-e]\. |there are several options"
)


def _question_lines(prompt: str) -> list[str]:
    """The lines of a prompt without instruction, options, context and OCR words; all if none is left."""
    lines = [" ".join(line.split()).casefold() for line in prompt.split("\n")]
    lines = [line for line in lines if line and line not in _FIXED_LINES]
    return [line for line in lines if not _BESIDE.match(line)] or lines


def _is_about(prompt: str, sample: Sample) -> bool:
    """Whether a prompt of another program asks the question of a sample."""
    if sample.malformed:
        return True
    # the longest line is the question, with whatever words around it
    for one, other in ((sample.prompt, prompt), (prompt, sample.prompt)):
        longest = max(_question_lines(one), key=len, default="")
        if longest and longest in " ".join(other.split()).casefold():
            return True
    return False
