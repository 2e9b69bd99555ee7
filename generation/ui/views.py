"""HTML of the page: images with progress, image and reconstruction, code maps.

N visual tokens per image, K sub-codebooks, V entries per sub-codebook, C width of one code.
"""

import base64
import html
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageChops
from torch import Tensor

from ..image_files import image_bytes


def hint_view(text: str) -> str:
    """A dashed box with a hint; `text` is HTML."""
    return f"<div class='ou-hint'>{text}</div>"


def _data_url(image: Image.Image, record: dict[str, Any] | None = None) -> str:
    """A data: URL of the image as PNG, with its record in the text chunks."""
    return "data:image/png;base64," + base64.b64encode(image_bytes(image, "png", record)).decode()


def images_view(
    images: Sequence[Image.Image], records: Sequence[dict[str, Any]], done: float, status: str
) -> str:
    """Images side by side above a progress bar; `done` is from 0 to 1. At 1 each image has a Save link."""
    figures = []
    for image, record in zip(images, records):
        url = _data_url(image, record)
        name = f"unitok-{record['seed']}.png"
        save = f"<a download='{name}' href='{url}'>Save</a>" if done >= 1 else ""
        figures.append(
            f"<figure>{_image(url, image, record['prompt'])}"
            f"<figcaption><span>seed {record['seed']}</span>{save}</figcaption></figure>"
        )
    state = "done" if done >= 1 else "generating"
    return (
        f"<div class='ou-images ou-{state} ou-columns-{min(len(images), 2)}'>{''.join(figures)}</div>"
        f"<div class='ou-bar'><div style='width:{100 * done:.1f}%'></div></div>"
        f"<div class='ou-status'>{html.escape(status)}</div>"
    )


def _image(url: str, image: Image.Image, text: str) -> str:
    small = " class='ou-small'" if max(image.size) <= 160 else ""
    return f"<img{small} src='{url}' alt='{html.escape(text, quote=True)}'>"


def comparison_view(
    original: Image.Image, reconstruction: Image.Image, facts: Sequence[tuple[str, str]]
) -> str:
    """Original, reconstruction and their difference times 3, above the facts (name, value)."""
    difference = ImageChops.difference(original, reconstruction).point(lambda value: min(255, 3 * value))  # pyright: ignore
    shown = [("original", original), ("reconstruction", reconstruction), ("difference × 3", difference)]
    figures = "".join(
        f"<figure>{_image(_data_url(image), image, name)}"
        f"<figcaption><span>{name}</span></figcaption></figure>"
        for name, image in shown
    )
    items = "".join(
        f"<div><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>" for name, value in facts
    )
    return f"<div class='ou-images ou-done ou-columns-3'>{figures}</div><div class='ou-facts'>{items}</div>"


def code_maps(codes: Tensor, colours: Tensor, columns: int, have_places: bool = True) -> str:
    """One SVG per sub-codebook of codes (N, K); similar colours are similar codebook entries.

    Args:
        colours: (K, V, 3) in 0..255, see `code_colours`.
        columns: visual tokens per row.
        have_places: whether the rows are those of the image; else they are a sequence in lines.
    """
    count, books = codes.shape
    rows = -(-count // columns)
    maps = []
    for book in range(books):
        cells = []
        for position, code in enumerate(codes[:, book].tolist()):
            row, column = divmod(position, columns)
            red, green, blue = colours[book, code].tolist()
            # 1.02: cells overlap, otherwise antialiasing shows gaps
            cells.append(
                f"<rect x='{column}' y='{row}' width='1.02' height='1.02' "
                f"fill='#{red:02x}{green:02x}{blue:02x}' data-position='{position}' data-code='{code}'/>"
            )
        used = codes[:, book].unique().numel()
        maps.append(
            f"<figure><svg viewBox='0 0 {columns} {rows}' shape-rendering='crispEdges'>{''.join(cells)}</svg>"
            f"<figcaption><span>sub-codebook {book + 1}</span><span>{used} used</span></figcaption></figure>"
        )
    return (
        f"<div class='ou-maps' data-columns='{columns if have_places else 0}'>{''.join(maps)}</div>"
        "<div class='ou-status ou-codes'>Hover over a token to see its codes.</div>"
    )


# Highlights the token under the pointer in all maps and shows its codes below.
CODE_MAPS_SCRIPT = """
element.addEventListener('mouseover', (event) => {
  const position = event.target.dataset && event.target.dataset.position;
  const maps = element.querySelector('.ou-maps');
  if (!maps) return;
  maps.querySelectorAll('.ou-marked').forEach((cell) => cell.classList.remove('ou-marked'));
  if (position === undefined) return;
  const cells = [...maps.querySelectorAll(`[data-position="${position}"]`)];
  cells.forEach((cell) => cell.classList.add('ou-marked'));
  const columns = Number(maps.dataset.columns);
  const place = `row ${Math.floor(position / columns) + 1}, column ${position % columns + 1}`;
  const where = columns ? place : `token ${Number(position) + 1}`;
  const codes = cells.map((cell) => cell.dataset.code).join(' · ');
  element.querySelector('.ou-codes').textContent = `${where}: ${codes}`;
});
"""


@torch.no_grad()
def code_colours(table: Tensor | None, code_sizes: Sequence[int]) -> Tensor:
    """Colours (K, V, 3) in 0..255 of codebook entries, similar for entries of similar direction.

    The ranks along the first three principal components become red, green and blue.

    Args:
        table: (K, V, C) entries; None for a quantiser without a table, whose colours follow the code's index.
        code_sizes: entries of each sub-codebook, V or fewer.
    """
    if table is None:
        table = torch.linspace(0, 1, max(code_sizes)).expand(len(code_sizes), -1)[..., None]
    vectors = table.float().cpu()
    if vectors.shape[-1] > 1:
        vectors = torch.nn.functional.normalize(vectors, dim=-1)
    # principal components: eigenvectors of the covariance, in descending order
    vectors = vectors - vectors.mean(dim=1, keepdim=True)
    _, _, directions = torch.linalg.svd(vectors.transpose(1, 2) @ vectors)  # (K, C, C)
    components = vectors @ directions[:, :3].transpose(1, 2)
    if components.shape[-1] < 3:  # C < 3: the remaining channels are constant
        components = torch.nn.functional.pad(components, (0, 3 - components.shape[-1]))
    # ranks instead of values: all shades are used for every distribution; 40 keeps colours off black
    ranks = components.argsort(dim=1).argsort(dim=1).float() / max(vectors.shape[1] - 1, 1)
    return (40 + 205 * ranks).round().long()
