"""The four Inception variants in use, their weight files and features; imports no network.

B images.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from open_unitok.core.errors import UserError, did_you_mean


class Features(NamedTuple):
    """Features of a batch; None if the variant has no such features.

    Attributes:
        pooled: (B, 2048), for FID, KID, precision and recall.
        logits: (B, 1008) without bias, for the Inception Score.
        spatial: (B, 2023), for sFID.
    """

    pooled: np.ndarray
    logits: np.ndarray | None = None
    spatial: np.ndarray | None = None


class InceptionVariant(NamedTuple):
    """Weight file of a variant, its download page, and a note for the report."""

    file: str
    source: str
    note: str


TORCH_FIDELITY_FILE = "weights-inception-2015-12-05-6726825d.pth"
TORCH_FIDELITY_RELEASE = "https://github.com/toshas/torch-fidelity/releases/tag/v0.2.0"
INCEPTION_VARIANTS = {
    "torch-fidelity": InceptionVariant(
        TORCH_FIDELITY_FILE, TORCH_FIDELITY_RELEASE, "bilinear as in TensorFlow 1 (UniTok's rFID)"
    ),
    "pytorch-fid": InceptionVariant(
        "pt_inception-2015-12-05-6726825d.pth",
        "https://github.com/mseitzer/pytorch-fid/releases/tag/fid_weights",
        "torch's bilinear on [0, 1]",
    ),
    "clean": InceptionVariant(
        "inception-2015-12-05.pt",
        "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
        "clean-fid: NVIDIA's torchscript after Pillow's bicubic in float (MJHQ-30K)",
    ),
    "adm": InceptionVariant(
        TORCH_FIDELITY_FILE,
        TORCH_FIDELITY_RELEASE,
        "ADM's statistics with our port of its TensorFlow graph: not bit-compatible with the graph",
    ),
}


def find_inception_weights(variant: str, path: str | Path | None) -> Path:
    """The path of a variant's weight file: `path` itself, or the file in the folder `path`."""
    from open_unitok.tokenizer.loading import find_weights  # here: it loads torch

    # the .pth files of torch-fidelity and pytorch-fid contain the same weights: accept either name
    kind = find_inception_variant(variant)
    others = (TORCH_FIDELITY_FILE, INCEPTION_VARIANTS["pytorch-fid"].file)
    names = (kind.file, *others) if kind.file.endswith(".pth") else (kind.file,)
    return find_weights(path, names, f"Inception ({variant})", kind.source)


def find_inception_variant(variant: str) -> InceptionVariant:
    """The variant of that name.

    Raises:
        UserError: there is none.
    """
    if variant not in INCEPTION_VARIANTS:
        raise UserError(f"inception_variant is {variant!r}." + did_you_mean(variant, INCEPTION_VARIANTS))
    return INCEPTION_VARIANTS[variant]
