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

from .annotations import read_image, require_key
from .harness import Answers, Record, Sample, Store, answer_samples


def open_judge_pass(out: Path, kind: str, about: dict[str, Any]) -> Path:
    """The folder for what this model says; from now on it is the one that counts.

    Args:
        about: the model; its "fingerprint" tells it from others.
    """
    folder = out / "judge_passes" / f"{kind}-{about['fingerprint'][:12]}"
    if distributed.is_main():
        write_json(out / "judge_passes" / f"{kind}.json", about | {"folder": folder.name})
    distributed.barrier()
    return folder


def current_judge_pass(out: Path, kind: str) -> tuple[Path, dict[str, Any]] | None:
    """The folder that counts and its model, or None where nothing has looked."""
    path = out / "judge_passes" / f"{kind}.json"
    if not path.exists():
        return None
    about = read_json(path)
    return out / "judge_passes" / about["folder"], about


def run_judge_pass(
    out: Path,
    kind: str,
    about: dict[str, Any],
    samples: Sequence[Sample],
    rows: dict[int, Record],
    work: Callable[[list[Sample], list[Any]], list[Record]],
    batch_size: int,
    quiet: bool = False,
) -> None:
    """Let a model look at every sample that it has not seen yet; resumes and shares like the drawing.

    Args:
        rows: the run's, whose "file" is the image.
        work: (samples, images) -> what the model says; an image that cannot be read gets a row with why.
    """

    def look(batch: list[Sample]) -> list[Record]:
        found: list[Record] = [{} for _ in batch]
        images = {}
        for i, sample in enumerate(batch):
            try:
                images[i] = read_image(out / rows[sample.index]["file"])
            except UserError as error:
                found[i] = {"error": str(error)}
        if images:
            findings = work([batch[i] for i in images], list(images.values()))
            for i, row in zip(images, findings, strict=True):
                found[i] = row
        return found

    answer_samples(
        Store(open_judge_pass(out, kind, about), kind), samples, look, batch_size, quiet, whole=True
    )


def read_judge_pass(out: Path, kind: str, samples: Sequence[Sample]) -> tuple[Answers, dict[str, Any]] | None:
    """The rows of the model that counts and the model, or None where nothing has looked."""
    found = current_judge_pass(out, kind)
    return None if found is None else (Store(found[0], kind).gather(samples), found[1])


def judge_findings(answers: Answers) -> tuple[dict[int, Record], list[str]]:
    """What a model said, by index, and a line about the images that it could not be shown."""
    found = {i: row for i, row in answers.records.items() if not row.get("error")}
    if not answers.failed:
        return found, []
    reason = answers.records[answers.failed[0]]["error"]
    return found, [f"{len(answers.failed)} images could not be looked at, the first because {reason}"]


class ExternalFindings(NamedTuple):
    """What another tool found: by sample index; whose it is; what has to be said about its file."""

    by_index: dict[int, Any]
    by: str
    problems: list[str]


def read_external_findings(
    path: Path, samples: Sequence[Sample], value: Callable[[Record, str], Any], key: str, unnamed: str
) -> ExternalFindings:
    """A file of lines {"index", ..., key: who found it}; a line that cannot be used is counted and named.

    Args:
        value: (line, where it stands) -> what was found; UserError where it is malformed.

    Raises:
        UserError: not one line can be used.
    """
    wanted = {sample.index for sample in samples}
    found: dict[int, Any] = {}
    names, bad = set(), []
    for number, row in enumerate(read_jsonl_lenient(path), 1):
        where = f"{path}, line {number}"
        try:
            index = require_key(row, "index", where)
            if not isinstance(index, int) or index not in wanted:
                raise UserError(f"{where}: index {index!r} is no sample of this benchmark.")
            if index in found:
                raise UserError(f"{where}: index {index} occurs twice; the first line counts.")
            found[index] = value(row, where)
            names.add(str(row.get(key, unnamed)))
        except UserError as error:
            bad.append(str(error))
    if not found:
        raise UserError(f"{path} holds no line that can be used. {(bad or ['It is empty.'])[0]}")
    problems = [f"{len(bad)} lines of {path.name} cannot be used, the first: {bad[0]}"] if bad else []
    return ExternalFindings(found, ", ".join(sorted(names)), problems)


def samples_with_images(samples: Sequence[Sample], rows: dict[int, Record]) -> list[Sample]:
    """The samples that have an image in the run's folder."""
    return [s for s in samples if rows.get(s.index, {}).get("file")]
