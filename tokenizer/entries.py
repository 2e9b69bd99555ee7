"""Entries of the registries `ENCODERS`, `DECODERS` and `QUANTIZERS`, and the check of their options."""

import copy
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from open_unitok.core.errors import UserError, did_you_mean

Entry = TypeVar("Entry")


def entry_of(table: Mapping[str, Entry], table_name: str, field: str, name: str) -> Entry:
    """The entry `name` of a registry such as `ENCODERS`; `field` is the config field it comes from.

    Raises:
        UserError: the registry has no such entry; the message lists its entries.
    """
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UserError(f"{field} {name!r} is not known: {table_name} has {', '.join(table)}.{hint}")


def build_entry(table: Mapping[str, Any], table_name: str, field: str, config: Any) -> Any:
    """Build the encoder or decoder that `config` names.

    Raises:
        UserError: there is no such entry, or its patch size differs from the config's.
    """
    name = getattr(config, field)
    module = entry_of(table, table_name, field, name)(config)
    if module.patch_size != config.patch_size:
        raise UserError(
            f"{field} {name!r} has patches of {module.patch_size} pixels, but patch_size = "
            f"{config.patch_size}: they must be equal."
        )
    # an entry that computes a set of tokens from the grid has their number as `tokens`
    made, tokens = getattr(module, "tokens", 0), config.layout.tokens
    if made != tokens:
        what = f"{made} tokens of an image" if made else "one token per cell of the grid"
        raise UserError(f"token_layout has tokens = {tokens}, but {field} {name!r} has {what}.")
    return module


def inner_config(config: Any, field: str, own: Sequence[str], default: str = "vitamin") -> Any:
    """The config of the encoder or decoder that a wrapping one names: one token per cell of the grid.

    Args:
        field: "encoder" or "decoder"; `<field>_options.<field>` names the inner entry, else it is `default`.
        own: the wrapping entry's own options; all others are the inner entry's.
    """
    inner, options = copy.copy(config), dict(getattr(config, f"{field}_options") or {})
    setattr(inner, field, options.pop(field, default))
    setattr(inner, f"{field}_options", {name: options[name] for name in options if name not in own})
    inner.token_layout = config.layout._replace(tokens=0).to_dict()
    return inner


def whole_options(field: str, options: Mapping[str, Any], defaults: Mapping[str, int]) -> dict[str, int]:
    """`defaults` overridden by `options`, of which other keys are left out.

    Raises:
        UserError: a value is not a whole number from 1.
    """
    found = {name: options.get(name, default) for name, default in defaults.items()}
    for name, value in found.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{field}_options.{name} is {value!r}: it must be a whole number from 1.")
    return found


def check_options(field: str, name: str, options: Mapping[str, Any], allowed: Sequence[str]) -> None:
    """
    Raises:
        UserError: `options` holds a key that the registry entry `name` does not accept.
    """
    for key in options:
        if key not in allowed:
            hint = did_you_mean(key, allowed) if allowed else " It takes none."
            raise UserError(f"{field}_options.{key} is not an option of {field} {name!r}.{hint}")


def check_gaussian(config: Any, field: str) -> None:
    """
    Raises:
        UserError: the layout is not a set, or the parts around Gaussians are not theirs.
    """
    layout, name = config.layout, f"{field} 'gaussian'"
    if not layout.tokens:
        raise UserError(
            f"{name} needs the number of its Gaussians: set token_layout = {{rows: {layout.rows}, columns: "
            f"{layout.columns}, tokens: ...}}, 1 or more."
        )
    if layout.registers:
        raise UserError(f"num_register_tokens = {layout.registers}: {name} has none, set it to 0.")
    if config.quantizer != "gaussian":
        raise UserError(f"{name} needs quantizer 'gaussian', not {config.quantizer!r}.")
    if config.projection != "none":
        raise UserError(
            f"{name} needs projection 'none', not {config.projection!r}: a projection would mix features and "
            "geometry."
        )
