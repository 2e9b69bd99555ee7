"""Checks of a model folder before anything is allocated, and of its weights after loading.

A folder may be truncated, hand-edited or hostile. Configs are compared with the headers of the weight files,
so that a wrong size is an error text instead of an endless build or an allocation that fails.
"""

import contextlib
import logging
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from open_unitok.core.errors import UserError
from open_unitok.core.memory import check_memory, is_memory_error, memory_reason
from open_unitok.core.text_files import read_json

MAX_CONFIG_BYTES = 16 << 20
# (stem, suffix) of weight files in transformers' order of preference
_WEIGHTS = (("model", "safetensors"), ("pytorch_model", "bin"))
# fields that count modules: the time to build a model grows with them, on the meta device too
_COUNTS = re.compile(
    r"(num_|n_)\w*(layers?|experts)|\w*(layers|depths?)|num_(codebooks|register_tokens|labels)"
)


class Stored(NamedTuple):
    """A tensor of a weight file."""

    shape: tuple[int, ...]
    itemsize: int  # bytes per number
    file: Path
    is_float: bool


@contextlib.contextmanager
def loading(source: str | os.PathLike[str]) -> Iterator[None]:
    """Turn every error of the block into one line that names `source`.

    Libraries raise almost any type for a broken file: tokenizers bare `Exception` and, in Rust, a
    BaseException. The original error stays attached for UNITOK_TRACEBACK=1.

    Raises:
        UserError: the block has failed.
    """
    try:
        yield
    except BaseException as error:
        is_failure = isinstance(error, Exception) or type(error).__name__ == "PanicException"
        # Ctrl-C, exit, or an error that names the file
        if not is_failure or (isinstance(error, UserError) and str(Path(source).parent) in str(error)):
            raise
        if isinstance(error, UserError):
            raise UserError(f"{source}: {error}") from error
        raise UserError(f"{source} cannot be loaded: {_reason(error)}") from error


def _reason(error: BaseException, length: int = 300) -> str:
    """An error's first lines as one line; memory errors also have the available bytes."""
    if is_memory_error(error):
        return memory_reason(error)
    text = " ".join(str(error).split())
    # the text of a KeyError is only the key
    name = "" if type(error) in (ValueError, OSError, RuntimeError) else f"{type(error).__name__}: "
    return f"{name}{text[:length]}" if text else type(error).__name__


def read_config(
    folder: str | os.PathLike[str], name: str = "config.json", max_bytes: int = MAX_CONFIG_BYTES
) -> dict[str, Any]:
    """The JSON object in a file of a model folder.

    Raises:
        UserError: the file is missing, not a regular file, too large, or holds anything else.
    """
    path = Path(folder) / name
    if not path.exists():
        raise UserError(f"{folder} is not a model folder: it has no {name}.")
    # a FIFO would block, a device file would not end
    if not path.is_file():
        raise UserError(f"{path} is not a regular file.")
    if path.stat().st_size > max_bytes:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes; at most {max_bytes:,} are read.")
    with loading(path):  # nesting too deep for the JSON reader is a RecursionError
        found = read_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path} must hold a JSON object, found {type(found).__name__}.")
    return found


def stored_weights(folder: str | os.PathLike[str]) -> dict[str, Stored]:
    """Names and shapes of all weights in a folder, read from the headers.

    Raises:
        UserError: there are no weights, or a file is truncated, broken or would run code.
    """
    folder = Path(folder)
    for stem, suffix in _WEIGHTS:
        single, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
        if single.exists():
            return read_header(single)
        if index.exists():
            return _read_shard_headers(folder, index)
    raise UserError(
        f"{folder} has no weights: neither model.safetensors nor pytorch_model.bin, nor their index."
    )


def _read_shard_headers(folder: Path, index: Path) -> dict[str, Stored]:
    shards = read_config(folder, index.name).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(file, str) for file in shards.values()):
        raise UserError(f"{index} has no weight_map from tensors to files.")
    found: dict[str, Stored] = {}
    for name in sorted(set(shards.values())):
        if Path(name).name != name:
            raise UserError(f"{index} lists {name!r}; a shard must be a file in the same folder.")
        if not (folder / name).exists():
            raise UserError(f"{folder / name} does not exist, but {index.name} lists it: download it again.")
        found |= read_header(folder / name)
    return found


