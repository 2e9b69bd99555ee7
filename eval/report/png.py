"""The report as one image: drawings, answers, copies and curves on a contact sheet, drawn by PIL."""

import functools
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from . import charts
from .demo import Line, Material, asked, copied, drawn, shown, stage_curves

WIDTH, MARGIN, GAP = 1600, 56, 16
PAPER, CARD, INK, SOFT, EDGE = "#f6f5f2", "#ffffff", "#1d1d22", "#6a6a74", "#e4e2dc"
ACCENT, WASH, GOOD, BAD = "#5446e0", "#ebe9fb", "#17805a", "#c22f4a"


def sheet(material: Material, lines: Sequence[Line], title: str) -> bytes:
    """The contact sheet as PNG bytes."""
    pen = Pen(WIDTH, 2400)
    y = MARGIN
    pen.text((MARGIN, y), title, INK, 46)
    y = tiles(pen, lines, y + 76)
    y = row_of_drawings(pen, material, y)
    y = row_of_answers(pen, material, y)
    y = row_of_copies(pen, material, y)
    y = row_of_curves(pen, material, y)
    buffer = io.BytesIO()
    pen.finished(y + MARGIN - GAP).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


class Pen:
    """Draws at twice the size and shrinks at the end, since PIL's lines and corners are jagged."""

    SCALE = 2

    def __init__(self, width: int, height: int):
        self.canvas = Image.new("RGB", (width * self.SCALE, height * self.SCALE), PAPER)
        self.draw = ImageDraw.Draw(self.canvas)

    def finished(self, height: int) -> Image.Image:
        """The upper part of the canvas, in its real size."""
        return self.canvas.crop((0, 0, self.canvas.width, height * self.SCALE)).reduce(self.SCALE)

    def text(self, at: tuple[float, float], words: str, colour: str, size: int) -> None:
        """Words with their top left corner at `at`."""
        self.draw.text((at[0] * self.SCALE, at[1] * self.SCALE), words, colour, font(size * self.SCALE))

    def box(self, box: tuple[float, float, float, float], radius: int, colour: str, edge: str = "") -> None:
        """A rounded rectangle."""
        x0, y0, x1, y1 = (v * self.SCALE for v in box)
        self.draw.rounded_rectangle((x0, y0, x1, y1), radius * self.SCALE, colour, edge or None, self.SCALE)

    def disc(self, x: float, y: float, radius: float, colour: str) -> None:
        """A filled circle."""
        self.draw.circle((x * self.SCALE, y * self.SCALE), radius * self.SCALE, colour)

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: int = 1) -> None:
        """A line through points."""
        scaled = [(x * self.SCALE, y * self.SCALE) for x, y in points]
        self.draw.line(scaled, colour, width * self.SCALE, joint="curve")

    def area(self, points: Sequence[tuple[float, float]], colour: str) -> None:
        """A filled polygon."""
        self.draw.polygon([(x * self.SCALE, y * self.SCALE) for x, y in points], colour)

    def picture(self, path: Path, x: int, y: int, side: int) -> None:
        """An image scaled to side x side, crisp where it is small; nothing where it cannot be read."""
        try:
            with Image.open(path) as opened:
                image = opened.convert("RGB")
        except OSError:
            return
        large = (side * self.SCALE, side * self.SCALE)
        way = Image.Resampling.NEAREST if image.width < side else Image.Resampling.LANCZOS
        self.canvas.paste(image.resize(large, way), (x * self.SCALE, y * self.SCALE))


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """PIL's own font: the same on every machine."""
    return ImageFont.load_default(size)


def heading(pen: Pen, words: str, y: int) -> int:
    """A section's name; returns where its content starts."""
    pen.text((MARGIN, y + 22), words, INK, 27)
    return y + 70


def card(pen: Pen, box: tuple[int, int, int, int]) -> None:
    """A white card."""
    pen.box(box, 14, CARD, EDGE)


def tiles(pen: Pen, lines: Sequence[Line], y: int) -> int:
    """The large numbers."""
    large = [line for line in lines if line.tile]
    width = (WIDTH - 2 * MARGIN - GAP * (len(large) - 1)) // max(len(large), 1)
    for i, line in enumerate(large):
        x = MARGIN + i * (width + GAP)
        card(pen, (x, y, x + width, y + 124))
        pen.text((x + 18, y + 16), shown(line.value, line.unit), INK, 34)
        pen.text((x + 18, y + 60), line.tile, SOFT, 18)
        pen.text((x + 18, y + 88), fit(line.beside, width - 30, 15), SOFT, 15)
    return y + 124 + GAP


