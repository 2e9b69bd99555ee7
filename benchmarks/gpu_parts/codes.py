"""Correctness: codes of the same images on the CPU and on the GPU, and how close the unequal ones were.

A code is the entry nearest to a latent. Where the two nearest ones are further apart than rounding moves
them, both devices must choose the same one.
"""

import copy
from typing import Any

import torch

from open_unitok.tokenizer import UniTok, UniTokConfig
from open_unitok.tokenizer.images import to_pixels

from .data import square_image
from .report import Report, load_script

MARGIN = 1e-5  # gap of the squared distances from a latent to the nearest two entries, all of unit norm
# what a caller may have set before: torch.set_float32_matmul_precision and cudnn's TF32
SETTINGS = {"as torch starts": None, "caller asks for TF32": "high", "caller asks for exact": "highest"}
TOY = {"stem_width": 8, "stage_widths": (8, 8), "stage_depths": (1, 1), "hidden_size": 16,
       "num_hidden_layers": 1, "num_attention_heads": 2, "decoder_widths": (8, 8), "decoder_depths": (1, 1),
       "num_codebooks": 2, "codebook_size": 16, "codebook_dim": 4, "image_size": 32}  # fmt: skip


def run(report: Report) -> None:
    """A row per model, precision and setting of the caller."""
    for name, count in (("scenes", 64), ("vitamin_large, random weights", 16)):
        model = UniTok.from_pretrained("scenes", dtype=torch.float32) if name == "scenes" else large(report)
        report.row(f"{name} on the CPU", compare_all, report, name, model.eval(), 4 if report.toy else count)
        del model


def large(report: Report) -> UniTok:
    """The tokenizer of the paper's size with random weights."""
    small = {"text_num_layers": 1, "text_vocab_size": 64}  # the text tower decides no codes
    config = UniTokConfig.named("vitamin_large", **{**(TOY if report.toy else {}), **small})
    return load_script("tokenizer").random_model(config, report.device)


def compare_all(report: Report, name: str, model: UniTok, count: int) -> dict[str, Any]:
    """Encode on the CPU once, then on the device under every setting; adds the rows."""
    shape = model.config.image_shape
    pixels = torch.stack([to_pixels(square_image(i, shape[0])[0], shape) for i in range(count)])
    on_cpu = copy.deepcopy(model).to("cpu")  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        latents = on_cpu.encode_latents(pixels)
    codes = on_cpu.quantizer.encode(latents)
    gaps = 2 * load_script("tokenizer").code_margins(on_cpu, latents)  # |a - b|^2 = 2 - 2 cos
    model = model.to(report.device)  # pyright: ignore[reportArgumentType]
    for setting, precision in SETTINGS.items():
        arguments = (model, pixels.to(report.device), codes, gaps, precision)
        report.row(f"{name}, fp32, {setting}", compare, *arguments)
    report.row(
        f"{name}, bf16", compare, model.to(torch.bfloat16), pixels.to(report.device), codes, gaps, None
    )
    return {"images": count, "codes": codes.numel(), "clear": (gaps > MARGIN).float().mean().item()}


def compare(
    model: UniTok, pixels: torch.Tensor, codes: torch.Tensor, gaps: torch.Tensor, precision: str | None
) -> dict[str, Any]:
    """Unequal codes, those whose gap is above `MARGIN` among them, and the largest gap of an unequal one."""
    before = torch.get_float32_matmul_precision()
    try:
        if precision is not None:
            torch.set_float32_matmul_precision(precision)
        found = model.encode(pixels.to(model.dtype)).cpu()
    finally:
        torch.set_float32_matmul_precision(before)
    wrong = found != codes
    beyond = wrong & (gaps > MARGIN)
    row: dict[str, Any] = {"unequal": int(wrong.sum()), "unequal_beyond_margin": int(beyond.sum())}
    return {**row, "of": codes.numel(), "largest_gap": float(gaps[wrong].max()) if wrong.any() else 0.0}
