"""The Inception network of FID and the Inception Score, in the four variants in use.

A port of the 2015 TensorFlow graph, with the parameter names of torch-fidelity's weight file, serves three of
them. Variants differ in how they resize images to 299 x 299, which changes FID by more than the gains of most
papers, so every result names its variant.
B images of H x W pixels.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from open_unitok.core.errors import UserError
from open_unitok.tokenizer.loading import load_exactly, read_weights

from .inception_weights import Features, find_inception_weights

SIDE = 299
TAPS = ("64", "192", "768", "2048", "logits_unbiased", "logits")
WIDTH, CLASSES, SPATIAL = 2048, 1008, 7 * 17 * 17  # widths of pooled features, logits and sFID features


class Conv(nn.Module):
    """Convolution without bias, batch norm with the epsilon of the graph, ReLU."""

    def __init__(
        self,
        inputs: int,
        width: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ):
        super().__init__()
        self.conv = nn.Conv2d(inputs, width, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def mean_pool(x: Tensor) -> Tensor:
    """3 x 3 average pooling whose divisor excludes the padding, as in the graph."""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def max_pool(x: Tensor) -> Tensor:
    """3 x 3 max pooling at the same size; the last block of the graph uses it instead of the average."""
    return F.max_pool2d(x, 3, 1, 1)


class BlockA(nn.Module):
    def __init__(self, inputs: int, pool: int):
        super().__init__()
        self.branch1x1 = Conv(inputs, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = Conv(inputs, 48, 1), Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(inputs, 64, 1), Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, padding=1)
        self.branch_pool = Conv(inputs, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(mean_pool(x))], dim=1)


class BlockB(nn.Module):
    def __init__(self, inputs: int):
        super().__init__()
        self.branch3x3 = Conv(inputs, 384, 3, 2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(inputs, 64, 1), Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), three, F.max_pool2d(x, 3, 2)], dim=1)


class BlockC(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        row, column = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))
        self.branch1x1 = Conv(768, 192, 1)
        self.branch7x7_1, self.branch7x7_2 = Conv(768, width, 1), Conv(width, width, *row)
        self.branch7x7_3 = Conv(width, 192, *column)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = Conv(768, width, 1), Conv(width, width, *column)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = Conv(width, width, *row), Conv(width, width, *column)
        self.branch7x7dbl_5 = Conv(width, 192, *row)
        self.branch_pool = Conv(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        once = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), once, twice, self.branch_pool(mean_pool(x))], dim=1)


class BlockD(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Conv(768, 192, 1), Conv(192, 320, 3, 2)
        self.branch7x7x3_1, self.branch7x7x3_2 = Conv(768, 192, 1), Conv(192, 192, (1, 7), 1, (0, 3))
        self.branch7x7x3_3, self.branch7x7x3_4 = Conv(192, 192, (7, 1), 1, (3, 0)), Conv(192, 192, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_2(self.branch7x7x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(seven))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, 2)], dim=1)


class BlockE(nn.Module):
    def __init__(self, inputs: int, pool: Callable[[Tensor], Tensor]):
        super().__init__()
        row, column = ((1, 3), 1, (0, 1)), ((3, 1), 1, (1, 0))
        self.pool = pool
        self.branch1x1, self.branch3x3_1 = Conv(inputs, 320, 1), Conv(inputs, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = Conv(384, 384, *row), Conv(384, 384, *column)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(inputs, 448, 1), Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = Conv(384, 384, *row), Conv(384, 384, *column)
        self.branch_pool = Conv(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        parts = [self.branch1x1(x), self.branch3x3_2a(one), self.branch3x3_2b(one)]
        parts += [self.branch3x3dbl_3a(two), self.branch3x3dbl_3b(two), self.branch_pool(self.pool(x))]
        return torch.cat(parts, dim=1)


class Inception(nn.Module):
    """The port; `taps(x)` takes (B, 3, 299, 299) in [-1, 1). Frozen, always in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = BlockA(192, 32), BlockA(256, 64), BlockA(288, 64)
        self.Mixed_6a, self.Mixed_6b, self.Mixed_6c = BlockB(288), BlockC(128), BlockC(160)
        self.Mixed_6d, self.Mixed_6e, self.Mixed_7a = BlockC(160), BlockC(192), BlockD()
        self.Mixed_7b, self.Mixed_7c = BlockE(1280, mean_pool), BlockE(2048, max_pool)
        self.fc = nn.Linear(WIDTH, CLASSES)
        self.requires_grad_(False)
        self.eval()

    # ignore mode: batch norm must always use its stored statistics
    def train(self, mode: bool = True) -> "Inception":
        return super().train(False)

    def taps(self, x: Tensor) -> dict[str, Tensor]:
        """Features (B, width) by torch-fidelity's names, and "spatial" (B, 2023), the features of sFID."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, 2)
        found = {"64": x.mean(dim=(2, 3))}
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
        found["192"] = x.mean(dim=(2, 3))
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6c(self.Mixed_6b(x))
        # mixed_6/conv of the graph: the first branch of this block, first seven channels
        found["spatial"] = self.Mixed_6d.branch1x1(x)[:, :7].flatten(1)
        x = self.Mixed_6e(self.Mixed_6d(x))
        found["768"] = x.mean(dim=(2, 3))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        found["2048"] = x.mean(dim=(2, 3))
        # torch-fidelity computes the Inception Score without the bias
        found["logits_unbiased"] = found["2048"] @ self.fc.weight.T
        found["logits"] = found["logits_unbiased"] + self.fc.bias
        return found


# ------------------------------------------------------------------------------------- resizing to 299 x 299


def resize_tf1(x: Tensor, side: int = SIDE) -> Tensor:
    """(B, 3, H, W) -> (B, 3, side, side), bilinear as in TensorFlow 1, without antialiasing."""

    def along(length: int) -> tuple[Tensor, Tensor, Tensor]:
        # TensorFlow 1 maps output i to input i * length / side, without the half-pixel offset
        at = torch.arange(side, dtype=torch.float32, device=x.device) * (length / side)
        low = at.floor().long()
        return low, (low + 1).clamp(max=length - 1), at - low

    top, bottom, down = along(x.shape[2])
    left, right, across = along(x.shape[3])
    down = down[:, None]
    upper, lower = x[:, :, top], x[:, :, bottom]
    first = upper[..., left] + (upper[..., right] - upper[..., left]) * across
    second = lower[..., left] + (lower[..., right] - lower[..., left]) * across
    return first + (second - first) * down


def resize_torch(x: Tensor, side: int = SIDE) -> Tensor:
    """(B, 3, H, W) -> (B, 3, side, side) by torch's bilinear interpolation, as in pytorch-fid."""
    return F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)


