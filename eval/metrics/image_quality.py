"""PSNR and SSIM per image, codebook usage and perplexity (UniTok, section 4).

Images are uint8 arrays (B, H, W, 3) or (H, W, 3): reconstructions are measured as they are saved.
B images, N visual tokens, K sub-codebooks, V entries.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from open_unitok.core.errors import UserError, did_you_mean

K1, K2 = 0.01, 0.03


class SSIMConvention(NamedTuple):
    """One of the SSIM variants in use; published numbers differ by variant."""

    window: tuple[float, ...]  # 1-D, applied along both axes
    data_range: float  # L of the formula
    scale: float  # factor on the 8-bit pixel values
    sample_covariance: bool  # divide by N - 1 instead of N
    mirror_border: bool


def _gaussian_window(radius: int = 5, sigma: float = 1.5) -> tuple[float, ...]:
    """2 * radius + 1 Gaussian weights that sum to 1."""
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return tuple(weights / weights.sum())


SSIM_MODES = {
    "skimage7": SSIMConvention((1 / 7,) * 7, 255.0, 1.0, True, False),
    "gauss11": SSIMConvention(_gaussian_window(), 255.0, 1.0, False, False),
    "llamagen": SSIMConvention(
        (1 / 7,) * 7, 2.0, 1 / 255, True, False
    ),  # a data range of 2 for values in [0, 1] inflates SSIM
    "torchmetrics": SSIMConvention(_gaussian_window(), 1.0, 1 / 255, False, True),
}


def psnr(originals: np.ndarray, reconstructions: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB with range 255, one value per image (B,); at most 100.

    Published tables average PSNR over images, which is not the PSNR of the average error.
    """
    a, b = _as_batch(originals, reconstructions)
    error = ((a - b) ** 2).reshape(len(a), -1).mean(axis=1)
    # identical images: error 0, infinite PSNR, clipped to 100 dB
    with np.errstate(divide="ignore"):
        return np.minimum(10 * np.log10(255.0**2 / error), 100.0)


def ssim(originals: np.ndarray, reconstructions: np.ndarray, mode: str = "skimage7") -> np.ndarray:
    """Structural similarity, mean over pixels and channels, one value per image (B,).

    Raises:
        UserError: an unknown mode, or images smaller than the mode's window.
    """
    if mode not in SSIM_MODES:
        raise UserError(f"SSIM mode is {mode!r}." + did_you_mean(mode, SSIM_MODES))
    kind = SSIM_MODES[mode]
    a, b = (x * kind.scale for x in _as_batch(originals, reconstructions))
    size = len(kind.window)
    if min(a.shape[1:3]) < size:
        raise UserError(
            f"Images of {a.shape[2]}x{a.shape[1]} are smaller than SSIM's window of {size}x{size} pixels."
        )
    # torchmetrics pads by reflection; the others average over valid positions only
    if kind.mirror_border:
        pad = ((0, 0), (size // 2, size // 2), (size // 2, size // 2), (0, 0))
        a, b = np.pad(a, pad, mode="reflect"), np.pad(b, pad, mode="reflect")
    blur = _separable_filter(kind.window)
    mean_a, mean_b = blur(a), blur(b)
    # skimage divides (co)variances by N - 1 by default; Wang's original uses the window weights
    correction = size**2 / (size**2 - 1) if kind.sample_covariance else 1.0
    var_a = correction * (blur(a * a) - mean_a**2)
    var_b = correction * (blur(b * b) - mean_b**2)
    covariance = correction * (blur(a * b) - mean_a * mean_b)
    # C1 = (K1 L)^2 and C2 = (K2 L)^2 keep the ratios stable
    c1, c2 = (K1 * kind.data_range) ** 2, (K2 * kind.data_range) ** 2
    # SSIM = luminance x (contrast x structure); the latter two merge since C3 = C2 / 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (var_a + var_b + c2)
    return (luminance * structure).reshape(len(a), -1).mean(axis=1)


def _separable_filter(window: Sequence[float]) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function that correlates (B, H, W, C) with the window along H and W, valid positions only."""

    def along(x: np.ndarray, axis: int) -> np.ndarray:
        length = x.shape[axis] - len(window) + 1
        slices = ([slice(None)] * axis + [slice(i, i + length)] for i in range(len(window)))
        return sum(w * x[tuple(s)] for w, s in zip(window, slices))  # type: ignore[return-value]

    return lambda x: along(along(x, 1), 2)


def _as_batch(originals: np.ndarray, reconstructions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both inputs as float64 (B, H, W, 3)."""
    if originals.shape != reconstructions.shape:
        raise UserError(f"Images must have equal shapes, got {originals.shape} and {reconstructions.shape}.")
    if originals.dtype != np.uint8 or reconstructions.dtype != np.uint8:
        raise UserError(f"Images must be uint8, got {originals.dtype} and {reconstructions.dtype}.")
    if originals.ndim == 3:
        originals, reconstructions = originals[None], reconstructions[None]
    return originals.astype(np.float64), reconstructions.astype(np.float64)


class CodebookUsage:
    """Counts the occurrences of each entry of each sub-codebook, batch by batch.

    Args:
        entries: of each sub-codebook, or a list of their numbers.
    """

    def __init__(self, sub_codebooks: int, entries: int | Sequence[int]):
        sizes = [entries] * sub_codebooks if isinstance(entries, int) else entries
        self.sizes = np.array(sizes)
        self.counts = np.zeros((sub_codebooks, max(sizes)), dtype=np.int64)

    def add(self, codes: np.ndarray) -> None:
        """Count codes (..., K)."""
        k, v = self.counts.shape
        codes = np.asarray(codes).reshape(-1, k).astype(np.int64)
        if codes.size and not 0 <= codes.min() <= codes.max() < v:
            raise UserError(
                f"Codes range from {codes.min()} to {codes.max()}, but a sub-codebook has {v} entries."
            )
        if codes.size and (codes.max(axis=0) >= self.sizes).any():
            raise UserError(
                f"Codes go up to {codes.max(axis=0).tolist()}, but the sub-codebooks have "
                f"{self.sizes.tolist()} entries."
            )
        # one histogram per sub-codebook: equal indices are different vectors
        self.counts += np.stack([np.bincount(codes[:, i], minlength=v) for i in range(k)])

    def usage(self) -> np.ndarray:
        """Fraction of entries that occur at least once, per sub-codebook (K,)."""
        return (self.counts > 0).sum(axis=1) / self.sizes

    def perplexity(self) -> np.ndarray:
        """exp(entropy) of the entry frequencies, per sub-codebook (K,); V if all are equally frequent."""
        # log 1 = 0 for unused entries: 0 log 0 = 0
        share = self.counts / np.maximum(self.counts.sum(axis=1, keepdims=True), 1)
        logs = np.log(np.where(share > 0, share, 1.0))
        return np.exp(-(share * logs).sum(axis=1))
