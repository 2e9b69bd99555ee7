"""Images inside tar files (webdataset layout), named as if the tar were a folder: shard.tar/000001.jpg."""

import functools
import tarfile
from pathlib import Path

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing


@functools.lru_cache(maxsize=64)
def index(tar: Path) -> dict[str, tuple[int, int]]:
    """Member -> (offset, size) of all files in a tar, in its order; nothing is unpacked.

    Raises:
        UserError: it is no plain tar file, or it is cut off.
    """
    try:
        with tarfile.open(tar, "r:") as file:
            found = {m.name: (m.offset_data, m.size) for m in file if m.isfile()}
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{tar} is no tar file that can be read: {error}") from error
    end = max((offset + size for offset, size in found.values()), default=0)
    if end > tar.stat().st_size:
        raise UserError(f"{tar} is cut off: its last file ends beyond the end of the tar.")
    return found


def split(path: Path) -> tuple[Path, str] | None:
    """shard.tar/member -> (shard.tar, member); None for a path that goes through no tar."""
    for parent in path.parents:
        if parent.suffix == ".tar" and parent.is_file():
            return parent, path.relative_to(parent).as_posix()
    return None


def read(tar: Path, member: str) -> bytes:
    """The bytes of one member, or a UserError that names it."""
    places = index(existing(tar))
    if member not in places:
        raise UserError(f"{tar} holds no {member}.")
    offset, size = places[member]
    with open(tar, "rb") as file:
        file.seek(offset)
        return file.read(size)


def members(tar: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The members with one of these suffixes, as paths through the tar, in its order."""
    return [tar / name for name in index(tar) if Path(name).suffix in suffixes]


def beside(image: Path, suffix: str) -> bytes | None:
    """What lies beside a member under the same key, such as its class in .cls; None where nothing does."""
    place = split(image)
    if place is None:
        return None
    tar, name = place
    folder, _, file = name.rpartition("/")
    key = (folder + "/" if folder else "") + file.split(".")[0]
    return read(tar, key + suffix) if key + suffix in index(tar) else None
