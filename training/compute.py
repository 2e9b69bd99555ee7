"""How much arithmetic a step of the MLLM is, what a device can do at most, and how much memory is in use.

Floating-point operations are those that the mathematics needs (a multiplication and an addition are two): a
recomputed activation counts once, frozen weights cost no gradient of their own, and attention counts the
pairs of tokens that see each other. So is model FLOPs utilisation, MFU, defined.
"""

import resource
import sys
from typing import Any, NamedTuple

import torch
from torch import nn

# Dense bf16 peak in FLOP/s, from the makers' data sheets; the first name found in the device's name counts.
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
}
# in the order in which a step runs through them
PARTS = ("visual_embedder", "language_model", "lm_head", "depth_head")


class Work(NamedTuple):
    """What runs through the model: counts of one or many micro-batches."""

    tokens: float = 0.0  # through the decoder, visual ones included
    pairs: float = 0.0  # of tokens and what each of them sees, itself included
    text_targets: float = 0.0  # places where text is learnt
    visual: float = 0.0  # visual tokens of all images, read or drawn
    drawn: float = 0.0  # those that are learnt


class Cost:
    """Floating-point operations of training steps; make it before ZeRO-3 takes the shapes away.

    Attributes:
        weights, trained: part -> weights of its matrices, and how many of them are trained.
    """

    def __init__(self, model: Any):
        self.weights, self.trained = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0)
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

    def flops(self, work: Work, backward: bool = True) -> float:
        """Of a forward pass over `work`, and of the backward pass behind it."""
        uses = (work.visual, work.tokens, work.text_targets, work.drawn * self.books)
        pairs = (0.0, work.pairs * self.pair_cost, 0.0, self._depth_pairs(work) * self.depth_pair_cost)
        total, learnt_before = 0.0, self.any_embedding
        for part, count, attention in zip(PARTS, uses, pairs):
            forward = 2 * count * self.weights[part] + attention
            total += forward
            learnt_here = self.trained[part] > 0
            if backward and (learnt_before or learnt_here):
                total += 2 * count * self.weights[part] + 2 * attention + 2 * count * self.trained[part]
            if part != "lm_head":  # the heads stand side by side
                learnt_before = learnt_before or learnt_here
        return total

    def _depth_pairs(self, work: Work) -> float:
        return work.drawn * self.books * (self.books + 1) / 2


def _pair_cost(config: Any) -> float:
    """Operations of attention per pair of tokens in all layers: a score and a weighted value."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 4.0 * config.num_hidden_layers * config.num_attention_heads * head


def peak_flops(device: torch.device) -> float | None:
    """What the device can do at most in bf16, FLOP/s; None where that is not known, as for every CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for words, peak in PEAKS.items() if words in name), None)


def peak_memory(device: torch.device) -> float:
    """The most memory that was in use since the last call, in GiB: of tensors on a GPU; of the whole process,
    since its beginning, on a CPU."""
    if device.type == "cuda":
        found = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return found / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
