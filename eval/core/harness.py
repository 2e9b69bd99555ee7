"""Run and score a benchmark: answers are appended to JSON lines, resumed by key, scored when complete.

A record is keyed by (benchmark, sample index, hash of prompt and image name): the ids of some benchmarks are
not unique. Scoring first counts duplicate, missing and unknown records.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from open_unitok.core import distributed
from open_unitok.core.errors import UserError
from open_unitok.core.files import existing, write_json, write_jsonl

from .annotations import read_json_as, require_key, require_type
from .benchmark import Benchmark, Record, Sample, Task
from .image_files import refuse_unreadable
from .release_files import benchmark_data
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
    """Answer the samples that have no answer yet, run the judge pass and score.

    A sample whose record is an error, such as an image that could not be read, is answered again.

    The samples are divided among the ranks; rank 0 scores and returns the result, the others return None.

    Args:
        model: `model.Model`, `generated_images.ExternalImages`, or an object with the same methods.
        data: the folder of the benchmark, or a folder that contains one of the benchmark's name.
        out: the output folder of this benchmark.
        options: option name -> value, for any of `benchmark.all_options`.
    """
    settings, scoring = benchmark.resolve(options)
    data, out = benchmark_data(data, benchmark), Path(out)
    # before the output folder is created: an error in the data leaves nothing behind
    task = benchmark.code.load(data, settings)
    store = AnswerStore(out, benchmark.name)
    refuse_unreadable(benchmark.name, task.samples, store.done(task.samples))
    if benchmark.needs == "generator" and hasattr(model, "check_classes"):
        model.check_classes(benchmark.name, task.metadata.get("classes"))
    if hasattr(model, "refuse_missing"):  # images of another system
        model.refuse_missing(benchmark.name, task.samples)
    open_run_dir(out, run_metadata(benchmark.name, settings, model.describe(), data))
    answer_samples(
        store,
        task.samples,
        lambda batch: benchmark.code.answer(model, batch, out, task),
        batch_size or benchmark.batch_size,
        quiet,
    )
    if hasattr(benchmark.code, "judge"):
        # after the barrier in answer_samples: this rank judges images that other ranks generated
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
    """Score the answers in `folder` without a model; writes `results.json` and `scores.jsonl`.

    Args:
        options: values of scoring options; all others are read from run.json.
        partial: score an incomplete run; missing answers count as wrong.
        task: the loaded task; None = load it.

    Raises:
        UserError: the folder is not a run of this benchmark, or answers are missing and `partial` is False.
    """
    folder = Path(folder)
    run = read_run_metadata(folder)
    # settings from run.json, so that the task has the samples that were answered
    settings, scoring = benchmark.resolve({**run["settings"], **options})
    if task is None:
        task = benchmark.code.load(existing(run["data"]), settings)
    assert task is not None  # only the main process has left it out
    answers = AnswerStore(folder, benchmark.name).gather(task.samples)
    problems = check_answers_complete(answers, task.samples, folder, partial)
    scored = benchmark.code.score(task, answers.records, folder, run, scoring)
    result = build_result(run, task, answers, scored, problems, scoring)
    if hasattr(benchmark.code, "submit"):
        files = benchmark.code.submit(task, answers.records, folder, Path(run["data"]))
        result["submission"] = [path.name for path in files]
    # results.json last: it marks a scored run
    write_jsonl(folder / "scores.jsonl", scored.per_sample)
    write_json(folder / "results.json", result)
    return result


def read_run_metadata(folder: str | Path) -> Record:
    """Read the `run.json` of a benchmark's output folder; UserError if it is not one."""
    hint = "`unitok eval run` writes it; give the folder of one benchmark."
    path = existing(Path(folder) / "run.json", hint)
    run = read_json_as(dict, path)
    for key, kind in (("benchmark", str), ("settings", dict), ("model", dict), ("data", str)):
        require_type(kind, require_key(run, key, path), f"{path}, {key}")
    return run


