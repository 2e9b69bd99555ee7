"""The table of benchmarks, and how each is read, run and scored."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from open_unitok.core import distributed
from open_unitok.core.errors import UserError, did_you_mean
from open_unitok.core.files import existing, read_json, write_json, write_jsonl

from .core.harness import Benchmark, Record, Scoring, Settings, Store, Task, always, answer_samples
from .core.results import build_result, check_complete, open_run_dir, run_metadata
from .generation import dpg_bench, genai_bench, geneval, imagenet_generation, mjhq, positions
from .metrics import image_quality
from .tokenizer import linear_probe, reconstruction, retrieval, zeroshot
from .understanding.table import UNDERSTANDING

SETTINGS, SCORING = Settings(), Scoring()

# What a tokenizer alone can do.
TOKENIZER: dict[str, Benchmark] = {
    "reconstruction": Benchmark(
        "rFID, PSNR, SSIM, LPIPS and codebook use of encode-decode on images",
        "tokenizer",
        reconstruction.load,
        always(reconstruction.answer),
        reconstruction.score,
        64,
        ("skimage7", *(mode for mode in image_quality.SSIM_MODES if mode != "skimage7")),
        ("scenes.json", "val"),
        look=reconstruction.judge,
    ),
    "zeroshot": Benchmark(
        "classification by the tokenizer's image and text embeddings",
        "tokenizer",
        zeroshot.load,
        always(zeroshot.answer),
        zeroshot.score,
        64,
        files=("scenes.json", "classes.json", "val/n*", "LOC_val_solution.csv"),
    ),
    "retrieval": Benchmark(
        "which of 100 captions is an image's own, and back, by the tokenizer's embeddings",
        "tokenizer",
        retrieval.load,
        always(retrieval.answer),
        retrieval.score,
        64,
        files=("scenes.json", "captions.json"),
    ),
    "linear_probe": Benchmark(
        "classes told apart by one linear layer on frozen features",
        "tokenizer",
        linear_probe.load,
        always(linear_probe.answer),
        linear_probe.score,
        64,
        linear_probe.SCORERS,
        ("train/n*",),
    ),
}

GENERATION: dict[str, Benchmark] = {
    "geneval": Benchmark(
        "do drawings show the objects, number, colours and places of their prompts",
        "generator",
        geneval.load,
        always(geneval.answer),
        geneval.score,
        128,
        files=("scenes.json", "evaluation_metadata.jsonl"),
        look=geneval.judge,
    ),
    "positions": Benchmark(
        "one object of a colour at a named place (scenes)",
        "generator",
        positions.load,
        always(positions.answer),
        positions.score,
        128,
        files=("scenes.json",),
    ),
    "genai_bench": Benchmark(
        "VQAScore of drawings, by skill (GenAI-Bench)",
        "generator",
        genai_bench.load,
        always(genai_bench.answer),
        genai_bench.score,
        64,
        files=("genai_skills.json",),
        look=genai_bench.judge,
    ),
    "dpg_bench": Benchmark(
        "questions about drawings of dense prompts (DPG-Bench)",
        "generator",
        dpg_bench.load,
        always(dpg_bench.answer),
        dpg_bench.score,
        64,
        files=("dpg_bench.csv",),
        look=dpg_bench.judge,
    ),
    "mjhq": Benchmark(
        "FID of drawings against MJHQ-30K",
        "generator",
        mjhq.load,
        always(mjhq.answer),
        mjhq.score,
        64,
        files=("meta_data.json",),
        look=mjhq.judge,
    ),
    "imagenet_generation": Benchmark(
        "gFID, sFID, IS, precision and recall of class-conditional drawings (ADM)",
        "generator",
        imagenet_generation.load,
        always(imagenet_generation.answer),
        imagenet_generation.score,
        64,
        files=("VIRTUAL_imagenet*.npz",),
        submit=imagenet_generation.submit,
        look=imagenet_generation.judge,
    ),
}

BENCHMARKS: dict[str, Benchmark] = {**TOKENIZER, **UNDERSTANDING, **GENERATION}


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of that name, or a UserError with what there is."""
    if name not in BENCHMARKS:
        raise UserError(f"There is no benchmark {name!r}." + did_you_mean(name, BENCHMARKS))
    return BENCHMARKS[name]


