"""Captions of images: from .txt files, from records, or from the names of files and folders."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from open_unitok.core.errors import UserError
from open_unitok.core.text_files import is_unicode, read_lines

from .tar_index import BadSample, TarSample

# all: every line of a .txt; first: its first line; name: the words of the image's path
CAPTION_CHOICES = ("all", "first", "name")
TEXT_EXTENSIONS = ("txt", "caption")  # of the file beside an image that holds its captions
# keys of a record that hold captions, in the order of preference
CAPTION_KEYS = ("captions", "caption", "text", "prompt")


def with_captions(sample: TarSample, info: dict[str, Any], choice: str = "all") -> dict[str, Any]:
    """`info` of a tar's sample with the list "captions", if there are any: those of its .json, else the lines
    of its .txt or .caption, else another key of `CAPTION_KEYS`.

    img2dataset writes a caption to the .txt and to the key "caption" of the .json.

    Raises:
        BadSample: the captions are not texts, or the .txt is not UTF-8.
    """
    if choice == "name":
        # tars of `unitok data convert` hold the name of the file, whose key may be shortened
        path = info.get("file") or sample.file
        captions = name_captions(path) if isinstance(path, str) else []
        info = {key: value for key, value in info.items() if key not in ("long_caption", "short_caption")}
    elif "captions" not in info and (text := next((e for e in TEXT_EXTENSIONS if e in sample.members), "")):
        try:
            captions = read_lines(sample.read(text), f".{text}")
        except UserError as error:
            raise BadSample(f"has a caption that cannot be read: {error}") from error
    else:
        captions = caption_list(next((info[key] for key in CAPTION_KEYS if info.get(key)), []))
    captions = chosen_captions(captions, choice)
    return {**info, "captions": captions} if captions or "captions" in info else info


def caption_list(value: Any) -> list[str]:
    """A caption, or a list of captions, as a list.

    Raises:
        BadSample: not texts, or a text with half of a surrogate pair.
    """
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadSample(f"has captions {str(value)[:60]}, expected a list of texts")
    for text in texts:
        if not is_unicode(text):
            raise BadSample(f"has the caption {text[:60]!r}, which holds half of a surrogate pair")
    return texts


def chosen_captions(captions: Sequence[str], choice: str) -> list[str]:
    """The captions that are not blank, or only the first of them."""
    kept = [caption.strip() for caption in captions if caption.strip()]
    return kept[:1] if choice == "first" else kept


def name_captions(path: str) -> list[str]:
    """The caption in an image's path: "dogs/golden_retriever_01.jpg" -> "dogs, golden retriever"; [] if the
    path has no words.

    Folders come first; a number at the end of the file's name counts files, and parts without a letter are
    left out.
    """
    *folders, name = str(Path(path).with_suffix("")).split("/")
    parts = [_words(part) for part in (*folders, re.sub(r"[\W_]*\d+\W*$", "", name))]
    caption = ", ".join(part for part in parts if any(letter.isalpha() for letter in part))
    return [caption] if caption else []


def _words(part: str) -> str:
    return " ".join(re.sub(r"[_\-]+", " ", part).split())
