"""The report of `unitok demo`: `metrics.json`, `report.html` and, if a browser is installed, `report.png`."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from open_unitok.core.files import write_atomic, write_json

from ..core.benchmark import Record
from . import charts, page
from .demo_run import (
    DemoRun,
    Headline,
    choose_samples,
    entries_text,
    headlines,
    held_out_note,
    metrics_summary,
    read_demo_run,
    stage_curves,
)
from .page import escape, grid, inline_image, section
from .screenshot import save_screenshot

BAR_LEGEND = (
    "Bars are per cent; whiskers are 95 % bootstrap intervals, resampled by image or prompt. "
    '<i class="key"></i> marks the baseline: the best constant answer of a question type, or, for generated '
    "images, the ceiling: the detector's score on reconstructions of real images that satisfy the prompt."
)


def write_report(
    folder: str | Path, phases: list[Record] | None = None, title: str = "OpenUniTok demo"
) -> Record:
    """Write the report into the demo folder and return the content of `metrics.json`.

    Args:
        folder: contains `eval/<benchmark>/results.json` and, where they exist, `<stage>/metrics.jsonl`.
        phases: {"name", "seconds", "peak_memory"} per phase; None = `phases.json` if it exists.

    Raises:
        UserError: there are no results in `folder/eval`.
    """
    run = read_demo_run(Path(folder), phases)
    metrics = metrics_summary(run)
    write_json(run.folder / "metrics.json", metrics)
    write_atomic(run.folder / "report.html", demo_page(run, title))
    # optional: the page is complete without the screenshot
    if reason := save_screenshot(run.folder / "report.html", run.folder / "report.png"):
        print(f"report.png is not written: {reason}", file=sys.stderr)
    return metrics


def demo_page(run: DemoRun, title: str) -> str:
    """The whole page."""
    rows = headlines(run)
    tiles = [page.tile(row.value, row.unit, row.tile, row.baseline) for row in rows if row.tile]
    seconds = sum(phase["seconds"] for phase in run.phases)
    took = f", trained and evaluated in {_duration(seconds)}" if seconds else ""
    intro = (
        "<p>A visual tokenizer and a decoder that reads and generates text and images through it"
        f"{took}. All images below are random samples of the test sets.</p>"
    )
    # images and answers first, then numbers
    sections = [
        generated_images(run),
        question_answering(run),
        reconstructions(run),
        scores(run),
        codebooks(run),
        training_curves(run),
        phase_times(run),
        headline_table(rows, held_out_note(run)),
        page.warnings(f"{name}: {text}" for name, r in run.results.items() for text in r["problems"]),
    ]
    return page.render_page(title, intro + grid(tiles, "tiles"), sections, _footer(run))


def generated_images(run: DemoRun) -> str:
    """Prompts and the images generated from them."""
    cards = {}
    for benchmark, count in (("geneval", 35), ("positions", 14)):
        # without the reconstructions, which are there for the ceiling
        rows = [r for r in run.samples.get(benchmark, []) if r["kind"] == "generate" and r["file"]]
        cards[benchmark] = [
            page.generated_card(
                run.folder / "eval" / benchmark / row["file"],
                row["prompt"],
                bool(row["score"]),
                (
                    "" if row["score"] else _short_reason(row["reason"]),
                    "held-out pair: never seen in training" if row.get("held_out") else "",
                ),
            )
            for row in choose_samples(rows, count, "group")
        ]
    return section(
        "Generated images",
        "Each image is generated from the prompt below it; ticks and crosses are the detector's verdicts.",
        grid(cards["geneval"], "gallery") + grid(cards["positions"], "gallery", "One object at a position"),
    )


def question_answering(run: DemoRun) -> str:
    """Questions and the model's answers."""
    cards = []
    for row in choose_samples(run.samples.get("vqav2", []), 24, "group"):
        # VQAv2 scores an answer between 0 and 1
        answer, correct = escape(row["answer"] or "no answer"), row["score"] > 0.5
        line = f"<b>{answer}</b>" if correct else f"<s>{answer}</s> <b>{escape(row['truth'])}</b>"
        image = inline_image(Path(row["image"]), "a test image")
        kind = f"<small>{escape(row['group'])}</small>"
        cards.append(page.sample_card(image, row["question"], (line, kind), correct))
    return section(
        "Question answering",
        "Questions about test scenes, none of which occurs in training. A wrong answer is struck out and "
        "followed by the correct one.",
        grid(cards, "samples"),
    )


def reconstructions(run: DemoRun) -> str:
    """Originals next to their reconstructions."""
    folder, details = run.folder / "eval" / "reconstruction", run.details("reconstruction")
    cards = [
        f'<div class="pair card"><div>{inline_image(Path(row["image"]), "original")}'
        f"{inline_image(folder / row['reconstruction'], 'reconstruction')}"
        f"</div><footer><span>original · reconstruction</span>"
        f"<span>{row['psnr']:.1f} dB</span></footer></div>"
        for row in choose_samples(run.samples.get("reconstruction", []), 16)
    ]
    note = (
        f"Left: original; right: its reconstruction from {len(details.get('usage', ()))} codes per visual "
        f"token (sub-codebooks of {entries_text(details)} entries), with its PSNR."
    )
    return section("Reconstructions", note, grid(cards, "pairs"))


