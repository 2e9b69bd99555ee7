"""FLOPs of a training step and the peak of a device: the two parts of MFU (model FLOPs utilisation).

A multiply-add is two operations. Recomputed activations count once, frozen weights have no weight gradient,
and attention counts the pairs of tokens that attend to each other.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from open_unitok.tokenizer import UniTok, UniTokConfig

from .gpus import PEAK_TFLOPS


def peak_tflops(device: torch.device) -> float | None:
    """Peak of a GPU in `PEAK_TFLOPS`; None for others."""
    if device.type != "cuda":
        return None
    # "NVIDIA A100-SXM4-80GB": compare whole words, so that L4 does not match L40S
    name = " " + torch.cuda.get_device_name(device).replace("-", " ") + " "
    return next((peak for part, peak in PEAK_TFLOPS.items() if f" {part} " in name), None)


def tokenizer_flops(
    config: UniTokConfig, captions: bool, decoded: float = 1.0, backward: float = 2.0
) -> float:
    """FLOPs of the forward and backward pass of one image and its caption, without losses.

    Counted on meta tensors.

    Args:
        captions: whether the text tower is trained too.
        decoded: share of the images that is reconstructed.
        backward: FLOPs of the backward pass in those of the forward pass; 1 where weights are frozen (without
            LoRA's own products).
    """
    with torch.device("meta"):
        model = UniTok(config)
        pixels = torch.zeros(1, 3, *config.image_shape)
        ids = torch.zeros(1, config.text_context_length, dtype=torch.int64) if captions else None
        total = _count(model, pixels, ids, 1)
        # without the pixel decoder: encoder and text tower only
        encoded = _count(model, pixels, ids, 0) if decoded < 1 else total
    return (1.0 + backward) * (encoded + decoded * (total - encoded))


def _count(model: UniTok, pixels: torch.Tensor, ids: torch.Tensor | None, decoded: int) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(pixels, ids, reconstruct_first=decoded)
    return counter.get_total_flops()


# in the order of the forward pass
_INPUTS = ("visual_embedder", "feature_adapter")
_PARTS = (*_INPUTS, "language_model", "lm_head", "depth_head")


class TokenCounts(NamedTuple):
    """Token counts of one or several micro-batches."""

    tokens: float = 0.0  # through the decoder, visual tokens included
    attention_pairs: float = 0.0  # of a token and each token it attends to, itself included
    text_targets: float = 0.0  # positions with a text loss
    image_tokens: float = 0.0  # visual tokens of all images, inputs or targets
    image_targets: float = 0.0  # visual tokens with a loss
    feature_tokens: float = 0.0  # continuous features of images that are read


class MLLMFlops:
    """FLOPs of MLLM training steps; build it before ZeRO 3 removes the parameters' shapes.

    Attributes:
        weights, trained: part -> number of weights of its matrices, and how many are trained; those of an
            output layer of one code are divided by K.
    """

    def __init__(self, model: Any):
        self.weights, self.trained = dict.fromkeys(_PARTS, 0), dict.fromkeys(_PARTS, 0)
        books = model.config.num_codebooks
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                part = name.partition(".")[0]
                # an output layer of one code runs once per visual token, the rest of the head K times
                share = books if name.startswith("depth_head.outputs.") else 1
                self.weights[part] += module.weight.numel() / share  # pyright: ignore
                self.trained[part] += module.weight.numel() / share * module.weight.requires_grad  # pyright: ignore
        self.trained_embeddings = model.get_input_embeddings().weight.requires_grad
        config = model.config
        self.books = books
        self.pair_cost = _pair_cost(config.text_config)
        self.depth_pair_cost = _pair_cost(config.depth_config)

    def flops(self, work: TokenCounts, backward: bool = True) -> float:
        """FLOPs of the forward and (if `backward`) the backward pass over `work`."""
        # per part: positions that pass through its matrices (the depth head runs once per code)
        codes = work.image_targets * self.books
        uses = (work.image_tokens, work.feature_tokens, work.tokens, work.text_targets, codes)
        pairs = (
            0.0,
            0.0,
            work.attention_pairs * self.pair_cost,
            0.0,
            self._depth_pairs(work) * self.depth_pair_cost,
        )
        total, trained_below, inputs_train = 0.0, False, bool(self.trained_embeddings)
        for part, count, attention in zip(_PARTS, uses, pairs):
            forward = 2 * count * self.weights[part] + attention
            total += forward
            trained_here = self.trained[part] > 0
            # the gradient passes through a part if anything in it or below it is trained
            # input gradients repeat the products of the forward pass (attention: of both operands), weight
            # gradients those with trained weights
            if backward and (trained_below or trained_here):
                total += 2 * count * self.weights[part] + 2 * attention + 2 * count * self.trained[part]
            if part in _INPUTS:  # text embeddings are at the same level
                inputs_train |= trained_here
                trained_below = inputs_train if part == _INPUTS[-1] else False
            elif part != "lm_head":  # the two heads are parallel
                trained_below = trained_below or trained_here
        return total

    def _depth_pairs(self, work: TokenCounts) -> float:
        # code k attends to k positions: 1 + 2 + ... + K
        return work.image_targets * self.books * (self.books + 1) / 2


class ClassFlops:
    """FLOPs of training steps of a class-conditional model; all of it is trained."""

    def __init__(self, model: Any):
        config, weights = model.config, {"layers": 0, "depth_head": 0}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                weights[name.partition(".")[0]] += module.weight.numel()
        self.decoder, self.head = weights["layers"], weights["depth_head"]
        self.books, self.width = config.num_codebooks, config.hidden_size
        self.layers, self.depth_layers = config.num_hidden_layers, config.depth_layers

    def flops(self, work: TokenCounts, backward: bool = True) -> float:
        """FLOPs of the forward and (if `backward`) the backward pass over `work`."""
        # the last token of an image is no input of the decoder
        pairs = 4.0 * self.width * self.layers * (work.attention_pairs - work.tokens)
        depth = 4.0 * self.width * self.depth_layers * work.image_targets * self.books * (self.books + 1) / 2
        products = 2.0 * (self.decoder * work.image_tokens + self.head * work.image_targets * self.books)
        return (3 if backward else 1) * (products + pairs + depth)


def flops_of(model: Any) -> "MLLMFlops | ClassFlops":
    """The FLOPs of an MLLM or of a class-conditional model."""
    return MLLMFlops(model) if hasattr(model.config, "text_config") else ClassFlops(model)


def _pair_cost(config: Any) -> float:
    """FLOPs of attention per pair of tokens in all layers: 2 x head_dim each for score and weighted value."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 4.0 * config.num_hidden_layers * config.num_attention_heads * head
