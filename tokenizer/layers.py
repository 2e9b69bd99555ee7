"""Blocks of the tokenizer: pre-norm transformer, GeGLU with its own norm, ViTamin's convolutions
(arXiv 2404.02132, section 3; used by arXiv 2502.20321, section 4.1).

B batch, N tokens, D width, (H, W) rows and columns of a feature map. `init_weights` of a module sets its own
weights as the published training does; `UniTok` calls it for each module, children first.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from . import cpu

NORM_EPS = 1e-6  # ViTamin; the projections and the text tower use torch's 1e-5


class Conv2d(nn.Conv2d):
    """A "same" convolution.

    Args:
        padding, bias: as in torch; LoRA builds its factors with them.
        weight_init: "torch" (PyTorch's default), "fan_out" (He et al., ViTamin's stem) or "xavier" (gain
            0.5, the decoder).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | None = None,
        groups: int = 1,
        bias: bool = True,
        weight_init: Literal["torch", "fan_out", "xavier"] = "torch",
    ) -> None:
        if padding is None:
            padding = kernel // 2 if isinstance(kernel, int) else (kernel[0] // 2, kernel[1] // 2)
        super().__init__(inputs, outputs, kernel, stride, padding, groups=groups, bias=bias)
        self.weight_init = weight_init

    def forward(self, map: torch.Tensor) -> torch.Tensor:
        options = {"stride": self.stride, "padding": self.padding, "groups": self.groups}
        return cpu.conv2d(map, self.weight, self.bias, **options)

    def init_weights(self) -> None:
        if self.weight_init == "torch":
            self.reset_parameters()
            return
        if self.weight_init == "xavier":
            init.xavier_normal_(self.weight, gain=0.5)
        else:
            # The published code does not divide the fan-out by `groups`; no grouped convolution uses it here.
            fan_out = self.out_channels * self.kernel_size[0] * self.kernel_size[1]
            init.normal_(self.weight, std=math.sqrt(2 / fan_out))
        if self.bias is not None:
            init.zeros_(self.bias)


def init_kaiming(module: nn.Module) -> None:
    """Initialise all convolutions within `module` at unit gain (He et al., arXiv 1502.01852, equation 10).

    The published initialisation counts the outputs of all groups, so depthwise kernels start near zero and
    their blocks contribute nothing for hundreds of steps: negligible in a long run, half of a short one.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, nonlinearity="relu")


class Linear(nn.Linear):
    """`nn.Linear` with the processor's operator for inference on CPU (see cpu.py)."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return cpu.linear(hidden, self.weight, self.bias)

    def init_weights(self) -> None:
        init.trunc_normal_(self.weight, std=0.02)
        if self.bias is not None:
            init.zeros_(self.bias)