def scores(run: DemoRun) -> str:
    """Bars per question type, GenEval tag and POPE category."""

    def constant(details: Record, kind: str) -> tuple[float | None, str]:
        best = details["constant"][kind]
        return best["accuracy"], f"always “{best['answer']}”"

    def ceiling(details: Record, tag: str) -> tuple[float | None, str]:
        return details["ceiling"].get(tag), "ceiling"

    # the baseline of a bar differs by benchmark
    panels = [
        _metric_panel(run, "vqav2", "type/", "Question answering, accuracy per type", constant),
        _metric_panel(run, "geneval", "tag/", "Generated images, GenEval score per tag", ceiling),
        _metric_panel(run, "pope", "f1/", "POPE, F1 per category", lambda details, name: (None, "")),
    ]
    return section("Scores by category", BAR_LEGEND, grid([p for p in panels if p], "columns"))


def _metric_panel(
    run: DemoRun,
    benchmark: str,
    prefix: str,
    title: str,
    baseline: Callable[[Record, str], tuple[float | None, str]],
) -> str:
    """Bars of the metrics whose names start with `prefix`; `baseline`: (details, label) -> (value, name)."""
    result = run.results.get(benchmark, {"metrics": {}, "details": {}})
    bars = []
    for name, metric in result["metrics"].items():
        if name.startswith(prefix):
            label = name.removeprefix(prefix)
            mark, mark_name = baseline(result["details"], label)
            bars.append(page.metric_bar(label.replace("_", " "), metric, mark=mark, mark_name=mark_name))
    return page.panel(title, bars)


def codebooks(run: DemoRun) -> str:
    """Usage and perplexity of each sub-codebook, and a histogram of PSNR."""
    details = run.details("reconstruction")
    if not details:
        return ""
    usage = details["usage"]
    sizes = details.get("code_sizes", [details["codebook_size"]] * len(usage))
    bars = [
        charts.bar_row(f"codebook {i + 1}", u, f"{round(u * size)} of {size} entries, perplexity {p:.1f}")
        for i, (u, p, size) in enumerate(zip(usage, details["perplexity"], sizes))
    ]
    values = [row["psnr"] for row in run.samples["reconstruction"]]
    body = grid(
        [
            page.panel("Codebook usage, per cent", bars),
            charts.histogram("PSNR of the test images", values, "dB"),
        ],
        "columns",
    )
    note = (
        f"Usage is the share of entries that occur at least once in {details['tokens']:,} visual tokens of "
        "the test images; perplexity is the exponential of the entropy of their frequencies."
    )
    return section("Codebooks", note, body)


def training_curves(run: DemoRun) -> str:
    """The training curves of every stage."""
    body = "".join(
        grid(
            [charts.line_chart(name, points) for name, points in stage_curves(rows).items()], "charts", stage
        )
        for stage, rows in run.curves.items()
    )
    return section("Training curves", "Values over optimiser steps, smoothed; raw values are pale.", body)


def phase_times(run: DemoRun) -> str:
    """Seconds and peak memory of every phase."""
    total = sum(phase["seconds"] for phase in run.phases) or 1.0
    rows = []
    for phase in run.phases:
        memory = phase.get("peak_memory")
        # the demo was interrupted in this phase
        resumed = " <small>stopped and resumed</small>" if phase.get("calls", 1) > 1 else ""
        # relative to the total: the bars add up to 100 %
        width = 100 * phase["seconds"] / total
        rows.append(
            (
                f"{escape(phase['name'])}{resumed}",
                f"{phase['seconds']:.1f} s",
                f"{memory / 2**30:.2f} GiB" if memory else "–",
                f'<div class="track"><i class="fill" style="width:{width:.1f}%"></i></div>',
            )
        )
    if rows:
        rows.append(("<b>total</b>", f"<b>{total:.1f} s</b>", "", ""))
    return section(
        "Time and memory",
        "",
        page.html_table(("phase", "time", "peak memory", "share of time"), rows, (1, 2)),
    )


def headline_table(rows: Sequence[Headline], note: str) -> str:
    """All headline numbers with their intervals and baselines."""
    cells = []
    for row in rows:
        name = escape(row.name.strip())
        cells.append(
            (
                # see Headline.name: two leading blanks
                f'<span class="sub">{name}</span>' if row.name.startswith("  ") else name,
                page.format_value(row.value, row.unit),
                page.format_interval(row.interval, row.unit),
                str(row.n or ""),
                escape(row.baseline),
            )
        )
    columns = ("metric", "value", "95 % interval", "n", "baseline")
    return section("All numbers", escape(note), page.html_table(columns, cells, (1, 2, 3)))


def _short_reason(reason: str) -> str:
    """The first reason of a verdict."""
    return (reason or "no object recognised").split("\n")[0].split("; and")[0]


def _duration(seconds: float) -> str:
    """A duration in words."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} minutes"


def _footer(run: DemoRun) -> str:
    """Decoding, models and versions."""
    # tokenizer and MLLM, once each
    models = {r["model"]["kind"]: r for r in run.results.values()}
    lines = [f"{escape(kind)}: {page.model_and_versions(r)}" for kind, r in models.items()]
    decoding = next((r["decoding"] for r in run.results.values() if "guidance" in r["settings"]), "")
    sampled = f"Images are generated with {escape(decoding)}; " if decoding else ""
    return "<br>".join([f"{sampled}Answers are decoded greedily.", *lines])
