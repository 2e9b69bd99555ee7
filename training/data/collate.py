"""From captions, conversations and codes to the rows of a batch (arXiv 2502.20321, section 3.4; published).

An image takes as many placeholder ids as it has visual tokens. `labels` say what is learnt at each position:
a text id, `image_token_id` where the image itself is drawn, IGNORED elsewhere. Rows are padded on the right;
what is padding is said by lengths alone, never by the pad id, which is a genuine token too. Packing puts
several samples into one row; positions that begin again from 0 keep them apart.

B rows, L sequence length, I images in a batch, N visual tokens per image, K sub-codebooks.
"""

import copy
import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from open_unitok.core.errors import UserError

from .tar_index import BadSample

IGNORED = -100
KINDS = ("text_to_image", "captioning", "conversation", "alignment", "text", "document", "reading")
KEPT_TEXTS = 100_000  # token rows kept, so that a text is tokenised once


class Row(NamedTuple):
    """The text side of a sample; it depends on no code, so it is made once per text."""

    ids: np.ndarray  # (L,) int64, `image_token_id` at placeholders
    labels: np.ndarray  # (L,) int64


class Sample(NamedTuple):
    """One row of a batch, with the codes of its images in the order of their placeholders."""

    kind: str
    row: Row
    images: tuple[np.ndarray, ...]  # each (N, K)


class Batch(NamedTuple):
    """One micro-batch: what the model takes, and what is counted about it."""

    # input_ids, labels, attention_mask (B, L), or, packed, position_ids (B, L); image_codes (I, N, K) or None
    inputs: dict[str, torch.Tensor | None]
    kinds: torch.Tensor  # (B, L) places in KINDS
    text_targets: int  # text labels left after the shift by one
    code_targets: int  # codes that are learnt: K per placeholder of a drawn image
    tokens: int  # tokens that are not padding
    pairs: int  # of those that see each other: each sees itself and what is before it in its sample


class CachedTokenizer:
    """A text tokenizer that remembers the pieces it has seen: questions repeat, and each call costs."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._ids = lru_cache(maxsize=KEPT_TEXTS)(self._encode)

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": list(self._ids(text))}

    def _encode(self, text: str) -> list[int]:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            return self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return backend.encode(text, add_special_tokens=False).ids  # the same, at a third of the cost

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


class Rows:
    """Makes rows of texts; `processor` (a UniTokProcessor) knows text tokenizer, prompts and special ids.

    Longer rows than `max_length` lose text at their end; a row that would lose an image is refused, but
    documents end before an image that does not fit.
    """

    def __init__(self, processor: Any, max_length: int):
        self.processor = copy.copy(processor)
        self.processor.text_tokenizer = CachedTokenizer(processor.text_tokenizer)
        self.image_token_id: int = processor.image_token_id
        self.max_length = max_length
        self.make = lru_cache(maxsize=KEPT_TEXTS)(self._make)

    def _make(self, kind: str, text: str | None, visual_tokens: tuple[int, ...]) -> Row:
        """The row of a caption (or turns as JSON) with images of so many visual tokens; raises BadSample."""
        try:
            ids, labels = _BUILDERS[kind](self, text)
        except UserError as error:
            raise BadSample(f"cannot be used: {error}") from error
        ids, labels = self._expand(ids, labels, visual_tokens)
        end = self._end(ids, kind in ("document", "reading"))
        ids, labels = ids[:end], labels[:end]
        if (labels[1:] == IGNORED).all():
            raise BadSample("leaves nothing to learn (is it cut off, or empty?)")
        return Row(ids, labels)

    def _end(self, ids: np.ndarray, may_lose_images: bool) -> int:
        """Where a row that is too long is cut: never within an image, nor between it and its boi."""
        end = min(len(ids), self.max_length)
        if not (ids[end:] == self.image_token_id).any():
            return end
        if not may_lose_images:
            raise BadSample(
                f"has {len(ids)} tokens, its image does not fit into max_length {self.max_length}"
            )
        if ids[end] == self.image_token_id:
            while ids[end - 1] == self.image_token_id:
                end -= 1
            end -= 1
        return end

    def _expand(
        self, ids: Sequence[int], labels: Sequence[int], visual_tokens: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Repeat each placeholder as often as its image has visual tokens."""
        flat, counts = np.asarray(ids, dtype=np.int64), np.ones(len(ids), dtype=np.int64)
        places = np.flatnonzero(flat == self.image_token_id)
        if len(places) != len(visual_tokens):
            raise BadSample(f"names {len(places)} image(s) in its text, but has {len(visual_tokens)}")
        counts[places] = visual_tokens
        return np.repeat(flat, counts), np.repeat(np.asarray(labels, dtype=np.int64), counts)


# ---- one builder per kind: text -> ids and labels with a single placeholder per image ----------------------


def _text_to_image(rows: Rows, caption: str | None) -> tuple[list[int], list[int]]:
    """Text-to-image: the prompt is given, boi, image, eoi and eos are learnt; None draws unconditionally."""
    processor = rows.processor
    *prompt, boi = processor.unconditional_ids() if caption is None else processor.text_to_image_ids(caption)
    learnt = [boi, rows.image_token_id, processor.eoi_token_id, processor.eos_token_id]
    return prompt + learnt, [IGNORED] * len(prompt) + learnt


