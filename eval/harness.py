"""Inference that survives: answers appended to JSON lines, resumed by key, scored only when complete.

A row is keyed by (benchmark, sample index, hash of prompt and picture name); the benchmark's own id stands
beside it, since ids repeat in some benchmarks. Rows of the same key, and samples without a row, are found
before scoring.
"""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from open_unitok import ranks
from open_unitok.errors import UserError
from open_unitok.files import read_json, write_json

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What shapes the answers of a run; None = the benchmark's own default."""

    split: str | None = None
    recipe: str | None = None  # the words around a question: see `questions.RECIPES`
    max_new_tokens: int | None = None
    images_per_prompt: int | None = None
    guidance: float = 5.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    limit: int | None = None  # only the first samples, for a quick look
    detector: str | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "images_per_prompt", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1.")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}; it must be 0 or more.")


class Sample(NamedTuple):
    """One thing to ask of a model."""

    index: int  # place in the benchmark, the key
    id: Any  # the benchmark's own id
    prompt: str = ""
    image: Path | None = None
    kind: str = ""  # what is to be done, where a benchmark asks for several things
    seed: int = 0

    @property
    def key(self) -> tuple[int, str]:
        picture = self.image.name if self.image else ""
        text = "\0".join((self.kind, self.prompt, picture, str(self.seed)))
        return self.index, hashlib.sha256(text.encode()).hexdigest()[:16]


class Task(NamedTuple):
    """A benchmark read from disk: what to ask, what is true, and what the result has to say about it."""

    samples: list[Sample]
    truth: Any
    about: dict[str, Any]  # split, recipe, decoding, ...: written into the result


class Metric(NamedTuple):
    """One number in its unit ("share", "dB", ...), of n samples, with a 95 % interval if there is one."""

    value: float
    n: int
    interval: list[float] | None = None
    unit: str = "share"


class Scored(NamedTuple):
    """A benchmark's numbers by name, the main one first; what belongs beside them; a row per sample."""

    metrics: dict[str, Metric]
    details: dict[str, Any]
    per_sample: list[Row]


class Answers(NamedTuple):
    """The rows of a run by sample index, and what is not as it should be."""

    rows: dict[int, Row]
    missing: list[int]
    failed: list[int]  # samples whose row says that they could not be asked, such as an unreadable picture
    duplicates: int
    strangers: int  # rows of samples that this benchmark does not have


