"""How much arithmetic a training step is, and how much a device could do: the two halves of MFU."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from open_unitok.tokenizer import UniTok, UniTokConfig

# Dense bf16 matrix products in 10^12 operations per second, from the makers' data sheets.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10G": 70.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}


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
        pixels = torch.zeros(1, 3, config.image_size, config.image_size)
        ids = torch.zeros(1, config.text_context_length, dtype=torch.int64) if captions else None
        total = _count(model, pixels, ids, 1)
        encoded = _count(model, pixels, ids, 0) if decoded < 1 else total
    return 3.0 * (encoded + decoded * (total - encoded))


def _count(model: UniTok, pixels: torch.Tensor, ids: torch.Tensor | None, decoded: int) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(pixels, ids, reconstruct_first=decoded)
    return counter.get_total_flops()
