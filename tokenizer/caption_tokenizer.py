"""Captions to token ids in the format of CLIP's text tower: start, words, end, zeros (arXiv 2103.00020)."""

import gzip
import html
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing

_MERGES = 48894  # CLIP uses only these lines of the file: 49408 ids - 512 byte letters - 2 special tokens
CAPTION_TOKENIZER_FOLDER = "caption_tokenizer"  # inside a tokenizer model's folder
_HINT = (
    "give a folder or hub id of a CLIPTokenizer, a bpe_simple_vocab file or a sentencepiece tokenizer.model"
)


class CaptionTokenizer:
    """Captions -> (B, T) ids, T = context_length; the end of text has the largest id.

    Attributes:
        vocab_size: lower bound for `UniTokConfig.text_vocab_size`.
        start, end: ids of start and end of text.
    """

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        save: Callable[[Path], object],
        start: int,
        end: int,
        context_length: int,
    ) -> None:
        self._encode, self._save = encode, save
        self.start, self.end, self.context_length = start, end, context_length
        self.vocab_size = end + 1

    def __call__(self, captions: Sequence[str]) -> torch.Tensor:
        """(B, context_length) int64; a long caption is truncated and still ends with the end of text."""
        ids = torch.zeros(len(captions), self.context_length, dtype=torch.int64)
        for row, caption in zip(ids, captions, strict=True):
            words = self._encode(caption)[: self.context_length - 2]
            # zeros follow the end of text: causal attention never sees them, pooling is at the largest id
            row[: len(words) + 2] = torch.tensor([self.start, *words, self.end])
        return ids

    def save(self, model_folder: str | os.PathLike[str]) -> None:
        """Save into a tokenizer model's folder, for `from_model_folder`."""
        folder = Path(model_folder) / CAPTION_TOKENIZER_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        self._save(folder)

    @classmethod
    def from_path(
        cls, path_or_hub_id: str | os.PathLike[str], context_length: int = 77
    ) -> "CaptionTokenizer":
        """Load CLIP's vocabulary (folder, hub id, or bpe_simple_vocab_16e6.txt.gz) or a sentencepiece model.

        A sentencepiece model with S pieces gets the start of text S and the end of text S + 1.

        Raises:
            UserError: the path or hub id holds no such tokenizer.
        """
        path = Path(path_or_hub_id)
        if (path / "tokenizer.model").is_file():
            path = path / "tokenizer.model"
        # The file name decides the format; everything else is left to transformers.
        if path.suffix == ".model":
            return cls._sentencepiece(existing(path), context_length)
        if path.name.endswith((".txt", ".txt.gz")):
            return cls._clip(_read_bpe(existing(path)), context_length)
        from transformers import CLIPTokenizer

        if path.is_dir() and not any((path / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            raise UserError(f"{path} holds no caption tokenizer: {_HINT}.")
        try:
            return cls._clip(CLIPTokenizer.from_pretrained(str(path_or_hub_id)), context_length)
        except (OSError, ValueError) as error:
            raise UserError(f"No caption tokenizer at {path_or_hub_id}: {_HINT} ({error}).") from error

    @classmethod
    def from_model_folder(
        cls, folder: str | os.PathLike[str], context_length: int = 77
    ) -> "CaptionTokenizer":
        """Load the caption tokenizer that training saved in a tokenizer model's folder.

        Raises:
            UserError: the folder has no caption tokenizer.
        """
        hint = "This model was saved without its caption tokenizer: give the path or hub id of one."
        return cls.from_path(existing(Path(folder) / CAPTION_TOKENIZER_FOLDER, hint), context_length)

    @classmethod
    def _clip(cls, tokenizer: Any, context_length: int) -> "CaptionTokenizer":
        def encode(caption: str) -> list[int]:
            # Twice, as CLIP does: web captions hold entities of entities (&amp;lt;).
            text = " ".join(html.unescape(html.unescape(caption)).split())
            # CLIP's spelling of the two special tokens differs from transformers' vocabulary files.
            text = re.sub("<end_of_text>", tokenizer.eos_token, text, flags=re.IGNORECASE)
            text = re.sub("<start_of_text>", tokenizer.bos_token, text, flags=re.IGNORECASE)
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        save = tokenizer.save_pretrained
        return cls(encode, save, tokenizer.bos_token_id, tokenizer.eos_token_id, context_length)

    @classmethod
    def _sentencepiece(cls, path: Path, context_length: int) -> "CaptionTokenizer":
        from sentencepiece import SentencePieceProcessor

        try:
            pieces: Any = SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path} is not a sentencepiece model: {_HINT}.") from error
        size = pieces.get_piece_size()  # S and S + 1 are free: the end of text becomes the largest id

        def save(folder: Path) -> None:
            shutil.copyfile(path, folder / "tokenizer.model")

        return cls(lambda caption: pieces.encode(caption), save, size, size + 1, context_length)


def _read_bpe(path: Path) -> Any:
    """A CLIPTokenizer from CLIP's merges file: a header, then one merge per line, in order of rank."""
    from transformers import CLIPTokenizer

    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    lines = text.split("\n")[1 : 1 + _MERGES]
    # Ids: 256 bytes, the same 256 at the end of a word, the merges, start of text, end of text.
    letters = _byte_letters()
    vocab = {letter: i for i, letter in enumerate([*letters, *(letter + "</w>" for letter in letters)])}
    merges = []
    for rank, line in enumerate(lines):
        if line.strip():  # a blank line still takes a rank, and with it an id
            left, right = line.split()
            vocab[left + right] = 512 + rank
            merges.append((left, right))
    vocab |= {"<|startoftext|>": 512 + len(lines), "<|endoftext|>": 513 + len(lines)}
    return CLIPTokenizer(vocab=vocab, merges=merges)


def _byte_letters() -> list[str]:
    """The characters that represent bytes in byte-level BPE, in the vocabulary's order: printable first."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    # A merges file cannot hold control characters and blanks: GPT-2's rule maps them to code points from 256.
    others = len(range(256)) - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(others)]