def bottleneck_width(outputs: int) -> int:
    """Width inside an inverted bottleneck: 4 x outputs, rounded to a multiple of 8, at most 10 % down."""
    wanted = 4 * outputs
    width = max(8, (wanted + 4) // 8 * 8)
    return width + 8 if width < 0.9 * wanted else width


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W) at every pixel; needs no copy for channels_last maps."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=NORM_EPS)

    def forward(self, map: torch.Tensor) -> torch.Tensor:
        # (B, H, W, C) is a view of a channels_last map
        return super().forward(map.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GeGLU(nn.Module):
    """Gated MLP with its own LayerNorm, tanh-GELU(gate x) * up x; (B, N, inputs) -> same."""

    def __init__(self, width: int, ratio: float = 2.0) -> None:
        super().__init__()
        hidden = int(width * ratio)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        # two layers instead of one of twice the width: published files store them separately
        self.gate = Linear(width, hidden)
        self.up = Linear(width, hidden)
        self.down = Linear(hidden, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(hidden)
        return self.down(F.gelu(self.gate(hidden), approximate="tanh") * self.up(hidden))


class Attention(nn.Module):
    """Multi-head self-attention with biases; (B, N, D) -> (B, N, D)."""

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.mix(hidden)[0]

    def mix(
        self, hidden: torch.Tensor, bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The result, and the keys (B, heads, N, d); `bias`, broadcast to (B, heads, N, N), is added to the
        logits."""
        query, key, value = split_heads(self.qkv(hidden), self.heads)
        bias = None if bias is None else bias.to(query.dtype)
        mixed = F.scaled_dot_product_attention(query, key, value, bias, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(2)), key


def split_heads(qkv: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(B, N, 3*heads*d), ordered (3, heads, d), -> query, key, value (B, heads, N, d)."""
    query, key, value = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return query, key, value


class Block(nn.Module):
    """Pre-norm transformer block with stochastic depth; (B, N, D) -> (B, N, D)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = GeGLU(width, mlp_ratio)

    def forward(self, hidden: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """A branch is dropped where `noise` (2, B), uniform in [0, 1), is below the rate; None drops none."""
        first, second = (None, None) if noise is None else noise
        hidden = hidden + self._drop_path(self.attention(self.norm1(hidden)), first)
        return hidden + self._drop_path(self.mlp(self.norm2(hidden)), second)

    def _drop_path(self, branch: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """Zero whole samples with probability `drop_path_rate`; scale the others up to keep the mean."""
        if noise is None or self.drop_path_rate == 0.0:
            return branch
        # (B,): 0 or 1 / (1 - rate)
        kept = (noise >= self.drop_path_rate) / (1.0 - self.drop_path_rate)
        return branch * kept.to(branch.dtype).view(-1, 1, 1)


class Recomputing:
    """A mixin: parts of a module may keep their inputs alone and recompute activations in the backward pass.

    Attributes:
        gradient_checkpointing: set by the model's `gradient_checkpointing_enable()`.
    """

    training: bool
    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Any]  # set by transformers with `gradient_checkpointing`

    def call(self, part: Callable[..., Any], *inputs: Any) -> Any:
        """The outputs of a part, whose activations are recomputed if the model asks for it."""
        # `part.__call__` instead of `forward`: hooks of DeepSpeed and peft must run in the recomputation
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(part.__call__, *inputs)
        return part(*inputs)


class Transformer(Recomputing, nn.ModuleList):
    """A stack of blocks, each of which is recomputed in the backward pass if the model asks for it.

    Attributes:
        drop_path_rate: of the last block; the rate grows linearly from 0 at the first.
        drop_path_noise: (depth, 2, B or more), uniform in [0, 1): the noise of `Block.forward` in training;
            None samples it in each forward pass. A training loop sets it to make the result independent of
            how a batch is split.
    """

    block_type: type[Block] = Block
    drop_path_noise: torch.Tensor | None = None

    def __init__(
        self, width: int, depth: int, heads: int, mlp_ratio: float, drop_path_rate: float = 0.0
    ) -> None:
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        super().__init__(self.block_type(width, heads, mlp_ratio, rate) for rate in rates)
        self.drop_path_rate = drop_path_rate

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for hidden in self.layer_outputs(hidden):  # noqa: B007,B020
            pass
        return hidden

    def layer_outputs(self, hidden: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the output of every block, from the first to the last."""
        for block, noise in zip(self, self.noise_for(hidden)):
            hidden = self.call(block, hidden, noise)
            yield hidden

    def noise_for(self, hidden: torch.Tensor) -> Any:
        """The noise of each block for this batch, see `Block.forward`."""
        if not self.training or not self.drop_path_rate:
            return [None] * len(self)
        if self.drop_path_noise is None:
            return torch.rand(len(self), 2, len(hidden), device=hidden.device)
        return self.drop_path_noise[:, :, : len(hidden)].to(hidden.device)


def drop_path_stacks(model: nn.Module) -> dict[str, Transformer]:
    """The transformers in `model` that train with drop path, by the name of the part that holds each."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, Transformer)}
    return {name.removesuffix(".blocks"): module for name, module in found.items() if module.drop_path_rate}


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution; (B, inputs, H, W) -> (B, outputs, 2H, 2W).

    Both run as one transposed convolution (4x4, stride 2): 4 products per output instead of 9.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = Conv2d(inputs, outputs, 3)
        self._kernel_cache = cpu.DerivedWeight()

    def forward(self, map: torch.Tensor) -> torch.Tensor:
        # Inference on CPU caches the 4x4 kernel; training derives it in the graph, for the gradient.
        if type(self.conv) is not Conv2d:  # with LoRA around it
            kernel = upsampling_kernel(adapted_kernel(self.conv))
        elif not self.training and cpu.active(map):
            kernel = self._kernel_cache.get(self.conv.weight, _upsampling_kernel_channels_last)
        else:
            self._kernel_cache.clear()
            kernel = upsampling_kernel(self.conv.weight)
        return cpu.conv_transpose2d(map, kernel, self.conv.bias, stride=2, padding=1)


def adapted_kernel(conv: Any) -> torch.Tensor:
    """The kernel of a convolution with the LoRA that peft has put around it; at LoRA's start the bare one."""
    return conv.weight + sum(conv.get_delta_weight(adapter) for adapter in conv.active_adapters)


def upsampling_kernel(kernel: torch.Tensor) -> torch.Tensor:
    """(outputs, inputs, 3, 3) of a convolution on the doubled map -> (inputs, outputs, 4, 4), transposed."""
    kernel = kernel.flip(2, 3)
    # Doubling repeats each pixel in both directions: add the kernel shifted by one column, then by one row.
    kernel = F.pad(kernel, (0, 1)) + F.pad(kernel, (1, 0))
    kernel = F.pad(kernel, (0, 0, 0, 1)) + F.pad(kernel, (0, 0, 1, 0))
    return kernel.transpose(0, 1)


def _upsampling_kernel_channels_last(kernel: torch.Tensor) -> torch.Tensor:
    return upsampling_kernel(kernel).contiguous(memory_format=torch.channels_last)


class ConvBlock(nn.Module):
    """ViTamin's inverted bottleneck: norm, widen, (resample,) depthwise 3x3, narrow, plus a shortcut.

    (B, inputs, H, W) -> (B, outputs, H*scale, W*scale). `scale` 1/2 strides the depthwise convolution;
    `scale` 2 puts a full 3x3 convolution on the doubled map before it.
    """

    def __init__(self, inputs: int, outputs: int, scale: float = 1.0) -> None:
        super().__init__()
        middle = bottleneck_width(outputs)
        self.scale = scale
        self.shortcut: nn.Module | None = None  # identity, or average pooling alone
        if scale == 2.0:
            self.shortcut = Upsample(inputs, outputs)
        elif inputs != outputs:
            self.shortcut = Conv2d(inputs, outputs, 1)
        self.norm = ChannelNorm(inputs)
        self.widen = Conv2d(inputs, middle, 1)
        self.upsample = Upsample(middle, middle) if scale == 2.0 else None
        self.depthwise = Conv2d(middle, middle, 3, stride=2 if scale == 0.5 else 1, groups=middle)
        self.narrow = Conv2d(middle, outputs, 1)

    def forward(self, map: torch.Tensor) -> torch.Tensor:
        shortcut = map
        if self.scale == 0.5:  # match the stride of the depthwise convolution
            shortcut = F.avg_pool2d(shortcut, 3, 2, 1, count_include_pad=False)
        if self.shortcut is not None:
            shortcut = self.shortcut(shortcut)
        branch = cpu.gelu(self.widen(self.norm(map)))
        if self.upsample is not None:
            branch = self.upsample(branch)
        return shortcut + self.narrow(cpu.gelu(self.depthwise(branch)))


class ConvStage(Recomputing, nn.Sequential):
    """`depth` blocks at one resolution; the first one resamples to it."""

    def __init__(self, inputs: int, outputs: int, depth: int, scale: float) -> None:
        first = ConvBlock(inputs, outputs, scale)
        super().__init__(first, *(ConvBlock(outputs, outputs) for _ in range(depth - 1)))

    def forward(self, map: torch.Tensor) -> torch.Tensor:
        for block in self:
            map = self.call(block, map)
        return map
