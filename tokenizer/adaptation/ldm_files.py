"""Single files of a KL autoencoder in latent diffusion's layout: MAR's kl16.ckpt, FLUX.1's ae.safetensors.

Names become those of diffusers' AutoencoderKL, whose own conversion leaves out attention within levels. Sizes
follow from the tensors; scale and shift are not in such a file.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from open_unitok.core.errors import UserError

from ..loading import read_checkpoint

_PREFIXES = ("first_stage_model.", "")  # of a whole diffusion model's file
_PARTS = ("encoder", "decoder", "quant_conv", "post_quant_conv")
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def read_ldm_file(path: Path, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """diffusers' config and weights of such a file.

    Args:
        options: has scaling_factor and, where the autoencoder has one, shift_factor.

    Raises:
        UserError: the file is not such an autoencoder; the scale is not given.
    """
    weights = _own_weights(path)
    if options.get("scaling_factor") is None:
        raise UserError(
            f"{path} does not hold the scale of its latents: set model.encoder_options.scaling_factor and, "
            "if there is one, shift_factor (MAR: 0.2325; FLUX.1: 0.3611 and 0.1159)."
        )
    levels = 1 + max(int(m[1]) for name in weights if (m := re.match(r"encoder\.down\.(\d+)\.", name)))
    blocks = [name for name in weights if re.match(r"encoder\.down\.0\.block\.\d+\.conv1\.weight", name)]
    config = {
        "block_out_channels": [len(weights[f"encoder.down.{i}.block.0.conv1.weight"]) for i in range(levels)],
        "layers_per_block": len(blocks),
        "act_fn": "silu",
        "latent_channels": weights["decoder.conv_in.weight"].shape[1],
        "norm_num_groups": 32,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in weights,
        "scaling_factor": options["scaling_factor"],
        "shift_factor": options.get("shift_factor"),
        "down_block_types": [
            f"{_attention(weights, f'encoder.down.{i}')}DownEncoderBlock2D" for i in range(levels)
        ],
        # LDM counts the decoder's levels from the finest
        "up_block_types": [
            f"{_attention(weights, f'decoder.up.{i}')}UpDecoderBlock2D" for i in reversed(range(levels))
        ],
        "use_quant_conv": "quant_conv.weight" in weights,
        "use_post_quant_conv": "post_quant_conv.weight" in weights,
    }
    return config, _diffusers_names(weights, levels)


def _own_weights(path: Path) -> dict[str, Tensor]:
    """The autoencoder's tensors by LDM's names."""
    found = read_checkpoint(path)
    for key in ("model", "state_dict"):  # MAR's, LDM's
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    tensors = {k: v for k, v in found.items() if isinstance(v, Tensor)} if isinstance(found, Mapping) else {}
    for prefix in _PREFIXES:
        own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        own = {name: t.float() for name, t in own.items() if name.partition(".")[0] in _PARTS}
        if {"encoder.down.0.block.0.conv1.weight", "decoder.conv_in.weight"} <= own.keys():
            return own
    raise UserError(
        f"{path} is not a KL autoencoder in LDM's layout: it has no encoder.down.0 or decoder.conv_in."
    )


def _attention(weights: Mapping[str, Tensor], level: str) -> str:
    return "Attn" if f"{level}.attn.0.q.weight" in weights else ""


def _diffusers_names(weights: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    found = {}
    for name, tensor in weights.items():
        name = name.replace(".nin_shortcut.", ".conv_shortcut.").replace(".norm_out.", ".conv_norm_out.")
        name = re.sub(r"\.mid\.block_(\d)\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}.", name)
        name = name.replace(".mid.attn_1.", ".mid_block.attentions.0.")
        name = re.sub(r"^encoder\.down\.(\d+)\.", r"encoder.down_blocks.\1.", name)
        name = re.sub(
            r"^decoder\.up\.(\d+)\.", lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}.", name
        )
        name = name.replace(".block.", ".resnets.").replace(".attn.", ".attentions.")
        name = name.replace(".downsample.conv.", ".downsamplers.0.conv.")
        name = name.replace(".upsample.conv.", ".upsamplers.0.conv.")
        layer = re.search(r"\.attentions\.\d+\.(\w+)\.", name)
        if layer:
            name = name.replace(f".{layer[1]}.", f".{_ATTENTION.get(layer[1], layer[1])}.")
            # 1x1 convolutions there, linear layers here
            tensor = tensor[:, :, 0, 0] if tensor.dim() == 4 else tensor
        found[name] = tensor
    return found
