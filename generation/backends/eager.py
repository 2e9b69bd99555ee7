"""What draws: the model behind its caches, one visual token and one code at a time, in torch's operators or,
on a CPU, in C++ steps over the same weights.

B images, R rows of the batch (B, or 2B under guidance: conditional rows, then unconditional ones), n given
visual tokens, K sub-codebooks, V entries per sub-codebook, D decoder width.
"""

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_unitok.core.errors import UserError
from open_unitok.tokenizer.layers import Linear

from ..kv_cache import PreallocatedLayer, prefill
from . import native_library

# rotary tables of these kinds do not change with the length
STATIC_ROPE = {"default", "linear", "llama3", "yarn"}


def start(
    model: Any, rows: Sequence[Sequence[int]], prefix: Tensor, weights: str | None = None
) -> "Eager | Native":
    """Read the prompts of R rows and the given codes (B, n, K); ready to draw visual token n.

    Args:
        weights: see `check_weights`; None = as the model has them, "int8" = rounded to 8 bits, a scale a row.
    """
    engine = Eager(model, rows, prefix)
    return Native(engine, weights == "int8") if native_can(model) else engine


def check_weights(model: Any, weights: str | None) -> None:
    """
    Raises:
        UserError: `weights` is unknown, or not to be had for this model here.
    """
    if weights not in (None, "int8"):
        raise UserError(f"weights is {weights!r}; it must be None or 'int8'.")
    if weights and not native_can(model):
        raise UserError("weights = 'int8' need a LLaMA decoder on a CPU and a C++ compiler: leave them out.")


def native_can(model: Any) -> bool:
    """True if the C++ steps know this model: a plain LLaMA on a CPU in float32 or bfloat16."""
    text, embedder = model.config.text_config, model.visual_embedder
    if model.device.type != "cpu" or text.model_type != "llama" or model.dtype not in native_library.KINDS:
        return False
    for config in (text, model.config.depth_config):
        rope = (config.rope_parameters or {}).get("rope_type", "default")
        if config.hidden_act != "silu" or rope not in STATIC_ROPE:
            return False
    parts = (model.language_model.layers, model.depth_head, embedder)
    if not all(is_plain(part, model.dtype) for part in parts):
        return False
    return not embedder.projection.attention.average and native_library.library() is not None


def is_plain(part: nn.Module, dtype: torch.dtype) -> bool:
    """True if all linear layers of this part are nothing but their weights: adapters are of other kinds."""
    for module in part.modules():
        if hasattr(module, "base_layer"):
            return False
        if isinstance(module, nn.Linear) and (
            type(module) not in (nn.Linear, Linear) or module.weight.dtype != dtype
        ):
            return False
    return True


class Eager:
    """Torch's operators, on every device and for every decoder.

    Attributes:
        hidden: (R, D) decoder states that predict the next visual token.
    """

    def __init__(self, model: Any, rows: Sequence[Sequence[int]], prefix: Tensor):
        count = model.config.num_image_tokens
        self.model, self.copies = model, len(rows) // len(prefix)
        self.decoder = prefill(model, rows, room=count - 1)
        self.embedder_cache = model.visual_embedder.new_cache(count)
        self.hidden, self.drawn = self.decoder.hidden, prefix.shape[1]
        if self.drawn:
            self._read(prefix)

    def decode_step(self, codes: Tensor) -> None:
        """Take in the codes (B, K) of the visual token just drawn."""
        self.drawn += 1
        self._read(codes.unsqueeze(1))

    def _read(self, codes: Tensor) -> None:
        vectors = self.model.visual_embedder.step(codes, self.embedder_cache).to(self.hidden.dtype)
        self.hidden = self.decoder.step(vectors.repeat(self.copies, 1, 1))

    def logits(self, k: int, chosen: Tensor | None) -> Tensor:
        """Logits (R, V) of code k, in order; `chosen` (B,) is the code before it, None for the first."""
        if chosen is None:
            self.depth_cache = self.model.depth_head.new_cache()
            return self.model.depth_head.step(0, self.hidden, self.depth_cache)
        return self.model.depth_head.step(k, chosen.repeat(self.copies), self.depth_cache)


