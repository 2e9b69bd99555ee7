"""Published MLLM folders (model_type mini_gemini) to our configs and state dicts, and back.

The published config.json describes the decoder only. The visual sizes follow from tensor shapes, the heads of
the projection from the tokenizer's rule; 256 visual tokens, boi 3 and eoi 4 are constants of the published
code.

K sub-codebooks, V entries per sub-codebook, C width of one code.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing, write_json
from open_unitok.tokenizer.convert import PROJECTION, rename
from open_unitok.tokenizer.folder_checks import loading, read_config, read_pickle, stored_weights

from .config import UniTokMLLMConfig
from .loading import PUBLISHED_TYPE

_LLAMA_LAYER = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
    "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm",
)  # fmt: skip
# Published module name -> ours; # matches a number.
_NAMES = {
    "model.embed_tokens": "language_model.embed_tokens",
    "model.norm": "language_model.norm",
    "lm_head": "lm_head",
    "model.multi_embedder.mm_projector.#": "visual_embedder.projector.#",
    "ar_head.norm": "depth_head.norm",
    "ar_head.linear_head": "depth_head.output",
}
_NAMES |= {f"model.layers.#.{part}": f"language_model.layers.#.{part}" for part in _LLAMA_LAYER}
_NAMES |= {f"ar_head.layers.#.{part}": f"depth_head.layers.#.{part}" for part in _LLAMA_LAYER}
_NAMES |= {
    f"model.multi_embedder.attn_projection.{theirs}": f"visual_embedder.projection.{ours}"
    for theirs, ours in PROJECTION.items()
}
_NAMES_BACK = {ours: theirs for theirs, ours in _NAMES.items()}
_BOOK = "model.multi_embedder.quantizer.codebooks"
# fields of the published config.json that describe the decoder
_TEXT_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_theta", "rope_scaling", "attention_bias",
)  # fmt: skip


def to_ours(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict under our names; works on the meta device too.

    Raises:
        UserError: a name that the published MLLM does not have, or a key bias that is not zero.
    """
    state: dict[str, Tensor] = {}
    # Codebooks and embedding tables are numbered in the file and one tensor in our model.
    books: dict[int, Tensor] = {}
    tables: dict[int, Tensor] = {}
    for name, tensor in published.items():
        if match := re.fullmatch(rf"{re.escape(_BOOK)}\.(\d+)\.codebook\.weight", name):
            books[int(match[1])] = tensor
        elif match := re.fullmatch(r"ar_head\.codebooks\.(\d+)\.weight", name):
            tables[int(match[1])] = tensor
        elif name.endswith(".attn.zero_k_bias"):
            if not tensor.is_meta and tensor.any():
                raise UserError(f"{name} is not zero: this is not a published MLLM.")
        elif name.endswith((".vocab_usage", ".rotary_emb.inv_freq")):
            continue  # usage statistics of the tokenizer; RoPE tables, which are recomputed
        elif (ours := rename(name, _NAMES)) is not None:
            state[ours] = tensor
        else:
            raise UserError(f"{name!r} is not a weight of a published MLLM: this is another kind of model.")
    if books:
        state["visual_embedder.codebooks"] = torch.stack([books[k] for k in sorted(books)])
    if tables:
        state["depth_head.embeddings.weight"] = torch.cat([tables[k] for k in sorted(tables)])
    return state


