"""Read the output of `unitok extract-codes`, any sample by its number.

A code folder holds `codes.json` (see `MANIFEST_FIELDS`) and tars of `KEY.codes.npy`, (N, K), or (I, N, K) for
a sample with other than one image, next to `KEY.json`:
{"captions": [str], "conversations": [[{"from", "value"}]], "document": [str | int], "grid": [rows, columns]},
optionally with "long_caption" and "short_caption"; the numbers in a document are those of its images. The
dtype of the codes follows from the codebook size (`open_unitok.core.codes`). With continuous features of the
images there is also `KEY.features.npy`, (M, F) or (I, M, F) in float16. Small tars may be compressed (xz,
gzip, bzip2), and are then held in memory.

I images of a sample, N visual tokens per image, K sub-codebooks, V entries per sub-codebook, M features per
image of width F.
"""

import contextlib
import hashlib
import io
import json
from collections.abc import Callable, Iterable
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from open_unitok.core.codes import code_dtype
from open_unitok.core.errors import UserError
from open_unitok.core.files import existing
from open_unitok.core.text_files import read_json

from .records import check_facts, hashed_image_key, image_key, image_name
from .tar_files import StreamedTar, is_stream
from .tar_index import BadSample, TarSample, scan_tar

CODES_MANIFEST = "codes.json"
CODES_FORMAT = "open-unitok codes 1"
MANIFEST_FIELDS = (
    "format",
    "tokenizer",  # fingerprint of the visual tokenizer
    "num_codebooks",  # K
    "codebook_size",  # V
    "num_tokens",  # N
    "shards",  # [{"file", "samples", "sha256"}]
)
LAYOUT_FIELDS = (
    "layout",  # {"rows", "columns", "registers"}, with "tokens" where it has any, see TokenLayout
    "grid",  # [rows, columns], in folders from before `layout`; without either the layout is square
    "scales",  # sides of the grids of a pyramid, whose tokens follow each other; the last is the layout's
)
# V of each of the K codes, where they differ; `codebook_size` is the largest
CODE_SIZES = "code_sizes"
# {"source", "fingerprint", "tokens", "width"} of stored features, see `FeatureFacts`
FEATURES = "features"
MAX_UNPACKED = 1 << 28  # bytes of a compressed tar
SHUFFLED_TARS = 16  # samples are shuffled within this many tars at a time: as many indexes are kept


class FeatureFacts(NamedTuple):
    """What the features beside codes are; `fingerprint` is that of their source."""

    source: str
    fingerprint: str
    tokens: int  # M
    width: int  # F


class CodeSample(NamedTuple):
    """The codes of some images, and their captions, conversations, ..."""

    key: str
    codes: np.ndarray  # (N, K) or (I, N, K)
    info: dict[str, Any]
    load_features: Callable[[], np.ndarray] | None = None  # reads (M, F) or (I, M, F) float16
    crops: int = 1  # the images are this many crops of one image

    @property
    def images(self) -> tuple[np.ndarray, ...]:
        """The codes of each image, (N, K)."""
        return (self.codes,) if self.codes.ndim == 2 else tuple(self.codes)

    @property
    def features(self) -> tuple[np.ndarray, ...]:
        """The features of each image, (M, F), read now; raises BadSample if they cannot be."""
        if self.load_features is None:
            raise BadSample("has no features")
        found = self.load_features()
        return (found,) if found.ndim == 2 else tuple(found)


class MemberOffsets(NamedTuple):
    """Where a sample is stored: its tar, and (offset, size) of its members."""

    key: str
    shard: int
    codes: tuple[int, int]
    info: tuple[int, int]
    features: tuple[int, int]


