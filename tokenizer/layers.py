"""The tokenizer's blocks: pre-norm transformer, GeGLU with a norm of its own, ViTamin's convolutions
(arXiv 2404.02132, section 3; used by arXiv 2502.20321, section 4.1).

B batch, N tokens, D width, (H, W) rows and columns of a feature map.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import cpu
from .config import UniTokConfig

NORM_EPS = 1e-6  # ViTamin; the projections and the text tower use torch's 1e-5


class Conv2d(nn.Conv2d):
    """A "same" convolution with bias; `start` names how its weights begin (see model.py)."""

    start: str

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, start: str = "torch"
    ) -> None:
        super().__init__(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups)
        self.start = start

    def forward(self, map: torch.Tensor) -> torch.Tensor:
        options = {"stride": self.stride, "padding": self.padding, "groups": self.groups}
        return cpu.conv2d(map, self.weight, self.bias, **options)


class Linear(nn.Linear):
    """A linear map; for inference on a CPU, by the operator that is fastest there."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return cpu.linear(hidden, self.weight, self.bias)


def middle_width(outputs: int) -> int:
    """Width inside an inverted bottleneck: 4 x outputs, to a multiple of 8, never down by over a tenth."""
    wanted = 4 * outputs
    width = max(8, (wanted + 4) // 8 * 8)
    return width + 8 if width < 0.9 * wanted else width


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W), at every pixel; free of copies for channels_last maps."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=NORM_EPS)

    def forward(self, map: torch.Tensor) -> torch.Tensor:
        return super().forward(map.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GeGLU(nn.Module):
    """MLP with a gate, tanh-GELU(gate x) * up x, behind a LayerNorm of its own; (B, N, inputs) -> same."""

    def __init__(self, width: int, ratio: float = 2.0) -> None:
        super().__init__()
        hidden = int(width * ratio)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
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
        query, key, value = split_heads(self.qkv(hidden), self.heads)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


def split_heads(qkv: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(B, N, 3*heads*d), ordered (3, heads, d), -> query, key, value (B, heads, N, d)."""
    query, key, value = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return query, key, value


class Block(nn.Module):
    """Pre-norm transformer block with stochastic depth; (B, N, D) -> (B, N, D)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, drop_path: float = 0.0) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = GeGLU(width, mlp_ratio)

    def forward(self, hidden: torch.Tensor, chance: torch.Tensor | None = None) -> torch.Tensor:
        """`chance` (2, B), in [0, 1): where it is below `drop_path` a branch is left out; None: nowhere."""
        first, second = (None, None) if chance is None else chance
        hidden = hidden + self._drop(self.attention(self.norm1(hidden)), first)
        return hidden + self._drop(self.mlp(self.norm2(hidden)), second)

    def _drop(self, branch: torch.Tensor, chance: torch.Tensor | None) -> torch.Tensor:
        """Zero whole samples with probability `drop_path`, scale the others up."""
        if chance is None or self.drop_path == 0.0:
            return branch
        kept = (chance >= self.drop_path) / (1.0 - self.drop_path)
        return branch * kept.to(branch.dtype).view(-1, 1, 1)


class Transformer(nn.ModuleList):
    """A stack of blocks; after the model's `gradient_checkpointing_enable()` the backward pass recomputes.

    Attributes:
        chances: numbers in [0, 1) of shape (depth, 2, B or more) that decide drop path in training; None
            draws them anew each time.
    """

    chances: torch.Tensor | None = None
    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Any]  # set by transformers beside `gradient_checkpointing`

    def __init__(self, width: int, depth: int, heads: int, mlp_ratio: float, drop_path: float = 0.0) -> None:
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        super().__init__(Block(width, heads, mlp_ratio, rate) for rate in rates)
        self.drop_path = drop_path

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        chances: Any = [None] * len(self)
        if self.training and self.drop_path:
            if self.chances is None:
                chances = torch.rand(len(self), 2, len(hidden), device=hidden.device)
            else:
                chances = self.chances[:, :, : len(hidden)].to(hidden.device)
        for block, chance in zip(self, chances):
            if self.gradient_checkpointing and self.training:
                hidden = self._gradient_checkpointing_func(block.__call__, hidden, chance)
            else:
                hidden = block(hidden, chance)
        return hidden


