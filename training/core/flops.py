"""How much arithmetic a training step is, and how much a device could do: the two halves of MFU.

A multiplication and an addition are two operations. A recomputed activation counts once, frozen weights cost
no gradient of their own, and attention counts the pairs of tokens that see each other.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from open_unitok.tokenizer import UniTok, UniTokConfig

from .gpus import PEAK_TFLOPS


def peak_tflops(device: torch.device) -> float | None:
    """Of a GPU that the table knows, else None."""
    if device.type != "cuda":
        return None
    name = " " + torch.cuda.get_device_name(device).replace("-", " ") + " "  # "NVIDIA A100-SXM4-80GB"
    return next((peak for part, peak in PEAK_TFLOPS.items() if f" {part} " in name), None)


def tokenizer_flops(config: UniTokConfig, captions: bool, decoded: float = 1.0) -> float:
    """Floating-point operations of one image's (and caption's) forward and backward pass, without losses.

    Counted on shapes alone; the backward pass is taken as twice the forward pass.

    Args:
        captions: the text tower is trained too.
        decoded: the share of the images that is reconstructed.
    """
    with torch.device("meta"):
        model = UniTok(config)
        pixels = torch.zeros(1, 3, *config.image_shape)
        ids = torch.zeros(1, config.text_context_length, dtype=torch.int64) if captions else None
        total = _count(model, pixels, ids, 1)
        encoded = _count(model, pixels, ids, 0) if decoded < 1 else total
    return 3.0 * (encoded + decoded * (total - encoded))


def _count(model: UniTok, pixels: torch.Tensor, ids: torch.Tensor | None, decoded: int) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(pixels, ids, reconstruct_first=decoded)
    return counter.get_total_flops()


# in the order in which a step runs through them
_PARTS = ("visual_embedder", "language_model", "lm_head", "depth_head")


class TokenCounts(NamedTuple):
    """What runs through the model: counts of one or many micro-batches."""

    tokens: float = 0.0  # through the decoder, visual ones included
    attention_pairs: float = 0.0  # of tokens and what each of them sees, itself included
    text_targets: float = 0.0  # places where text is learnt
    image_tokens: float = 0.0  # visual tokens of all images, read or drawn
    image_targets: float = 0.0  # those that are learnt


class MLLMFlops:
    """Floating-point operations of training steps; make it before ZeRO-3 takes the shapes away.

    Attributes:
        weights, trained: part -> weights of its matrices, and how many of them are trained.
    """

    def __init__(self, model: Any):
        self.weights, self.trained = dict.fromkeys(_PARTS, 0), dict.fromkeys(_PARTS, 0)
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                part = name.partition(".")[0]
                self.weights[part] += module.weight.numel()
                self.trained[part] += module.weight.numel() * module.weight.requires_grad
        self.any_embedding = model.get_input_embeddings().weight.requires_grad
        config = model.config
        self.books = config.num_codebooks
        self.pair_cost = _pair_cost(config.text_config)
        self.depth_pair_cost = _pair_cost(config.depth_config)

    def flops(self, work: TokenCounts, backward: bool = True) -> float:
        """Of a forward pass over `work`, and of the backward pass behind it."""
        uses = (work.image_tokens, work.tokens, work.text_targets, work.image_targets * self.books)
        pairs = (
            0.0,
            work.attention_pairs * self.pair_cost,
            0.0,
            self._depth_pairs(work) * self.depth_pair_cost,
        )
        total, learnt_before = 0.0, False
        for part, count, attention in zip(_PARTS, uses, pairs):
            forward = 2 * count * self.weights[part] + attention
            total += forward
            learnt_here = self.trained[part] > 0
            if backward and (learnt_before or learnt_here):
                total += 2 * count * self.weights[part] + 2 * attention + 2 * count * self.trained[part]
            if part == "visual_embedder":  # embeddings of text come in beside it
                learnt_before = learnt_here or self.any_embedding
            elif part != "lm_head":  # the heads stand side by side
                learnt_before = learnt_before or learnt_here
        return total

    def _depth_pairs(self, work: TokenCounts) -> float:
        return work.image_targets * self.books * (self.books + 1) / 2


def _pair_cost(config: Any) -> float:
    """Operations of attention per pair of tokens in all layers: a score and a weighted value."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 4.0 * config.num_hidden_layers * config.num_attention_heads * head
