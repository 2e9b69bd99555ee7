"""The native backend: decode steps and code logits of a LLaMA on a CPU in C++ (native.cpp).

States and accumulators are float32 for every weight dtype. On processors with the instructions for it,
products with bfloat16 (AVX-512) and int8 weights (AVX2, AVX-512) round their inputs to 16 bits.

B images, R rows of the batch (B, or 2B under guidance: conditional rows, then unconditional ones), n given
visual tokens, K sub-codebooks, V entries per sub-codebook, D decoder width.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kv_cache import PreallocatedLayer
from . import native_library
from .cuda_graph import STATIC_ROPE
from .eager import Eager


def native_obstacle(model: Any) -> str | None:
    """Why C++ cannot run an unchanged model; None for a LLaMA on a CPU in float32 or bfloat16."""
    text, embedder = model.config.text_config, model.visual_embedder
    if model.device.type != "cpu":
        return f"it runs on a CPU, and the model is on {model.device}"
    if text.model_type != "llama":
        return f"it runs LLaMA decoders, and this one is {text.model_type!r}"
    if model.dtype not in native_library.NATIVE_DTYPES:
        return f"it computes in float32 and bfloat16, and the model is in {model.dtype}"
    if model.training and text.attention_dropout:
        return "the model is in training mode with dropout"
    for config in (text, model.config.depth_config):
        rope = (config.rope_parameters or {}).get("rope_type", "default")
        if config.hidden_act != "silu":
            return f"its MLP has silu, and this model {config.hidden_act!r}"
        if rope not in STATIC_ROPE:
            return f"RoPE of type {rope!r} depends on the length"
    if embedder.projection is None:
        return f"it runs input_embedder = 'projection', and this model has {model.config.input_embedder!r}"
    if model.config.depth.context != "normed":
        return "its depth head reads normed states, and this model has depth_options.context = 'raw'"
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.weight.dtype != model.dtype:
            return f"{name} is in {module.weight.dtype}, and the model in {model.dtype}"
    # run_embedder concatenates heads
    if embedder.projection.attention.average:
        return "averaging the heads of the visual embedder is not implemented"
    # last: it may compile
    if native_library.load_library() is None:
        return "the C++ library could not be built (is g++ or clang++ installed? is UNITOK_NATIVE=0 set?)"
    return None


class Native(Eager):
    """See `base.Backend`; torch prefills, C++ decodes.

    Attributes:
        hidden: (R, D) float32.
    """

    def prefill(self, rows: Sequence[Sequence[int]], prefix: Tensor) -> None:
        """As `Eager`; then build C++ structs that point to weights and caches."""
        super().prefill(rows, prefix)
        model, decoder, config = self.model, self.decoder, self.model.config
        self.hidden = self.hidden.float().contiguous()
        self.num_rows, self.cache_index = len(self.hidden), decoder.length
        padding = torch.zeros(self.num_rows) if decoder.mask is None else (decoder.mask == 0).sum(dim=1)
        self.starts = padding.to(torch.int64)  # cache index of each row's first real token
        self.library, self.num_threads = native_library.load_library(), native_library.num_threads()
        # the structs hold raw pointers: `weights` and `builder` keep the tensors alive
        self.weights = _WeightStructs(model)
        self.builder = native_library.StructBuilder()
        caches = [layer.buffers for layer in decoder.cache.layers if isinstance(layer, PreallocatedLayer)]
        self.decoder_stack = stack_struct(
            self.builder,
            self.weights.decoder_layers,
            config.text_config,
            model.language_model.norm,
            caches,
            model.language_model.rotary_emb,
            num_positions=self.cache_index + config.num_image_tokens,
        )
        # one cache for all visual tokens: the depth head restarts at k = 0 and overwrites it
        depth, books = config.depth_config, config.num_codebooks
        shape = (self.num_rows, depth.num_key_value_heads, books, depth.head_dim)
        caches = [(torch.empty(shape), torch.empty(shape)) for _ in range(depth.num_hidden_layers)]
        self.depth_stack = stack_struct(
            self.builder,
            self.weights.depth_layers,
            depth,
            model.depth_head.norm,
            caches,
            model.depth_head.rotary,
            num_positions=books,
        )
        self.embedder = self._embedder_struct()
        layers = model.depth_head.output_layers()
        self.logits = [torch.empty(self.num_rows, layer.out_features) for layer in layers]

    def _embedder_struct(self) -> Any:
        """The visual embedder's struct with a cache; entries of torch's cache (of a prefix) are copied."""
        cache = self.embedder_cache
        embedder = self.weights.embedder
        # no cache = the "last" context: one entry, overwritten by every token
        images, capacity = self.num_rows // self.rows_per_image, 1 if cache is None else cache.max_length
        shape = (images, embedder.heads, capacity, embedder.head_dim)
        states = (torch.empty(shape), torch.empty(shape))
        if cache is not None and cache.length:
            for buffer, filled in zip(states, (cache._keys, cache._values)):
                buffer[:, :, : cache.length] = filled[:, :, : cache.length]
        embedder.keys, embedder.values = map(self.builder.pointer, states)
        embedder.capacity, embedder.attends_to_earlier = capacity, int(cache is not None)
        return embedder

    def decode_step(self, codes: Tensor) -> None:
        """Feed the codes (B, K) of the visual token just sampled."""
        codes = codes.contiguous()
        self.hidden = torch.empty_like(self.hidden)
        self.library.decode_step(
            ctypes.addressof(self.embedder), ctypes.addressof(self.decoder_stack), codes.data_ptr(),
            len(codes), self.num_rows, self.num_read, self.cache_index, self.starts.data_ptr(),
            self.hidden.data_ptr(), self.num_threads,
        )  # fmt: skip
        self.num_read, self.cache_index = self.num_read + 1, self.cache_index + 1

    def code_logits(self, k: int, previous: Tensor | None) -> Tensor:
        """Logits (R, V) of code k, in order; the next call overwrites them."""
        head = self.model.depth_head
        if previous is None:
            # logits_step overwrites its input: clone `hidden`
            entry = (
                self.hidden.clone()
                if head.reduce is None
                else F.linear(self.hidden, head.reduce.weight.float())
            )
        else:
            entry = head.embed_rows(previous + (k - 1) * head.codebook_size).float()
            entry = entry.repeat(self.rows_per_image, 1)
        self.library.logits_step(
            ctypes.addressof(self.depth_stack), ctypes.addressof(self.weights.outputs[k]), self.num_rows, k,
            None, None, entry.data_ptr(), self.logits[k].data_ptr(), self.num_threads,
        )  # fmt: skip
        return head.mask_logits(self.logits[k], k)


class _WeightStructs:
    """C++ structs that point to a model's weights, without caches."""

    def __init__(self, model: Any):
        build = self.builder = native_library.StructBuilder()
        self.decoder_layers = [layer_struct(build, layer) for layer in model.language_model.layers]
        self.depth_layers = [layer_struct(build, layer) for layer in model.depth_head.layers]
        self.outputs = [build.linear(layer) for layer in model.depth_head.output_layers()]
        embedder = model.visual_embedder
        projection, attention = embedder.projection, embedder.projection.attention
        width = attention.outputs
        query, key, value = attention.qkv.weight.split(width)
        # positional, in the order of the C++ struct's fields
        books, entries, code_dim = embedder.codebooks.shape
        places = embedder.place_table()
        self.embedder = native_library.Embedder(
            build.floats(embedder.code_table()),
            *map(build.norm, (projection.attention_norm, projection.linear_norm, projection.mlp_norm)),
            *map(build.norm, (projection.mlp.norm, embedder.projector[0])),
            build.matrix(query, attention.query_bias), build.matrix(key),
            build.matrix(value, attention.value_bias),
            *map(build.linear, (attention.out, projection.linear, projection.mlp.gate, projection.mlp.up)),
            *map(build.linear, (projection.mlp.down, embedder.projector[1], embedder.projector[3])),
            None, None, build.floats(places), books, entries, code_dim, attention.heads,
            width // attention.heads, 0, 0, int(model.config.sums_rows),
        )  # fmt: skip


