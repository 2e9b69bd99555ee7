"""Checkpoints of LlamaGen and of UniTok's fork of it: their names of the weights, and their sizes.

LlamaGen saves {"model": weights, ...}; the fork's names with K sub-codebooks differ in the tables and the
head. D width, V entries of a sub-codebook.
"""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from open_unitok.core.errors import UserError
from open_unitok.core.files import SAMPLING_FILE, atomic_folder, write_atomic, write_json
from open_unitok.tokenizer import UniTok
from open_unitok.tokenizer.loading import read_checkpoint

from ..loading import check_class_folder
from .config import ClassConditionalConfig
from .model import ClassConditionalModel

# published name -> ours; `layers` of the decoder and of the depth head alike
_RENAMES = [
    (r"cls_embedding\.embedding_table\.", "class_embedding."),
    (r"tok_embeddings\.codebooks\.", "code_embeddings."),
    (r"tok_embeddings\.weight", "code_embeddings.0.weight"),  # K = 1
    (r"output\.codebooks\.", "depth_head.embeddings."),
    (r"output\.linear_head\.", "depth_head.output."),
    (r"output\.layers\.", "depth_head.layers."),
    (r"output\.norm\.", "depth_head.norm."),
    (r"output\.weight", "depth_head.output.weight"),  # K = 1
]
_IN_BLOCK = [
    ("attention.wqkv.", "attention.qkv."),
    ("attention.wo.", "attention.out."),
    ("feed_forward.w1.", "mlp.gate."),
    ("feed_forward.w3.", "mlp.up."),
    ("feed_forward.w2.", "mlp.down."),
    ("ffn_norm.", "mlp_norm."),
]
_NESTED = ("model", "ema", "module", "state_dict")  # keys under which checkpoints hold their weights
# width -> heads of the published sizes; a checkpoint does not store the number of heads
_HEADS = {768: 12, 1024: 16, 1280: 20, 1536: 24, 2560: 40, 3200: 32}


def from_llamagen_file(
    source: Path, target: Path, unitok: UniTok | None = None, num_heads: int | None = None, **fields: Any
) -> None:
    """Write the model of a published checkpoint as a folder; other arguments as `from_llamagen`.

    Args:
        unitok: its visual tokenizer; None = write a folder without one, which cannot generate images.

    Raises:
        UserError: as `from_llamagen`; the tokenizer's codes have other sizes.
    """
    if unitok is not None:
        sizes = unitok.config
        fields |= {"num_image_tokens": sizes.num_visual_tokens, "token_layout": sizes.token_layout}
        fields["unitok_fingerprint"] = unitok.fingerprint()
    # training scripts save their arguments beside the weights
    with torch.serialization.safe_globals([argparse.Namespace]):
        weights = read_checkpoint(source)
    model = from_llamagen(weights, source, num_heads, **fields)
    if unitok is not None:
        model.config.check_tokenizer(unitok, source)
    with atomic_folder(target) as folder:
        model.save_pretrained(folder)
        write_json(folder / SAMPLING_FILE, {"guidance": 1.0})
        if unitok is not None:
            unitok.save_pretrained(folder / "unitok")


def to_llamagen_file(source: Path, target: Path) -> None:
    """Write the model folder `source` as a published checkpoint, without the visual tokenizer.

    Raises:
        UserError: not a class-conditional folder, or one whose sub-codebooks have different sizes.
    """
    check_class_folder(source)
    if target.suffix != ".pt":
        raise UserError(f"{target} must end in .pt: a folder is converted to a published checkpoint.")
    model = ClassConditionalModel.from_pretrained(source)
    if model.config.code_sizes is not None:
        raise UserError(
            f"{source} has sub-codebooks of {model.config.code_sizes} entries; published ones are equal."
        )
    write_atomic(target, lambda file: torch.save({"model": to_llamagen(model)}, file))


