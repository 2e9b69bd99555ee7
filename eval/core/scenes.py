"""`captions.json` of scenes: what each image shows, entry by entry."""

from pathlib import Path
from typing import Any, NamedTuple

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing

from .annotations import read_json_as, require_key, require_text, require_type


class Scene(NamedTuple):
    """An image's file and what it shows: "shape", "color", "cell" and "box" of each object."""

    file: str
    objects: list[dict[str, Any]]


def read_scenes(path: Path) -> list[Scene | UserError]:
    """The images of a `captions.json`; an entry that describes none stands as the UserError that says why.

    Raises:
        UserError: no such file, or no list.
    """
    found: list[Scene | UserError] = []
    for i, row in enumerate(read_json_as(list, existing(path))):
        where = f"{path}, entry {i}"
        try:
            file, scene = require_text(row, "file", where), require_key(row, "scene", where)
            things = require_type(list, require_key(scene, "objects", f"{where}, scene"), f"{where}, objects")
            for j, thing in enumerate(things):
                place = f"{where}, objects[{j}]"
                for key in ("shape", "color"):
                    require_text(thing, key, place)
                for key, count in (("cell", 2), ("box", 4)):
                    numbers = require_type(list, require_key(thing, key, place), f"{place}, {key}")
                    if len(numbers) != count or not all(isinstance(n, int | float) for n in numbers):
                        raise UserError(f"{place}: {key} is {numbers!r}; it must be {count} numbers.")
            found.append(Scene(file, things))
        except UserError as error:
            found.append(error)
    return found
