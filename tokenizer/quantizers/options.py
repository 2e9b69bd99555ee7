"""The check of `quantizer_options` before a quantiser is built: names, types and ranges."""

import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Union

from open_unitok.core.errors import UserError

from ..entries import check_options
from .base import Quantizer, option_names

# smallest values of options that several quantisers have; others check their own
_LEAST = {"commitment": 0, "codebook": 0, "through": 0, "eps": 0, "adjectives": 2, "nouns": 1}
_ABOVE_ZERO = ("temperature", "entropy_eps")  # a divisor; inside a logarithm

_NAMES = {
    int: "a whole number",
    float: "a finite number",
    str: "a string",
    bool: "true or false",
    type(None): "null",
}


def check_quantizer_options(
    field: str, name: str, kind: type[Quantizer], options: Mapping[str, Any] | None
) -> None:
    """
    Args:
        field: "quantizer" or "quantizer_options.inner"; name: the entry `kind` of QUANTIZERS.

    Raises:
        UserError: the quantiser has no such option, or a value has another type or range than the option.
    """
    if options is not None and not isinstance(options, Mapping):
        raise UserError(f"{field}_options is {options!r}: expected a section of keys and values.")
    options = options or {}
    check_options(field, name, options, option_names(kind))
    hints = typing.get_type_hints(kind.__init__) | kind.own_options  # pyright: ignore
    for key, value in options.items():
        where, hint = f"{field}_options.{key}", hints.get(key, Any)
        if not _fits(value, hint):
            # YAML reads 1e-5 without a point as text
            point = (
                ", with a point (1.0e-5)" if isinstance(value, str) and float in _alternatives(hint) else ""
            )
            raise UserError(f"{where} is {value!r}: expected {_describe(hint)}{point}.")
        if value is None:
            continue
        if key in _LEAST and value < _LEAST[key]:
            raise UserError(f"{where} is {value}: it must be at least {_LEAST[key]}.")
        if key in _ABOVE_ZERO and value <= 0:
            raise UserError(f"{where} is {value}: it must be above 0.")


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the type alone."""
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of YAML or JSON has the type of an annotation."""
    if hint is Any:
        return True
    options = _alternatives(hint)
    if len(options) > 1:
        return any(_fits(value, option) for option in options)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (list, Sequence):
        return isinstance(value, list | tuple) and all(_fits(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, Mapping)
    if isinstance(value, bool):  # a subclass of int
        return hint is bool
    if hint is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    """A type in words."""
    options = _alternatives(hint)
    if len(options) > 1:
        return " or ".join(_describe(option) for option in options)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (list, Sequence):
        return f"a list ({_describe(inner[0])} each)"
    if origin is dict:
        return "a section of keys and values"
    return _NAMES.get(hint, str(hint))
