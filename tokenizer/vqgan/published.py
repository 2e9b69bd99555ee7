"""Published VQGAN checkpoints (arXiv 2012.09841), IBQ's and LlamaGen's, as tokenizers of ours.

The three share encoder and decoder; they differ in names and in the quantiser's rule. All sizes but the
image's are read from the shapes of the weights.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from open_unitok.core.errors import UserError, did_you_mean

from ..config import UniTokConfig
from ..folder_checks import check_finite, loading
from ..loading import check_weights_fit, read_state_dict
from ..model import UniTok

# System -> fields of its quantiser. VQGAN takes the nearest row, IBQ the largest inner product, LlamaGen the
# largest cosine, as UniTok does.
QUANTIZER_FIELDS: dict[str, dict[str, Any]] = {
    "vqgan": {"quantizer": "nearest"},
    "ibq": {"quantizer": "ibq"},
    "llamagen": {"quantizer": "multi_codebook"},
}
# (pattern, ours) of module names that are not the same in both
_RENAMED = (
    (r"^quant_conv\.", "down_projection."),
    (r"^post_quant_conv\.", "up_projection."),
    (r"^quantize\.embedding\.weight$", "quantizer.codebooks"),
    (r"^(encoder|decoder)\.mid\.0\.", r"\1.mid.block_1."),
    (r"^(encoder|decoder)\.mid\.1\.", r"\1.mid.attn_1."),
    (r"^(encoder|decoder)\.mid\.2\.", r"\1.mid.block_2."),
    (r"^encoder\.conv_blocks\.(\d+)\.res\.", r"encoder.down.\1.block."),
    (r"^encoder\.conv_blocks\.(\d+)\.", r"encoder.down.\1."),
)
_PARTS = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")
_LEFT_OUT = ("quantize.codebook_used",)  # LlamaGen: a ring of used codes


def load_published_vqgan(system: str, path: str | os.PathLike[str], image_size: int = 256) -> UniTok:
    """The tokenizer of a published checkpoint file; it has no text tower (`embed_dim` 0).

    Args:
        system: a key of `QUANTIZER_FIELDS`.
        image_size: of the training images, which the file does not hold.

    Raises:
        UserError: the file is not a checkpoint of this system; the message names what is missing.
    """
    if system not in QUANTIZER_FIELDS:
        raise UserError(f"{system!r} is not a known system." + did_you_mean(system, QUANTIZER_FIELDS))
    with loading(path):
        published = read_state_dict(path)
    state = {name: tensor.float() for name, tensor in _renamed(_averaged(published)).items()}
    try:
        config = vqgan_config(system, state, image_size)
    except KeyError as error:
        raise UserError(f"{path} is not a checkpoint of {system}: {error.args[0]} is missing.") from None
    model = UniTok(config)
    statistics = ("quantizer.usage", "quantizer.calls")  # of our training: no file has them
    target = {name: tensor for name, tensor in model.state_dict().items() if name not in statistics}
    check_weights_fit(path, state, target, f"a tokenizer of {system}")
    model.load_state_dict(state, strict=False)
    check_finite(model, path)
    return model.eval()


def vqgan_config(system: str, state: Mapping[str, Tensor], image_size: int) -> UniTokConfig:
    """The config that fits a state dict under our names."""
    channels, options = state["encoder.conv_in.weight"].shape[0], {}
    for part, levels in (("encoder", "down"), ("decoder", "up")):
        names = [f"{part}.{levels}.{i}" for i in range(max(_count(state, f"{part}.{levels}"), 1))]
        widths = [state[f"{name}.block.0.conv1.weight"].shape[0] for name in names]
        options[f"{part}_options"] = {
            "channels": channels,
            "multipliers": [width // channels for width in widths],
            # a level of the decoder has one block more
            "residual_blocks": max(_count(state, f"{names[0]}.block") - (part == "decoder"), 1),
            "attention_levels": [i for i, name in enumerate(names) if f"{name}.attn.0.q.weight" in state],
        }
    shape = tuple(state["quantizer.codebooks"].shape)
    if len(shape) != 3:
        raise UserError(f"quantize.embedding.weight has shape {shape[1:]}, expected (entries, width).")
    books, entries, width = shape
    return UniTokConfig(
        image_size=image_size,
        patch_size=2 ** (_count(state, "encoder.down") - 1),
        hidden_size=state["encoder.conv_out.weight"].shape[0],
        num_attention_heads=1,  # of no use here, but it must divide hidden_size
        encoder="vqgan",
        decoder="vqgan",
        projection="linear",
        num_codebooks=books,
        codebook_size=entries,
        codebook_dim=width,
        embed_dim=0,
        **QUANTIZER_FIELDS[system],
        **options,
    )


def _averaged(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tokenizer's own weights; IBQ evaluates their average, whose names have no dots."""
    own = {n: t for n, t in published.items() if n.startswith(_PARTS) and not n.startswith(_LEFT_OUT)}
    return {name: published.get("model_ema." + name.replace(".", ""), tensor) for name, tensor in own.items()}


def _renamed(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    levels = _count(published, "decoder.conv_blocks")
    state = {}
    for name, tensor in published.items():
        # LlamaGen numbers the decoder's levels from the lowest resolution on
        found = re.match(r"decoder\.conv_blocks\.(\d+)\.(res|attn|upsample)\.(.*)", name)
        if found:
            block = "block" if found[2] == "res" else found[2]
            name = f"decoder.up.{levels - 1 - int(found[1])}.{block}.{found[3]}"
        for pattern, ours in _RENAMED:
            name = re.sub(pattern, ours, name)
        # a 1x1 convolution is a linear layer of each token; a table is the first of K
        if name.endswith("_projection.weight") and tensor.dim() == 4:
            tensor = tensor[:, :, 0, 0]
        state[name] = tensor[None] if name == "quantizer.codebooks" else tensor
    return state


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """The number of modules in the list `prefix`; names are PREFIX.NUMBER.*"""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return 1 + max((int(found[1]) for name in state if (found := pattern.match(name))), default=-1)
