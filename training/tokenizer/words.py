"""The words of a language codebook in a run: sizes for the model's config, and its vectors."""

import warnings
from collections.abc import Mapping
from typing import Any

from open_unitok.core.errors import UserError
from open_unitok.tokenizer import UniTok
from open_unitok.tokenizer.words import Words, read_words

from .config import TokenizerRunConfig

KINDS = ("language", "language_map")


def _word_kind(model: Mapping[str, Any]) -> str | None:
    """The quantiser that may have words: the model's, or the inner one of a pyramid."""
    kind = model.get("quantizer")
    return (model.get("quantizer_options") or {}).get("inner") if kind == "residual" else kind


def read_run_words(config: TokenizerRunConfig) -> Words | None:
    """The words of the section `words`; None without it.

    Raises:
        UserError: the quantiser has no words, or the model at init_from has its own; a file is malformed.
    """
    kind, options = _word_kind(config.model), config.words
    if not options.lists:
        if kind in KINDS and config.init_from is None:
            warnings.warn(
                f"quantizer {kind!r} without the section `words`: its rows are a map of random vectors.",
                stacklevel=2,
            )
        return None
    if config.init_from is not None:
        raise UserError(
            "words: the model at init_from holds the vectors of its words: leave the section out."
        )
    if kind not in KINDS:
        raise UserError(
            f"words: model.quantizer is {kind!r}, but only {' and '.join(KINDS)} have words: leave the "
            "section out."
        )
    assert options.vectors is not None
    words = read_words(options.lists, options.vectors, options.edges)
    if kind == "language" and len(words.counts) != 2:
        raise UserError(
            f"words.lists has {len(words.counts)} files, but quantizer 'language' needs two: adjectives, "
            "then nouns."
        )
    return words


def word_sizes(words: Words, model: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the model's config that follow from its words.

    Raises:
        UserError: the config has other sizes.
    """
    kind, pyramid = _word_kind(model), model["quantizer"] == "residual"
    options = {"word_dim": words.vectors.shape[1], "edges": len(words.edges)}
    fields: dict[str, Any] = {"codebook_size": len(words.names)}
    if kind == "language":
        adjectives, nouns = words.counts
        options |= {"adjectives": adjectives, "nouns": nouns}
        fields = {"codebook_size": max(adjectives, nouns), "num_codebooks": 3}
    outer = dict(model.get("quantizer_options") or {})
    given = dict(outer.get("inner_options") or {}) if pyramid else outer
    where_given = "model.quantizer_options" + ".inner_options" * pyramid
    for where, own, found in (("model", model, fields), (where_given, given, options)):
        for name, value in found.items():
            if own.get(name) not in (None, value):
                raise UserError(
                    f"{where}.{name} is {own[name]}, but the words have {value}: leave the key out."
                )
    given = given | options
    return {**fields, "quantizer_options": outer | {"inner_options": given} if pyramid else given}


def set_words(model: UniTok, words: Words) -> None:
    """Give the words' vectors and edges to the quantiser of a new model."""
    quantizer: Any = model.quantizer
    quantizer = quantizer.inner if model.config.quantizer == "residual" else quantizer
    quantizer.map.set_words(words.vectors, words.edges)
