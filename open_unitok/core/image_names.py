"""Which files are images by their names: one list of suffixes, compared without case."""

import functools
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

# of image files, in lower case; compare without case
IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jpe",
    ".jfif", ".jp2", ".dib", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico",
)  # fmt: skip
_SHOWN = 3  # names per reason in a note
_VECTOR_SUFFIXES = (".svg", ".svgz", ".eps", ".pdf", ".ai")
# what lies beside images: captions, annotations, other shards
_COMPANIONS = (
    ".txt", ".caption", ".json", ".jsonl", ".csv", ".tsv", ".cls", ".tar", ".npz", ".npy", ".parquet", ".zip",
    ".md", ".html", ".yaml", ".yml", ".xml", ".log",
)  # fmt: skip


class ImageFiles(NamedTuple):
    """Sorted paths of images below a folder, the paths left out by reason, and the files that lie beside
    images: captions, annotations, shards."""

    images: list[Path]
    left_out: dict[str, list[Path]]
    companions: list[Path]

    def note(self, folder: str | os.PathLike[str]) -> str:
        """One line that counts and names what is left out; "" if nothing is."""
        parts = []
        for reason, paths in self.left_out.items():
            names = ", ".join(os.path.relpath(path, folder) for path in paths[:_SHOWN])
            parts.append(f"{len(paths):,} {reason} ({names}{', ...' if len(paths) > _SHOWN else ''})")
        return f"left out: {'; '.join(parts)}" if parts else ""


def find_images(folder: str | os.PathLike[str], recursive: bool = True) -> ImageFiles:
    """All images below `folder`, those in linked folders too.

    Left out are hidden files and folders, vector graphics, files that do not exist or are no regular files,
    and linked folders that are read already, which ends loops.
    """
    images: list[Path] = []
    left_out: dict[str, list[Path]] = {}
    companions: list[Path] = []
    for path, reason in _walk(Path(folder), recursive):
        if reason:
            left_out.setdefault(reason, []).append(path)
        elif is_image_name(path):
            images.append(path)
        elif path.suffix.lower() in _VECTOR_SUFFIXES:
            kind = path.suffix.lower()[1:]
            left_out.setdefault(f"{kind} files, which are not read", []).append(path)
        elif path.suffix.lower() in _COMPANIONS:
            companions.append(path)
        else:
            left_out.setdefault("files with another suffix", []).append(path)
    sorted_out = {reason: sorted(paths) for reason, paths in left_out.items()}
    return ImageFiles(sorted(images), sorted_out, sorted(companions))


def is_image_name(name: str | os.PathLike[str]) -> bool:
    """Whether a file name ends with one of `IMAGE_SUFFIXES`, in any case."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def find_sibling(path: Path, suffixes: Sequence[str]) -> Path | None:
    """The file beside `path` with its stem and the first of `suffixes` (lower case) in any case, or None."""
    listing = _names(path.parent, path.parent.stat().st_mtime_ns)
    name = next((listing[key] for s in suffixes if (key := path.stem + s) in listing), None)
    return path.with_name(name) if name else None


# one listing per folder instead of a search per image; the time makes a changed folder another key
@functools.lru_cache(maxsize=8)
def _names(folder: Path, _changed: int) -> dict[str, str]:
    """File names by the same name with a lower-case suffix; an exact match wins."""
    found: dict[str, str] = {}
    for name in sorted(os.listdir(folder)):
        stem, suffix = os.path.splitext(name)
        if os.path.isfile(folder / name):
            found[stem + suffix.lower()] = name
    return found


def _walk(folder: Path, recursive: bool) -> Iterator[tuple[Path, str]]:
    """(path of a file, why it cannot be an image or "")."""
    seen: set[tuple[int, int]] = set()
    # linked folders come last: a folder that is reached both ways keeps its own name
    folders, linked = [folder], []
    while folders or linked:
        current = folders.pop() if folders else linked.pop(0)
        status = current.stat()
        if (status.st_dev, status.st_ino) in seen:
            yield current, "linked folders that are read already"
            continue
        seen.add((status.st_dev, status.st_ino))
        try:
            entries = sorted(os.scandir(current), key=lambda entry: entry.name)
        except OSError:
            yield current, "folders that cannot be opened"
            continue
        for entry in entries:
            path = Path(entry.path)
            try:
                mode = entry.stat().st_mode
            except OSError:
                if is_image_name(path):
                    yield path, "links that lead nowhere"
                continue
            if stat.S_ISDIR(mode):
                if entry.name.startswith("."):
                    yield path, "hidden"
                elif recursive:
                    (linked if entry.is_symlink() else folders).append(path)
            elif entry.name.startswith("."):
                if is_image_name(path):
                    yield path, "hidden"
            elif stat.S_ISREG(mode):
                yield path, ""
            elif is_image_name(path):
                yield path, "not regular files"