def read_header(path: Path) -> dict[str, Stored]:
    """Names and shapes of the tensors of one .safetensors or .bin file.

    Raises:
        UserError: the file is broken, or cannot be read without running code from it.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a regular file.")
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with loading(path), safe_open(path, "pt") as file:
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: Stored(tuple(part.get_shape()), _itemsize(dtype), path, dtype.startswith(("F", "BF")))
                for name, part in found.items()
                if (dtype := part.get_dtype())
            }
    state = read_pickle(path, map_location="meta")
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"{path} does not hold a plain mapping from names to tensors.")
    return {
        name: Stored(tuple(t.shape), t.element_size(), path, t.is_floating_point())
        for name, t in state.items()
    }


def read_pickle(path: Path, map_location: str = "cpu") -> Any:
    """The content of a file of torch.save, read without running code from it.

    Raises:
        UserError: the file is broken, holds other objects than tensors, or expands when read.
    """
    if zipfile.is_zipfile(path):
        with loading(path), zipfile.ZipFile(path) as archive:
            # torch stores its members; a compressed one may expand a thousand times
            packed = [member for member in archive.infolist() if member.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise UserError(f"{path} has a compressed member, {packed[0].filename}: torch.save writes none.")
    try:
        try:  # mmap: a file of many GB is not copied into memory
            return torch.load(path, map_location=map_location, weights_only=True, mmap=True)
        except RuntimeError:  # files of torch < 1.6 cannot be mapped
            return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # of a broken pickle almost any type
        raise UserError(
            f"{path} is not a checkpoint that can be read without running code from it: {_reason(error, 150)}"
        ) from error


def _itemsize(dtype: str) -> int:
    """Bytes of safetensors' "F32", "BF16", "I64", "BOOL", "F8_E4M3"; 4-bit numbers count as a byte."""
    bits = re.match(r"[A-Z]+(\d+)", dtype)
    return max(int(bits[1]) // 8, 1) if bits else 1


def load_checked(cls: Any, load: Callable[..., Any], path: Path, *args: Any, **kwargs: Any) -> Any:
    """The result of `load`, transformers' from_pretrained of the model class `cls`, between all checks.

    Args:
        path: a folder or a hub id; the files of a hub id are checked only after loading.
        args, kwargs: of from_pretrained.

    Raises:
        UserError: a file is broken, sizes differ, weights are missing or not finite, memory is too small, or
            a package that an argument needs is not installed.
    """
    fields = cls.config_class.__dataclass_fields__.keys() - {"dtype"}
    changes = {name: value for name, value in kwargs.items() if name in fields}
    if path.is_dir():
        config = kwargs.get("config")
        check_model_folder(
            path,
            lambda: cls(config or cls.config_class.from_pretrained(path, **changes)),
            # layers may go to disk or another device, and quantised weights are smaller
            check_free=kwargs.keys().isdisjoint({"device_map", "quantization_config"}),
            itemsize=itemsize_of(kwargs.get("dtype")),
        )
    wants_info = kwargs.pop("output_loading_info", False)  # always requested below, for the check
    try:
        with loading(path), quiet_reports():
            model, info = load(str(path), *args, output_loading_info=True, **kwargs)
    except UserError as error:
        if isinstance(error.__cause__, ImportError):
            reason = " ".join(str(error.__cause__).split())
            raise UserError(f"{path} cannot be loaded with these arguments: {reason}") from error
        raise
    if not changes:  # a caller who changes sizes wants the new weights initialised
        check_complete_weights(path, info)
    check_finite(model, path)
    return (model, info) if wants_info else model


def check_model_folder(
    folder: str | os.PathLike[str], build: Callable[[], nn.Module], check_free: bool, itemsize: int | None
) -> None:
    """Compare config.json with the weight files of a folder, before anything is allocated.

    Args:
        build: the model from the folder's config; runs on the meta device.
        check_free: compare the memory that the weights need with the available memory.
        itemsize: bytes per number after loading; None = as stored.

    Raises:
        UserError: the sizes differ, a weight is missing, a file is broken, or memory is too small.
    """
    folder = Path(folder)
    description, stored = read_config(folder), stored_weights(folder)
    check_counts(folder / "config.json", description, len(stored))
    _check_attention(folder / "config.json", description)
    with loading(folder / "config.json"), torch.device("meta"):
        expected = build().state_dict()
    for name in sorted(expected.keys() & stored.keys()):
        if (shape := tuple(expected[name].shape)) != stored[name].shape:
            raise UserError(
                f"{stored[name].file} does not fit config.json: {name} has shape {stored[name].shape}, "
                f"expected {shape}."
            )
        # transformers would round the model's weights to them
        if expected[name].is_floating_point() and not stored[name].is_float:
            raise UserError(f"{stored[name].file}: {name} holds integers, expected floats.")
    if check_free:
        widest = itemsize or max((entry.itemsize for entry in stored.values()), default=4)
        check_memory(sum(t.numel() for t in expected.values()) * widest, f"Loading {folder}")


def check_counts(source: Path, description: Any, limit: int, prefix: str = "") -> None:
    """Check every field that counts modules, such as num_hidden_layers, against the number of tensors.

    Raises:
        UserError: a field is larger: every layer has at least one tensor.
    """
    for key, value in description.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            check_counts(source, value, limit, f"{name}.")
        elif _COUNTS.fullmatch(str(key)):
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, (int, float)) and number > max(limit, 1024):
                    raise UserError(f"{source}: {name} = {value}, but the weights are only {limit} tensors.")