def from_llamagen(
    weights: Mapping[str, Any], source: Any, num_heads: int | None = None, **fields: Any
) -> ClassConditionalModel:
    """The model of a published class-conditional checkpoint, in its dtype.

    Args:
        weights: the loaded file: a state dict, or a mapping that holds one as "model".
        num_heads: attention heads; None = those of the published size of this width.
        fields: further fields of the config: num_image_tokens (256 by default), class_dropout, ...

    Raises:
        UserError: not such a checkpoint; a text-conditional one; an unknown width without `num_heads`.
    """
    state = {our_name(name): tensor for name, tensor in _state_dict(weights, source).items()}
    config = _config_of(state, source, num_heads, fields)
    return ClassConditionalModel.from_state(config, state, source)


def to_llamagen(model: ClassConditionalModel) -> dict[str, Tensor]:
    """The model's weights by their published names."""
    single = model.config.num_codebooks == 1
    return {_published(name, single): tensor for name, tensor in model.state_dict().items()}


def our_name(name: str) -> str:
    """A published name as ours."""
    for pattern, ours in _RENAMES:
        name, found = re.subn("^" + pattern, ours, name)
        if found:
            break
    for published, ours in _IN_BLOCK:
        name = name.replace(published, ours)
    return name


def _published(name: str, single: bool) -> str:
    for published, ours in _IN_BLOCK:
        name = name.replace(ours, published)
    for pattern, ours in _RENAMES:
        published = pattern.replace("\\", "")
        # with one sub-codebook the tables and the head have names of their own
        if name.startswith(ours) and (published.endswith("weight") == single or ours == "class_embedding."):
            return published + name[len(ours) :]
    return name


def _state_dict(weights: Mapping[str, Any], source: Any) -> dict[str, Tensor]:
    found: Any = weights
    while isinstance(found, Mapping) and (key := next((k for k in _NESTED if k in found), None)):
        found = found[key]
    tensors = isinstance(found, Mapping) and all(isinstance(tensor, Tensor) for tensor in found.values())
    # a prefix that DistributedDataParallel and torch.compile add
    state = {re.sub(r"^(module\.|_orig_mod\.)+", "", str(k)): v for k, v in found.items()} if tensors else {}
    if any(name.startswith("cls_embedding.cap_proj") for name in state):
        raise UserError(f"{source} is conditioned on captions, not on classes: it cannot be converted.")
    if "cls_embedding.embedding_table.weight" not in state:
        raise UserError(
            f"{source} is not a checkpoint of LlamaGen or of UniTok's fork of it: it has no "
            "cls_embedding.embedding_table.weight."
        )
    # rotary tables, which some versions save, are computed
    return {name: tensor for name, tensor in state.items() if "freqs_cis" not in name}


def _config_of(
    state: dict[str, Tensor], source: Any, num_heads: int | None, fields: dict[str, Any]
) -> ClassConditionalConfig:
    """Sizes from the shapes of the weights."""
    books = range(_count(state, "code_embeddings."))
    tables = [state[name] for k in books if (name := f"code_embeddings.{k}.weight") in state]
    gate = state.get("layers.0.mlp.gate.weight")
    if not tables or gate is None:
        raise UserError(f"{source} has no code embedding or no layer.")
    rows, width = state["class_embedding.weight"].shape
    heads = num_heads or _HEADS.get(width)
    if heads is None:
        raise UserError(f"{source} has width {width}, which is not a published size: give --heads.")
    # the null class has the last row; a table of 1000 rows has ImageNet's classes alone
    classes = fields.get("num_classes", 1000 if rows == 1000 else rows - 1)
    if rows - classes not in (0, 1):
        raise UserError(f"{source} has {rows} classes (with the null class, if any), not {classes}.")
    sizes = [table.shape[0] for table in tables]
    return ClassConditionalConfig(
        **{
            "num_classes": classes,
            "class_dropout": 0.1 * (rows - classes),
            "hidden_size": width,
            "num_attention_heads": heads,
            "num_hidden_layers": _count(state, "layers."),
            "intermediate_size": gate.shape[0],
            "depth_layers": _count(state, "depth_head.layers."),
            "num_codebooks": len(sizes),
            "codebook_size": max(sizes),
            "code_sizes": sizes,
            **fields,
        }
    )


def _count(state: Mapping[str, Any], prefix: str) -> int:
    found = [int(name[len(prefix) :].partition(".")[0]) for name in state if name.startswith(prefix)]
    return max(found, default=-1) + 1