def _captioning(rows: Rows, caption: str | None) -> tuple[list[int], list[int]]:
    """Image-to-text of the pretraining: bos, boi, image, eoi are given, the caption and eos are learnt."""
    processor = rows.processor
    bos = [] if processor.bos_token_id is None else [processor.bos_token_id]
    words = processor.encode_text(caption or "")[len(bos) :]
    given = [*bos, processor.boi_token_id, rows.image_token_id, processor.eoi_token_id]
    learnt = [*words, processor.eos_token_id]
    return given + learnt, [IGNORED] * len(given) + learnt


def _conversation(rows: Rows, turns: str | None) -> tuple[list[int], list[int]]:
    """Questions and answers in the processor's template; the answers are learnt."""
    return rows.processor.conversation_ids(json.loads(turns or "[]"))


def _alignment(rows: Rows, turns: str | None) -> tuple[list[int], list[int]]:
    """A conversation's first answer straight after the image, as LLaVA's projector is pretrained: no eos."""
    return rows.processor.alignment_ids(json.loads(turns or "[]"))


def _text(rows: Rows, text: str | None) -> tuple[list[int], list[int]]:
    """Plain text, learnt from its second token on; no eos."""
    ids = list(rows.processor.encode_text(text or ""))
    return ids, ids


def _document(rows: Rows, pieces: str | None, drawn: bool = True) -> tuple[list[int], list[int]]:
    """Texts and images in turns (JSON, numbers are images); boi and eoi stand around each image. Texts and
    eos are learnt, and with `drawn` the images."""
    processor = rows.processor
    bos = [] if processor.bos_token_id is None else [processor.bos_token_id]
    image = [processor.boi_token_id, rows.image_token_id, processor.eoi_token_id]
    ids, labels = list(bos), [IGNORED] * len(bos)
    for piece in json.loads(pieces or "[]"):
        added = processor.encode_text(piece)[len(bos) :] if isinstance(piece, str) else image
        ids += added
        labels += added if drawn or isinstance(piece, str) else [IGNORED] * len(added)
    return [*ids, processor.eos_token_id], [*labels, processor.eos_token_id]


def _reading(rows: Rows, pieces: str | None) -> tuple[list[int], list[int]]:
    """A document whose images are only read."""
    return _document(rows, pieces, drawn=False)


_BUILDERS: dict[str, Callable[[Rows, str | None], tuple[list[int], list[int]]]] = {
    "text_to_image": _text_to_image,
    "captioning": _captioning,
    "conversation": _conversation,
    "alignment": _alignment,
    "text": _text,
    "document": _document,
    "reading": _reading,
}


def collate(samples: Sequence[Sample], image_token_id: int, pad_id: int, pack_to: int = 0) -> Batch:
    """Join samples of any kinds and any numbers of images into one micro-batch.

    Args:
        pack_to: 0 = one sample per row; else rows of this length (or of the longest sample's) hold as many
            samples as fit.

    Raises:
        BadSample: images of different numbers of visual tokens; they cannot stand in one tensor.
    """
    lengths = [len(sample.row.ids) for sample in samples]
    packed = pack(lengths, max(pack_to, *lengths)) if pack_to else [[i] for i in range(len(samples))]
    shape = (len(packed), max(sum(lengths[i] for i in row) for row in packed))
    ids, labels = np.full(shape, pad_id, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64)
    positions, kinds = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    real = np.zeros(shape, dtype=np.int64)
    firsts = 0  # labels that the shift drops: the first of each sample
    for number, row in enumerate(packed):
        start = 0
        for i in row:
            place = (number, slice(start, start + lengths[i]))
            ids[place], labels[place] = samples[i].row
            positions[place], kinds[place] = np.arange(lengths[i]), KINDS.index(samples[i].kind)
            real[place] = 1
            firsts += int(samples[i].row.labels[0] != IGNORED)
            start += lengths[i]
        positions[number, start:] = np.arange(shape[1] - start)  # the padding is a sample of its own
    images = [codes for row in packed for i in row for codes in samples[i].images]
    if len({codes.shape for codes in images}) > 1:
        raise BadSample("a batch holds images of different sizes")
    drawn = labels == image_token_id
    inputs = {
        "input_ids": ids,
        "labels": labels,
        **({"position_ids": positions} if pack_to else {"attention_mask": real}),
    }
    codes = torch.from_numpy(np.stack(images).astype(np.int64)) if images else None
    return Batch(
        inputs={**{name: torch.from_numpy(array) for name, array in inputs.items()}, "image_codes": codes},
        kinds=torch.from_numpy(kinds),
        text_targets=int(((labels != IGNORED) & ~drawn).sum()) - firsts,
        code_targets=int(drawn.sum()) * (images[0].shape[1] if images else 0),
        tokens=sum(lengths),
        pairs=sum(length * (length + 1) // 2 for length in lengths),
    )


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which samples share a row of `room` tokens: longest first, each into the fullest row that has room."""
    rows: list[list[int]] = []
    free: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [row for row, space in enumerate(free) if space >= lengths[i]]
        if not fitting:
            rows.append([])
            free.append(room)
            fitting = [len(rows) - 1]
        row = min(fitting, key=lambda row: free[row])
        rows[row].append(i)
        free[row] -= lengths[i]
    return rows