def row_of_drawings(pen: Pen, material: Material, y: int) -> int:
    """Two rows of prompts and drawings."""
    rows = drawn(material)[:18]
    if not rows:
        return y
    y, across = heading(pen, "It draws", y), 9
    side = (WIDTH - 2 * MARGIN - GAP * (across - 1)) // across
    for i, row in enumerate(rows):
        x, top = MARGIN + i % across * (side + GAP), y + i // across * (side + 66)
        pen.picture(row["path"], x, top, side)
        mark(pen, x + side - 15, top + 15, bool(row["score"]))
        for k, line in enumerate(wrap(row["prompt"], side, 15)[:2]):
            pen.text((x, top + side + 6 + 19 * k), line, INK, 15)
    return y + -(-len(rows) // across) * (side + 66)


def row_of_answers(pen: Pen, material: Material, y: int) -> int:
    """Questions beside answers."""
    rows = asked(material, 12)
    if not rows:
        return y
    y, across, tall = heading(pen, "It sees", y), 4, 118
    width = (WIDTH - 2 * MARGIN - GAP * (across - 1)) // across
    for i, row in enumerate(rows):
        x, top = MARGIN + i % across * (width + GAP), y + i // across * (tall + GAP)
        card(pen, (x, top, x + width, top + tall))
        pen.picture(row["path"], x + 11, top + 11, tall - 22)
        left, good = x + tall + 4, row["score"] > 0.5
        for k, line in enumerate(wrap(row["question"], width - tall - 22, 16)[:2]):
            pen.text((left, top + 13 + 21 * k), line, INK, 16)
        pen.text(
            (left, top + 64),
            fit(row["answer"] or "no answer", width - tall - 22, 23),
            GOOD if good else BAD,
            23,
        )
        if not good:
            pen.text((left, top + 93), f"truth: {row['truth']}", SOFT, 14)
    return y + -(-len(rows) // across) * (tall + GAP)


def row_of_copies(pen: Pen, material: Material, y: int) -> int:
    """Originals above their copies."""
    rows = copied(material, 14)
    if not rows:
        return y
    y = heading(pen, "It remembers: originals above, copies below", y)
    side = (WIDTH - 2 * MARGIN - 10 * 13) // 14
    for i, row in enumerate(rows):
        x = MARGIN + i * (side + 10)
        pen.picture(row["path"], x, y, side)
        pen.picture(row["copy_path"], x, y + side + 6, side)
        pen.text((x, y + 2 * side + 12), f"{row['psnr']:.1f} dB", SOFT, 15)
    return y + 2 * side + 40


def row_of_curves(pen: Pen, material: Material, y: int) -> int:
    """The loss of every stage, and the use of the codebooks."""
    found = [
        (f"{stage}: {name}", points)
        for stage, rows in material.curves.items()
        for name, points in list(stage_curves(rows, 1).items())
    ]
    details = material.results.get("reconstruction", {}).get("details")
    count = len(found) + bool(details)
    if not count:
        return y
    y, tall = heading(pen, "Training and codebooks", y), 250
    width = (WIDTH - 2 * MARGIN - GAP * (count - 1)) // count
    for i, (name, points) in enumerate(found):
        curve(pen, name, points, MARGIN + i * (width + GAP), y, width, tall)
    if details:
        bars(
            pen, details["usage"], details["perplexity"], MARGIN + len(found) * (width + GAP), y, width, tall
        )
    return y + tall + GAP


def curve(pen: Pen, name: str, points: charts.Points, x: int, y: int, width: int, tall: int) -> None:
    """One chart."""
    card(pen, (x, y, x + width, y + tall))
    pen.text((x + 16, y + 13), name, INK, 17)
    last = charts.short(points[-1][1])
    pen.text((x + width - 16 - wide(last, 17), y + 13), last, SOFT, 17)
    points = charts.thin(points)
    x0, x1, y0, y1 = charts.bounds(points)
    left, right, top, bottom = x + 58, x + width - 18, y + 50, y + tall - 36

    def place(across: float, up: float) -> tuple[float, float]:
        share = (min(max(up, y0), y1) - y0) / (y1 - y0)
        return left + (across - x0) / (x1 - x0) * (right - left), bottom - share * (bottom - top)

    for value in charts.ticks(y0, y1):
        at = place(x0, value)[1]
        pen.line([(left, at), (right, at)], EDGE)
        label = charts.short(value)
        pen.text((left - 8 - wide(label, 13), at - 8), label, SOFT, 13)
    for value in charts.ticks(x0, x1):
        label = charts.short(value)
        pen.text((place(value, y0)[0] - wide(label, 13) / 2, bottom + 8), label, SOFT, 13)
    smooth = charts.smooth(points, 7) if len(points) > 30 else list(points)
    line = [place(*p) for p in smooth]
    pen.area([(line[0][0], bottom), *line, (line[-1][0], bottom)], WASH)
    pen.line(line, ACCENT, 3)


def bars(
    pen: Pen,
    usage: Sequence[float],
    perplexity: Sequence[float],
    x: int,
    y: int,
    width: int,
    tall: int,
) -> None:
    """How much of each sub-codebook is used."""
    card(pen, (x, y, x + width, y + tall))
    pen.text((x + 16, y + 13), "codebook entries used", INK, 17)
    step = min((tall - 62) / len(usage), 36)
    for i, (share, spread) in enumerate(zip(usage, perplexity)):
        top = y + 50 + i * step
        thick = max(step - 10, 4)
        end = x + width - 200
        pen.box((x + 16, top, end, top + thick), 5, WASH)
        pen.box((x + 16, top, x + 16 + max(share * (end - x - 16), 8), top + thick), 5, ACCENT)
        pen.text((end + 12, top + thick / 2 - 9), f"{100 * share:.0f} %   perplexity {spread:.0f}", SOFT, 15)


def mark(pen: Pen, x: int, y: int, good: bool) -> None:
    """A tick or a cross in a disc, drawn, since the font may lack the signs."""
    pen.disc(x, y, 10, CARD)
    if good:
        pen.line([(x - 5, y), (x - 1, y + 4), (x + 5, y - 4)], GOOD, 3)
    else:
        pen.line([(x - 4, y - 4), (x + 4, y + 4)], BAD, 3)
        pen.line([(x - 4, y + 4), (x + 4, y - 4)], BAD, 3)


def wide(words: str, size: int) -> float:
    """The width of words in pixels."""
    return font(size).getlength(words)


def wrap(words: str, width: int, size: int) -> list[str]:
    """Lines no wider than `width` pixels."""
    lines = [""]
    for word in words.split():
        longer = f"{lines[-1]} {word}".strip()
        if wide(longer, size) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def fit(words: str, width: int, size: int) -> str:
    """Cut so that it is no wider than `width` pixels."""
    while words and wide(words, size) > width:
        words = words[:-1]
    return words
