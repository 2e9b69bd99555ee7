"""Write replay data: some samples of a model's training data, small enough to be stored with the model.

A folder with `replay.json` and one compressed code shard, see `training/data/mixture_options.py`.
"""

import io
import json
import lzma
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from open_unitok.core.errors import UserError
from open_unitok.core.files import atomic_folder, sha256, write_json

from ..core.config import build_config
from ..data.code_shards import (
    CODE_SIZES,
    CODES_MANIFEST,
    FEATURES,
    LAYOUT_FIELDS,
    MANIFEST_FIELDS,
    CodeFolder,
    CodeSample,
)
from ..data.mixture_options import REPLAY_FILE, REPLAY_FORMAT, MixtureOptions
from ..data.records import unused_key
from ..data.sample_kinds import CODE_FOLDER, SAMPLE_KINDS, DropOptions
from ..data.seeding import python_random
from ..data.tar_files import tar_writer, write_sample
from ..data.tar_index import BadSample

LISTS = ("captions", "conversations")  # fields of KEY.json of which training samples one text
# of codes.json: what codes are, not where they came from
_KEPT_FACTS = (
    *MANIFEST_FIELDS,
    *LAYOUT_FIELDS,
    CODE_SIZES,
    FEATURES,
    "image_size",
    "mode",
    "crops",
    "labels",
)
# bytes are coded in the context of their position, i.e. of their sub-codebook, and not of the byte before
_XZ = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 4, "pb": 4}]


class ReplayFacts(NamedTuple):
    """What `write_replay` wrote."""

    samples: int
    unusable: int  # samples that were left out, since a kind cannot use them
    num_bytes: int


def write_replay(
    codes: CodeFolder, kinds: Mapping[str, float], out: Path, *, samples: int, texts: int, seed: int = 0
) -> ReplayFacts:
    """Write a replay folder with evenly spaced samples of a code folder.

    Args:
        kinds: kind -> share, as in the training of the base.
        samples: at most this many.
        texts: captions and conversations that a sample keeps, at most this many of each.

    Raises:
        UserError: a kind is not made of codes, or can use no sample.
    """
    entries = [{"kind": kind, "path": ".", "weight": weight} for kind, weight in kinds.items()]
    for entry in build_config(MixtureOptions, {"mixture": entries}).mixture:
        if entry.dataset != CODE_FOLDER:
            raise UserError(f"--kinds: {entry.kind} is not made of codes; one of {', '.join(_code_kinds())}.")
    places = [(shard, item) for shard, size in enumerate(codes.sizes) for item in range(size)]
    count = min(samples, len(places))
    written, unusable, keys = 0, "", set()
    buffer = io.BytesIO()
    with tar_writer(buffer) as writer:
        for shard, item in (places[number * len(places) // count] for number in range(count)):
            try:
                sample = codes.read(shard, item)
                members = dict(_members(sample, kinds, texts, seed))
            except BadSample as error:
                unusable = f"{codes.folder}: {shard}/{item} {error}"
                continue
            write_sample(writer, unused_key(sample.key, sample.key, keys), members)
            written += 1
    if not written:
        raise UserError(
            f"No sample of {codes.folder} can be used as {', '.join(kinds)}: {unusable or 'it is empty'}."
        )
    with atomic_folder(out) as folder:
        shard_path = folder / "codes-000000.tar.xz"
        shard_path.write_bytes(lzma.compress(buffer.getvalue(), filters=_XZ))
        shard_facts = {"file": shard_path.name, "samples": written, "sha256": sha256(shard_path)}
        facts = {name: value for name, value in codes.manifest.items() if name in _KEPT_FACTS}
        write_json(folder / CODES_MANIFEST, {**facts, "samples": written, "shards": [shard_facts]})
        write_json(folder / REPLAY_FILE, {"format": REPLAY_FORMAT, "mixture": entries})
        num_bytes = sum(file.stat().st_size for file in folder.iterdir())
    return ReplayFacts(written, count - written, num_bytes)


def _code_kinds() -> list[str]:
    return [name for name, kind in SAMPLE_KINDS.items() if CODE_FOLDER in kind.reads]


def _members(
    sample: CodeSample, kinds: Mapping[str, float], texts: int, seed: int
) -> Iterator[tuple[str, bytes]]:
    """The members of a sample with the fields that the kinds read; raises BadSample if one cannot use it."""
    fields = {SAMPLE_KINDS[kind].field for kind in kinds}
    fields |= {"long_caption", "short_caption"} if "captions" in fields else set()
    info = {name: value for name, value in sample.info.items() if name in {*fields, "grid"}}
    for name in set(LISTS) & info.keys():
        if isinstance(info[name], list) and len(info[name]) > texts:
            chosen = python_random(seed, sample.key, name).sample(range(len(info[name])), texts)
            info[name] = [info[name][number] for number in sorted(chosen)]
    for kind in kinds:
        for number in range(texts):  # each of the texts
            SAMPLE_KINDS[kind].select(sample._replace(info=info), DropOptions(), (number / texts, 0.0, 0.0))
    yield "codes.npy", _npy(sample.codes)
    if sample.load_features is not None:
        yield "features.npy", _npy(sample.load_features())
    yield "json", json.dumps(info, ensure_ascii=False, separators=(",", ":")).encode()


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()
