"""Texts in files: plain text, and conversations in LLaVA's JSON whose images are codes.

Lines are located once and stay on disk. A conversation is {"image": name | [names], "conversations":
[{"from": "human" | "gpt", "value"}]}; without "image" it is text only. An image is looked up by its name in
a code folder that `unitok data convert folder` and `unitok extract-codes` made of the images.
"""

import contextlib
import hashlib
import json
import mmap
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing
from open_unitok.core.text_files import decode_text, is_unicode, parse_json, read_json, without_mark

from .captions import with_captions
from .code_shards import CodeFolder, CodeSample
from .records import TEXT_KEYS, caption_texts, conversation_turns, image_names, read_records
from .tar_files import StreamedTar, is_stream, matching_shards
from .tar_index import BadSample, matching_files, scan_tar

NO_IMAGES = np.empty((0, 0, 0))  # codes of a sample without images: (I, N, K) with I = 0
SCAN_BLOCK = 1 << 26  # bytes compared at a time while lines are located
FINGERPRINTED = 1 << 20  # bytes of a file that are hashed


class FileLines:
    """The non-empty lines of a file, by number; the file stays on disk.

    Raises:
        UserError: there is no such file, or no line in it.
    """

    def __init__(self, path: str | Path):
        self.path = existing(path)
        if not self.path.is_file():
            kind = "a folder" if self.path.is_dir() else "not a regular file"
            raise UserError(f"{path} is {kind}, expected a text file with one text per line.")
        size = self.path.stat().st_size
        self._file = open(self.path, "rb")  # noqa: SIM115 - it stays open as long as the data set
        self._bytes = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        head = self._bytes[:4]
        mark = len(head) - len(without_mark(head, str(path)))
        ends = []
        # block by block: comparing a large file at once would allocate its size in memory
        for start in range(0, size, SCAN_BLOCK):
            block = np.frombuffer(self._bytes[start : start + SCAN_BLOCK], dtype=np.uint8)
            ends.append(start + np.flatnonzero(block == ord("\n")))
        bounds = np.concatenate([[-1], *ends, [size]])
        spans = np.stack([bounds[:-1] + 1, bounds[1:]], axis=1)
        spans[0, 0] = mark
        self._numbers = self._not_blank(spans)
        self._spans = spans[self._numbers]
        if not len(self._spans):
            raise UserError(f"{path} holds no line of text.")

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, number: int) -> bytes:
        start, end = self._spans[number]
        return self._bytes[start:end].removesuffix(b"\r")  # line ends of Windows

    def text(self, number: int) -> str:
        """Line `number` as text; raises UserError with its number in the file if it is not UTF-8."""
        return decode_text(self[number], self.path.name, int(self._numbers[number]) + 1)

    def json(self, number: int) -> Any:
        """Line `number` as JSON; raises UserError with its number in the file."""
        return parse_json(self.text(number), f"{self.path.name}, line {self._numbers[number] + 1},")

    def _not_blank(self, spans: np.ndarray) -> np.ndarray:
        """The indices of the spans that hold more than blanks."""
        full = spans[:, 1] > spans[:, 0]
        if not full.any():
            return np.flatnonzero(full)
        first = np.frombuffer(self._bytes, dtype=np.uint8)[spans[full, 0]]
        # only lines that begin with a blank can be blank
        for index in np.flatnonzero(full)[first <= ord(" ")]:
            start, end = spans[index]
            full[index] = bool(self._bytes[start:end].strip())
        return np.flatnonzero(full)

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the file's size and first bytes."""
        head = f"{len(self._bytes)} ".encode() + bytes(self._bytes[:FINGERPRINTED])
        return hashlib.sha256(head).hexdigest()


class TextLines:
    """Plain text: a .txt file of lines, a .jsonl file of {"text": ...}, or a glob of such files."""

    def __init__(self, path: str | Path):
        name = str(path)
        paths = matching_files(name, "data.mixture") if any(c in name for c in "*?[{") else [name]
        self.files = [FileLines(p) for p in paths]
        self.sizes = [len(file) for file in self.files]

    def __len__(self) -> int:
        return sum(self.sizes)

    @property
    def codes(self) -> None:
        """Texts have no images."""
        return None

    @property
    def fingerprint(self) -> str:
        """Hex digest of all files' sizes and first bytes."""
        each = [file.fingerprint for file in self.files]
        return each[0] if len(each) == 1 else hashlib.sha256(json.dumps(each).encode()).hexdigest()

    def read(self, shard: int, number: int) -> CodeSample:
        """Text `number` of file `shard`, as a sample without images; raises BadSample if it is not a text."""
        file = self.files[shard]
        return CodeSample(f"{file.path.name} {number}", NO_IMAGES, {"text": self._text(file, number)})

    def _text(self, file: FileLines, number: int) -> str:
        is_json = file.path.suffix.lower() == ".jsonl"
        try:
            record = file.json(number) if is_json else file.text(number)
        except UserError as error:
            raise BadSample(str(error)) from error
        if not is_json:
            return record
        # a line may also be a bare JSON string
        found = (
            next((record[k] for k in TEXT_KEYS if k in record), None) if isinstance(record, dict) else record
        )
        if not isinstance(found, str):
            raise BadSample(f"line {number} of {file.path.name} has no {' or '.join(TEXT_KEYS)}")
        if not is_unicode(found):
            raise BadSample(f"line {number} of {file.path.name} holds half of a surrogate pair")
        return found


