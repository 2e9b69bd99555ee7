"""YAML to strict dataclasses: a config error stops the run before its first batch with a one-line message.

This module, `options.py` and the stages' `config.py` import no torch, so that errors and finished runs are
reported at once.
"""

import dataclasses
import importlib.resources
import math
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from open_unitok.core.errors import UserError, did_you_mean
from open_unitok.core.text_files import read_text

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """YAML in which `2e-4` is a number (YAML 1.1 wants 2.0e-4) and a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        # PyYAML keeps the last of several equal keys without an error
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} occurs twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


# an exponent without a decimal point; PyYAML would read a string
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


_INHERITS = "inherits"
# Keys that a resumed run may change, because results do not depend on them, or by rounding only.
CHANGEABLE_KEYS = (
    *("out", "stop_at", "log", "checkpoint", "profile"),
    # how the work is laid out over GPUs: another layout changes the rounding of sums only
    *("engine.threads", "engine.zero_stage", "engine.offload"),
    *("engine.overlap_comm", "engine.hpz", "engine.compile"),
)
CHANGEABLE_IN_STAGE = {"mllm": ("data.workers", "engine.accumulation", "attention")}


# ---- reading ---------------------------------------------------------------------------------------------


def read_yaml(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plain dict of a YAML file (or a shipped one), with `a.b=value` overrides applied.

    The key `inherits` names a YAML file, relative to its own (or a shipped one), whose keys are the defaults:
    a section is merged key by key, any other value (a list too) is replaced. The result has no such key.

    Raises:
        UserError: no such file, not a YAML mapping, files that inherit from each other in a circle, or an
            override that is not `key=value`.
    """
    raw = _read_inherited(str(path), ())
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise UserError(f"Override {override!r} is not of the form key=value or section.key=value.")
        _set(raw, key, _parse(value, override), override)
    return raw


def _read_inherited(path: str, children: tuple[str, ...]) -> dict[str, Any]:
    """The mapping of a file and of those it inherits from; `children` are the files that led to it."""
    # somebody else's run directory may name commands, see `load_run_config`
    if children and (Path(path).parent / "run.json").exists():
        raise UserError(
            f"{children[-1]} inherits from {path} of a run directory: copy that to your own YAML."
        )
    try:
        raw = yaml.load(_text(path, children), _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds {type(raw).__name__}, not a mapping of keys to values.")
    if _INHERITS not in raw:
        return raw
    parent = raw.pop(_INHERITS)
    if not isinstance(parent, str) or not parent:
        raise UserError(f"{path}: {_INHERITS} is {parent!r}; it must be the name of one YAML file.")
    # a link is not resolved: it stands for its own folder
    beside = os.path.normpath(os.path.join(os.path.dirname(path), parent))
    # as on the command line, a shipped config is found from anywhere
    if os.path.exists(beside) or not _shipped(parent).is_file():
        parent = beside
    chain = (*children, path)
    if os.path.realpath(parent) in map(os.path.realpath, chain):
        raise UserError(f"{_INHERITS} runs in a circle: {' -> '.join((*chain, parent))}.")
    return _merged(_read_inherited(parent, chain), raw)


def _merged(parent: dict[str, Any], child: dict[str, Any]) -> dict[str, Any]:
    """The child's values over the parent's; sections are merged."""
    both = {
        key: _merged(parent[key], value)
        for key, value in child.items()
        if isinstance(value, dict) and isinstance(parent.get(key), dict)
    }
    return {**parent, **child, **both}


def _text(path: str, children: tuple[str, ...]) -> str:
    file = Path(path)
    if file.is_dir():
        raise UserError(f"{path} is a folder: name the YAML file.")
    shipped = _shipped(path)
    # a file in the working directory has precedence over the shipped config of the same name
    if not file.exists():
        if not (path.endswith(".yaml") and shipped.is_file()):
            where = f", from which {children[-1]} inherits," if children else ""
            raise UserError(
                f"{path}{where} does not exist, neither here nor among the shipped configs (configs/)."
            )
        return shipped.read_text(encoding="utf-8")
    return read_text(file)


def _shipped(path: str) -> Traversable:
    """The place of the shipped config of this name, which may not exist."""
    return importlib.resources.files("open_unitok.configs").joinpath(path.removeprefix("configs/"))


def _parse(value: str, override: str) -> Any:
    try:
        return yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"Override {override!r}: the value is not valid YAML.") from error


def _set(raw: Any, key: str, value: Any, override: str) -> None:
    """Set raw[a][b] for key "a.b"; a number is an index of a list."""
    *parents, last = key.split(".")
    node = raw
    for part in parents:
        if isinstance(node, list):
            node = node[_index(part, node, override)]
        else:
            # a section may be absent or null: create it
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        if not isinstance(node, dict | list):
            raise UserError(f"Override {override!r}: {part!r} is a value, not a section.")
    if isinstance(node, list):
        node[_index(last, node, override)] = value
    else:
        node[last] = value