def build_transformer(config: UniTokConfig) -> Transformer:
    """The transformer of encoder and decoder; they are alike."""
    heads, depth = config.num_attention_heads, config.num_hidden_layers
    return Transformer(config.hidden_size, depth, heads, config.mlp_ratio, config.drop_path_rate)


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution; (B, inputs, H, W) -> (B, outputs, 2H, 2W).

    The two are one transposed convolution (4x4, stride 2), with 4 products per output instead of 9.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = Conv2d(inputs, outputs, 3)
        self._kept = cpu.Kept()

    def forward(self, map: torch.Tensor) -> torch.Tensor:
        if not self.training and cpu.active(map):
            kernel = self._kept.get(self.conv.weight, _doubled_kernel_last)
        else:
            self._kept.drop()
            kernel = doubled_kernel(self.conv.weight)
        return cpu.conv_transpose2d(map, kernel, self.conv.bias, stride=2, padding=1)


def doubled_kernel(kernel: torch.Tensor) -> torch.Tensor:
    """(outputs, inputs, 3, 3) -> (inputs, outputs, 4, 4): a convolution of the doubled map, transposed."""
    kernel = kernel.flip(2, 3)
    # Each input pixel stands twice in a row and in a column: add the kernel to itself, shifted by one.
    kernel = F.pad(kernel, (0, 1)) + F.pad(kernel, (1, 0))
    kernel = F.pad(kernel, (0, 0, 0, 1)) + F.pad(kernel, (0, 0, 1, 0))
    return kernel.transpose(0, 1)


def _doubled_kernel_last(kernel: torch.Tensor) -> torch.Tensor:
    """The same, laid out for channels_last maps."""
    return doubled_kernel(kernel).contiguous(memory_format=torch.channels_last)


class ConvBlock(nn.Module):
    """ViTamin's inverted bottleneck: norm, widen, (resample,) depthwise 3x3, narrow, plus a shortcut.

    (B, inputs, H, W) -> (B, outputs, H*scale, W*scale). With `scale` 1/2 the depthwise convolution strides;
    with 2 a full 3x3 convolution on the doubled map goes before it.
    """

    def __init__(self, inputs: int, outputs: int, scale: float = 1.0) -> None:
        super().__init__()
        middle = middle_width(outputs)
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
        if self.scale == 0.5:
            shortcut = F.avg_pool2d(shortcut, 3, 2, 1, count_include_pad=False)
        if self.shortcut is not None:
            shortcut = self.shortcut(shortcut)
        branch = cpu.gelu(self.widen(self.norm(map)))
        if self.upsample is not None:
            branch = self.upsample(branch)
        return shortcut + self.narrow(cpu.gelu(self.depthwise(branch)))


def conv_stage(inputs: int, outputs: int, depth: int, scale: float) -> nn.Sequential:
    """`depth` blocks, of which the first one resamples."""
    first = ConvBlock(inputs, outputs, scale)
    return nn.Sequential(first, *(ConvBlock(outputs, outputs) for _ in range(depth - 1)))


@contextlib.contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Within it, products of float32 matrices are true float32: no autocast, no TF32, no bf16 shortcuts.

    Codes are an argmax: two machines, or two settings of one, must not come to different ones.
    """
    backends: list[Any] = [torch.backends.cuda.matmul]
    backends.append(torch.backends.mkldnn.matmul)  # pyright: ignore[reportAttributeAccessIssue]
    before = [backend.fp32_precision for backend in backends]
    autocast = contextlib.nullcontext()
    if torch.amp.is_autocast_available(device.type):
        autocast = torch.autocast(device.type, enabled=False)
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with autocast:
            yield
    finally:
        for backend, precision in zip(backends, before):
            backend.fp32_precision = precision
