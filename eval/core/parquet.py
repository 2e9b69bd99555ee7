"""Parquet files of data sets on the Hugging Face hub, as a clone or download leaves them, with images inside.

A split is a number of files, `test-00000-of-00003.parquet`; the folder above names the configuration, "data"
for the default one. Rows are read without their images: an image stays a `ParquetImage` until it is needed.
"""

import functools
import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing

from .benchmark import Record

DEFAULT_CONFIGURATION = "data"
# test-00000-of-00003.parquet, or with the hash that older uploads have: test-00000-of-00004-53ae1794f93b1e35
_PART = re.compile(r"(?P<split>.+?)-(?P<part>\d{5})-of-(?P<parts>\d{5})(-[0-9a-f]{16})?")
_MARK = ".parquet#"  # separates file and row in the text of an image
_POINTER = b"version https://git-lfs.github.com/spec/"


class ParquetImage(NamedTuple):
    """An image inside a parquet file; its text, FILE.parquet#ROW/COLUMN/ITEM, goes into result files."""

    name: str  # FILE-ROW; a benchmark whose other columns name the image replaces it
    file: Path
    row: int
    column: str = "image"
    item: int = 0  # in a column of lists

    def __str__(self) -> str:
        return f"{self.file}#{self.row}/{self.column}/{self.item}"

    def read(self) -> bytes:
        """The bytes of the image file.

        Raises:
            UserError: the row has no image, or one stored outside of the parquet file that is missing.
        """
        cell = _image_cell(self.file, self.row, self.column)
        cell = cell[self.item] if isinstance(cell, list) and self.item < len(cell) else cell
        if isinstance(cell, bytes):
            return cell
        if isinstance(cell, dict) and cell.get("bytes"):
            return cell["bytes"]
        path = cell.get("path") if isinstance(cell, dict) else None
        # an image may also stay outside of the table, with its path relative to the table or its data set
        inside = path and not Path(path).is_absolute() and ".." not in Path(path).parts
        for folder in (self.file.parent, self.file.parent.parent) if inside else ():
            file = folder / str(path)
            if file.is_file():
                return file.read_bytes()
        raise UserError(f"{self.file}, row {self.row}: {self.column} holds no image.")

    def digest(self) -> str:
        """A hash of the image file: equal for rows about one image."""
        return hashlib.sha256(self.read()).hexdigest()


def parquet_image(text: str) -> ParquetImage | None:
    """The image that `str` of a `ParquetImage` names; None for any other text."""
    stem, mark, place = text.rpartition(_MARK)
    if not mark or place.count("/") != 2:
        return None
    row, column, item = place.split("/")
    return ParquetImage(place, Path(stem + ".parquet"), int(row), column, int(item))


class ParquetSplit(NamedTuple):
    """The files of one split of one configuration, in order."""

    configuration: str
    split: str
    files: tuple[Path, ...]


def holds_parquet(data: str | Path) -> bool:
    """Whether `data` is a parquet file or a folder with some."""
    return bool(_parquet_files(Path(data)))


def find_splits(data: str | Path) -> list[ParquetSplit]:
    """The splits in a data set's folder, a folder of one configuration, or a single file; [] without any.

    Raises:
        UserError: a part of a split is missing, or a file is a Git LFS pointer.
    """
    found: dict[tuple[str, str], dict[str, Path]] = {}
    for path in _parquet_files(existing(data)):
        match, above = _PART.fullmatch(path.stem), path.parent.name
        # the hub's own conversion: default/test/0000.parquet
        if not match and path.stem.isdecimal() and path.parent != Path(data):
            key = (path.parent.parent.name, above)
        else:
            key = (above, match["split"] if match else path.stem)
        part = match["part"] if match else path.stem
        if part in (parts := found.setdefault(key, {})):
            raise UserError(f"{parts[part]} and {path.name} are the same part of split {key[1]}: remove one.")
        parts[part] = path
    splits = [ParquetSplit(*key, tuple(parts.values())) for key, parts in found.items()]
    if not Path(data).is_file():  # one file of several is what the user asked for
        for split in splits:
            _require_all_parts(split)
    return splits


def _parquet_files(data: Path) -> list[Path]:
    """The parquet files in and up to three folders below `data`, sorted."""
    if data.is_file():
        return [data] if data.suffix == ".parquet" else []
    # not below hidden folders: .cache/huggingface, .git
    paths = (p for depth in range(4) for p in data.glob("*/" * depth + "*.parquet"))
    return sorted(p for p in paths if not any(part.startswith(".") for part in p.relative_to(data).parts))


def _require_all_parts(split: ParquetSplit) -> None:
    """UserError if a part of the split is missing: an interrupted download must not become a number."""
    names = [_PART.fullmatch(path.stem) for path in split.files]
    parts = {int(match["part"]) for match in names if match}
    for match in names:
        if match and (missing := set(range(int(match["parts"]))) - parts):
            first = f"{split.split}-{min(missing):05d}-of-{match['parts']}.parquet"
            raise UserError(
                f"{split.files[0].parent}: {len(missing)} of {int(match['parts'])} files of split "
                f"{split.split} are missing, the first is {first}."
            )