def _check_attention(source: Path, description: Mapping[str, Any]) -> None:
    """Reject attention implementations that transformers would download and import."""
    for key, value in description.items():
        if isinstance(value, dict):
            _check_attention(source, value)
        elif "attn_implementation" in key and not re.fullmatch(r"[\w-]+", str(value or "eager")):
            raise UserError(f"{source}: {key} = {value!r} is code from a hub: remove the key.")


def check_complete_weights(folder: str | os.PathLike[str], info: Mapping[str, Any]) -> None:
    """Reject incomplete weights; `info` is transformers' loading info.

    transformers initialises missing weights randomly and only logs a warning.

    Raises:
        UserError: weights are missing; the message names them and the unexpected ones.
    """
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing:
        found = "; ".join(
            f"{len(names)} {kind}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            for kind, names in (("missing", missing), ("unexpected", unexpected))
            if names
        )
        raise UserError(f"The weights in {folder} do not match its config.json ({found}).")


def itemsize_of(dtype: Any) -> int | None:
    """Bytes per number of a dtype or its name; None for None and "auto"."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    return found.itemsize if isinstance(found, torch.dtype) else None


@contextlib.contextmanager
def quiet_reports() -> Iterator[None]:
    """Silence transformers' load reports of many lines; our checks say the same in one."""
    # the last one reports at a level of modeling_utils above WARNING
    names = ("modeling_utils", "core_model_loading", "distributed.tensor_parallel")
    loggers = [logging.getLogger(f"transformers.{name}") for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def check_finite(model: nn.Module, source: str | os.PathLike[str] = "") -> None:
    """
    Raises:
        UserError: a weight holds NaN or infinity; the message names the tensor.
    """
    for name, tensor in model.state_dict().items():
        check_finite_tensor(name, tensor, source)


def check_finite_tensor(name: str, tensor: Tensor, source: str | os.PathLike[str] = "") -> None:
    """As `check_finite`, for one tensor."""
    if tensor.is_meta or not tensor.is_floating_point():
        return  # offloaded, or quantised
    # one pass without a copy: NaN and infinity survive a sum, an overflow is looked at again
    total = tensor.detach().sum(dtype=torch.float32)
    if not torch.isfinite(total) and not torch.isfinite(tensor).all():
        raise UserError(f"{source or 'The model'}: the weight {name} holds NaN or infinity.")
