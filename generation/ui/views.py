"""What the page of `unitok ui` shows, as HTML: images that grow, an image beside its copy, maps of codes.

N visual tokens per image, K sub-codebooks, V entries per sub-codebook, C width of one code.
"""

import base64
import html
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..image_files import image_bytes

HINT = "<div class='ou-hint'>{}</div>"


def inline(image: Image.Image, record: dict[str, Any] | None = None) -> str:
    """The image as a data: URL of a PNG, with its record inside."""
    return "data:image/png;base64," + base64.b64encode(image_bytes(image, "png", record)).decode()


def images_view(
    images: Sequence[Image.Image], records: Sequence[dict[str, Any]], done: float, status: str
) -> str:
    """Images side by side over a bar that is filled to `done` of 1; once done, each can be saved."""
    figures = []
    for image, record in zip(images, records):
        url = inline(image, record)
        name = f"unitok-{record['seed']}.png"
        save = f"<a download='{name}' href='{url}'>Save</a>" if done >= 1 else ""
        figures.append(
            f"<figure>{_image(url, image, record['prompt'])}"
            f"<figcaption><span>seed {record['seed']}</span>{save}</figcaption></figure>"
        )
    state = "done" if done >= 1 else "going"
    return (
        f"<div class='ou-images ou-{state} ou-many-{min(len(images), 2)}'>{''.join(figures)}</div>"
        f"<div class='ou-bar'><div style='width:{100 * done:.1f}%'></div></div>"
        f"<div class='ou-status'>{html.escape(status)}</div>"
    )


def _image(url: str, image: Image.Image, text: str) -> str:
    small = " class='ou-small'" if max(image.size) <= 160 else ""
    return f"<img{small} src='{url}' alt='{html.escape(text, quote=True)}'>"


def pair_view(original: Image.Image, copy: Image.Image, facts: Sequence[tuple[str, str]]) -> str:
    """An image, its copy and where they differ (three times as bright), over some facts."""
    from PIL import ImageChops

    difference = ImageChops.difference(original, copy).point(lambda value: min(255, 3 * value))
    shown = [("original", original), ("copy from its codes", copy), ("difference x 3", difference)]
    figures = "".join(
        f"<figure>{_image(inline(image), image, name)}<figcaption><span>{name}</span></figcaption></figure>"
        for name, image in shown
    )
    items = "".join(
        f"<div><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>" for name, value in facts
    )
    return f"<div class='ou-images ou-done ou-many-3'>{figures}</div><div class='ou-facts'>{items}</div>"


def code_maps(codes: Tensor, colours: Tensor, columns: int) -> str:
    """One map per sub-codebook of codes (N, K): equal colours are equal codes, like ones are near ones.

    Args:
        colours: (K, V, 3) in 0..255, see `code_colours`.
        columns: visual tokens in a row.
    """
    count, books = codes.shape
    rows = -(-count // columns)
    maps = []
    for book in range(books):
        cells = []
        for place, code in enumerate(codes[:, book].tolist()):
            row, column = divmod(place, columns)
            red, green, blue = colours[book, code].tolist()
            cells.append(
                f"<rect x='{column}' y='{row}' width='1.02' height='1.02' "
                f"fill='#{red:02x}{green:02x}{blue:02x}' data-place='{place}' data-code='{code}'/>"
            )
        used = codes[:, book].unique().numel()
        maps.append(
            f"<figure><svg viewBox='0 0 {columns} {rows}' shape-rendering='crispEdges'>{''.join(cells)}</svg>"
            f"<figcaption><span>sub-codebook {book + 1}</span><span>{used} used</span></figcaption></figure>"
        )
    return (
        f"<div class='ou-maps' data-columns='{columns}'>{''.join(maps)}</div>"
        "<div class='ou-status ou-codes'>Point at a place to read its codes.</div>"
    )


# marks the place under the pointer in all maps and writes its codes below; part of the page, so it is text
MAPS_SCRIPT = """
element.addEventListener('mouseover', (event) => {
  const place = event.target.dataset && event.target.dataset.place;
  const maps = element.querySelector('.ou-maps');
  if (!maps) return;
  maps.querySelectorAll('.ou-marked').forEach((cell) => cell.classList.remove('ou-marked'));
  if (place === undefined) return;
  const cells = [...maps.querySelectorAll(`[data-place="${place}"]`)];
  cells.forEach((cell) => cell.classList.add('ou-marked'));
  const columns = Number(maps.dataset.columns);
  const where = `row ${Math.floor(place / columns) + 1}, column ${place % columns + 1}`;
  const codes = cells.map((cell) => cell.dataset.code).join(' · ');
  element.querySelector('.ou-codes').textContent = `${where}: ${codes}`;
});
"""


@torch.no_grad()
def code_colours(codebooks: Tensor) -> Tensor:
    """Colours (K, V, 3) in 0..255 of codebooks (K, V, C): near entries get near colours.

    The first three principal directions become red, green and blue, by rank, so that all shades are used.
    """
    vectors = torch.nn.functional.normalize(codebooks.float().cpu(), dim=-1)
    vectors = vectors - vectors.mean(dim=1, keepdim=True)
    _, _, directions = torch.linalg.svd(vectors.transpose(1, 2) @ vectors)  # (K, C, C)
    places = vectors @ directions[:, :3].transpose(1, 2)
    if places.shape[-1] < 3:
        places = torch.nn.functional.pad(places, (0, 3 - places.shape[-1]))
    ranks = places.argsort(dim=1).argsort(dim=1).float() / max(codebooks.shape[1] - 1, 1)
    return (40 + 205 * ranks).round().long()
