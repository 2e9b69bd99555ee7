"""Answer normalisation of the VQA benchmarks, as the public VQAv2 evaluation defines it.

The odd rules below are deliberate: published scores depend on them.
"""

import functools
import re
from pathlib import Path

from open_unitok.core.text_files import read_json

# in the published order: the marks are removed one after the other
PUNCTUATION = tuple(';/[]"{}()=+\\_-><@`,?!')
# digit, comma, digit: the official pattern consumes both digits, that of M4C only the comma
COMMA = {
    "official": re.compile(r"\d,\d"),
    "m4c": re.compile(r"(?<=\d),+(?=\d)"),
}
# The published pattern misspells a look-behind as "(?!<=\d)", a look-ahead that always passes: a period is
# removed unless a digit follows, whether or not a digit precedes it.
PERIOD = re.compile(r"\.(?!\d)")
MAX_PERIODS = 32  # the published call passes re.UNICODE (32) as the count
NUMBERS = {
    word: str(value)
    for value, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}
ARTICLES = frozenset({"a", "an", "the"})


@functools.cache
def contractions() -> dict[str, str]:
    """Word -> contraction, including the odd entries of the published table (`data/contractions.json`)."""
    return read_json(Path(__file__).parent / "data" / "contractions.json")


def one_line(text: str) -> str:
    """Replace newlines and tabs by blanks and strip the text."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def strip_punctuation(text: str, comma: str = "official") -> str:
    """Remove punctuation, and periods that no digit follows; `comma` selects a pattern of `COMMA`."""
    result, digits_around_comma = text, COMMA[comma].search(text) is not None
    for mark in PUNCTUATION:
        # conditions look at the original text, replacements change the current one, as published;
        # a mark next to a blank is deleted, one inside a word becomes a blank
        alone = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if alone or digits_around_comma else " ")
    return PERIOD.sub("", result, count=MAX_PERIODS)


def unify_words(text: str) -> str:
    """Lower-case; number words become digits, articles are removed, contractions get their apostrophe."""
    # numbers first: "none" becomes "0" before the articles are filtered
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    table = contractions()
    return " ".join(table.get(word, word) for word in words if word not in ARTICLES)


@functools.lru_cache(maxsize=200_000)
def normalise(text: str, comma: str = "official") -> str:
    """All steps of the VQAv2 evaluation: one line, punctuation, words."""
    return unify_words(strip_punctuation(one_line(text), comma))


def word_tokenize(text: str) -> str:
    """The first step of the M4C/EvalAI processor of TextVQA and VizWiz."""
    return text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()


@functools.lru_cache(maxsize=200_000)
def normalise_m4c(text: str) -> str:
    """Normalisation of TextVQA and VizWiz (the M4C/EvalAI processor)."""
    return normalise(word_tokenize(text), "m4c")
