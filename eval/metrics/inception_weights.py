"""The four lineages of Inception by name: their weight files, and what their features are; no network here.

B images.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from open_unitok.core.errors import UserError, did_you_mean


class Features(NamedTuple):
    """What a batch gives: pooled (B, 2048), logits without bias (B, 1008), sFID's (B, 2023); None = none."""

    pooled: np.ndarray
    logits: np.ndarray | None = None
    spatial: np.ndarray | None = None


class Lineage(NamedTuple):
    """How one lineage is built: its weight file, where that comes from, and what a reader has to know."""

    file: str
    source: str
    note: str


TORCH_FIDELITY = "weights-inception-2015-12-05-6726825d.pth"
RELEASES = "https://github.com/toshas/torch-fidelity/releases/tag/v0.2.0"
LINEAGES = {
    "torch-fidelity": Lineage(TORCH_FIDELITY, RELEASES, "bilinear as TensorFlow 1 had it (rFID of UniTok)"),
    "pytorch-fid": Lineage(
        "pt_inception-2015-12-05-6726825d.pth",
        "https://github.com/mseitzer/pytorch-fid/releases/tag/fid_weights",
        "torch's bilinear on [0, 1]",
    ),
    "clean": Lineage(
        "inception-2015-12-05.pt",
        "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
        "clean-fid: NVIDIA's torchscript behind Pillow's bicubic in float (MJHQ-30K)",
    ),
    "adm": Lineage(
        TORCH_FIDELITY,
        RELEASES,
        "ADM's statistics on our port of its TensorFlow graph: not bit-compatible with the graph itself",
    ),
}  # fmt: skip


def weights_file(lineage: str, path: str | Path | None) -> Path:
    """The lineage's weight file; both .pth files hold the same weights, so either name serves."""
    from open_unitok.tokenizer.loading import find_weights

    kind = named_lineage(lineage)
    others = (TORCH_FIDELITY, LINEAGES["pytorch-fid"].file) if kind.file.endswith(".pth") else ()
    return find_weights(path, (kind.file, *others), f"Inception ({lineage})", kind.source)


def named_lineage(lineage: str) -> Lineage:
    """The lineage of that name, or a UserError with what there is."""
    if lineage not in LINEAGES:
        raise UserError(f"The FID lineage is {lineage!r}." + did_you_mean(lineage, LINEAGES))
    return LINEAGES[lineage]
