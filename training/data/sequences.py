"""Build token sequences with all placeholders of each image from texts (arXiv 2502.20321, section 3.4).

`labels` hold the target of each position: a text id, `image_token_id` for a visual token of a generated
image, IGNORE_INDEX for none. An image that is read is expanded to codes, separator and features as the
processor's visual input says, one that is generated to codes: the kind of a sample is the task switch.

L sequence length, N visual tokens per image.
"""

import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from open_unitok.core.errors import UserError

from .sample_kinds import IGNORE_INDEX, SAMPLE_KINDS
from .tar_index import BadSample

CACHED_TEXTS = 100_000  # texts and sequences that are cached, so that repeated ones are tokenised once


class TokenSequence(NamedTuple):
    """The text side of a sample; it does not depend on the codes, so it is cached by its text."""

    ids: np.ndarray  # (L,) int64, `image_token_id` at placeholders
    labels: np.ndarray  # (L,) int64


class CachedTokenizer:
    """A text tokenizer with a cache: questions repeat, and tokenising is slow."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._ids = lru_cache(maxsize=CACHED_TEXTS)(self._encode)

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": list(self._ids(text))}

    def _encode(self, text: str) -> list[int]:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            return self._tokenizer(text, add_special_tokens=False)["input_ids"]
        # the Rust tokenizer gives the same ids without transformers' wrapper, three times as fast
        return backend.encode(text, add_special_tokens=False).ids

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


class SequenceBuilder:
    """Builds the sequence of a text for any kind of sample.

    Sequences longer than `max_length` lose text at their end. One that would lose an image is rejected, but
    kinds with `may_drop_images` end before an image that does not fit.

    Args:
        processor: a UniTokProcessor: text tokenizer, prompts and special ids.
    """

    def __init__(self, processor: Any, max_length: int):
        self.processor = copy.copy(processor)
        self.processor.text_tokenizer = CachedTokenizer(processor.text_tokenizer)
        self.image_token_id: int = processor.image_token_id
        # the ids that only images have
        ids = (processor.image_token_id, processor.feature_token_id, processor.sep_token_id)
        self._image_ids = np.array([i for i in ids if i is not None])
        self.max_length = max_length
        self.build = lru_cache(maxsize=CACHED_TEXTS)(self._build)

    def _build(self, kind: str, text: str | None, visual_tokens: tuple[int, ...]) -> TokenSequence:
        """The sequence of `text` (see `Selection`); `visual_tokens` has the number of tokens of each image.

        Raises:
            BadSample: the text cannot be used, or nothing of it is learned.
        """
        sample_kind = SAMPLE_KINDS[kind]
        try:
            images = [self._image_row(kind, count) for count in visual_tokens]
            ids, labels = self._expand(*sample_kind.sequence(self.processor, text), images)
        except UserError as error:
            raise BadSample(f"cannot be used: {error}") from error
        end = self._end(ids, sample_kind.may_drop_images)
        ids, labels = ids[:end], labels[:end]
        # the first label has no position before it that could predict it
        if (labels[1:] == IGNORE_INDEX).all():
            raise BadSample("has nothing to learn (is it cut off, or empty?)")
        return TokenSequence(ids, labels)

    def _end(self, ids: np.ndarray, may_drop_images: bool) -> int:
        """Length to truncate a sequence to: never inside an image, nor between it and its boi."""
        end = min(len(ids), self.max_length)
        of_image = np.isin(ids, self._image_ids)
        if not of_image[end:].any():
            return end
        if not may_drop_images:
            raise BadSample(
                f"has {len(ids)} tokens, its image does not fit into max_length {self.max_length}"
            )
        if of_image[end]:
            # back to the first placeholder of this image, then before its boi
            while of_image[end - 1]:
                end -= 1
            end -= 1
        return end

    def num_images(self, kind: str, sequence: TokenSequence, visual_tokens: int) -> int:
        """How many whole images a sequence holds, of `visual_tokens` each."""
        count = int(np.isin(sequence.ids, self._image_ids).sum())
        return count // len(self._image_row(kind, visual_tokens))

    def _image_row(self, kind: str, visual_tokens: int) -> list[int]:
        return self.processor.image_ids(visual_tokens, read=not SAMPLE_KINDS[kind].generates_images)

    def _expand(
        self, ids: Sequence[int], labels: Sequence[int], images: Sequence[Sequence[int]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Replace each placeholder by the ids of its image."""
        flat, repeats = np.asarray(ids, dtype=np.int64), np.ones(len(ids), dtype=np.int64)
        positions = np.flatnonzero(flat == self.image_token_id)
        if len(positions) != len(images):
            raise BadSample(f"names {len(positions)} image(s) in its text, but has {len(images)}")
        repeats[positions] = [len(row) for row in images]
        flat = np.repeat(flat, repeats)
        flat[np.repeat(np.isin(np.arange(len(ids)), positions), repeats)] = [i for row in images for i in row]
        return flat, np.repeat(np.asarray(labels, dtype=np.int64), repeats)
