"""Runs and scores a benchmark: answers go to JSON lines, are resumed by key and scored only when complete.

A record is keyed by (benchmark, sample index, hash of prompt and image name); the benchmark's own id is
stored too, but ids repeat in some benchmarks. Duplicate, missing and unknown records are found before
scoring.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from open_unitok.core import distributed
from open_unitok.core.errors import UserError
from open_unitok.core.files import existing, read_json, write_json, write_jsonl

from .benchmark import Benchmark, Record, Sample, Task
from .results import Answers, build_result, check_answers_complete, open_run_dir, run_metadata

NO_OPTIONS: Mapping[str, Any] = {}


def run_benchmark(
    benchmark: Benchmark,
    model: Any,
    data: str | Path,
    out: str | Path,
    options: Mapping[str, Any] = NO_OPTIONS,
    batch_size: int | None = None,
    quiet: bool = False,
) -> Record | None:
    """Answer the samples that have no answer yet, run the judge pass, score; a finished run is only read.

    Several ranks share the samples; rank 0 scores and gets the result, the others None.

    Args:
        model: has `describe()` and the methods that the benchmark calls (see `model.Model`).
        data: the benchmark's folder, or one that holds a folder of the benchmark's name.
        out: the run folder of this benchmark.
        options: option name -> value, for any of `benchmark.all_options`.
    """
    settings, scoring = benchmark.resolve(options)
    data, out = benchmark_data(data, benchmark.name), Path(out)
    # before the run folder is touched: a data error leaves nothing behind
    task = benchmark.code.load(data, settings)
    open_run_dir(out, run_metadata(benchmark.name, settings, model.describe(), data))
    store = AnswerStore(out, benchmark.name)
    answer_samples(
        store,
        task.samples,
        lambda batch: benchmark.code.answer(model, batch, out, task),
        batch_size or benchmark.batch_size,
        quiet,
    )
    if hasattr(benchmark.code, "judge"):
        # the pass reads images of all ranks, so it gathers the files again
        records = store.gather(task.samples).records
        benchmark.code.judge(task, records, out, scoring, getattr(model, "device", "cpu"), quiet)
    return score_run(benchmark, out, options, task=task) if distributed.is_main() else None


def score_run(
    benchmark: Benchmark,
    folder: str | Path,
    options: Mapping[str, Any] = NO_OPTIONS,
    partial: bool = False,
    task: Task | None = None,
) -> Record:
    """Score the answers in `folder` from files alone, and write `results.json` and `scores.jsonl`.

    Args:
        options: values of scoring options; those that shape the answers are read from run.json.
        partial: score an incomplete run, in which missing answers are wrong.
        task: the benchmark's task where it is already read.

    Raises:
        UserError: the folder is not a run of this benchmark, or answers are missing and `partial` is not set.
    """
    folder = Path(folder)
    run = read_run_metadata(folder)
    # settings come from run.json, so that scoring sees the samples that were answered
    settings, scoring = benchmark.resolve({**run["settings"], **options})
    if task is None:
        task = benchmark.code.load(existing(run["data"]), settings)
    answers = AnswerStore(folder, benchmark.name).gather(task.samples)
    problems = check_answers_complete(answers, task.samples, folder, partial)
    scored = benchmark.code.score(task, answers.records, folder, run, scoring)
    result = build_result(run, task, answers, scored, problems, scoring)
    if hasattr(benchmark.code, "submit"):
        files = benchmark.code.submit(task, answers.records, folder, Path(run["data"]))
        result["submission"] = [path.name for path in files]
    write_jsonl(folder / "scores.jsonl", scored.per_sample)
    write_json(folder / "results.json", result)
    return result


def read_run_metadata(folder: str | Path) -> Record:
    """The content of `run.json` in a run folder."""
    hint = "`unitok eval run` writes it; give the folder of one benchmark."
    return read_json(existing(Path(folder) / "run.json", hint))


def benchmark_data(data: str | Path, name: str) -> Path:
    """The folder of one benchmark: DATA/NAME if there is such a folder, else DATA itself."""
    data = existing(data)
    return data / name if (data / name).is_dir() else data


class AnswerStore:
    """The answers of one run in `folder`, one append-only file per rank."""

    def __init__(self, folder: str | Path, benchmark: str):
        self.folder, self.benchmark = Path(folder), benchmark
        self.path = self.folder / f"answers-{distributed.rank():05d}.jsonl"
        self.end_checked = False

    def records(self) -> Iterator[Record]:
        """Every record on disk, all ranks' files in order; a last line cut off by a kill is skipped."""
        for path in sorted(self.folder.glob("answers-*.jsonl")):
            with open(path, "rb") as file:  # bytes: a kill may leave half a UTF-8 character
                for number, line in enumerate(file, 1):
                    if not line.endswith(b"\n"):
                        continue
                    try:
                        record = json.loads(line)
                        yield record | {"key": (record["index"], record["prompt_hash"])}
                    except (ValueError, KeyError, TypeError) as error:
                        raise UserError(
                            f"{path}, line {number} is not a valid answer record ({error}). "
                            "Remove the line, and the next run answers its sample again."
                        ) from error

    def done(self) -> set[tuple[int, str]]:
        """The keys that have an answer."""
        return {record["key"] for record in self.records() if record["benchmark"] == self.benchmark}

    def append(self, samples: Sequence[Sample], fields: Sequence[Record]) -> None:
        """Append one record per sample in one write."""
        lines = []
        for sample, more in zip(samples, fields, strict=True):
            index, prompt_hash = sample.key
            record = {
                "benchmark": self.benchmark, "index": index, "prompt_hash": prompt_hash, "id": sample.id,
                "prompt": sample.prompt,
            }  # fmt: skip
            # no ASCII escapes: the file is read by people too
            lines.append(json.dumps(record | more, ensure_ascii=False) + "\n")
        self.folder.mkdir(parents=True, exist_ok=True)
        # only once per process: later writes are our own and end in a newline
        if self.path.exists() and not self.end_checked:
            truncate_partial_line(self.path)
        self.end_checked = True
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(lines))

    def gather(self, samples: Sequence[Sample]) -> Answers:
        """Match records with samples; of several records with one key the first counts."""
        wanted = {sample.key for sample in samples}
        records: dict[int, Record] = {}
        duplicates = unknown = 0
        for record in self.records():
            if record["benchmark"] != self.benchmark or record["key"] not in wanted:
                unknown += 1
            elif record["index"] in records:
                duplicates += 1
            else:
                records[record["index"]] = record
        missing = [sample.index for sample in samples if sample.index not in records]
        failed = sorted(i for i, record in records.items() if record.get("error"))
        return Answers(records, missing, failed, duplicates, unknown)