def _index(part: str, items: list, override: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise UserError(f"Override {override!r}: {part!r} is not an index from 0 to {len(items) - 1}.")
    return int(part)


# ---- building --------------------------------------------------------------------------------------------


def build_config(cls: type[T], raw: Any, where: str = "") -> T:
    """An instance of the dataclass `cls` from plain values; checks every type, then calls its `check()`.

    Raises:
        UserError: unknown or missing key, wrong type, or a value that `check` rejects; names the dotted key.
    """
    if not isinstance(raw, Mapping):
        raise UserError(f"{where or 'The config'} is {raw!r}: expected a section of keys and values.")
    fields: dict[str, dataclasses.Field] = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for key in raw:
        if key not in fields:
            section = next((s for s, keys in getattr(cls, "section_keys", {}).items() if key in keys), None)
            hint = f" Did you mean '{section}.{key}'?" if section else did_you_mean(str(key), fields)
            raise UserError(f"Unknown config key {_join(where, key)!r}.{hint}")
    values = {}
    for name, field in fields.items():
        if name in raw:
            values[name] = _convert(hints[name], raw[name], _join(where, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(
                f"Config key {_join(where, name)!r} is missing: expected {_describe(hints[name])}."
            )
    config = cls(**values)
    check = getattr(config, "check", None)
    if check is not None:
        check()
    return config


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint`; the only conversions are int to float and list to tuple."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    # `X | None` has another origin than `Optional[X]`
    if origin in (Union, types.UnionType):
        return _convert_union(inner, value, where, hint)
    if origin is Literal:
        # True == 1, so a bool must not pass for an int
        if value in inner and not (isinstance(value, bool) and not any(isinstance(i, bool) for i in inner)):
            return value
        near = did_you_mean(str(value), map(str, inner))
        raise UserError(f"{where} is {value!r}.{near}")
    if dataclasses.is_dataclass(hint):
        return build_config(typing.cast(type, hint), value, where)
    if origin is list and isinstance(value, list):
        return [_convert(inner[0], item, f"{where}.{i}") for i, item in enumerate(value)]
    if origin is tuple and isinstance(value, list | tuple):
        if inner[-1] is Ellipsis:
            return tuple(_convert(inner[0], item, f"{where}.{i}") for i, item in enumerate(value))
        if len(inner) == len(value):
            return tuple(_convert(t, item, f"{where}.{i}") for i, (t, item) in enumerate(zip(inner, value)))
    if origin is dict and isinstance(value, dict):
        return {
            _convert(inner[0], k, where): _convert(inner[1], v, _join(where, k)) for k, v in value.items()
        }
    # `lr: 1` is an int in YAML
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    # bool is a subclass of int: `steps: true` must be rejected
    if (
        isinstance(hint, type)
        and isinstance(value, hint)
        and not (isinstance(value, bool) and hint is not bool)
    ):
        if hint is float and not math.isfinite(value):  # pyright: ignore
            raise UserError(f"{where} is {value!r}: expected a finite number.")
        return value
    raise UserError(f"{where} is {value!r}: expected {_describe(hint)}.")


def _convert_union(options: tuple, value: Any, where: str, hint: Any) -> Any:
    if value is None and type(None) in options:
        return None
    options = tuple(option for option in options if option is not type(None))
    if len(options) == 1:  # X | None: the error of X names more than "X or None" would
        return _convert(options[0], value, where)
    # the only section, or list of sections, has errors that name its keys
    for kind, fits in ((Mapping, dataclasses.is_dataclass), (list, _is_list_of_sections)):
        fitting = [option for option in options if fits(option)]
        if isinstance(value, kind) and len(fitting) == 1:
            return _convert(fitting[0], value, where)
    # the first type that accepts the value
    for option in options:
        try:
            return _convert(option, value, where)
        except UserError:
            continue
    raise UserError(f"{where} is {value!r}: expected {_describe(hint)}.")


def _is_list_of_sections(hint: Any) -> bool:
    inner = typing.get_args(hint)
    return typing.get_origin(hint) is list and dataclasses.is_dataclass(inner[0])


_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "a string",
    bool: "true or false",
    type(None): "nothing (null)",
}


def _describe(hint: Any) -> str:
    """A type in words, for error messages."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(i) for i in inner)
    if origin is Literal:
        return "one of " + ", ".join(map(str, inner))
    if origin is tuple and inner[-1] is not Ellipsis:
        return f"a list of {len(inner)} values ({', '.join(_describe(i) for i in inner)})"
    if origin in (list, tuple):
        return f"a list ({_describe(inner[0])} each)"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "a section of keys and values"
    return _NAMES.get(hint, str(hint))


# ---- writing and comparing -------------------------------------------------------------------------------


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain dicts, lists, strings and numbers."""
    return _plain(dataclasses.asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def to_yaml(config: Any) -> str:
    """The resolved config as YAML, keys in the order of the dataclasses."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def config_differences(
    old: Mapping[str, Any], new: Mapping[str, Any], free: Sequence[str] = CHANGEABLE_KEYS
) -> list[str]:
    """ "key: old -> new" for every key that differs, except those in `free` and below them."""
    before, after = _flat(old), _flat(new)
    return [
        f"{key}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key, _ABSENT) != after.get(key, _ABSENT)
        and not any(key == name or key.startswith(f"{name}.") for name in free)
    ]


_ABSENT = object()  # distinct from None, which is a valid value


def _flat(value: Any, where: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        return {k: v for key, item in value.items() for k, v in _flat(item, _join(where, key)).items()}
    return {where: value}