class Conversations:
    """LLaVA's conversation JSON (a list) or JSONL, with its images looked up in a code folder.

    The .json form is held in memory, the .jsonl form stays on disk.

    Raises:
        UserError: no such file, or a .json that is not a list.
    """

    def __init__(self, path: str | Path, codes: CodeFolder | None):
        self.path = existing(path)
        self.codes = codes
        self.on_disk = self.path.suffix.lower() == ".jsonl"
        if self.on_disk:
            self.records: Any = FileLines(self.path)
            self._facts = [self.records.fingerprint]
        else:
            records = read_json(self.path)
            if not isinstance(records, list) or not records:
                raise UserError(f"{path} is not a list of conversations.")
            # as bytes: a million parsed conversations take several times the memory
            self.records = [json.dumps(record, ensure_ascii=False).encode() for record in records]
            self._facts = [hashlib.sha256(self.path.read_bytes()).hexdigest()]
        self.sizes = [len(self.records)]
        if codes:
            codes.places  # noqa: B018 - an index, made before worker processes copy it

    def __len__(self) -> int:
        return len(self.records)

    @property
    def fingerprint(self) -> str:
        """Hex digest of the conversations and of the codes."""
        facts = [*self._facts, self.codes.fingerprint if self.codes else None]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def read(self, _shard: int, number: int) -> CodeSample:
        """Conversation `number` with the codes of its images; raises BadSample if it cannot be used."""
        try:
            record = self.records.json(number) if self.on_disk else read_json(self.records[number])
        except UserError as error:
            raise BadSample(str(error)) from error
        names = image_names(record)
        info = {"conversations": [conversation_turns(record, len(names))]}
        images = [self._image(name) for name in names]
        codes = np.stack([image.codes for image in images]) if images else NO_IMAGES

        def load_features() -> np.ndarray:
            return np.stack([array for image in images for array in image.features])

        return CodeSample(str(record.get("id", number)), codes, info, load_features if images else None)

    def _image(self, name: str) -> CodeSample:
        if self.codes is None:
            raise BadSample(f"has the image {name}, but no code folder to look it up in (`codes`)")
        return self.codes.image(name)


def dataset_texts(path: str, captions: str = "all") -> Iterator[str]:
    """The captions, questions, answers and texts of a data set, for a text tokenizer; unusable samples are
    left out.

    Args:
        path: tars or a glob of them, a folder of tars or of codes, conversations (.json, .jsonl), or texts.
        captions: a value of CAPTION_CHOICES, for tars.

    Raises:
        UserError: there is no such data set.
    """
    folder = Path(path)
    if folder.is_dir() and not any(folder.glob("*.tar")):
        raise UserError(f"{path} holds no tars: make tars of images with `unitok data convert folder`.")
    is_text = path.lower().endswith((".json", ".jsonl", ".txt"))
    for info in _text_infos(path) if is_text else _tar_infos(path, captions):
        try:
            turns = [turn for talk in info.get("conversations", []) for turn in talk]
            # the mark of an image is no word
            yield from (turn["value"].replace("<image>", "").strip() for turn in turns)
            yield from (piece for piece in info.get("document", []) if isinstance(piece, str))
            yield from (info["text"],) if isinstance(info.get("text"), str) and is_text else ()
            yield from caption_texts(info)
        except (BadSample, KeyError, TypeError, AttributeError):
            continue


def _text_infos(path: str) -> Iterator[dict[str, Any]]:
    first = {} if path.lower().endswith(".txt") else next(read_records(existing(path)), {})
    if not {"conversations", "messages"} & first.keys():
        texts = TextLines(path)
        for shard, size in enumerate(texts.sizes):
            for number in range(size):
                with contextlib.suppress(BadSample):
                    yield texts.read(shard, number).info
        return
    for record in read_records(Path(path)):
        with contextlib.suppress(BadSample):
            yield {"conversations": [conversation_turns(record, len(image_names(record)))]}


def _tar_infos(path: str, captions: str) -> Iterator[dict[str, Any]]:
    for source in matching_shards(f"{path}/*.tar" if Path(path).is_dir() else path, "PATH"):
        for sample in StreamedTar(source) if is_stream(source) else scan_tar(source).samples:
            with contextlib.suppress(BadSample):
                info = sample.json("json") if "json" in sample.members else {}
                if isinstance(info, dict):
                    yield with_captions(sample, info, captions)
