"""Captions to token ids in the format of CLIP's text tower: start, words, end, zeros (arXiv 2103.00020)."""

import functools
import gzip
import hashlib
import html
import json
import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ftfy
import regex
import torch

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing, sha256, tokenizer_path
from open_unitok.core.text_files import decode_text, is_unicode

from .loading import find_weights

_MERGES = 48894  # CLIP uses only these lines of the file: 49408 ids - 512 byte letters - 2 special tokens
_CACHED_WORDS = 100_000
# the published split into words; the special tokens are matched first
_CLIP_WORD = regex.compile(
    r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)
CAPTION_TOKENIZER_FOLDER = "caption_tokenizer"  # inside a tokenizer model's folder
_HINT = (
    "give a folder or hub id of a CLIPTokenizer, a bpe_simple_vocab file, a sentencepiece tokenizer.model, "
    "or a model that holds one"
)
# in a hub repository of a tokenizer, or of an MLLM
_HUB_FILES = tuple(f"{folder}{CAPTION_TOKENIZER_FOLDER}/tokenizer.model" for folder in ("", "unitok/"))


class CaptionTokenizer:
    """Captions -> (B, T) ids, T = context_length; the end of text has the largest id.

    Attributes:
        vocab_size: lower bound for `UniTokConfig.text_vocab_size`.
        start, end: ids of start and end of text.
        fingerprint: equal for tokenizers that give equal ids.
    """

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        save: Callable[[Path], object],
        start: int,
        end: int,
        context_length: int,
        fingerprint: str,
    ) -> None:
        self._encode, self._save = encode, save
        self.start, self.end, self.context_length = start, end, context_length
        self.vocab_size = end + 1
        self.fingerprint = fingerprint

    def __call__(self, captions: Sequence[str]) -> torch.Tensor:
        """(B, context_length) int64; a long caption is truncated and still ends with the end of text.

        Raises:
            UserError: a caption for sentencepiece holds half of a surrogate pair (ftfy repairs CLIP's).
        """
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
        """Load CLIP's vocabulary (folder, hub id, or bpe_simple_vocab_16e6.txt.gz), a sentencepiece model, or
        the caption tokenizer of a model: its folder, hub id or shipped name.

        A sentencepiece model with S pieces gets the start of text S and the end of text S + 1.

        Raises:
            UserError: the path or hub id holds no such tokenizer.
        """
        path = Path(path_or_hub_id)
        if (tokenizer_path(path) / CAPTION_TOKENIZER_FOLDER).is_dir():
            path = tokenizer_path(path) / CAPTION_TOKENIZER_FOLDER
        if (path / "tokenizer.model").is_file():
            path = path / "tokenizer.model"
        # The file name decides the format; everything else is left to transformers.
        if path.suffix == ".model":
            return cls._sentencepiece(existing(path), context_length)
        if path.name.endswith((".txt", ".txt.gz")):
            return cls._clip(_read_bpe(existing(path)), context_length)
        from transformers import CLIPTokenizer

        is_folder = tokenizer_path(path).is_dir()
        if is_folder and not any((path / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            raise UserError(f"{path} holds no caption tokenizer: {_HINT}.")
        if not is_folder and str(path).count("/") != 1:  # a hub id is owner/name
            raise UserError(f"No caption tokenizer at {path}, which does not exist: {_HINT}.")
        try:
            return cls._clip(CLIPTokenizer.from_pretrained(str(path)), context_length)
        except (OSError, ValueError) as error:
            if is_folder:
                raise UserError(f"No caption tokenizer at {path}: {_HINT} ({error}).") from error
        source = "a model of open_unitok holds one"
        file = find_weights(str(path), _HUB_FILES, "The caption tokenizer", source)
        return cls._sentencepiece(file, context_length)

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
        from tokenizers import Tokenizer, pre_tokenizers

        # only the merges of a word are left to it: its own cleaning and split differ from the published ones
        merges = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        merges.normalizer = None
        merges.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        merges.encode_special_tokens = True  # "<|endoftext|>" in a caption is text
        # CLIP's spelling of the two special tokens differs from transformers' vocabulary files
        special = {"<start_of_text>": [tokenizer.bos_token_id], "<end_of_text>": [tokenizer.eos_token_id]}

        @functools.lru_cache(maxsize=_CACHED_WORDS)
        def encode_word(word: str) -> list[int]:
            return special.get(word) or merges.encode(word, add_special_tokens=False).ids

        def encode(caption: str) -> list[int]:
            return [i for word in _CLIP_WORD.findall(clean_caption(caption)) for i in encode_word(word)]

        save = tokenizer.save_pretrained
        vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        fingerprint = hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()
        ids = tokenizer.bos_token_id, tokenizer.eos_token_id
        return cls(encode, save, *ids, context_length, fingerprint)

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

        def encode(caption: str) -> list[int]:
            if not is_unicode(caption):
                raise UserError(f"The caption {caption!r} holds half of a surrogate pair.")
            return pieces.encode(caption)

        return cls(encode, save, size, size + 1, context_length, sha256(path))


def clean_caption(caption: str) -> str:
    """A caption as CLIP's vocabulary expects it: repaired (mojibake, curly quotes, ligatures, full-width
    letters), HTML-unescaped, in lower case, with single blanks (as published)."""
    # unescaped twice: web captions hold entities of entities (&amp;lt;)
    text = html.unescape(html.unescape(ftfy.fix_text(caption)))
    return " ".join(text.split()).lower()


def _read_bpe(path: Path) -> Any:
    """A CLIPTokenizer from CLIP's merges file: a header, then one merge per line, in order of rank."""
    from transformers import CLIPTokenizer

    try:
        data = path.read_bytes()
        lines = decode_text(gzip.decompress(data) if path.suffix == ".gz" else data, str(path)).split("\n")
        merges = [tuple(line.split()) for line in lines[1 : 1 + _MERGES]]
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    for number, merge in enumerate(merges, 2):
        if len(merge) not in (0, 2):
            raise UserError(f"{path}, line {number}, is not a merge of two pieces: {_HINT}.")
    # Ids: 256 bytes, the same 256 at the end of a word, the merges, start of text, end of text.
    letters = _byte_letters()
    vocab = {letter: i for i, letter in enumerate([*letters, *(letter + "</w>" for letter in letters)])}
    # a blank line still takes a rank, and with it an id
    vocab |= {"".join(merge): 512 + rank for rank, merge in enumerate(merges) if merge}
    vocab |= {"<|startoftext|>": 512 + len(merges), "<|endoftext|>": 513 + len(merges)}
    return CLIPTokenizer(vocab=vocab, merges=[merge for merge in merges if merge])  # pyright: ignore


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