class CodeFolder:
    """The samples of one code folder.

    Args:
        fingerprint: of the visual tokenizer that the codes must be of.
        features: those that must be stored beside the codes; None = any or none.

    Raises:
        UserError: not a code folder; codes of another visual tokenizer; other features, or none.
    """

    def __init__(
        self, folder: str | Path, fingerprint: str | None = None, features: FeatureFacts | None = None
    ):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        if fingerprint is not None and self.manifest["tokenizer"] != fingerprint:
            raise UserError(
                f"The codes in {folder} were made by another visual tokenizer "
                f"({self.manifest['tokenizer'][:12]}...) than the one given ({fingerprint[:12]}...): run "
                "`unitok extract-codes` again with that one."
            )
        stored = self.manifest.get(FEATURES)
        self.features = None if stored is None else FeatureFacts(**stored)
        if features is not None:
            self._check_features(features)
        self.sizes = [shard["samples"] for shard in self.manifest["shards"]]
        self.shape = (self.manifest["num_tokens"], self.manifest["num_codebooks"])  # (N, K)
        self.dtype = code_dtype([self.manifest["codebook_size"]])
        self.code_sizes = code_sizes(self.manifest)
        self._in_memory: set[int] = set()  # shards that are compressed
        # twice, as two orders may read the same folder
        self._index = lru_cache(maxsize=2 * SHUFFLED_TARS)(self._read_index)

    def __len__(self) -> int:
        return sum(self.sizes)

    @property
    def crops(self) -> int:
        """Crops of each image: the leading axis of the codes then means "sample one"."""
        return self.manifest.get("crops", 1)

    @property
    def roots(self) -> list[str]:
        """Folders that the images came from."""
        return self.manifest.get("image_roots", [])

    @property
    def image_places(self) -> int:
        """Positions of an image in a sequence: N, or the places of the last scale of a pyramid."""
        scales = self.manifest.get("scales")
        return scales[-1] ** 2 if scales else self.shape[0]

    @property
    def codes(self) -> "CodeFolder":
        """The code folder of its images: itself."""
        return self

    @property
    def fingerprint(self) -> str:
        """Hex digest of the manifest: tokenizer, shapes, and the hash of every tar."""
        names = (*MANIFEST_FIELDS, *LAYOUT_FIELDS, CODE_SIZES)
        facts = {name: self.manifest[name] for name in names if name in self.manifest}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _check_features(self, expected: FeatureFacts) -> None:
        command = f"run `unitok extract-codes --features {expected.source}` again"
        if self.features is None:
            raise UserError(
                f"The codes in {self.folder} have no features beside them, and the model reads the features "
                f"of source {expected.source!r}: {command}."
            )
        if self.features != expected:
            differing = next(n for n, a, b in zip(expected._fields, self.features, expected) if a != b)
            found, wanted = (str(getattr(facts, differing))[:12] for facts in (self.features, expected))
            raise UserError(
                f"The features in {self.folder} are others than the model's ({differing} {found}, the model "
                f"has {wanted}): {command}, with the model's tokenizer."
            )

    def image(self, name: str) -> CodeSample:
        """The sample of the image that has this name in the folder that it came from.

        Raises:
            BadSample: no image has the name, or several do and their codes differ.
        """
        given, name = name.removeprefix("./"), image_name(name, self.roots)
        keys = dict.fromkeys((image_key(name), hashed_image_key(name), name.rpartition(".")[0]))
        near = [place for key in keys for place in self.places.get(key, ())]
        # keys that a conversion shortened or changed: look for the stored names
        samples = self._named(name, near) or self._named(name, self._places_by_file.get(name, ()))
        if not samples:
            raise BadSample(f"has the image {name}, which is not in {self.folder}")
        # two names may differ in the form of a letter alone
        found = [s for s in samples if s.info.get("file") == given] or samples
        if any(not np.array_equal(found[0].codes, other.codes) for other in found[1:]):
            raise BadSample(f"has the image {name}, which {len(found)} images in {self.folder} are called")
        return found[0]

    @cached_property
    def places(self) -> dict[str, list[MemberOffsets]]:
        """key -> where its samples are stored; reads the headers of all tars."""
        places: dict[str, list[MemberOffsets]] = {}
        missing = (0, 0)
        for shard in range(len(self.sizes)):
            for record in self._index(shard):
                members = (record.members.get(name, missing) for name in _MEMBERS)
                places.setdefault(record.key, []).append(MemberOffsets(record.key, shard, *members))
        return places

    @cached_property
    def _places_by_file(self) -> dict[str, list[MemberOffsets]]:
        """Name of an image -> where its samples are stored; reads the .json of every sample."""
        places: dict[str, list[MemberOffsets]] = {}
        for place in (place for places in self.places.values() for place in places):
            with contextlib.suppress(BadSample):
                places.setdefault(image_name(self._record(place).json()["file"]), []).append(place)
        return places

    def _named(self, name: str, places: Iterable[MemberOffsets]) -> list[CodeSample]:
        """The samples in `places` whose one image has this name."""
        samples = [self._parse(self._record(place)) for place in places]
        named = [s for s in samples if "file" in s.info and image_name(str(s.info["file"])) == name]
        # older folders do not store names: there the key decides
        found = named or [sample for sample in samples if "file" not in sample.info]
        return [sample for sample in found if sample.codes.ndim == 2]

    def _record(self, place: MemberOffsets) -> TarSample:
        if place.shard in self._in_memory:
            return next(r for r in self._index(place.shard) if r.members.get(_MEMBERS[0]) == place.codes)
        path = str(self.folder / self.manifest["shards"][place.shard]["file"])
        offsets = (place.codes, place.info, place.features)
        members = {name: at for name, at in zip(_MEMBERS, offsets) if at != (0, 0)}
        return TarSample(path, place.key, members)

    def check_shard(self, shard: int) -> None:
        """Raises UserError if tar `shard` is missing or cut off, or has more or fewer samples than listed."""
        self._index(shard)

    def _read_index(self, shard: int) -> list[TarSample]:
        path = self.folder / self.manifest["shards"][shard]["file"]
        existing(path, "Run `unitok extract-codes` again.")
        # absolute: a name is not read as a URL, a command or stdin
        if is_stream(absolute := str(path.absolute())):
            self._in_memory.add(shard)
            stream = StreamedTar(absolute, limit=MAX_UNPACKED)
            records, problem = list(stream), stream.problem
        else:
            records, problem, _ = scan_tar(str(path))
        if problem or len(records) != self.sizes[shard]:
            raise UserError(
                f"{path} is broken ({problem or f'{len(records)} samples'}; {CODES_MANIFEST} lists "
                f"{self.sizes[shard]}): delete it and run `unitok extract-codes` again."
            )
        return records

    def read(self, shard: int, number: int) -> CodeSample:
        """Sample `number` of tar `shard`; raises BadSample if it cannot be used."""
        return self._parse(self._index(shard)[number])

    def _parse(self, record: TarSample) -> CodeSample:
        info = record.json("json")
        if not isinstance(info, dict):
            raise BadSample(f".json holds {type(info).__name__}, expected a mapping")
        # (N, K) for one image, (I, N, K) otherwise
        codes = _read_npy(record.read("codes.npy"), self.shape, self.dtype)
        if codes.dtype != self.dtype or self.shape not in (codes.shape, codes.shape[1:]):
            raise BadSample(f".codes.npy is {codes.dtype} {codes.shape}, expected {self.dtype} {self.shape}")
        if codes.size and codes.max() >= self.manifest["codebook_size"]:
            raise BadSample(f"code {codes.max()} is not below {self.manifest['codebook_size']}")
        if codes.size and CODE_SIZES in self.manifest:
            highest = codes.reshape(-1, self.shape[1]).max(axis=0).tolist()
            if any(code >= size for code, size in zip(highest, self.code_sizes)):
                raise BadSample(f"codes go up to {highest}, which are not below {self.code_sizes}")
        load = None if self.features is None else partial(self._read_features, record, codes.shape[:-2])
        return CodeSample(record.key, codes, info, load, self.crops)

    def _read_features(self, record: TarSample, images: tuple[int, ...]) -> np.ndarray:
        """(M, F) or (I, M, F); `images` is () or (I,)."""
        assert self.features is not None
        if "features.npy" not in record.members:
            raise BadSample("has no .features.npy")
        shape = (self.features.tokens, self.features.width)
        found = _read_npy(record.read("features.npy"), shape, np.dtype(np.float16), "features")
        if found.dtype != np.float16 or found.shape != (*images, *shape):
            raise BadSample(
                f".features.npy is {found.dtype} {found.shape}, expected float16 {(*images, *shape)}"
            )
        return found


