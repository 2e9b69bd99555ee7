"""What other models say of a run's images: a pass of its own after drawing, kept apart per model.

The rows of one detector, VQA model or distance lie in `looks/KIND-FINGERPRINT`; `looks/KIND.json` says which
of them counts. Another model starts another folder, so that nothing is drawn again and two never mix.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from open_unitok.core import distributed
from open_unitok.core.errors import UserError
from open_unitok.core.files import read_json, read_jsonl_lenient, write_json

from .annotations import entry, read_image
from .harness import Answers, Row, Sample, Store, answer_all


def open_look(out: Path, kind: str, about: dict[str, Any]) -> Path:
    """The folder for what this model says; from now on it is the one that counts.

    Args:
        about: the model; its "fingerprint" tells it from others.
    """
    folder = out / "looks" / f"{kind}-{about['fingerprint'][:12]}"
    if distributed.is_main():
        write_json(out / "looks" / f"{kind}.json", about | {"folder": folder.name})
    distributed.barrier()
    return folder


def current(out: Path, kind: str) -> tuple[Path, dict[str, Any]] | None:
    """The folder that counts and its model, or None where nothing has looked."""
    path = out / "looks" / f"{kind}.json"
    if not path.exists():
        return None
    about = read_json(path)
    return out / "looks" / about["folder"], about


def look_all(
    out: Path,
    kind: str,
    about: dict[str, Any],
    samples: Sequence[Sample],
    rows: dict[int, Row],
    work: Callable[[list[Sample], list[Any]], list[Row]],
    batch_size: int,
    quiet: bool = False,
) -> None:
    """Let a model look at every sample that it has not seen yet; resumes and shares like the drawing.

    Args:
        rows: the run's, whose "file" is the image.
        work: (samples, images) -> what the model says; an image that cannot be read gets a row with why.
    """

    def look(batch: list[Sample]) -> list[Row]:
        found: list[Row] = [{} for _ in batch]
        images = {}
        for i, sample in enumerate(batch):
            try:
                images[i] = read_image(out / rows[sample.index]["file"])
            except UserError as error:
                found[i] = {"error": str(error)}
        if images:
            said = work([batch[i] for i in images], list(images.values()))
            for i, row in zip(images, said, strict=True):
                found[i] = row
        return found

    answer_all(Store(open_look(out, kind, about), kind), samples, look, batch_size, quiet, whole=True)


def looked(out: Path, kind: str, samples: Sequence[Sample]) -> tuple[Answers, dict[str, Any]] | None:
    """The rows of the model that counts and the model, or None where nothing has looked."""
    found = current(out, kind)
    return None if found is None else (Store(found[0], kind).gather(samples), found[1])


def said(answers: Answers) -> tuple[dict[int, Row], list[str]]:
    """What a model said, by index, and a line about the images that it could not be shown."""
    found = {i: row for i, row in answers.rows.items() if not row.get("error")}
    if not answers.failed:
        return found, []
    reason = answers.rows[answers.failed[0]]["error"]
    return found, [f"{len(answers.failed)} images could not be looked at, the first because {reason}"]


class Findings(NamedTuple):
    """What another tool found: by sample index; whose it is; what has to be said about its file."""

    by_index: dict[int, Any]
    by: str
    problems: list[str]


def read_findings(
    path: Path, samples: Sequence[Sample], value: Callable[[Row, str], Any], key: str, unnamed: str
) -> Findings:
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
            index = entry(row, "index", where)
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
    return Findings(found, ", ".join(sorted(names)), problems)


def with_images(samples: Sequence[Sample], rows: dict[int, Row]) -> list[Sample]:
    """The samples that have an image in the run's folder."""
    return [s for s in samples if rows.get(s.index, {}).get("file")]
