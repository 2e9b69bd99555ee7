"""The report as one HTML page: images inline, curves as SVG, light and dark, nothing loaded."""

import base64
import html
import io
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from ..core.harness import Row, Settings
from . import charts
from .demo import Line, Material, about_held_out, asked, copied, drawn, percent, placed, shown, stage_curves
from .style import STYLE


def page(material: Material, lines: Sequence[Line], title: str) -> str:
    """The whole page."""
    sections = [
        drawings(material),
        answers(material),
        copies(material),
        scores(material),
        codebooks(material),
        curves(material),
        phases(material),
        table(lines, about_held_out(material)),
        ending(material),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head><body><main>"
        f"{head(material, lines, title)}{''.join(sections)}</main></body></html>\n"
    )


def text(value: object) -> str:
    """Safe inside HTML and its attributes."""
    return html.escape(str(value))


def picture(path: Path, alt: str) -> str:
    """An inline image; small ones are kept pixel for pixel, large ones shrunk to 256."""
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except OSError:
        return f'<img alt="{text(path.name)} could not be read">'
    image.thumbnail((256, 256))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{text(alt)}" src="data:image/png;base64,{data}">'


def section(name: str, line: str, body: str) -> str:
    """A section, or nothing where it would be empty."""
    return f"<section><h2>{text(name)}</h2><p>{line}</p>{body}</section>" if body else ""


def verdict(good: bool) -> str:
    """A tick or a cross."""
    return '<i class="verdict yes">✓</i>' if good else '<i class="verdict no">✗</i>'


def head(material: Material, lines: Sequence[Line], title: str) -> str:
    """Title, one sentence, and the large numbers."""
    tiles = []
    for line in lines:
        if line.tile:
            value, _, unit = shown(line.value, line.unit).partition(" ")
            beside = f"<em>{text(line.beside)}</em>" if line.beside else ""
            tiles.append(
                f'<div class="tile card"><b>{value}<small>{unit}</small></b><span>{text(line.tile)}</span>'
                f"{beside}</div>"
            )
    seconds = sum(p["seconds"] for p in material.phases)
    took = f", in {minutes(seconds)} from nothing" if seconds else ""
    return (
        f"<header><h1>{text(title)}</h1><p>One tokenizer that both sees and draws, and one decoder that "
        f"reads and writes text and images through it{took}. Every image below was chosen by lot.</p>"
        f'<div class="tiles">{"".join(tiles)}</div></header>'
    )


def minutes(seconds: float) -> str:
    """A duration in words."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} minutes"


def shot(row: Row) -> str:
    """One drawing with its prompt and verdict."""
    why = "" if row["score"] else f"<small>{text(first_line(row['reason']))}</small>"
    apart = "<small>pair never seen in training</small>" if row.get("held_out") else ""
    body = f"{verdict(bool(row['score']))}{text(row['prompt'])}{why}{apart}"
    return f'<div class="shot card">{picture(row["path"], row["prompt"])}<div>{body}</div></div>'


def first_line(reason: str) -> str:
    """A reason short enough for a caption."""
    return (reason or "nothing recognised").split("\n")[0].split("; and")[0]


def drawings(material: Material) -> str:
    """Prompts and what was drawn from them."""
    compositions, singles = drawn(material), placed(material)
    body = f'<div class="gallery">{"".join(map(shot, compositions))}</div>' if compositions else ""
    if singles:
        body += f'<h3>One object at a place</h3><div class="gallery">{"".join(map(shot, singles))}</div>'
    return section(
        "It draws",
        "The prompt below each image is all that the model was given; the verdict is the detector's.",
        body,
    )


def answers(material: Material) -> str:
    """Questions, the model's answer, and the true one where they differ."""
    cards = []
    for row in asked(material):
        good = row["score"] > 0.5
        said = text(row["answer"] or "no answer")
        answer = f"<b>{said}</b>" if good else f"<s>{said}</s> <b>{text(row['truth'])}</b>"
        cards.append(
            f'<div class="ask card">{picture(row["path"], "a test picture")}<div>{verdict(good)}'
            f"<q>{text(row['question'])}</q>{answer}<small>{text(row['group'])}</small></div></div>"
        )
    return section(
        "It sees",
        "Each test scene differs from every training scene, at least in the jitter or the size of an object. "
        "A wrong answer is struck out, the truth stands beside it.",
        f'<div class="asks">{"".join(cards)}</div>' if cards else "",
    )


def copies(material: Material) -> str:
    """Originals beside reconstructions."""
    cards = [
        f'<div class="pair card"><div>{picture(row["path"], "original")}'
        f"{picture(row['copy_path'], 'reconstruction')}"
        f"</div><footer><span>original · copy</span><span>{row['psnr']:.1f} dB</span></footer></div>"
        for row in copied(material)
    ]
    size = material.results.get("reconstruction", {}).get("details", {}).get("codebook_size")
    count = len(material.results.get("reconstruction", {}).get("details", {}).get("usage", ()))
    line = f"Left the original, right what {count} codes of {size} entries per visual token keep of it."
    return section("It remembers", line, f'<div class="pairs">{"".join(cards)}</div>' if cards else "")


def scores(material: Material) -> str:
    """Bars per question type, per tag, per POPE category."""
    panels = [
        panel(material, "vqav2", "type/", "Questions, per type", constant_mark),
        panel(material, "geneval", "tag/", "Drawings, per GenEval tag", ceiling_mark),
        panel(material, "pope", "f1/", "POPE, F1 per category", no_mark),
    ]
    line = (
        "Bars are per cent, whiskers 95 % bootstrap intervals by image or prompt. "
        '<i class="key"></i> marks what to '
        "compare with: the best constant answer, or for drawings the ceiling, that is the same detector on "
        "reconstructions of real images that fit the prompt."
    )
    body = "".join(panels)
    return section("Scores", line, f'<div class="columns">{body}</div>' if body else "")