def to_published(ours: Mapping[str, Tensor], codebook_size: int) -> dict[str, Tensor]:
    """Our state dict under the published names; the tokenizer's usage statistics, which we drop, are zeros.

    Raises:
        UserError: a weight that the published MLLM does not have.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in ours.items():
        if name == "visual_embedder.codebooks":
            state |= {f"{_BOOK}.{k}.codebook.weight": book for k, book in enumerate(tensor)}
            state |= {f"{_BOOK}.{k}.vocab_usage": book.new_zeros(len(book)) for k, book in enumerate(tensor)}
        elif name == "depth_head.embeddings.weight":
            parts = tensor.split(codebook_size)
            state |= {f"ar_head.codebooks.{k}.weight": part for k, part in enumerate(parts)}
        elif (published := rename(name, _NAMES_BACK)) is not None:
            state[published] = tensor
            if name.endswith(".query_bias"):  # the published attention also stores a zero bias of the keys
                state[published.replace("q_bias", "zero_k_bias")] = torch.zeros_like(tensor)
        else:
            raise UserError(f"The published MLLM has no weight {name!r}.")
    return state


def config_from_published(config: Mapping[str, Any], published: Mapping[str, Tensor]) -> UniTokMLLMConfig:
    """Our config of a published model: the decoder from its config.json, the rest from tensor shapes.

    Raises:
        UserError: tensors from which sizes are derived are missing.
    """
    books = sum(bool(re.fullmatch(rf"{re.escape(_BOOK)}\.\d+\.codebook\.weight", name)) for name in published)
    layers = {m[1] for name in published if (m := re.match(r"ar_head\.layers\.(\d+)\.", name))}
    wanted = (
        f"{_BOOK}.0.codebook.weight",
        "model.multi_embedder.attn_projection.proj.weight",
        "ar_head.layers.0.mlp.gate_proj.weight",
    )
    for name in wanted:
        if name not in published:
            raise UserError(f"The weights have no {name}: this is not a published MLLM.")
    entries, width = published[wanted[0]].shape  # (V, C)
    text = {name: config[name] for name in _TEXT_FIELDS if config.get(name) is not None}
    return UniTokMLLMConfig(
        text_config=LlamaConfig.from_dict(text),
        depth_config={
            "num_hidden_layers": len(layers),
            "intermediate_size": published[wanted[2]].shape[0],
        },
        num_codebooks=books,
        codebook_size=entries,
        codebook_dim=width,
        visual_hidden_size=published[wanted[1]].shape[0],
        visual_context="last",  # as in the published sampler
        pad_token_id=config.get("pad_token_id") or 0,
    )


def read_published(
    folder: str | os.PathLike[str], dtype: torch.dtype | str | None = None, **fields: Any
) -> tuple[UniTokMLLMConfig, dict[str, Tensor]]:
    """The config and the state dict, under our names, of a published folder.

    Args:
        dtype: of the weights; None or "auto" = as in the files.
        fields: of `UniTokMLLMConfig` that replace the derived ones, such as visual_context.

    Raises:
        UserError: the folder holds another type of model, or weights with other names.
    """
    folder = existing(Path(folder))
    description = read_config(folder)
    if description.get("model_type") != PUBLISHED_TYPE:
        raise UserError(
            f"{folder} holds a model of type {description.get('model_type')!r}, not a published MLLM "
            f"({PUBLISHED_TYPE!r})."
        )
    published = read_shards(folder)
    config = config_from_published(description, published)
    for name, value in fields.items():
        setattr(config, name, value)
    state = to_ours(published)
    if config.tie_word_embeddings:  # files of tied models may store the shared tensor once
        state.setdefault("lm_head.weight", state["language_model.embed_tokens.weight"])
    if isinstance(dtype, str):
        dtype = None if dtype == "auto" else getattr(torch, dtype)
    if dtype is not None:
        state = {name: tensor.to(dtype) for name, tensor in state.items()}
    return config, state


def read_shards(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a folder: safetensors, or .bin files (read with weights_only=True).

    Raises:
        UserError: there are no weights, or a shard of the index is missing or broken.
    """
    from safetensors.torch import load_file

    state: dict[str, Tensor] = {}
    # the headers are checked first: every file of the index exists and is whole
    for path in sorted({stored.file for stored in stored_weights(folder).values()}):
        if path.suffix == ".safetensors":
            with loading(path):
                state |= load_file(path)
        else:
            state |= read_pickle(path)
    return state


def save_published(
    config: UniTokMLLMConfig,
    state: Mapping[str, Tensor],
    text_tokenizer: Any,
    folder: str | os.PathLike[str],
) -> None:
    """Write a LLaMA-based model as a published folder: config.json, model.safetensors, the text tokenizer."""
    from safetensors.torch import save_file

    text = config.text_config.to_dict()
    if text.get("model_type") != "llama":
        raise UserError(f"The published format is for LLaMA; this decoder is {text.get('model_type')!r}.")
    # transformers 5 nests rope_theta; published code reads it at the top level
    fields = {name: text[name] for name in _TEXT_FIELDS if text.get(name) is not None}
    fields["rope_theta"] = text["rope_parameters"]["rope_theta"]
    fields |= {"model_type": PUBLISHED_TYPE, "pad_token_id": config.pad_token_id}
    fields |= {
        "tokenizer_model_max_length": text["max_position_embeddings"],
        "tokenizer_padding_side": "right",
    }
    if config.code_sizes is not None or config.sums_rows:
        raise UserError(
            "The published format has sub-codebooks of equal size, whose rows are concatenated: this model "
            f"has code_sizes = {config.book_sizes}, sums_rows = {config.sums_rows}."
        )
    if config.depth_options is not None or config.input_embedder != "projection":
        raise UserError(
            "The published format has UniTok's depth head and input embedder: this model has depth_options = "
            f"{config.depth_options}, input_embedder = {config.input_embedder!r}."
        )
    published = to_published(state, config.codebook_size)
    # clones: tied weights share memory, which safetensors rejects
    published = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in published.items()}
    save_file(published, Path(folder) / "model.safetensors", metadata={"format": "pt"})
    write_json(Path(folder) / "config.json", fields)
    if text_tokenizer is not None:
        text_tokenizer.save_pretrained(folder)


def check_same_codebooks(ours: Tensor, theirs: Tensor) -> None:
    """
    Args:
        ours: (K, V, C) codebooks of the MLLM. theirs: those of a visual tokenizer.

    Raises:
        UserError: the rows differ in direction: the MLLM was trained on another tokenizer.
    """
    # Cosines: rows are normalised on use, so only directions matter; 0.999 tolerates rounding.
    same = ours.shape == theirs.shape and bool(
        (F.cosine_similarity(ours.float(), theirs.float(), dim=-1) > 0.999).all()
    )
    if not same:
        raise UserError(
            "The visual tokenizer's sub-codebooks are not those of the MLLM: give the tokenizer that the "
            "MLLM was trained with."
        )