class Store:
    """The answers of one run in `folder`, one file per rank, append-only."""

    def __init__(self, folder: str | Path, benchmark: str):
        self.folder, self.benchmark = Path(folder), benchmark
        self.own = self.folder / f"answers-{ranks.rank():05d}.jsonl"
        self.looked_at_end = False

    def rows(self) -> Iterator[Row]:
        """Every row on disk, all ranks' files in order; a last line cut off by a kill is passed over."""
        for path in sorted(self.folder.glob("answers-*.jsonl")):
            with open(path, encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    if not line.endswith("\n"):
                        continue
                    try:
                        row = json.loads(line)
                        yield row | {"key": (row["index"], row["prompt_hash"])}
                    except (json.JSONDecodeError, KeyError, TypeError) as error:
                        raise UserError(
                            f"{path}, line {number}, is no answer of ours ({error}). "
                            "Remove the line, and the next run asks again."
                        ) from error

    def done(self) -> set[tuple[int, str]]:
        """The keys that have an answer."""
        return {row["key"] for row in self.rows() if row["benchmark"] == self.benchmark}

    def append(self, samples: Sequence[Sample], fields: Sequence[Row]) -> None:
        """Write one row per sample in one go."""
        lines = []
        for sample, more in zip(samples, fields, strict=True):
            index, prompt_hash = sample.key
            row = {"benchmark": self.benchmark, "index": index, "prompt_hash": prompt_hash, "id": sample.id}
            lines.append(json.dumps(row | {"prompt": sample.prompt} | more, ensure_ascii=False) + "\n")
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.own.exists() and not self.looked_at_end:
            drop_half_line(self.own)
        self.looked_at_end = True
        with open(self.own, "a", encoding="utf-8") as file:
            file.write("".join(lines))

    def gather(self, samples: Sequence[Sample]) -> Answers:
        """Match the rows with the samples; of rows with one key the first counts."""
        wanted = {sample.key for sample in samples}
        rows: dict[int, Row] = {}
        duplicates = strangers = 0
        for row in self.rows():
            if row["benchmark"] != self.benchmark or row["key"] not in wanted:
                strangers += 1
            elif row["index"] in rows:
                duplicates += 1
            else:
                rows[row["index"]] = row
        missing = [sample.index for sample in samples if sample.index not in rows]
        failed = sorted(i for i, row in rows.items() if row.get("error"))
        return Answers(rows, missing, failed, duplicates, strangers)


def drop_half_line(path: Path) -> None:
    """Cut off what a kill left after the last newline."""
    data = path.read_bytes()
    if not data.endswith(b"\n"):
        with open(path, "rb+") as file:
            file.truncate(data.rfind(b"\n") + 1)


def answer_all(
    store: Store,
    samples: Sequence[Sample],
    work: Callable[[list[Sample]], list[Row]],
    batch_size: int,
    quiet: bool = False,
) -> int:
    """Ask for every sample that has no row yet, this rank's share of them; returns how many were asked.

    In the benchmark's order, so that questions about one picture meet in a batch and it is encoded once.
    """
    done = store.done()
    open_samples = [s for s in samples if s.key not in done]
    ranks.barrier()  # nobody writes before all have read
    open_samples.sort(key=lambda s: (s.kind, s.index))
    mine = open_samples[ranks.rank() :: ranks.world_size()]
    bar = tqdm(total=len(mine), desc=store.benchmark, unit=" samples", disable=quiet or not ranks.is_main())
    with bar:
        for start in range(0, len(mine), batch_size):
            batch = mine[start : start + batch_size]
            store.append(batch, work(batch))
            bar.update(len(batch))
    ranks.barrier()
    return len(mine)


def open_run(folder: str | Path, run: dict[str, Any]) -> None:
    """Write `run.json`, or compare with the one that is there: answers of two settings never mix.

    Raises:
        UserError: the folder holds a run of another model or with other settings; the difference is shown.
    """
    path = Path(folder) / "run.json"
    if not path.exists():
        if ranks.is_main():
            write_json(path, run)
        ranks.barrier()
        return
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
    if answers.strangers:
        problems.append(f"{answers.strangers} answers belong to no sample of this benchmark (not counted)")
    if problems and not partial:
        raise UserError(
            f"{folder}: {'; '.join(problems)}. Run the same `unitok eval run` again to complete it, or score "
            "what is there with --partial."
        )
    if answers.duplicates:
        problems.append(f"{answers.duplicates} samples were answered twice (the first answer counts)")
    if answers.failed:
        first = answers.rows[answers.failed[0]]
        problems.append(
            f"{len(answers.failed)} samples could not be asked, the first because {first['error']} "
            "(counted as wrong)"
        )
    return problems


def result_of(run: dict[str, Any], task: Task, answers: Answers, scored: Scored, problems: list[str]) -> Row:
    """The result as it is written: numbers with n and interval, and all that a reader needs to compare."""
    main = next(iter(scored.metrics), None)
    return {
        "benchmark": run["benchmark"],
        "metric": main,
        "value": scored.metrics[main].value if main else None,
        "n": len(task.samples),
        "missing": len(answers.missing),
        "failed": len(answers.failed),
        "complete": not answers.missing,
        "metrics": {name: metric._asdict() for name, metric in scored.metrics.items()},
        "problems": problems,
        "about": task.about,
        "settings": run["settings"],
        "model": run["model"],
        "data": run["data"],
        "versions": run["versions"],
        "details": scored.details,
    }


def describe_run(
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