def choose_split(
    data: str | Path,
    split: str | None = None,
    defaults: Sequence[str] = (),
    configurations: Sequence[str] = (),
) -> ParquetSplit:
    """The split that a benchmark reads.

    Args:
        split: SPLIT or CONFIGURATION/SPLIT, from the user.
        defaults: the splits to take if the user names none, the first that exists.
        configurations: likewise; after them the default configuration.

    Raises:
        UserError: there is no such split, or there are several.
    """
    found = find_splits(data)
    configuration, _, name = split.rpartition("/") if split else ("", "", "")
    names = ", ".join(f"{s.configuration}/{s.split}" for s in found) or "no parquet file"
    chosen = [s for s in found if (not name or s.split == name)]
    chosen = [s for s in chosen if not configuration or s.configuration == configuration]
    for preferred in () if configuration else (*configurations, DEFAULT_CONFIGURATION, "default"):
        chosen = [s for s in chosen if s.configuration == preferred] or chosen
    for preferred in () if name else defaults:
        chosen = [s for s in chosen if s.split == preferred] or chosen
    if len(chosen) != 1:
        wanted = f"one split {split}" if split else f"one split ({' or '.join(defaults) or 'any'})"
        raise UserError(
            f"{data}: expected {wanted}, found {names}. Choose one with --split, or point to its file."
        )
    return chosen[0]


def read_parquet(
    files: Sequence[Path], required: Sequence[str] = (), images: Sequence[str] = ()
) -> Iterator[Record]:
    """Yield the rows of some files in order; every column with images has a `ParquetImage`, a list, or None.

    The bytes of images are not read. A row has the text of its place under "#".

    Args:
        required: columns that must exist.
        images: columns of images as plain bytes; columns of struct{bytes, path} need not be named.

    Raises:
        UserError: a file is not a readable parquet file, or a column is missing.
    """
    for path in files:
        file = _open(path)
        names = file.schema_arrow.names
        if missing := [name for name in required if name not in names]:
            raise UserError(
                f"{path}: the columns {', '.join(missing)} are missing; there are {', '.join(names)}."
            )
        image_columns = {*_image_columns(file), *(name for name in images if name in names)}
        leaves = [file.schema.column(i).path for i in range(len(file.schema))]
        # of an image only its path is read: that also tells a row with an image from one without
        wanted = [
            leaf
            for leaf in leaves
            if leaf.split(".")[0] not in image_columns or leaf.split(".")[-1] == "path"
        ]
        row_number = 0
        for batch in _batches(file, path, wanted):
            for row in batch.to_pylist():
                for name in image_columns:
                    row[name] = _references(row.get(name, {}), path, row_number, name)
                yield row | {"#": f"{path}, row {row_number}"}
                row_number += 1


def _batches(file: Any, path: Path, columns: Sequence[str]) -> Iterator[Any]:
    """The rows of a file in batches; UserError if a part of it is damaged."""
    import pyarrow

    batches = file.iter_batches(batch_size=1024, columns=columns)
    while True:
        try:
            batch = next(batches, None)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path} is damaged: {str(error).splitlines()[0]}") from error
        if batch is None:
            return
        yield batch


def row_image(row: Record, name: str, column: str = "image") -> ParquetImage:
    """The image of a row under the file name that it has in the release.

    Raises:
        UserError: the row has none.
    """
    if not isinstance(row[column], ParquetImage):
        raise UserError(f"{row['#']}: {column} is empty.")
    return row[column]._replace(name=name)


def _references(cell: Any, path: Path, row: int, column: str) -> Any:
    """The image or images of a cell without its bytes; None for an empty one."""
    if isinstance(cell, list):
        images = [_references(item, path, row, column) for item in cell]
        return [image._replace(item=i) for i, image in enumerate(images) if image]
    if cell is None:
        return None
    # not the stored path: many rows have none, others all have the same
    return ParquetImage(f"{path.stem}-{row}", path, row, column)


def _image_columns(file: Any) -> list[str]:
    """The columns of struct{bytes, path}, or of lists of them."""
    columns = []
    for field in file.schema_arrow:
        # lists have a value_type
        kind = getattr(field.type, "value_type", field.type)
        members = {kind.field(i).name for i in range(getattr(kind, "num_fields", 0))}
        if {"bytes", "path"} <= members:
            columns.append(field.name)
    return columns


def _open(path: Path) -> Any:
    """The open parquet file."""
    status = existing(path).stat()
    return _open_once(path, status.st_size, status.st_mtime_ns)


# reading the metadata of a file costs more than reading a row
@functools.lru_cache(maxsize=64)
def _open_once(path: Path, size: int, changed: int) -> Any:
    """The open parquet file; size and time tell a file that was replaced from the one before."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"Reading {path} needs pyarrow: pip install 'open-unitok[eval]'.") from error
    with open(path, "rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise UserError(
                f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder."
            )
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable parquet file: {str(error).splitlines()[0]}") from error


def _image_cell(path: Path, row: int, column: str) -> Any:
    """The cell of a row, with the bytes of its image."""
    metadata = _open(path).metadata
    for group in range(metadata.num_row_groups):
        size = metadata.row_group(group).num_rows
        if row < size:
            return _image_group(_open(path), path, group, column)[row].as_py()
        row -= size
    raise UserError(f"{path} has no row {row}.")


# neighbouring questions are about neighbouring rows; two groups, since questions may alternate between files
@functools.lru_cache(maxsize=2)
def _image_group(file: Any, path: Path, group: int, column: str) -> Any:
    """The column of images of one row group, still encoded as image files."""
    import pyarrow

    try:
        return file.read_row_group(group, columns=[column]).column(column)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged: {str(error).splitlines()[0]}") from error