def resize_clean(image: np.ndarray, side: int = SIDE) -> np.ndarray:
    """uint8 (H, W, 3) -> float32 (side, side, 3): Pillow's bicubic, as in clean-fid."""
    # per channel in mode F (float): in mode RGB Pillow rounds to 8 bits
    channels = [
        Image.fromarray(image[:, :, c].astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)
        for c in range(3)
    ]
    return np.stack([np.asarray(channel) for channel in channels], axis=2).clip(0, 255)


def stack(images: Sequence[np.ndarray]) -> Tensor:
    """uint8 (H, W, 3) images of one size -> float (B, 3, H, W) of 0 to 255."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()


# --------------------------------------------------------------------------------------------------- variants


class PortExtractor:
    """Features by our port of the network; `resize` maps values of 0 to 255 to [-1, 1)."""

    def __init__(self, net: Inception, resize: Callable[[Tensor], Tensor], spatial: bool, device: str):
        self.net, self.resize, self.spatial, self.device = net.to(device), resize, spatial, device

    def __call__(self, images: Sequence[np.ndarray]) -> Features:
        """uint8 (H, W, 3) images of any sizes -> features in the same order."""
        found = {}
        # images of equal size share a batch
        for shape in dict.fromkeys(p.shape for p in images):
            same = [i for i, p in enumerate(images) if p.shape == shape]
            with torch.inference_mode():
                taps = self.net.taps(self.resize(stack([images[i] for i in same]).to(self.device)))
            wanted = ("2048", "logits_unbiased", *(("spatial",) if self.spatial else ()))
            for k, i in enumerate(same):
                found[i] = [taps[name][k].float().cpu().numpy() for name in wanted]
        columns = [np.stack([found[i][k] for i in range(len(images))]) for k in range(2 + self.spatial)]
        return Features(*columns)


class CleanExtractor:
    """Features of clean-fid: NVIDIA's torchscript file after Pillow's bicubic."""

    def __init__(self, path: Path, device: str):
        try:
            self.layers = torch.jit.load(str(path), map_location=device).eval().layers
        except (RuntimeError, AttributeError) as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            raise UserError(
                f"{path} is not clean-fid's torchscript file inception-2015-12-05.pt: {reason}"
            ) from error
        self.device = device

    def __call__(self, images: Sequence[np.ndarray]) -> Features:
        """uint8 (H, W, 3) images of any sizes -> pooled features."""
        x = torch.from_numpy(np.stack([resize_clean(p) for p in images])).permute(0, 3, 1, 2)
        with torch.inference_mode():
            pooled = self.layers((x.to(self.device) - 128) / 128)
        return Features(pooled.reshape(len(images), -1).float().cpu().numpy())


def load_extractor(
    variant: str, path: str | Path | None, device: str = "cpu"
) -> PortExtractor | CleanExtractor:
    """The feature extractor of a variant, with weights from a local file or the folder that contains it.

    Raises:
        UserError: an unknown variant, a missing file, or weights of another network.
    """
    file = find_inception_weights(variant, path)
    if variant == "clean":
        return CleanExtractor(file, device)
    net = Inception()
    load_exactly(net, _with_counters(read_weights(file)), file)
    # pytorch-fid resizes in [0, 1] and scales to [-1, 1]; the TF1 graph computes (x - 128) / 128
    resizes = {"pytorch-fid": lambda x: 2 * resize_torch(x / 255) - 1}
    resize = resizes.get(variant, lambda x: (resize_tf1(x) - 128) / 128)
    return PortExtractor(net, resize, variant == "adm", device)


def _with_counters(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add batch-norm counters, which some published files lack; evaluation does not use them."""
    counters = {
        name.replace("running_mean", "num_batches_tracked"): torch.zeros(())
        for name in weights
        if name.endswith("running_mean")
    }
    return counters | weights
