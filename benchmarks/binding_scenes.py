"""Scenes, questions and captions of benchmarks/binding.py, as tensors.

n scenes or texts, N visual tokens per scene, K codes per visual token, T words per text.
"""

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
import torch.nn.functional as F

from open_unitok.core.files import make_folder, tokenizer_path
from open_unitok.tokenizer import UniTok
from open_unitok.training.scenes.config import SceneConfig
from open_unitok.training.scenes.dataset import load_config
from open_unitok.training.scenes.scene import Scene, SceneObject, render_array

COLORS, SHAPES, GRID = 6, 4, 2
PAIRS, CELLS = COLORS * SHAPES, GRID * GRID
KINDS = ("exist", "colour", "read", "row", "column", "left_right", "above_below")
EXIST, COLOUR, READ, ROW, COLUMN, LEFT_RIGHT, ABOVE_BELOW = range(len(KINDS))
CHANCE = dict.fromkeys(KINDS, 1 / 2) | {"colour": 1 / COLORS, "read": 1 / COLORS}
FILLERS = 8
WORDS = (
    *("pad", "boi", "eoi", "answer", "end", "caption", "no", "yes"),
    *("top", "bottom", "left", "right", "above", "below"),
    *KINDS,
    *(f"filler {i}" for i in range(FILLERS)),
    *(f"cell {i}" for i in range(CELLS)),
    *(f"colour {i}" for i in range(COLORS)),
    *(f"shape {i}" for i in range(SHAPES)),
)
ID = {word: number for number, word in enumerate(WORDS)}
PAD = ID["pad"]


class Scenes(NamedTuple):
    """n scenes of up to four objects; object i exists if i < count."""

    pairs: torch.Tensor  # (n, 4) colour * SHAPES + shape, all different in a scene
    cells: torch.Tensor  # (n, 4) row * GRID + column
    count: torch.Tensor  # (n,)
    codes: torch.Tensor  # (n, N, K)

    def take(self, rows: torch.Tensor) -> "Scenes":
        return Scenes(*(values[rows] for values in self))

    @property
    def exists(self) -> torch.Tensor:
        """(n, 4) bool."""
        return torch.arange(CELLS) < self.count[:, None]

    @property
    def grid(self) -> torch.Tensor:
        """(n, CELLS): the pair in each cell, -1 where it is empty."""
        pairs = torch.where(self.exists, self.pairs, -1)
        return torch.full_like(pairs, -1).scatter(1, self.cells, pairs)


class Texts(NamedTuple):
    """n texts, padded on the right."""

    ids: torch.Tensor  # (n, T)
    learned: torch.Tensor  # (n, T) bool
    value: torch.Tensor  # (n, T) bool: the words that a wrong idea of the scene gets wrong

    def compact(self) -> "Texts":
        """Padding inside a text moves to its end."""
        order = (self.ids == PAD).int().argsort(dim=1, stable=True)
        moved = [values.gather(1, order) for values in self]
        longest = int((moved[0] != PAD).sum(1).max())
        return Texts(*(values[:, :longest] for values in moved))


# ---- scenes ------------------------------------------------------------------------------------------------


def sample_scenes(n: int, rng: torch.Generator, held_out: bool = False, most: int = CELLS) -> Scenes:
    """n scenes without codes, of training or of the tenth of arrangements that is held out."""
    number = n * (14 if held_out else 2) + 100
    pairs = torch.rand(number, PAIRS, generator=rng).argsort(1)[:, :CELLS]
    cells = torch.rand(number, CELLS, generator=rng).argsort(1)
    count = torch.randint(1, most + 1, (number,), generator=rng)
    scenes = Scenes(pairs, cells, count, torch.empty(number, 0))
    return scenes.take((is_held_out(scenes) == held_out).nonzero()[:n, 0])


def is_held_out(scenes: Scenes) -> torch.Tensor:
    """(n,) bool: by a hash of what is in each cell."""
    key = ((scenes.grid + 2) * torch.tensor([1, 31, 961, 29791])).sum(1)
    return (key * 2654435761 >> 7) % 10 == 0


