"""What other models say of a run's pictures: a pass of its own after drawing, kept apart per model.

The rows of one detector, VQA model or distance lie in `looks/KIND-FINGERPRINT`; `looks/KIND.json` says which
of them counts. Another model starts another folder, so that nothing is drawn again and two never mix.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from open_unitok import ranks
from open_unitok.files import read_json, write_json

from .harness import Answers, Row, Sample, Store, answer_all


def open_look(out: Path, kind: str, about: dict[str, Any]) -> Path:
    """The folder for what this model says; from now on it is the one that counts.

    Args:
        about: the model; its "fingerprint" tells it from others.
    """
    folder = out / "looks" / f"{kind}-{about['fingerprint'][:12]}"
    if ranks.is_main():
        write_json(out / "looks" / f"{kind}.json", about | {"folder": folder.name})
    ranks.barrier()
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
    work: Callable[[list[Sample]], list[Row]],
    batch_size: int,
    quiet: bool = False,
) -> None:
    """Let a model look at every sample that it has not seen yet; resumes and shares like the drawing."""
    answer_all(Store(open_look(out, kind, about), kind), samples, work, batch_size, quiet)


def looked(out: Path, kind: str, samples: Sequence[Sample]) -> tuple[Answers, dict[str, Any]] | None:
    """The rows of the model that counts and the model, or None where nothing has looked."""
    found = current(out, kind)
    return None if found is None else (Store(found[0], kind).gather(samples), found[1])


def with_pictures(samples: Sequence[Sample], rows: dict[int, Row]) -> list[Sample]:
    """The samples that have a picture in the run's folder."""
    return [s for s in samples if rows.get(s.index, {}).get("file")]
