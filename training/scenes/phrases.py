"""Phrases that captions and questions of scenes are built from: names of cells, counts, relations."""

from .scene import SceneObject

# names of the rows and columns of a grid, from the top and from the left
ROW_NAMES = {2: ("top", "bottom"), 3: ("top", "middle", "bottom")}
COLUMN_NAMES = {2: ("left", "right"), 3: ("left", "middle", "right")}
# the index is the number
NUMBER_WORDS = ("no", "one", "two", "three", "four", "five", "six")
RELATION_PHRASES = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}


def position_name(cell: tuple[int, int], grid: int) -> str:
    """The name of a grid cell, such as "top left"; the central cell of a 3 x 3 grid is "middle"."""
    row, column = ROW_NAMES[grid][cell[0]], COLUMN_NAMES[grid][cell[1]]
    return " ".join(dict.fromkeys(word for word in (row, column) if word != "middle")) or "middle"


def is_corner(cell: tuple[int, int], grid: int) -> bool:
    """Whether a grid cell lies in a corner of the image."""
    return set(cell) <= {0, grid - 1}


def a_or_an(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def with_count(name: str, count: int) -> str:
    """ "a red circle", "two red circles"."""
    return a_or_an(name) if count == 1 else f"{NUMBER_WORDS[count]} {plural(name)}"


def plural(name: str) -> str:
    # crosses, but circles
    return name + ("es" if name.endswith("s") else "s")


def join_phrases(parts: list[str]) -> str:
    """ "x", "x and y", "x, y and z"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def relations_between(first: SceneObject, second: SceneObject) -> list[str]:
    """The relations of `first` to `second` by their grid cells: at most two of left, right, above, below."""
    (row, column), (other_row, other_column) = first.cell, second.cell
    words = []
    if column != other_column:
        words.append("left" if column < other_column else "right")
    if row != other_row:
        words.append("above" if row < other_row else "below")
    return words
