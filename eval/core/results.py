"""The content of run.json and results.json, and the completeness check in between."""

import hashlib
import importlib.metadata
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from open_unitok.core import distributed
from open_unitok.core.errors import UserError
from open_unitok.core.files import write_json
from open_unitok.core.text_files import read_json

from .benchmark import Options, Record, Sample, Scored, Task, malformed_reasons

_FINGERPRINTED_SUFFIXES = (".safetensors", ".bin", ".pth", ".json", ".model")


# what is not known of the answers of another program
_OF_OTHERS = {
    "prompt_template": "of another program",
    "decoding": "of another program",
    "max_new_tokens": None,
}


class Answers(NamedTuple):
    """The records of a run by sample index, and counts of irregular ones."""

    records: dict[int, Record]
    missing: list[int]
    failed: list[int]  # samples whose record is an error, e.g. an unreadable image
    duplicates: int
    unknown: int  # records that match no sample


def run_metadata(benchmark: str, settings: Options, model: Record, data: str | Path) -> Record:
    """The content of `run.json`."""
    return {
        "benchmark": benchmark,
        "settings": vars(settings),
        "model": model,
        "data": str(data),
        "versions": run_versions(),
    }


def open_run_dir(folder: str | Path, run: Record) -> None:
    """Write `run.json`, or compare with an existing one, so that answers of two settings never mix.

    Raises:
        UserError: the folder has a run of another model or with other settings; the difference is shown.
    """
    path = Path(folder) / "run.json"
    if not path.exists():
        write_json(path, run)  # the same content on every rank, and an atomic write
    distributed.barrier()
    old, new = _comparable(read_json(path)), _comparable(run)
    for name in {**old, **new}:
        if old.get(name) != new.get(name):
            raise UserError(
                f"{folder} holds answers made with {name} = {old.get(name)!r}, this run has "
                f"{new.get(name)!r}. Use another --out, or remove the folder."
            )


def _comparable(run: Record) -> Record:
    """The entries of `run.json` that determine the answers, as a flat dict."""
    # fingerprint, not path: a moved model folder can be resumed
    settings = {f"setting {name}": value for name, value in run.get("settings", {}).items()}
    if "setting guidance" in settings:  # runs from before this option
        settings.setdefault("setting guidance_interval", -1)
    model = {"model fingerprint": run.get("model", {}).get("fingerprint")}
    return {"benchmark": run.get("benchmark")} | settings | model


def check_answers_complete(
    answers: Answers, samples: Sequence[Sample], folder: Path, partial: bool
) -> list[str]:
    """Warnings about the answers, one line each.

    Raises:
        UserError: answers are missing or match no sample, and `partial` is False; or there is no answer.
    """
    problems = []
    _require_an_answer(answers, samples, folder)
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
            "the incomplete run with --partial."
        )
    # "x" by default: a record without "text" is a generated image, not an empty answer
    empty = sum(
        not record.get("text", "x") and not record.get("error") for record in answers.records.values()
    )
    if empty:
        problems.append(f"{empty} answers are empty (scored by the benchmark's own rule)")
    lengths = [r["max_new_tokens"] for r in answers.records.values() if r.get("max_new_tokens")]
    if lengths:
        problems.append(
            f"{len(lengths)} answers could only have the rest of the context, at least {min(lengths)} tokens"
        )
    if answers.duplicates:
        problems.append(f"{answers.duplicates} samples were answered twice (the first answer counts)")
    if reasons := malformed_reasons(samples):
        problems.append(
            f"{len(reasons)} annotations are malformed, the first: {reasons[0]} (counted as wrong)"
        )
    # malformed samples have a line of their own above
    failed = sorted(set(answers.failed) - {s.index for s in samples if s.malformed})
    if failed:
        # an image without a reconstruction has no PSNR that could count
        left_out = all(s.kind == "reconstruct" for s in samples if s.index in answers.failed)
        how = "left out of the means" if left_out else "counted as wrong"
        problems.append(
            f"{len(failed)} samples could not be answered, the first because "
            f"{answers.records[failed[0]]['error']} ({how}; the next run asks them again)"
        )
    return problems


