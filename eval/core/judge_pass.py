"""Judge passes: a detector, VQA model or metric network runs over a run's images after generation.

The records of one judge lie in `judge_passes/KIND-FINGERPRINT`; `judge_passes/KIND.json` names the current
one. Another judge gets its own folder: no image is generated again and the records of two never mix.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from open_unitok.core import distributed
from open_unitok.core.errors import UserError
from open_unitok.core.files import read_json, read_jsonl_lenient, write_json

from .annotations import require_key
from .benchmark import Record, Sample
from .harness import AnswerStore, answer_samples
from .image_files import read_sample_image
from .results import Answers


def run_judge_pass(
    out: Path,
    kind: str,
    about: dict[str, Any],
    samples: Sequence[Sample],
    records: dict[int, Record],
    judge: Callable[[list[Sample], list[Any]], list[Record]],
    batch_size: int,
    quiet: bool = False,
) -> None:
    """Judge every sample that has no finding of this judge; resumed and shared by ranks like answers.

    Args:
        records: the run's, whose "file" is the image.
        judge: (samples, images) -> findings; an unreadable image gets a record with the error.
    """

    def judge_batch(batch: list[Sample]) -> list[Record]:
        found: list[Record] = [{} for _ in batch]
        images = {}
        for i, sample in enumerate(batch):
            try:
                images[i] = read_sample_image(out / records[sample.index]["file"])
            except UserError as error:
                found[i] = {"error": str(error)}
        if images:
            findings = judge([batch[i] for i in images], list(images.values()))
            for i, record in zip(images, findings, strict=True):
                found[i] = record
        return found

    store = AnswerStore(open_judge_pass(out, kind, about), kind)
    # fixed batches: a judge's scores must not depend on where a run was killed
    answer_samples(store, samples, judge_batch, batch_size, quiet, fixed_batches=True)


def open_judge_pass(out: Path, kind: str, about: dict[str, Any]) -> Path:
    """The folder for this judge's findings; it becomes the current one.

    Args:
        about: describes the judge; its "fingerprint" distinguishes it from others.
    """
    folder = out / "judge_passes" / f"{kind}-{about['fingerprint'][:12]}"
    # the pointer first: a killed pass is found and resumed
    if distributed.is_main():
        write_json(out / "judge_passes" / f"{kind}.json", about | {"folder": folder.name})
    distributed.barrier()
    return folder


def current_judge_pass(out: Path, kind: str) -> tuple[Path, dict[str, Any]] | None:
    """The current folder and its judge, or None without a judge pass."""
    path = out / "judge_passes" / f"{kind}.json"
    if not path.exists():
        return None
    about = read_json(path)
    return out / "judge_passes" / about["folder"], about


def read_judge_pass(out: Path, kind: str, samples: Sequence[Sample]) -> tuple[Answers, dict[str, Any]] | None:
    """The findings of the current judge and the judge, or None without a judge pass."""
    found = current_judge_pass(out, kind)
    return None if found is None else (AnswerStore(found[0], kind).gather(samples), found[1])


def judge_findings(answers: Answers) -> tuple[dict[int, Record], list[str]]:
    """Findings by sample index, and a line about the images that could not be judged."""
    found = {i: record for i, record in answers.records.items() if not record.get("error")}
    if not answers.failed:
        return found, []
    reason = answers.records[answers.failed[0]]["error"]
    return found, [f"{len(answers.failed)} images could not be judged, the first because {reason}"]


class ExternalFindings(NamedTuple):
    """Findings of another tool: by sample index; the tool's name; problems of its file."""

    by_index: dict[int, Any]
    by: str
    problems: list[str]


def read_external_findings(
    path: Path, samples: Sequence[Sample], value: Callable[[Record, str], Any], key: str, unnamed: str
) -> ExternalFindings:
    """A file of lines {"index", ..., key: name of the tool}; unusable lines are counted and the first named.

    Args:
        value: (line, place) -> the finding; UserError where it is malformed.
        unnamed: the tool's name for lines that do not name it.

    Raises:
        UserError: the file has no usable line.
    """
    wanted = {sample.index for sample in samples}
    found: dict[int, Any] = {}
    names, bad = set(), []
    for number, row in enumerate(read_jsonl_lenient(path), 1):
        where = f"{path}, line {number}"
        try:
            index = require_key(row, "index", where)
            # a typo must not shift findings to other samples
            if not isinstance(index, int) or index not in wanted:
                raise UserError(f"{where}: index {index!r} is not a sample of this benchmark.")
            if index in found:
                raise UserError(f"{where}: index {index} occurs twice; the first line counts.")
            found[index] = value(row, where)
            names.add(str(row.get(key, unnamed)))
        except UserError as error:
            bad.append(str(error))
    if not found:
        raise UserError(f"{path} has no usable line. {(bad or ['It is empty.'])[0]}")
    problems = [f"{len(bad)} lines of {path.name} cannot be used, the first: {bad[0]}"] if bad else []
    return ExternalFindings(found, ", ".join(sorted(names)), problems)


def samples_with_images(samples: Sequence[Sample], records: dict[int, Record]) -> list[Sample]:
    """The samples that have an image in the run's folder."""
    return [s for s in samples if records.get(s.index, {}).get("file")]