Mark = Callable[[Row, str], tuple[float | None, str]]


def constant_mark(details: Row, name: str) -> tuple[float | None, str]:
    """The best constant answer of a question type."""
    constant = details["constant"][name]
    return constant["accuracy"], f"always “{constant['answer']}”"


def ceiling_mark(details: Row, name: str) -> tuple[float | None, str]:
    """The detector on reconstructions."""
    return details["ceiling"].get(name), "ceiling"


def no_mark(details: Row, name: str) -> tuple[float | None, str]:
    """Nothing to compare with."""
    return None, ""


def panel(material: Material, benchmark: str, prefix: str, title: str, mark: Mark) -> str:
    """The bars of one benchmark's metrics whose name starts with `prefix`."""
    result = material.results.get(benchmark)
    if not result:
        return ""
    bars = []
    for name, metric in result["metrics"].items():
        if name.startswith(prefix):
            label = name.removeprefix(prefix)
            at, what = mark(result["details"], label)
            note = f"n = {metric['n']}" + (f", {what} {percent(at)}" if at is not None else "")
            bars.append(
                charts.bar_row(label.replace("_", " "), metric["value"], note, metric["interval"], at, what)
            )
    return f'<div class="panel card"><h3>{title}</h3>{"".join(bars)}</div>'


def codebooks(material: Material) -> str:
    """Use and perplexity of each sub-codebook, and how PSNR is spread."""
    details = material.results.get("reconstruction", {}).get("details")
    if not details:
        return ""
    size = details["codebook_size"]
    used = "".join(
        charts.bar_row(f"codebook {i + 1}", u, f"{round(u * size)} of {size} entries, perplexity {p:.1f}")
        for i, (u, p) in enumerate(zip(details["usage"], details["perplexity"]))
    )
    values = [row["psnr"] for row in material.samples["reconstruction"]]
    spread = charts.histogram("PSNR of the test images", values, "dB")
    tokens = f"{details['tokens']:,}"
    line = f"Entries hit by {tokens} visual tokens of the test images; perplexity is exp(entropy)."
    bars = f'<div class="panel card"><h3>Entries used, per cent</h3>{used}</div>'
    body = f'<div class="columns">{bars}{spread}</div>'
    return section("The codebooks", line, body)


def curves(material: Material) -> str:
    """The training curves of every stage."""
    parts = []
    for stage, rows in material.curves.items():
        found = stage_curves(rows)
        if found:
            figures = "".join(charts.line_chart(name, points) for name, points in found.items())
            parts.append(f'<h3>{text(stage)}</h3><div class="charts">{figures}</div>')
    return section("Training", "Values over steps; the pale line is unsmoothed.", "".join(parts))


def phases(material: Material) -> str:
    """Seconds and peak memory of every phase."""
    if not material.phases:
        return ""
    total = sum(p["seconds"] for p in material.phases) or 1.0
    rows = []
    for phase in material.phases:
        memory = phase.get("peak_memory")
        shown_memory = f"{memory / 2**30:.2f} GiB" if memory else "–"
        part = 100 * phase["seconds"] / total
        again = "<small> stopped and resumed</small>" if phase.get("calls", 1) > 1 else ""
        rows.append(
            f'<tr><td>{text(phase["name"])}{again}</td><td class="n">{phase["seconds"]:.1f} s</td>'
            f'<td class="n">{shown_memory}</td><td style="width:45%"><div class="track">'
            f'<i class="fill" style="width:{part:.1f}%"></i></div></td></tr>'
        )
    rows.append(f'<tr><td><b>total</b></td><td class="n"><b>{total:.1f} s</b></td><td></td><td></td></tr>')
    header = "<tr><th>phase</th><th class='n'>time</th><th class='n'>peak memory</th><th></th></tr>"
    body = f'<div class="card scroll"><table>{header}{"".join(rows)}</table></div>'
    return section("Time and memory", "", body)


def table(lines: Sequence[Line], about: str) -> str:
    """All headline numbers with intervals, and what they are about."""
    rows = []
    for line in lines:
        around = ""
        if line.interval:
            low, high = (shown(v, line.unit).split()[0] for v in line.interval)
            around = f"{low} – {high}"
        sub = ' class="sub"' if line.name.startswith("  ") else ""
        rows.append(
            f'<tr><td{sub}>{text(line.name.strip())}</td><td class="n">{shown(line.value, line.unit)}</td>'
            f'<td class="n">{around}</td><td class="n">{line.n or ""}</td><td>{text(line.beside)}</td></tr>'
        )
    header = (
        "<tr><th>measure</th><th class='n'>value</th><th class='n'>95 % interval</th><th class='n'>n</th>"
        "<th>beside it</th></tr>"
    )
    return section(
        "All numbers", text(about), f'<div class="card scroll"><table>{header}{"".join(rows)}</table></div>'
    )


def ending(material: Material) -> str:
    """What went wrong, and what the numbers were made with."""
    problems = [f"{name}: {problem}" for name, r in material.results.items() for problem in r["problems"]]
    warnings = "".join(f'<div class="warn card">{text(problem)}</div>' for problem in problems)
    result = next(iter(material.results.values()))
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    settings = Settings(**result["settings"])
    prints = {text(r["model"]["kind"]): r["model"]["fingerprint"][:16] for r in material.results.values()}
    models = ", ".join(f"{kind} <code>{value}</code>" for kind, value in prints.items())
    return (
        f'{warnings}<footer class="end">Drawn with {text(settings.decoding)}; answers are greedy. '
        f"Models: {models}. {text(versions)}.</footer>"
    )