def _require_an_answer(answers: Answers, samples: Sequence[Sample], folder: Path) -> None:
    """UserError if not one sample was answered: 0.0 % would look like a result."""
    # per kind: reconstructions of real images succeed where every generated image is missing
    kinds = {s.kind for s in samples if not s.malformed}
    # the ceiling beside generated images is no result of its own
    for kind in kinds - ({"reconstruct"} if len(kinds) > 1 else set()):
        own = [s.index for s in samples if s.kind == kind and not s.malformed]
        failed = [i for i in own if answers.records.get(i, {}).get("error")]
        if len(failed) == len(own):
            raise UserError(
                f"{folder}: not one of {len(own)} samples could be answered, the first because "
                f"{answers.records[failed[0]]['error']}"
            )


def build_result(
    run: Record, task: Task, answers: Answers, scored: Scored, problems: list[str], scoring: Options
) -> Record:
    """The content of `results.json`."""
    # the first metric is the main one; a split without public answers has none
    main = next(iter(scored.metrics), None)
    # of answers of other programs, and of images of other systems
    found = [*_answer_file_problems(run), *run["model"].get("notes", ())]
    if "answers" in run:
        task = task._replace(metadata=task.metadata | _OF_OTHERS)
    malformed = len(malformed_reasons(task.samples))
    reason = _not_comparable_reason(run, task, answers, scored, malformed)
    return {
        "benchmark": run["benchmark"],
        "metric": main,
        "value": scored.metrics[main].value if main else None,
        "n": len(task.samples),
        "missing": len(answers.missing),
        "failed": len(answers.failed),
        "malformed": malformed,
        "complete": not answers.missing,
        "comparable": not reason,
        **({"not_comparable_reason": reason} if reason else {}),
        "scorer": scoring.scorer,
        "split": task.metadata.get("split"),
        "prompt_template": task.metadata.get("prompt_template"),
        "decoding": task.metadata.get("decoding"),
        "metrics": {name: metric._asdict() for name, metric in scored.metrics.items()},
        "statistic": scored.statistic,
        "problems": [*found, *problems, *task.problems, *scored.problems],
        "metadata": task.metadata,
        "settings": run["settings"],
        "scoring": vars(scoring),
        "model": run["model"],
        "data": run["data"],
        "versions": run["versions"],
        "details": scored.details,
    }


def _answer_file_problems(run: Record) -> list[str]:
    """What is irregular in the answers of another program (`eval/answers`), one line each."""
    found = run.get("answers", {})
    problems = [*found.get("notes", ())]
    for kind, words in (("unknown", "belong to no question"), ("malformed", "are malformed")):
        if found.get(kind):
            count, first = found[kind]
            problems.append(
                f"{count} of {Path(found['file']).name} {words} (not counted), the first: {first}"
            )
    if found.get("duplicates"):
        problems.append(f"{found['duplicates']} questions are answered twice (the first answer counts)")
    return problems


def _not_comparable_reason(run: Record, task: Task, answers: Answers, scored: Scored, malformed: int) -> str:
    """The reasons why the numbers are not comparable with published ones, else ""."""
    limit = run["settings"].get("limit")
    # malformed samples have a reason of their own
    failed = len(set(answers.failed) - {s.index for s in task.samples if s.malformed})
    reasons: Iterable[tuple[Any, str]] = (
        (task.not_comparable, task.not_comparable),
        (scored.not_comparable, scored.not_comparable),
        (limit, f"only the first {limit} samples"),
        (answers.missing, f"{len(answers.missing)} answers are missing"),
        (failed, f"{failed} samples could not be asked"),
        (malformed, f"{malformed} annotations are malformed"),
        *((True, problem) for problem in _answer_file_problems(run)),
    )
    return "; ".join(reason for found, reason in reasons if found)


def run_versions() -> dict[str, str]:
    """Versions of the packages that may affect the numbers."""
    found = {}
    for name in ("open-unitok", "torch", "transformers", "numpy", "pillow"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "from a checkout"
    return found | {"python": platform.python_version()}


def model_fingerprint(folder: Path) -> str:
    """Hex sha256 of the weight files and configs of a model folder, including its tokenizer."""
    if folder.is_file():
        files = [folder]
    else:
        files = [p for p in folder.rglob("*") if p.suffix in _FINGERPRINTED_SUFFIXES]
    digest = hashlib.sha256()
    for path in sorted(files):
        # names without folders: a moved model keeps its fingerprint
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