def layer_struct(build: native_library.StructBuilder, layer: Any) -> Any:
    """The struct of one LLaMA layer, without its cache."""
    attention, mlp = layer.self_attn, layer.mlp
    return native_library.Layer(
        *map(build.norm, (layer.input_layernorm, layer.post_attention_layernorm)),
        *map(build.linear, (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)),
        *map(build.linear, (mlp.gate_proj, mlp.up_proj, mlp.down_proj)),
    )


def stack_struct(
    build: native_library.StructBuilder,
    layers: list[Any],
    config: Any,
    norm: Any,
    caches: list[Any],
    rotary: Any,
    num_positions: int,
) -> Any:
    """Layers with their KV caches (keys, values), each (R, kv_heads, capacity, head_dim), and RoPE tables."""
    array = (native_library.Layer * len(layers))(*layers)
    for layer, states in zip(array, caches):
        layer.keys, layer.values = map(build.floats, states)
    build.kept.append(array)  # an address does not keep its object alive
    # tables for all positions: C++ does not compute RoPE scaling
    cos, sin = rotary(torch.empty(0), torch.arange(num_positions)[None])
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    capacity, head_dim = caches[0][0].shape[2:]
    return native_library.Stack(
        ctypes.addressof(array), build.norm(norm), build.floats(cos[0]), build.floats(sin[0]),
        len(layers), config.hidden_size, heads, kv_heads, head_dim, capacity,
    )  # fmt: skip
