"""Palette, outlines and textures of scene objects, and their anti-aliased coverage of pixels.

Lengths are pixels, x to the right and y downwards.
"""

import functools
import math

import numpy as np

# A configuration uses the first `colors` of them. The names are GenEval's, with gray in place of white.
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (212, 32, 44),
    "green": (36, 150, 62),
    "blue": (40, 84, 210),
    "yellow": (250, 212, 36),
    "purple": (142, 52, 172),
    "orange": (244, 130, 24),
    "black": (28, 28, 32),
    "pink": (246, 120, 180),
    "brown": (122, 72, 34),
    "gray": (128, 130, 134),
}
SUPERSAMPLES = 8  # samples per pixel and axis
PALE = np.float32(0.4)  # opacity of an object's colour in the pale parts of a texture
TEXTURES = ("plain", "striped", "dotted")


def _circle(radius: float, points: int = 48) -> list[tuple[float, float]]:
    angle = 2 * math.pi / points
    return [(radius * math.cos(i * angle), radius * math.sin(i * angle)) for i in range(points)]


def _star() -> list[tuple[float, float]]:
    # outer and inner corners alternate, from the top; shifted down by 0.04 to centre the star in its box
    corners = [(0.56 if i % 2 == 0 else 0.24, math.pi * (i / 5 - 0.5)) for i in range(10)]
    return [(r * math.cos(angle), r * math.sin(angle) + 0.04) for r, angle in corners]


def _heart() -> list[tuple[float, float]]:
    # the heart curve x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t, scaled to the box
    angles = [2 * math.pi * i / 48 for i in range(48)]
    return [
        (
            math.sin(t) ** 3 / 2,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) + 2.5) / 29,
        )
        for t in angles
    ]


_ARM = 0.17
# Outlines in a box of side 1 around the origin: closed rings under the even-odd rule.
# A configuration uses the first `shapes` of them.
SHAPES: dict[str, list[list[tuple[float, float]]]] = {
    "circle": [_circle(0.5)],
    "square": [[(-0.47, -0.47), (0.47, -0.47), (0.47, 0.47), (-0.47, 0.47)]],
    "triangle": [[(0.0, -0.5), (0.5, 0.5), (-0.5, 0.5)]],
    "cross": [
        [
            (-_ARM, -0.5), (_ARM, -0.5), (_ARM, -_ARM), (0.5, -_ARM), (0.5, _ARM), (_ARM, _ARM),
            (_ARM, 0.5), (-_ARM, 0.5), (-_ARM, _ARM), (-0.5, _ARM), (-0.5, -_ARM), (-_ARM, -_ARM),
        ]
    ],
    "ring": [_circle(0.5), _circle(0.26)],
    "diamond": [[(0.0, -0.5), (0.4, 0.0), (0.0, 0.5), (-0.4, 0.0)]],
    "star": [_star()],
    "heart": [_heart()],
}  # fmt: skip


@functools.lru_cache(maxsize=4096)
def coverage(shape: str, texture: str, size: float, shift: tuple[float, float], cell: int) -> np.ndarray:
    """Opacity of an object at each pixel of its cell, (cell, cell) float32 in [0, 1]."""
    # sample points of the cell in pixels from the object's centre, in units of its size
    at = (np.arange(cell * SUPERSAMPLES) + 0.5) / SUPERSAMPLES - cell / 2
    x, y = (at - shift[0])[None, :] / size, (at - shift[1])[:, None] / size
    inside = np.zeros((at.size, at.size), bool)
    for ring in SHAPES[shape]:
        for (x0, y0), (x1, y1) in zip(ring, ring[1:] + ring[:1]):
            if y0 != y1:  # a ray to the right crosses this edge: even-odd rule
                inside ^= ((y0 > y) != (y1 > y)) & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    # box filter: the mean over the samples of each pixel
    fine = np.where(pattern(texture, x * size, y * size), inside, inside * PALE).astype(np.float32)
    fine = fine.reshape(cell, SUPERSAMPLES, cell, SUPERSAMPLES)
    return fine.mean(axis=(1, 3), dtype=np.float32)


def pattern(texture: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Mask of a texture's full colour at offsets x, y from the object's centre; elsewhere it is pale."""
    if texture == "striped":  # horizontal stripes, 4 of every 6 pixels
        bold = np.mod(y + 2, 6) < 4
    elif texture == "dotted":  # one disc per 6 x 6 pixels
        bold = (np.mod(x, 6) - 3) ** 2 + (np.mod(y, 6) - 3) ** 2 > 1.9**2
    else:
        bold = np.ones((1, 1), bool)
    return np.broadcast_to(bold, np.broadcast_shapes(x.shape, y.shape))