# in the order of `MemberOffsets`
_MEMBERS = ("codes.npy", "json", "features.npy")


def _read_npy(data: bytes, shape: tuple[int, int], dtype: np.dtype, name: str = "codes") -> np.ndarray:
    """The array of an .npy file."""
    # np.load parses the header as Python, which is slow: skip it for one image of the expected shape
    header = _npy_header(shape, dtype)
    if data.startswith(header) and len(data) == len(header) + dtype.itemsize * shape[0] * shape[1]:
        return np.frombuffer(data, dtype=dtype, offset=len(header)).reshape(shape)
    try:
        return np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError) as error:  # numpy's own message is about pickles
        raise BadSample(f".{name}.npy cannot be read: it is not an .npy file of numbers") from error


@lru_cache
def _npy_header(shape: tuple[int, int], dtype: np.dtype) -> bytes:
    file = io.BytesIO()
    zeros = np.zeros(shape, dtype=dtype)
    np.save(file, zeros)
    return file.getvalue()[: -zeros.nbytes]


def code_sizes(manifest: dict[str, Any]) -> list[int]:
    """V of each of the K codes."""
    return manifest.get(CODE_SIZES) or [manifest["codebook_size"]] * manifest["num_codebooks"]


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The contents of a code folder's `codes.json`.

    Raises:
        UserError: it is missing or malformed.
    """
    path = Path(folder) / CODES_MANIFEST
    hint = "Its extraction is not finished: run the same `unitok extract-codes` again."
    manifest = read_json(
        existing(path, hint if Path(folder).is_dir() else "Run `unitok extract-codes` first.")
    )
    if isinstance(manifest, dict) and "pictures" in manifest:  # key of `images` in older folders
        manifest["images"] = manifest.pop("pictures")
    missing = (
        [name for name in MANIFEST_FIELDS if name not in manifest] if isinstance(manifest, dict) else ["all"]
    )
    if missing or manifest["format"] != CODES_FORMAT:
        raise UserError(
            f"{path} is not the manifest of a code folder (format {CODES_FORMAT!r}); missing keys: "
            f"{', '.join(missing) or 'none'}."
        )
    _check_manifest(path, manifest)
    return manifest


def _check_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Raises UserError if a value has another type than extraction writes."""
    remedy = "run `unitok extract-codes` again"
    sizes = dict.fromkeys(("num_codebooks", "codebook_size", "num_tokens"), int)
    others = {
        "scales": list,
        "mode": str,
        "oblong": int,
        "crops": int,
        "labels": dict,
        "samples": int,
        "images": int,
        "notes": dict,
        "image_roots": list,
    }
    given = {name: kind for name, kind in others.items() if name in manifest}
    check_facts(path, manifest, {"tokenizer": str, **sizes, "shards": list, **given}, remedy)
    for name in sizes:
        if manifest[name] < 1:
            raise UserError(f"{path} is damaged: {name} is {manifest[name]}; {remedy}.")
    if manifest.get(FEATURES) is not None:
        kinds = {"source": str, "fingerprint": str, "tokens": int, "width": int}
        check_facts(path, manifest[FEATURES], kinds, remedy)
        manifest[FEATURES] = {name: manifest[FEATURES][name] for name in kinds}
    own = manifest.get(CODE_SIZES, [manifest["codebook_size"]] * manifest["num_codebooks"])
    whole = isinstance(own, list) and all(type(size) is int and size > 0 for size in own)
    if not whole or len(own) != manifest["num_codebooks"] or max(own) != manifest["codebook_size"]:
        raise UserError(
            f"{path} is damaged: {CODE_SIZES} is {str(own)[:80]}, with num_codebooks = "
            f"{manifest['num_codebooks']} and codebook_size = {manifest['codebook_size']}; {remedy}."
        )
    for shard in manifest["shards"]:
        kinds = {"file": str, "samples": int, "sha256": str}
        check_facts(path, shard, kinds, remedy)
        # tars lie in the folder: no path, command or URL
        if Path(shard["file"]).name != shard["file"] or ":" in shard["file"] or shard["samples"] < 0:
            raise UserError(f"{path} is damaged: {str(shard)[:80]} is not a tar of its folder; {remedy}.")
    if not all(isinstance(root, str) for root in manifest.get("image_roots", [])):
        raise UserError(f"{path} is damaged: image_roots are not texts; {remedy}.")
