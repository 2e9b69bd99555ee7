"""Reading what `unitok extract-codes` wrote: samples by number.

A code folder holds `codes.json` (see `MANIFEST_FIELDS`) and tars of `KEY.codes.npy`, uint16 (N, K), or
(I, N, K) for a sample of another number of images than one, beside `KEY.json`:
{"captions": [str], "conversations": [[{"from", "value"}]], "document": [str | int], "grid": [rows, columns]};
a "long_caption" and a "short_caption" may stand there too, and the numbers in a document are those of its
images.

I images of a sample, N visual tokens per image, K sub-codebooks, V entries per sub-codebook.
"""

import hashlib
import io
import json
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing, read_json

from .tar_index import BadSample, Record, index

CODES_MANIFEST = "codes.json"
FORMAT = "open-unitok codes 1"
MANIFEST_FIELDS = (
    "format",
    "tokenizer",  # fingerprint of the visual tokenizer
    "num_codebooks",  # K
    "codebook_size",  # V
    "num_tokens",  # N
    "grid",  # [rows, columns]
    "shards",  # [{"file", "samples", "sha256"}]
)
SHUFFLED_TARS = 16  # samples are shuffled within this many tars at a time: as many indexes are kept


class CodeSample(NamedTuple):
    """Some images as codes, and what is said of them."""

    key: str
    codes: np.ndarray  # (N, K) uint16, or (I, N, K)
    info: dict[str, Any]

    @property
    def images(self) -> tuple[np.ndarray, ...]:
        """The codes of each image, (N, K)."""
        return (self.codes,) if self.codes.ndim == 2 else tuple(self.codes)


class MemberOffsets(NamedTuple):
    """Where a sample is stored: its tar, and (offset, size) of its two members."""

    shard: int
    codes: tuple[int, int]
    info: tuple[int, int]


class CodeFolder:
    """The samples of one code folder.

    Raises:
        UserError: no code folder; or its codes were made by another visual tokenizer than `fingerprint`.
    """

    def __init__(self, folder: str | Path, fingerprint: str | None = None):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        if fingerprint is not None and self.manifest["tokenizer"] != fingerprint:
            raise UserError(
                f"The codes in {folder} were made by another visual tokenizer "
                f"({self.manifest['tokenizer'][:12]}...) than the one given ({fingerprint[:12]}...): run "
                "`unitok extract-codes` again with that one."
            )
        self.sizes = [shard["samples"] for shard in self.manifest["shards"]]
        self._index = lru_cache(maxsize=2 * SHUFFLED_TARS)(self._index_of)

    def __len__(self) -> int:
        return sum(self.sizes)

    @property
    def codes(self) -> "CodeFolder":
        """Where the codes of its images are: itself."""
        return self

    @property
    def fingerprint(self) -> str:
        """Hex digest of the manifest: tokenizer, shapes, and the hash of every tar."""
        facts = {name: self.manifest[name] for name in MANIFEST_FIELDS}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def member_offsets(self) -> dict[str, MemberOffsets]:
        """key -> where the sample is stored, for reading in any order; reads the headers of all tars."""
        missing = (0, 0)
        return {
            record.key: MemberOffsets(
                shard, record.members.get("codes.npy", missing), record.members.get("json", missing)
            )
            for shard in range(len(self.sizes))
            for record in self._index(shard)
        }

    def read_at(self, key: str, at: MemberOffsets) -> CodeSample:
        """The sample at one of `member_offsets`; raises BadSample if it cannot be used."""
        path = str(self.folder / self.manifest["shards"][at.shard]["file"])
        return self._parse(Record(path, key, {"codes.npy": at.codes, "json": at.info}))

    def check_shard(self, shard: int) -> None:
        """Raises UserError if tar `shard` is missing, cut off, or has other samples than it should."""
        self._index(shard)

    def _index_of(self, shard: int) -> Any:
        path = self.folder / self.manifest["shards"][shard]["file"]
        records, problem = index(str(existing(path, "Run `unitok extract-codes` again.")))
        if problem or len(records) != self.sizes[shard]:
            raise UserError(
                f"{path} is broken ({problem or f'{len(records)} samples'}; {CODES_MANIFEST} lists "
                f"{self.sizes[shard]}): delete it and run `unitok extract-codes` again."
            )
        return records

    def read(self, shard: int, number: int) -> CodeSample:
        """Sample `number` of tar `shard`; raises BadSample if it cannot be used."""
        return self._parse(self._index(shard)[number])

    def _parse(self, record: Record) -> CodeSample:
        info = record.json("json")
        if not isinstance(info, dict):
            raise BadSample(".json holds no mapping")
        shape = (self.manifest["num_tokens"], self.manifest["num_codebooks"])
        codes = _array(record.read("codes.npy"), shape)
        if codes.dtype != np.uint16 or shape not in (codes.shape, codes.shape[1:]):
            raise BadSample(f".codes.npy is {codes.dtype} {codes.shape}, uint16 {shape} is wanted")
        if codes.size and codes.max() >= self.manifest["codebook_size"]:
            raise BadSample(f"code {codes.max()} is not below {self.manifest['codebook_size']}")
        return CodeSample(record.key, codes, info)


def _array(data: bytes, shape: tuple[int, int]) -> np.ndarray:
    """The array of an .npy file; where its head is that of uint16 of this shape, without parsing it again."""
    head = _npy_head(shape)
    if data.startswith(head) and len(data) == len(head) + 2 * shape[0] * shape[1]:
        return np.frombuffer(data, dtype=np.uint16, offset=len(head)).reshape(shape)
    try:
        return np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError) as error:  # its own words speak of pickles
        raise BadSample(".codes.npy cannot be read: it is no .npy file of numbers") from error


@lru_cache
def _npy_head(shape: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(shape, dtype=np.uint16))
    return file.getvalue()[: -2 * shape[0] * shape[1]]


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The contents of a code folder's `codes.json`.

    Raises:
        UserError: it is missing or is of another kind.
    """
    path = Path(folder) / CODES_MANIFEST
    hint = "Its extraction is not finished: run the same `unitok extract-codes` again."
    manifest = read_json(
        existing(path, hint if Path(folder).is_dir() else "Run `unitok extract-codes` first.")
    )
    if isinstance(manifest, dict) and "pictures" in manifest:  # what `images` was called before 0.2
        manifest["images"] = manifest.pop("pictures")
    lacking = (
        [name for name in MANIFEST_FIELDS if name not in manifest] if isinstance(manifest, dict) else ["all"]
    )
    if lacking or manifest["format"] != FORMAT:
        raise UserError(
            f"{path} is not the list of a code folder (format {FORMAT!r}): lacking {', '.join(lacking)}."
        )
    return manifest