class Native:
    """The C++ steps, which go on where an `Eager` engine stands. States and sums are float32 whatever the
    weights are; products with bfloat16 and int8 weights round their inputs to 16 bits where AVX-512 has
    products of such numbers.

    Attributes:
        hidden: (R, D) float32.
    """

    def __init__(self, eager: Eager, int8: bool):
        model, decoder = eager.model, eager.decoder
        self.model, self.copies, self.drawn = model, eager.copies, eager.drawn
        self.hidden = eager.hidden.float().contiguous()
        self.rows, self.slot = len(self.hidden), decoder.length
        pads = torch.zeros(self.rows) if decoder.mask is None else (decoder.mask == 0).sum(dim=1)
        self.starts = pads.to(torch.int64)
        self.steps, self.threads = native_library.library(), torch.get_num_threads()
        weights = _weights(model, int8)
        keep = self.keep = native_library.Keeper()
        text, depth = model.config.text_config, model.config.depth_config
        caches = [layer.buffers for layer in decoder.cache.layers if isinstance(layer, PreallocatedLayer)]
        room = self.slot + model.config.num_image_tokens
        self.stack = stack_struct(
            keep,
            weights.decoder,
            text,
            model.language_model.norm,
            caches,
            model.language_model.rotary_emb,
            room,
        )
        head, books = model.depth_head, model.config.num_codebooks
        shape = (self.rows, depth.num_key_value_heads, books, depth.head_dim)
        empty = [(torch.empty(shape), torch.empty(shape)) for _ in range(depth.num_hidden_layers)]
        self.depth = stack_struct(keep, weights.depth, depth, head.norm, empty, head.rotary, books)
        self.output, self.embedder = weights.output, weights.embedder
        self._embedder_cache(eager)
        self.entries = torch.empty(self.rows, model.config.codebook_size)
        self.weights = weights

    def _embedder_cache(self, eager: Eager) -> None:
        cache = eager.embedder_cache
        self.embedder = type(self.embedder).from_buffer_copy(self.embedder)  # the weights are shared
        images, room = self.rows // self.copies, 1 if cache is None else cache.max_length
        shape = (images, self.embedder.heads, room, self.embedder.head)
        states = (torch.empty(shape), torch.empty(shape))
        if cache is not None and cache.length:
            for to, there in zip(states, (cache._keys, cache._values)):
                to[:, :, : cache.length] = there[:, :, : cache.length]
        self.embedder.keys, self.embedder.values = map(self.keep.pointer, states)
        self.embedder.room, self.embedder.context = room, int(cache is not None)

    def decode_step(self, codes: Tensor) -> None:
        """Take in the codes (B, K) of the visual token just drawn."""
        codes = codes.contiguous()
        self.hidden = torch.empty_like(self.hidden)
        self.steps.decoder_step(
            ctypes.addressof(self.embedder), ctypes.addressof(self.stack), codes.data_ptr(), len(codes),
            self.rows, self.drawn, self.slot, self.starts.data_ptr(), self.hidden.data_ptr(), self.threads,
        )  # fmt: skip
        self.drawn, self.slot = self.drawn + 1, self.slot + 1

    def logits(self, k: int, chosen: Tensor | None) -> Tensor:
        """Logits (R, V) of code k, in order; `chosen` (B,) is the code before it, None for the first.

        The next call overwrites them.
        """
        head = self.model.depth_head
        if chosen is None:
            entry = (
                self.hidden.clone()
                if head.reduce is None
                else F.linear(self.hidden, head.reduce.weight.float())
            )
        else:
            entry = F.embedding(chosen + (k - 1) * head.codebook_size, head.embeddings.weight).float()
            entry = entry.repeat(self.copies, 1)
        self.steps.logits_step(
            ctypes.addressof(self.depth), ctypes.addressof(self.output), self.rows, k, None, None,
            entry.data_ptr(), self.entries.data_ptr(), self.threads,
        )  # fmt: skip
        return self.entries


class _Weights:
    """The structs over a model's weights."""

    def __init__(self, model: Any, int8: bool):
        keep = self.keep = native_library.Keeper(int8)
        self.decoder = [layer_struct(keep, layer) for layer in model.language_model.layers]
        self.depth = [layer_struct(keep, layer) for layer in model.depth_head.layers]
        self.output = keep.linear(model.depth_head.output)
        embedder = model.visual_embedder
        projection, attention = embedder.projection, embedder.projection.attention
        wide = attention.outputs
        query, key, value = attention.qkv.weight.split(wide)
        books, entries, code = embedder.codebooks.shape
        self.embedder = native_library.Embedder(
            keep.floats(F.normalize(embedder.codebooks.float(), dim=-1)),
            *map(keep.norm, (projection.attention_norm, projection.linear_norm, projection.mlp_norm)),
            *map(keep.norm, (projection.mlp.norm, embedder.projector[0])),
            keep.matrix(query, attention.query_bias), keep.matrix(key),
            keep.matrix(value, attention.value_bias),
            *map(keep.linear, (attention.out, projection.linear, projection.mlp.gate, projection.mlp.up)),
            *map(keep.linear, (projection.mlp.down, embedder.projector[1], embedder.projector[3])),
            None, None, books, entries, code, attention.heads, wide // attention.heads, 0, 0,
        )  # fmt: skip


# int8 copies by model, with what tells that its weights have changed
_rounded: "weakref.WeakKeyDictionary[Any, tuple[Any, _Weights]]" = weakref.WeakKeyDictionary()


def _weights(model: Any, int8: bool) -> _Weights:
    if not int8:
        return _Weights(model, False)
    state = tuple((p.data_ptr(), p._version) for p in model.parameters())
    if model not in _rounded or _rounded[model][0] != state:
        _rounded[model] = (state, _Weights(model, True))
    return _rounded[model][1]


def layer_struct(keep: native_library.Keeper, layer: Any) -> Any:
    attention, mlp = layer.self_attn, layer.mlp
    return native_library.Layer(
        *map(keep.norm, (layer.input_layernorm, layer.post_attention_layernorm)),
        *map(keep.linear, (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)),
        *map(keep.linear, (mlp.gate_proj, mlp.up_proj, mlp.down_proj)),
    )


def stack_struct(
    keep: native_library.Keeper,
    layers: list[Any],
    config: Any,
    norm: Any,
    caches: list[Any],
    rotary: Any,
    room: int,
) -> Any:
    """Layers with the caches (keys, values), each (R, kv_heads, places, head), and rotary tables."""
    array = (native_library.Layer * len(layers))(*layers)
    for layer, states in zip(array, caches):
        layer.keys, layer.values = map(keep.floats, states)
    keep.kept.append(array)
    cos, sin = rotary(torch.empty(0), torch.arange(room)[None])
    heads, kv_heads, head = config.num_attention_heads, config.num_key_value_heads, caches[0][0].shape[3]
    return native_library.Stack(
        ctypes.addressof(array), keep.norm(norm), keep.floats(cos[0]), keep.floats(sin[0]),
        len(layers), config.hidden_size, heads, kv_heads, head, caches[0][0].shape[2],
    )  # fmt: skip
