"""Judge passes: a detector, VQA model or metric network processes the images of a run after generation.

Findings are stored in `judge_passes/KIND-FINGERPRINT`; `judge_passes/KIND.json` points to the current judge.
Every judge has its own folder: findings never mix, and images are not regenerated for another judge.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from open_unitok.core import distributed
from open_unitok.core.errors import UserError
from open_unitok.core.files import write_json
from open_unitok.core.text_files import read_json, read_json_lines

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
    """Judge the samples without a finding of this judge; resumed and divided among ranks like answers.

    Args:
        about: see `open_judge_pass`.
        records: the answers of the run; "file" is the image.
        judge: (samples, images) -> findings; unreadable images get a record with the error instead.
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
    # a judge's scores must not depend on the number of ranks or on where a run was killed
    answer_samples(store, samples, judge_batch, batch_size, quiet, fixed_batches=True)


def open_judge_pass(out: Path, kind: str, about: dict[str, Any]) -> Path:
    """Make this judge the current one; returns the folder of its findings.

    Args:
        about: description of the judge; "fingerprint" identifies it.
    """
    folder = out / "judge_passes" / f"{kind}-{about['fingerprint'][:12]}"
    # written before the first finding, so that a killed pass is found and resumed
    if distributed.is_main():
        write_json(out / "judge_passes" / f"{kind}.json", about | {"folder": folder.name})
    distributed.barrier()
    return folder


def current_judge_pass(out: Path, kind: str) -> tuple[Path, dict[str, Any]] | None:
    """Folder and description of the current judge, or None without a judge pass."""
    path = out / "judge_passes" / f"{kind}.json"
    if not path.exists():
        return None
    about = read_json(path)
    return out / "judge_passes" / about["folder"], about


def read_judge_pass(out: Path, kind: str, samples: Sequence[Sample]) -> tuple[Answers, dict[str, Any]] | None:
    """Findings and description of the current judge, or None without a judge pass."""
    found = current_judge_pass(out, kind)
    return None if found is None else (AnswerStore(found[0], kind).gather(samples), found[1])


def judge_findings(answers: Answers) -> tuple[dict[int, Record], list[str]]:
    """Findings by sample index, and a warning about images that could not be judged."""
    found = {i: record for i, record in answers.records.items() if not record.get("error")}
    if not answers.failed:
        return found, []
    reason = answers.records[answers.failed[0]]["error"]
    return found, [f"{len(answers.failed)} images could not be judged, the first because {reason}"]


class ExternalFindings(NamedTuple):
    """Findings by sample index, the name of the tool that made them, and problems of its file."""

    by_index: dict[int, Any]
    by: str
    problems: list[str]


def read_external_findings(
    path: Path, samples: Sequence[Sample], value: Callable[[Record, str], Any], key: str, unnamed: str
) -> ExternalFindings:
    """Read JSON lines {"index", ..., key: name of the tool}; invalid lines are counted, the first is quoted.

    Args:
        value: (line, location for the error text) -> the finding; UserError if it is malformed.
        unnamed: name of the tool if a line has none.

    Raises:
        UserError: the file has no valid line.
    """
    wanted = {sample.index for sample in samples}
    found: dict[int, Any] = {}
    names, bad = set(), []
    for number, row in enumerate(read_json_lines(path, lenient=True), 1):
        where = f"{path}, line {number}"
        try:
            index = require_key(row, "index", where)
            # a wrong index must not count for another sample
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
