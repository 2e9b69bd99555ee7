"""What stands around the answers: `run.json`, whether they are complete, and the result as it is written."""

import importlib.metadata
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from open_unitok.core import distributed
from open_unitok.core.errors import UserError
from open_unitok.core.files import read_json, write_json

from .harness import Answers, Record, Sample, Scored, Scoring, Settings, Task, malformed_reasons


def open_run_dir(folder: str | Path, run: dict[str, Any]) -> None:
    """Write `run.json`, or compare with the one that is there: answers of two settings never mix.

    Raises:
        UserError: the folder holds a run of another model or with other settings; the difference is shown.
    """
    path = Path(folder) / "run.json"
    if not path.exists():
        write_json(path, run)  # the same on every rank, and atomic
    distributed.barrier()
    old = read_json(path)
    for name, before, now in differences(comparable(old), comparable(run)):
        raise UserError(
            f"{folder} holds answers made with {name} = {before!r}, this run has {now!r}. "
            "Use another --out, or remove the folder."
        )


def comparable(run: dict[str, Any]) -> dict[str, Any]:
    """The parts of `run.json` that decide the answers, flat; a model that has moved is still the same."""
    settings = {f"setting {k}": v for k, v in run.get("settings", {}).items()}
    model = {"model fingerprint": run.get("model", {}).get("fingerprint")}
    return {"benchmark": run.get("benchmark")} | settings | model


def differences(old: dict[str, Any], new: dict[str, Any]) -> Iterable[tuple[str, Any, Any]]:
    """(name, old value, new value) of all that differs."""
    return [(k, old.get(k), new.get(k)) for k in {**old, **new} if old.get(k) != new.get(k)]


def check_complete(answers: Answers, samples: Sequence[Sample], folder: Path, partial: bool) -> list[str]:
    """What has to be said about these answers, one line each.

    Raises:
        UserError: answers are missing, or belong to other questions, and `partial` was not asked for.
    """
    problems = []
    if answers.missing:
        problems.append(
            f"{len(answers.missing)} of {len(samples)} samples have no answer, "
            f"for instance number {answers.missing[0]} (counted as wrong)"
        )
    if answers.unknown:
        problems.append(f"{answers.unknown} answers belong to no sample of this benchmark (not counted)")
    if problems and not partial:
        raise UserError(
            f"{folder}: {'; '.join(problems)}. Run the same `unitok eval run` again to complete it, or score "
            "what is there with --partial."
        )
    empty = sum(not row.get("text", "x") and not row.get("error") for row in answers.records.values())
    if empty:
        problems.append(f"{empty} answers are empty (scored as the benchmark's own rule says)")
    if answers.duplicates:
        problems.append(f"{answers.duplicates} samples were answered twice (the first answer counts)")
    if broken := malformed_reasons(samples):
        problems.append(f"{len(broken)} annotations are malformed, the first: {broken[0]} (counted as wrong)")
    failed = sorted(set(answers.failed) - {s.index for s in samples if s.malformed})
    if failed:
        problems.append(
            f"{len(failed)} samples could not be asked, the first because "
            f"{answers.records[failed[0]]['error']} (counted as wrong)"
        )
    return problems


def build_result(
    run: dict[str, Any], task: Task, answers: Answers, scored: Scored, problems: list[str], scoring: Scoring
) -> Record:
    """The result as it is written: numbers with n and interval, and all that a reader needs to compare."""
    main = next(iter(scored.metrics), None)
    limit = run["settings"].get("limit")
    why_not = scored.not_comparable or (f"only the first {limit} samples" if limit else "")
    broken = len(malformed_reasons(task.samples))
    for count, what in ((len(answers.missing), "answers are missing"), (broken, "annotations are malformed")):
        why_not = why_not or (f"{count} {what}" if count else "")
    return {
        "benchmark": run["benchmark"],
        "metric": main,
        "value": scored.metrics[main].value if main else None,
        "n": len(task.samples),
        "missing": len(answers.missing),
        "failed": len(answers.failed),
        "malformed": broken,
        "complete": not answers.missing,
        "comparable": not why_not,
        **({"not_comparable_reason": why_not} if why_not else {}),
        "scorer": scoring.scorer,
        "split": task.metadata.get("split"),
        "prompt_template": task.metadata.get("prompt_template"),
        "decoding": task.metadata.get("decoding"),
        "metrics": {name: metric._asdict() for name, metric in scored.metrics.items()},
        "statistic": scored.statistic,
        "problems": [*problems, *task.problems, *scored.problems],
        "about": task.metadata,
        "settings": run["settings"],
        "scoring": asdict(scoring),
        "model": run["model"],
        "data": run["data"],
        "versions": run["versions"],
        "details": scored.details,
    }


def run_metadata(
    benchmark: str, settings: Settings, model: dict[str, Any], data: str | Path
) -> dict[str, Any]:
    """What `run.json` holds."""
    return {
        "benchmark": benchmark,
        "settings": asdict(settings),
        "model": model,
        "data": str(data),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of what the numbers may depend on."""
    names = ("open-unitok", "torch", "transformers", "numpy", "pillow")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "from a checkout"
    return found | {"python": platform.python_version()}
