"""Reading what `unitok extract-codes` wrote: samples by number, in an order fixed by a seed.

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

from . import seeding
from .tar_index import BadSample, Record, index

MANIFEST = "codes.json"
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
SUITED = {"text_to_image": "crop", "conversation": "pad", "alignment": "pad"}  # kind -> extract-codes --mode
SHARDS_AT_ONCE = 16  # samples are shuffled within so many tars: as many are kept open and indexed


class CodeSample(NamedTuple):
    """Some images as codes, and what is said of them."""

    key: str
    codes: np.ndarray  # (N, K) uint16, or (I, N, K)
    info: dict[str, Any]

    @property
    def images(self) -> tuple[np.ndarray, ...]:
        """The codes of each image, (N, K)."""
        return (self.codes,) if self.codes.ndim == 2 else tuple(self.codes)


class Place(NamedTuple):
    """Where a sample lies: its tar, and (offset, size) of its two members."""

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
        self._index = lru_cache(maxsize=2 * SHARDS_AT_ONCE)(self._index_of)

    def __len__(self) -> int:
        return sum(self.sizes)

    @property
    def fingerprint(self) -> str:
        """Hex digest of the manifest: tokenizer, shapes, and the hash of every tar."""
        facts = {name: self.manifest[name] for name in MANIFEST_FIELDS}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def unsuited(self, kind: str) -> str | None:
        """One line where images were made square in another way than suits `kind`, else None."""
        mode, oblong = self.manifest.get("mode"), self.manifest.get("oblong", 0)  # of older folders: unknown
        if not oblong or mode in (None, SUITED.get(kind, mode)):
            return None
        return (
            f"{self.folder}: {oblong} of {self.manifest['images']} images were not square and came "
            f"through --mode {mode}; kind {kind} wants codes of `unitok extract-codes --mode {SUITED[kind]}`."
        )

    def places(self) -> dict[str, Place]:
        """key -> where the sample lies, for reading in any order; looks at the headers of all tars."""
        nothing = (0, 0)
        return {
            record.key: Place(
                shard, record.members.get("codes.npy", nothing), record.members.get("json", nothing)
            )
            for shard in range(len(self.sizes))
            for record in self._index(shard)
        }

    def read_at(self, key: str, place: Place) -> CodeSample:
        """The sample at one of `places`; raises BadSample if it cannot be used."""
        path = str(self.folder / self.manifest["shards"][place.shard]["file"])
        return self._parse(Record(path, key, {"codes.npy": place.codes, "json": place.info}))

    def check_shard(self, shard: int) -> None:
        """Raises UserError if tar `shard` is missing, cut off, or has other samples than it should."""
        self._index(shard)

    def _index_of(self, shard: int) -> Any:
        path = self.folder / self.manifest["shards"][shard]["file"]
        records, problem = index(str(existing(path, "Run `unitok extract-codes` again.")))
        if problem or len(records) != self.sizes[shard]:
            raise UserError(
                f"{path} is broken ({problem or f'{len(records)} samples'}; {MANIFEST} lists "
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
    path = Path(folder) / MANIFEST
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


class Order:
    """Which sample comes at which place, without end: every epoch is a new shuffle, a function of the seed.

    The tars of an epoch are shuffled, then their samples within groups of `SHARDS_AT_ONCE` tars, so that a
    large data set is read tar by tar; a small one is one group, and so shuffled as a whole.
    """

    def __init__(self, sizes: list[int], seed: int, name: str):
        self.sizes, self.seed, self.name = sizes, seed, name
        self.total = sum(sizes)
        self._epoch = lru_cache(maxsize=2)(self._epoch_of)
        self._group = lru_cache(maxsize=2)(self._group_of)

    def __getitem__(self, place: int) -> tuple[int, int]:
        """(shard, number in it) of the sample at `place`, counted from the first epoch on."""
        epoch, within = divmod(place, self.total)
        shards, ends = self._epoch(epoch)
        group = int(np.searchsorted(ends, within, side="right"))
        chosen = shards[group * SHARDS_AT_ONCE : (group + 1) * SHARDS_AT_ONCE]
        starts, shuffled = self._group(epoch, group, tuple(chosen))
        number = int(shuffled[within - (int(ends[group - 1]) if group else 0)])
        at = int(np.searchsorted(starts, number, side="right")) - 1
        return chosen[at], number - int(starts[at])

    def _epoch_of(self, epoch: int) -> tuple[list[int], np.ndarray]:
        shards = [shard for shard, size in enumerate(self.sizes) if size]
        seeding.python_random(self.seed, "tars", self.name, epoch).shuffle(shards)
        groups = [shards[i : i + SHARDS_AT_ONCE] for i in range(0, len(shards), SHARDS_AT_ONCE)]
        return shards, np.cumsum([sum(self.sizes[s] for s in group) for group in groups])

    def _group_of(self, epoch: int, group: int, chosen: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        sizes = [self.sizes[shard] for shard in chosen]
        import torch

        random = seeding.torch_generator(self.seed, "samples", self.name, epoch, group)
        return np.cumsum([0, *sizes[:-1]]), torch.randperm(sum(sizes), generator=random).numpy()