class AnswerStore:
    """The answers of one run: an append-only file per rank in `folder`."""

    def __init__(self, folder: str | Path, benchmark: str):
        self.folder, self.benchmark = Path(folder), benchmark
        self.path = self.folder / f"answers-{distributed.rank():05d}.jsonl"
        self.end_checked = False

    def records(self) -> Iterator[Record]:
        """All records of all ranks; a last line truncated by a kill is skipped."""
        for path in sorted(self.folder.glob("answers-*.jsonl")):
            with open(path, "rb") as file:  # bytes: a kill may truncate inside a UTF-8 character
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

    def done(self, samples: Sequence[Sample]) -> set[tuple[int, str]]:
        """The keys that have an answer; those of malformed samples have an error for good."""
        malformed = {s.key for s in samples if s.malformed}
        return {
            record["key"]
            for record in self.records()
            if record["benchmark"] == self.benchmark
            and (not record.get("error") or record["key"] in malformed)
        }

    def append(self, samples: Sequence[Sample], fields: Sequence[Record]) -> None:
        """Append one record per sample."""
        lines = []
        for sample, more in zip(samples, fields, strict=True):
            index, prompt_hash = sample.key
            record = {
                "benchmark": self.benchmark, "index": index, "prompt_hash": prompt_hash, "id": sample.id,
                "prompt": sample.prompt,
            }  # fmt: skip
            # keep non-ASCII answers readable
            lines.append(json.dumps(record | more, ensure_ascii=False) + "\n")
        self.folder.mkdir(parents=True, exist_ok=True)
        # once per process: only a previous, killed process can have left a partial line
        if self.path.exists() and not self.end_checked:
            truncate_partial_line(self.path)
        self.end_checked = True
        # one write per batch: a kill loses at most the last line
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(lines))

    def gather(self, samples: Sequence[Sample]) -> Answers:
        """Match records with samples; of several with one key the first answer counts, or the last error."""
        wanted = {sample.key for sample in samples}
        records: dict[int, Record] = {}
        duplicates = unknown = 0
        for record in self.records():
            # e.g. records of a larger --limit, or of another version of the data
            if record["benchmark"] != self.benchmark or record["key"] not in wanted:
                unknown += not record.get("error")  # an error of an entry since repaired is no answer
            elif (known := records.get(record["index"])) is None or known.get("error"):
                records[record["index"]] = record
            elif not record.get("error"):
                duplicates += 1
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
    """Answer this rank's share of the samples that have no answer yet; returns the size of the share.

    Args:
        fixed_batches: compose batches independently of the number of ranks and of where a run was killed: a
            batch with a missing record is recomputed as a whole. For scores whose last digits depend on the
            composition of the batch.
    """
    done = store.done(samples)
    distributed.barrier()  # no rank writes before all ranks have read the records
    # group by kind: a model call either generates or reconstructs
    ordered = sorted(samples, key=lambda s: (s.kind, s.index))
    if not fixed_batches:
        ordered = [s for s in ordered if s.key not in done]
    rank, world, size = distributed.rank(), distributed.world_size(), batch_size if fixed_batches else 1
    # indices instead of lists: a list per sample would be most of what a long run holds
    starts = [
        i for i in range(0, len(ordered), size) if any(s.key not in done for s in ordered[i : i + size])
    ]
    # contiguous shares: questions about one image stay in one batch, which encodes the image once
    count = len(starts)
    share = starts[count * rank // world : count * (rank + 1) // world]
    mine = [s for i in share for s in ordered[i : i + size]]
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
    """Remove an incomplete last line, which a killed process leaves."""
    data = path.read_bytes()
    if not data.endswith(b"\n"):
        with open(path, "rb+") as file:
            file.truncate(data.rfind(b"\n") + 1)


def _answer_batch(batch: list[Sample], answer: Callable[[list[Sample]], list[Record]]) -> list[Record]:
    """The records of a batch; malformed samples get the error and are not passed to `answer`."""
    valid = [s for s in batch if not s.malformed]
    records = iter(answer(valid) if valid else ())
    return [{"text": "", "error": s.malformed} if s.malformed else next(records) for s in batch]