def symbols(scenes: Scenes, code: str, tokens: int) -> torch.Tensor:
    """(n, N, K) symbolic codes: the pair ("joint") or colour and shape ("factored"); the last is "empty"."""
    grid = scenes.grid
    if tokens == 4:  # 2 x 2 tokens per cell, in reading order of all 4 x 4 tokens
        grid = grid.view(-1, GRID, GRID).repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)
    if code == "joint":
        return torch.where(grid < 0, PAIRS, grid)[..., None]
    color, shape = torch.where(grid < 0, COLORS, grid // SHAPES), torch.where(grid < 0, SHAPES, grid % SHAPES)
    return torch.stack([color, shape], dim=-1)


def rendered_scenes(n: int, held_out: bool, folder: Path = Path("runs/binding")) -> Scenes:
    """n scenes rendered as those of configs/scenes, with codes of the shipped tokenizer; kept in `folder`."""
    path = folder / f"{'held_out' if held_out else 'train'}-{n}.pt"
    if path.exists():
        return Scenes(*torch.load(path, weights_only=True))
    scenes, random = sample_scenes(n, torch.Generator().manual_seed(7), held_out), Random(7)
    config = load_config("configs/scenes/scenes.yaml")
    images = [
        scene for rows in torch.arange(n).split(200) for scene in as_images(scenes.take(rows), config, random)
    ]
    found = scenes._replace(codes=encode_scenes(images))
    torch.save(tuple(found), make_folder(folder) / path.name)
    return found


@torch.no_grad()
def encode_scenes(scenes: Sequence[Scene]) -> torch.Tensor:
    """(n, N, K) codes of rendered scenes by the shipped tokenizer."""
    unitok = UniTok.from_pretrained(tokenizer_path("scenes"), dtype=torch.float32).eval()
    codes = []
    for start in range(0, len(scenes), 200):
        images = [torch.from_numpy(render_array(scene)) for scene in scenes[start : start + 200]]
        codes.append(unitok.encode(torch.stack(images).permute(0, 3, 1, 2) / 127.5 - 1))
    return torch.cat(codes)


def as_images(scenes: Scenes, config: SceneConfig, random: Random) -> list[Scene]:
    """Sizes, textures, offsets and backgrounds are sampled as in training data."""
    found = []
    for pairs, cells, count in zip(scenes.pairs.tolist(), scenes.cells.tolist(), scenes.count.tolist()):
        objects = []
        for pair, cell in list(zip(pairs, cells))[:count]:
            color, shape = config.color_names[pair // SHAPES], config.shape_names[pair % SHAPES]
            size, texture = random.choice(config.sizes), random.choice(config.textures)
            shift = random.randint(-1, 1), random.randint(-1, 1)
            objects.append(SceneObject(shape, color, size, divmod(cell, GRID), shift, texture))
        red, green, blue = (random.randint(config.light_min, config.light_max) for _ in range(3))
        gradient = tuple(random.randint(-config.gradient, config.gradient) for _ in range(2))
        found.append(Scene(config.size, GRID, tuple(objects), (red, green, blue), gradient))
    return found


# ---- texts -------------------------------------------------------------------------------------------------


def ask(
    scenes: Scenes, kinds: torch.Tensor, rng: torch.Generator, filler: int = 0, describe: bool = False
) -> Texts:
    """One question per scene: its kind, up to `filler` words without meaning, one or two names or a cell,
    "answer", with `describe` the cells of what it names, the answer, "end".

    Args:
        kinds: (n,) numbers in KINDS; another kind takes the place of one that the scene does not allow.
    """
    kinds, candidates, ordered = possible_kinds(scenes, kinds)
    n, relation = len(kinds), kinds >= LEFT_RIGHT
    both = choose(ordered[torch.arange(n), (kinds == ABOVE_BELOW).long()].flatten(1), rng)
    first = torch.where(relation, both // CELLS, choose(candidates, rng))
    pair, cell = pick(scenes.pairs, first), pick(scenes.cells, first)
    other, other_cell = pick(scenes.pairs, both % CELLS), pick(scenes.cells, both % CELLS)
    yes = torch.rand(n, generator=rng) < 0.5
    asked = torch.where((kinds == EXIST) & ~yes, absent_pairs(scenes, rng), pair)
    row, column, color = cell // GRID, cell % GRID, ID["colour 0"] + pair // SHAPES
    values = [ID["no"] + yes.long(), color, color, ID["top"] + row, ID["left"] + column]
    value = pick(torch.stack([*values, ID["left"] + column, ID["above"] + row], dim=1), kinds)
    pad = torch.full_like(value, PAD)
    words = torch.arange(filler) < torch.randint(0, filler + 1, (n, 1), generator=rng)
    meaningless = ID["filler 0"] + torch.randint(0, FILLERS, (n, filler), generator=rng)
    question = [
        ID[KINDS[0]] + kinds,
        *torch.where(words, meaningless, PAD).unbind(1),
        torch.where((kinds != READ) & (kinds != COLOUR), ID["colour 0"] + asked // SHAPES, pad),
        torch.where(kinds != READ, ID["shape 0"] + asked % SHAPES, ID["cell 0"] + cell),
        torch.where(relation, ID["colour 0"] + other // SHAPES, pad),
        torch.where(relation, ID["shape 0"] + other % SHAPES, pad),
        pad + ID["answer"],
    ]
    place = (kinds >= ROW) & describe
    answer = [
        torch.where(place, ID["cell 0"] + cell, pad),
        torch.where(place & relation, ID["cell 0"] + other_cell, pad),
        value,
        pad + ID["end"],
    ]
    ids = torch.stack([*question, *answer], dim=1)
    position = (torch.arange(ids.shape[1]) - len(question)).expand_as(ids)
    return Texts(ids, (position >= 0) & (ids != PAD), (position >= 0) & (position < 3) & (ids != PAD))


def possible_kinds(scenes: Scenes, kinds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Kinds that the scenes allow; (n, 4) objects that may be asked for; (n, 2, 4, 4) ordered pairs of
    objects that differ in the column, and in the row."""
    exists, shape = scenes.exists, scenes.pairs % SHAPES
    two = exists[:, :, None] & exists[:, None, :]
    unique = exists & ((two & (shape[:, :, None] == shape[:, None, :])).sum(2) == 1)
    places = (scenes.cells % GRID, scenes.cells // GRID)
    ordered = torch.stack([two & (place[:, :, None] != place[:, None, :]) for place in places], dim=1)
    # any two objects differ in the row or in the column; a single object has a row and a column only
    has = ordered.flatten(2).any(2)
    swapped = (kinds == LEFT_RIGHT) & ~has[:, 0] | (kinds == ABOVE_BELOW) & ~has[:, 1]
    kinds = torch.where(swapped, LEFT_RIGHT + ABOVE_BELOW - kinds, kinds)
    kinds = torch.where((kinds >= LEFT_RIGHT) & (scenes.count == 1), kinds - (LEFT_RIGHT - ROW), kinds)
    kinds = torch.where((kinds == COLOUR) & ~unique.any(1), EXIST, kinds)
    return kinds, torch.where((kinds == COLOUR)[:, None], unique, exists), ordered


def absent_pairs(scenes: Scenes, rng: torch.Generator) -> torch.Tensor:
    """(n,) pairs that the scenes lack; six in ten share the colour or the shape with an object."""
    grid, every = scenes.grid[:, :, None], torch.arange(PAIRS)
    absent = (grid != every).all(1)
    alike = (grid // SHAPES == every // SHAPES) | (grid % SHAPES == every % SHAPES)
    near = absent & (alike & (grid >= 0)).any(1)
    hard = torch.rand(len(absent), generator=rng) < 0.6
    return choose(torch.where(hard[:, None] & near.any(1, keepdim=True), near, absent), rng)


def converse(
    scenes: Scenes,
    rng: torch.Generator,
    shares: Sequence[float],
    turns: int = 1,
    filler: int = 0,
    describe: bool = False,
) -> Texts:
    """One to `turns` questions about each scene, their kinds by `shares`."""
    n = len(scenes.count)
    kinds = torch.multinomial(torch.tensor(shares), n * turns, replacement=True, generator=rng)
    texts = ask(scenes.take(torch.arange(n).repeat_interleave(turns)), kinds, rng, filler, describe)
    dropped = torch.randint(1, turns + 1, (n, 1), generator=rng) <= torch.arange(turns)
    dropped = dropped.flatten()[:, None]
    parts = (texts.ids.masked_fill(dropped, PAD), texts.learned & ~dropped, texts.value & ~dropped)
    return Texts(*(values.reshape(n, -1) for values in parts)).compact()


def caption(scenes: Scenes, rng: torch.Generator, placed: float = 0.5) -> Texts:
    """All objects in random order, in a share `placed` of the captions each with its row and column."""
    place = torch.rand(len(scenes.count), 1, generator=rng) < placed
    color, shape = ID["colour 0"] + scenes.pairs // SHAPES, ID["shape 0"] + scenes.pairs % SHAPES
    row = torch.where(place, ID["top"] + scenes.cells // GRID, PAD)
    column = torch.where(place, ID["left"] + scenes.cells % GRID, PAD)
    words = torch.stack([color, shape, row, column], dim=2)
    ids = torch.where(scenes.exists[..., None], words, PAD).flatten(1)
    ids = F.pad(F.pad(ids, (1, 0), value=ID["caption"]), (0, 1), value=ID["end"])
    learned = (ids != PAD) & (ids != ID["caption"])
    is_place = (torch.arange(ids.shape[1]) - 1) % 4 >= 2
    return Texts(ids, learned, learned & is_place & (ids != ID["end"])).compact()


def choose(allowed: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """(n, m) bool -> (n,): a random true column."""
    return ((torch.rand(allowed.shape, generator=rng) + 1e-3) * allowed).argmax(1)


def pick(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(n, m) values, (n,) columns -> (n,)."""
    return values.gather(1, index[:, None])[:, 0]
