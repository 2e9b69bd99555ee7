"""Quantisers of published checkpoints: IBQ, TokenFlow, VQ-KD, its cluster variant, and CODA.

A file gives the quantiser alone; `vqgan/published.py` reads whole tokenizers of IBQ.
V entries, C width of one row, A width of queries and keys.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from open_unitok.core.errors import UserError, did_you_mean
from open_unitok.core.files import atomic_folder, write_json
from open_unitok.core.text_files import read_json

from ..folder_checks import loading
from ..loading import check_weights_fit, read_state_dict
from .base import Quantizer

WEIGHTS, DESCRIPTION = "quantizer.safetensors", "quantizer.json"
State = Mapping[str, Tensor]


class PublishedQuantizer(NamedTuple):
    """A quantiser under our names."""

    fields: dict[str, Any]  # of UniTokConfig: quantizer, quantizer_options, num_codebooks, ...
    state: dict[str, Tensor]  # of our `Quantizer`, without usage statistics


def _fields(quantizer: str, rows: Tensor, **options: Any) -> dict[str, Any]:
    if rows.dim() != 2:
        raise UserError(f"its table of rows has shape {tuple(rows.shape)}, expected (entries, width).")
    sizes = {"num_codebooks": 1, "codebook_size": rows.shape[0], "codebook_dim": rows.shape[1]}
    return {"quantizer": quantizer, "quantizer_options": options, **sizes}


def _ibq(state: State) -> PublishedQuantizer:
    # the averaged weights, which are evaluated, have names without dots
    rows = state.get("model_ema.quantizeembeddingweight")
    rows = state["quantize.embedding.weight"] if rows is None else rows
    return PublishedQuantizer(_fields("ibq", rows), {"codebooks": rows[None]})


def _tokenflow(state: State) -> PublishedQuantizer:
    parts = [state[f"quantize.embedding_{part}.weight"] for part in ("vqkd", "vqgan")]  # semantic, pixel
    if len(parts[0]) != len(parts[1]):
        raise UserError(f"the two tables have {len(parts[0])} and {len(parts[1])} rows: they share an index.")
    rows = torch.cat(parts, dim=-1)
    widths = [part.shape[-1] for part in parts]
    return PublishedQuantizer(_fields("shared_index", rows, block_widths=widths), {"codebooks": rows[None]})


def _vqkd(state: State) -> PublishedQuantizer:
    rows = state["_quantizer._embedding.weight"]
    # k-means must not run again on rows that are trained
    started = torch.ones((), dtype=torch.bool, device=rows.device)
    return PublishedQuantizer(_fields("ema", rows), {"codebooks": rows[None], "started": started})


def _cluster(state: State) -> PublishedQuantizer:
    rows, probability = state["_quantizer._embedding.weight"], state["_quantizer._probability"]
    ours = {"codebooks": rows[None], "probability": probability[None]}
    fields = _fields("cluster", rows)
    _check_shapes({"_quantizer._probability": (probability, (len(rows),))})
    return PublishedQuantizer(fields, ours)


def _coda(state: State) -> PublishedQuantizer:
    rows = state["codebooks.weight"]
    ours = {"codebooks": rows[None]}
    for theirs, name in (("to_q", "query"), ("to_k", "key"), ("to_v", "value")):
        ours |= {f"{name}.{part}": state[f"attn.{theirs}.{part}"] for part in ("weight", "bias")}
    norm = None
    if "attn.norm_q.weight" in state:
        norm = "layer" if "attn.norm_q.bias" in state else "rms"
        for theirs, name in (("norm_q", "query_norm"), ("norm_k", "key_norm")):
            parts = ("weight", "bias") if norm == "layer" else ("weight",)
            ours |= {f"{name}.{part}": state[f"attn.{theirs}.{part}"] for part in parts}
    width = ours["query.weight"].shape[0]
    fields = _fields("attention", rows, attention_dim=width, norm=norm)
    inputs = rows.shape[1]
    shapes = {"value.weight": (inputs, inputs), "value.bias": (inputs,)}
    for name in ("query", "key"):
        shapes |= {f"{name}.weight": (width, inputs), f"{name}.bias": (width,)}
        shapes |= {f"{name}_norm.{part}": (width,) for part in ("weight", "bias")}
    _check_shapes({name: (ours[name], shape) for name, shape in shapes.items() if name in ours})
    return PublishedQuantizer(fields, ours)


def _check_shapes(expected: Mapping[str, tuple[Tensor, tuple[int, ...]]]) -> None:
    """
    Raises:
        UserError: a tensor does not have the shape beside it.
    """
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise UserError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}.")


# System -> how its quantiser is read, and the beginnings of the names that belong to the quantiser.
SYSTEMS: dict[str, tuple[Callable[[State], PublishedQuantizer], tuple[str, ...]]] = {
    "ibq": (_ibq, ("quantize.",)),
    "tokenflow": (_tokenflow, ("quantize.",)),
    "vqkd": (_vqkd, ("_quantizer.",)),
    "cluster": (_cluster, ("_quantizer.",)),
    "coda": (_coda, ("codebooks.", "attn.")),
}
# Tensors of these quantisers that are no part of ours: a ring of used codes, step counters of losses.
_LEFT_OUT = ("quantize.codebook_used", "_quantizer._losses.")


class _Recorded(dict[str, Tensor]):
    """A state dict that knows which names were read."""

    def __init__(self, state: State) -> None:
        super().__init__(state)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return super().__getitem__(name)


def quantizer_from_published(system: str, published: State) -> PublishedQuantizer:
    """The quantiser in a published state dict; works on the meta device as well.

    Raises:
        UserError: an unknown system; the dict lacks a tensor of its quantiser, or has one that ours does not.
    """
    if system not in SYSTEMS:
        raise UserError(f"{system!r} is not a known system." + did_you_mean(system, SYSTEMS))
    convert, prefixes = SYSTEMS[system]
    state = _Recorded(published)
    missing: list[str] = []
    found = None
    while found is None:  # name all that is missing, not only the first
        try:
            found = convert(state)
        except KeyError as error:
            missing.append(error.args[0])
            state[error.args[0]] = torch.empty(1, 1)
        except UserError:
            if not missing:
                raise
            break  # of a stand-in's shape
    if missing or found is None:
        raise UserError(f"the quantiser of {system} is not complete: {', '.join(missing)} missing.")
    if system == "ibq":
        state.read.add("quantize.embedding.weight")  # beside the averaged copy
    unknown = [
        name
        for name in state
        if name.startswith(prefixes) and not name.startswith(_LEFT_OUT) and name not in state.read
    ]
    if unknown:
        raise UserError(
            f"{len(unknown)} tensors are not known in the quantiser of {system} ({unknown[0]}, ...)."
        )
    return found


def convert_quantizer(system: str, path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> Any:
    """Write the quantiser of a published checkpoint file as a folder that `load_quantizer` reads.

    Returns:
        The fields of UniTokConfig that fit it.

    Raises:
        UserError: the file is not such a checkpoint.
    """
    if system not in SYSTEMS:
        raise UserError(f"{system!r} is not a known system." + did_you_mean(system, SYSTEMS))
    published = read_state_dict(path)
    try:
        found = quantizer_from_published(system, published)
        _check_finite(found.state)
    except UserError as error:
        raise UserError(f"{path} does not fit: {error}") from None
    with atomic_folder(Path(folder)) as target:
        state = {n: (t.float() if t.is_floating_point() else t) for n, t in found.state.items()}
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, target / WEIGHTS)
        write_json(target / DESCRIPTION, {"system": system, "model": found.fields})
    return found.fields


def _check_finite(state: State) -> None:
    """
    Raises:
        UserError: a tensor holds NaN or infinity, so that codes would be wrong.
    """
    for name, tensor in state.items():
        # other devices than meta have values
        if not tensor.is_meta and not torch.isfinite(tensor).all():
            raise UserError(f"{name} holds NaN or infinity.")


def load_quantizer(quantizer: Quantizer, config: Any, folder: str | os.PathLike[str]) -> None:
    """Load a folder of `convert_quantizer` into a tokenizer's quantiser; in a pyramid, into its inner one.

    Args:
        config: the `UniTokConfig` of the tokenizer.

    Raises:
        UserError: the folder holds another quantiser than the config asks for.
    """
    path = Path(folder)
    for name in (WEIGHTS, DESCRIPTION):
        if not (path / name).is_file():
            raise UserError(f"init_quantizer: {path} has no {name}: write it by unitok convert quantizer.")
    content = read_json(path / DESCRIPTION)
    stored = content.get("model") if isinstance(content, dict) else None
    known = isinstance(stored, dict) and isinstance(stored.get("quantizer_options"), dict)
    if not known or not all(hasattr(config, name) for name in stored):  # pyright: ignore
        raise UserError(f"init_quantizer: {path / DESCRIPTION} is not a file of unitok convert quantizer.")
    options = dict(config.quantizer_options or {})
    wanted = {name: getattr(config, name) for name in stored} | {"quantizer_options": options}  # pyright: ignore
    if config.quantizer == "residual":
        quantizer = quantizer.inner  # pyright: ignore
        wanted["quantizer"] = options.get("inner", "multi_codebook")
        wanted["quantizer_options"] = options = dict(options.get("inner_options") or {})
    for name, value in stored.items():  # pyright: ignore
        if name == "quantizer_options":
            other = {key: options.get(key) for key in value if options.get(key) != value[key]}
            if other:
                raise UserError(
                    f"init_quantizer: {path} has {json.dumps(value)}, but the options of the quantiser are "
                    f"{json.dumps(options)}: take those of {DESCRIPTION}."
                )
        elif wanted[name] != value:
            raise UserError(
                f"init_quantizer: {path} has {name} = {value!r}, but model.{name} is {wanted[name]!r}."
            )
    with loading(path / WEIGHTS):
        state = load_file(path / WEIGHTS)
        _check_finite(state)
    target = {n: t for n, t in quantizer.state_dict().items() if n not in ("usage", "calls")}
    check_weights_fit(path, state, target, "the quantiser")
    quantizer.load_state_dict(state, strict=False)
