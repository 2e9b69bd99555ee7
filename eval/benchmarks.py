"""The table of benchmarks: how each is read, run and scored."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_unitok.errors import UserError, did_you_mean
from open_unitok.files import existing, read_json, write_json, write_jsonl

from . import drawings, pictures, questions
from .harness import (
    Row,
    Sample,
    Scored,
    Settings,
    Store,
    Task,
    answer_all,
    check_complete,
    describe_run,
    open_run,
    result_of,
)

DEFAULTS = Settings()
Work = Callable[[Any, list[Sample], Path, Task], list[Row]]


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: `needs` is "tokenizer" or "mllm"; `work(data, settings)` gives what runs a batch."""

    line: str
    needs: str
    load: Callable[[Path, Settings], Task]
    work: Callable[[Path, Settings], Work]
    score: Callable[[Task, dict[int, Row], Path, dict[str, Any], str], Scored]
    batch_size: int


def always(work: Work) -> Callable[[Path, Settings], Work]:
    """The same work whatever the data and settings."""
    return lambda data, settings: work


BENCHMARKS: dict[str, Benchmark] = {
    "reconstruction": Benchmark(
        "PSNR, SSIM and codebook use of encode-decode on a folder of pictures",
        "tokenizer",
        pictures.load_reconstruction,
        always(pictures.reconstruct),
        pictures.score_reconstruction,
        64,
    ),
    "zeroshot": Benchmark(
        "classification by the tokenizer's image and text embeddings",
        "tokenizer",
        pictures.load_zeroshot,
        always(pictures.classify),
        pictures.score_zeroshot,
        64,
    ),
    "vqav2": Benchmark(
        "open questions about pictures (VQAv2 layout)",
        "mllm",
        questions.load_vqav2,
        always(questions.ask),
        questions.score_vqav2,
        1024,
    ),
    "pope": Benchmark(
        "is an object there or not (POPE layout)",
        "mllm",
        questions.load_pope,
        always(questions.ask),
        questions.score_pope,
        1024,
    ),
    "geneval": Benchmark(
        "do drawings show the objects, number, colours and places of their prompts",
        "mllm",
        drawings.load_geneval,
        drawings.worker,
        drawings.score_geneval,
        128,
    ),
    "drawing_positions": Benchmark(
        "one object of a colour at a named place (scenes)",
        "mllm",
        drawings.load_positions,
        drawings.worker,
        drawings.score_positions,
        128,
    ),
}


def named(name: str) -> Benchmark:
    """The benchmark of that name, or a UserError with what there is."""
    if name not in BENCHMARKS:
        raise UserError(f"There is no benchmark {name!r}." + did_you_mean(name, BENCHMARKS))
    return BENCHMARKS[name]


def run_benchmark(
    name: str,
    model: Any,
    data: str | Path,
    out: str | Path,
    settings: Settings = DEFAULTS,
    batch_size: int | None = None,
    scorer: str = "",
    quiet: bool = False,
) -> Row:
    """Answer what is still open, then score; a finished run is only read. Returns the result.

    `model` needs `describe()` and the methods that the benchmark calls (see `models.Model`); the answers lie
    in `out`.
    """
    benchmark, data, out = named(name), existing(data), Path(out)
    task = benchmark.load(data, settings)
    run = describe_run(name, settings, model.describe(), data)
    open_run(out, run)
    store, work = Store(out, name), benchmark.work(data, settings)
    answer_all(
        store,
        task.samples,
        lambda batch: work(model, batch, out, task),
        batch_size or benchmark.batch_size,
        quiet,
    )
    return score_run(out, scorer=scorer, task=task)


def score_run(folder: str | Path, partial: bool = False, scorer: str = "", task: Task | None = None) -> Row:
    """Score the answers in `folder` from files alone, and write `results.json` and `scores.jsonl`.

    Raises:
        UserError: the folder is no run of ours, or answers are missing and `partial` was not asked for.
    """
    folder = Path(folder)
    run = read_json(
        existing(folder / "run.json", "`unitok eval run` writes it; give the folder of one benchmark.")
    )
    benchmark = named(run["benchmark"])
    if task is None:
        task = benchmark.load(existing(run["data"]), Settings(**run["settings"]))
    answers = Store(folder, run["benchmark"]).gather(task.samples)
    problems = check_complete(answers, task.samples, folder, partial)
    scored = benchmark.score(task, answers.rows, folder, run, scorer)
    result = result_of(run, task, answers, scored, problems)
    write_jsonl(folder / "scores.jsonl", scored.per_sample)
    write_json(folder / "results.json", result)
    return result