def answer_samples(
    store: AnswerStore,
    samples: Sequence[Sample],
    answer: Callable[[list[Sample]], list[Record]],
    batch_size: int,
    quiet: bool = False,
    fixed_batches: bool = False,
) -> int:
    """Answer this rank's share of the samples that have no record yet; returns how many were run.

    Each rank takes a contiguous piece in the benchmark's order, so that questions about one image meet in a
    batch and the image is encoded once.

    Args:
        fixed_batches: batches do not depend on the number of ranks or on where a run was killed: one that
            lacks a record is computed again as a whole. For numbers whose last digits depend on the batch.
    """
    done = store.done()
    distributed.barrier()  # no rank writes before all have read
    # samples of one kind together: a batch is answered or generated or reconstructed
    ordered = sorted(samples, key=lambda s: (s.kind, s.index))
    if not fixed_batches:
        ordered = [s for s in ordered if s.key not in done]
    rank, world, size = distributed.rank(), distributed.world_size(), batch_size if fixed_batches else 1
    pieces = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    pieces = [piece for piece in pieces if any(s.key not in done for s in piece)]
    # contiguous pieces: rank r takes pieces r * count / world to (r + 1) * count / world
    count = len(pieces)
    mine = [s for piece in pieces[count * rank // world : count * (rank + 1) // world] for s in piece]
    bar = tqdm(
        total=len(mine),
        desc=store.benchmark,
        unit=" samples",
        disable=quiet or not mine or not distributed.is_main(),
    )
    with bar:
        for start in range(0, len(mine), batch_size):
            batch = mine[start : start + batch_size]
            records = _answer_batch(batch, answer)
            # a fixed batch may hold samples that already have a record; only new records are written
            fresh = [(s, record) for s, record in zip(batch, records, strict=True) if s.key not in done]
            store.append([s for s, _ in fresh], [record for _, record in fresh])
            bar.update(len(batch))
    distributed.barrier()
    return len(mine)


def truncate_partial_line(path: Path) -> None:
    """Cut off what a kill left after the last newline."""
    data = path.read_bytes()
    if not data.endswith(b"\n"):
        with open(path, "rb+") as file:
            file.truncate(data.rfind(b"\n") + 1)


def _answer_batch(batch: list[Sample], answer: Callable[[list[Sample]], list[Record]]) -> list[Record]:
    """The records of a batch; a malformed sample gets one with the reason, without the model."""
    valid = [s for s in batch if not s.malformed]
    records = iter(answer(valid) if valid else ())
    return [{"text": "", "error": s.malformed} if s.malformed else next(records) for s in batch]
