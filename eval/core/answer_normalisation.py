"""Answer normalisation of the VQA benchmarks, as the public VQAv2 evaluation defines it.

Every odd rule below is deliberate: published scores depend on it.
"""

import functools
import importlib.resources
import json
import re

# The order matters: the text runs through the marks one after the other.
PUNCTUATION = tuple(';/[]"{}()=+\\_-><@`,?!')
COMMA = {
    "official": re.compile(r"\d,\d"),
    "m4c": re.compile(r"(?<=\d),+(?=\d)"),
}
# The published pattern tries to look behind with "(?!<=\d)", which forbids the literal text "<=" after the
# period's place and so always passes: a period is removed unless a digit follows it.
PERIOD = re.compile(r"\.(?!\d)")
MOST_PERIODS = 32  # the published call passes re.UNICODE where the count belongs
NUMBERS = {
    word: str(value)
    for value, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}
ARTICLES = frozenset({"a", "an", "the"})


@functools.cache
def contractions() -> dict[str, str]:
    """Word -> contraction, with the published table's odd entries (data file `data/contractions.json`)."""
    return json.loads(
        importlib.resources.files("open_unitok.eval.core")
        .joinpath("data/contractions.json")
        .read_text(encoding="utf-8")
    )


def one_line(text: str) -> str:
    """Newlines and tabs become blanks; outer blanks are stripped."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def strip_punctuation(text: str, comma: str = "official") -> str:
    """Delete or blank out punctuation and periods that no digit follows; `comma` picks the digit-comma rule.

    Conditions are evaluated on the original text, replacements act on the current one.
    """
    result, digits_around_comma = text, COMMA[comma].search(text) is not None
    for mark in PUNCTUATION:
        alone = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if alone or digits_around_comma else " ")
    return PERIOD.sub("", result, count=MOST_PERIODS)


def unify_words(text: str) -> str:
    """Lower-case; number words to digits, articles removed, contractions spelled with an apostrophe."""
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