def benchmark_data(data: str | Path, name: str) -> Path:
    """The folder of one benchmark: DATA/NAME if there is such a folder, else DATA itself."""
    data = existing(data)
    return data / name if (data / name).is_dir() else data


def detect_benchmarks(data: str | Path) -> list[str]:
    """The names of the benchmarks whose files lie in `data`.

    Raises:
        UserError: there are none.
    """
    names = [
        name
        for name, benchmark in BENCHMARKS.items()
        if any(next(benchmark_data(data, name).glob(pattern), None) for pattern in benchmark.files)
    ]
    if not names:
        raise UserError(f"{data} holds the files of no benchmark; eval/README.md says what each one needs.")
    return names


def resolve_scorer(name: str, scoring: Scoring) -> Scoring:
    """`scoring` with the scorer's name filled in.

    Raises:
        UserError: the benchmark has no scorer of that name.
    """
    allowed = find_benchmark(name).scorers
    if scoring.scorer and scoring.scorer not in allowed:
        raise UserError(f"{name}: scorer is {scoring.scorer!r}." + did_you_mean(scoring.scorer, allowed))
    return replace(scoring, scorer=scoring.scorer or allowed[0])


def run_benchmark(
    name: str,
    model: Any,
    data: str | Path,
    out: str | Path,
    settings: Settings = SETTINGS,
    batch_size: int | None = None,
    scoring: Scoring = SCORING,
    quiet: bool = False,
) -> Record | None:
    """Answer what is still open, then score; a finished run is only read.

    `model` needs `describe()` and the methods that the benchmark calls (see `models.Model`); the answers lie
    in `out`. Several processes share the questions; the main one scores and gets the result, the others None.
    """
    benchmark, data, out = find_benchmark(name), benchmark_data(data, name), Path(out)
    resolve_scorer(name, scoring)
    task = benchmark.load(data, settings)
    open_run_dir(out, run_metadata(name, settings, model.describe(), data))
    store, work = Store(out, name), benchmark.work(data, settings)
    answer_samples(
        store,
        task.samples,
        lambda batch: work(model, batch, out, task),
        batch_size or benchmark.batch_size,
        quiet,
    )
    if benchmark.look:
        rows = store.gather(task.samples).records
        benchmark.look(task, rows, out, resolve_scorer(name, scoring), getattr(model, "device", "cpu"), quiet)
    return score_run(out, scoring=scoring, task=task) if distributed.is_main() else None


def score_run(
    folder: str | Path, partial: bool = False, scoring: Scoring = SCORING, task: Task | None = None
) -> Record:
    """Score the answers in `folder` from files alone, and write `results.json` and `scores.jsonl`.

    Raises:
        UserError: the folder is no run of ours, or answers are missing and `partial` was not asked for.
    """
    folder = Path(folder)
    run = read_json(
        existing(folder / "run.json", "`unitok eval run` writes it; give the folder of one benchmark.")
    )
    benchmark = find_benchmark(run["benchmark"])
    scoring = resolve_scorer(run["benchmark"], scoring)
    if task is None:
        task = benchmark.load(existing(run["data"]), Settings(**run["settings"]))
    answers = Store(folder, run["benchmark"]).gather(task.samples)
    problems = check_complete(answers, task.samples, folder, partial)
    scored = benchmark.score(task, answers.records, folder, run, scoring)
    result = build_result(run, task, answers, scored, problems, scoring)
    if benchmark.submit:
        result["submission"] = [
            p.name for p in benchmark.submit(task, answers.records, folder, Path(run["data"]))
        ]
    write_jsonl(folder / "scores.jsonl", scored.per_sample)
    write_json(folder / "results.json", result)
    return result
