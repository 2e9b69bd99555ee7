"""AutoencoderKL, the VAE of latent diffusion (arXiv 2112.10752, section 3.1), through diffusers."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor, nn

from open_unitok.core.errors import UserError

from ..config import UniTokConfig
from ..entries import check_options
from ..folder_checks import loading

# Fields of diffusers' config and their defaults there.
_SHARED: dict[str, Any] = {
    "block_out_channels": [64],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "mid_block_add_attention": True,
    "scaling_factor": 0.18215,
    "shift_factor": None,
}
FIELDS: dict[str, dict[str, Any]] = {
    "encoder": _SHARED | {"down_block_types": ["DownEncoderBlock2D"], "use_quant_conv": True},
    "decoder": _SHARED | {"up_block_types": ["UpDecoderBlock2D"], "use_post_quant_conv": True},
}


class VAEPart(NamedTuple):
    """Half of an AutoencoderKL."""

    network: nn.Module
    convolution: nn.Module | None  # 1x1, between the network and the latents
    patch_size: int
    width: int  # latent channels
    scale: float  # latents are (z - shift) * scale of the VAE's own
    shift: float


def build_part(config: UniTokConfig, part: str) -> VAEPart:
    """The encoder or decoder of an AutoencoderKL with random weights, from `<part>_options`.

    Raises:
        UserError: diffusers is not installed; an option is unknown or not valid; the tokenizer has registers.
    """
    options = getattr(config, f"{part}_options") or {}
    check_options(part, getattr(config, part), options, list(FIELDS[part]))
    for name in ("latent_channels", "block_out_channels"):
        if name not in options:
            raise UserError(f"{part}_options.{name} is missing: {part} 'autoencoder_kl' needs it.")
    if config.num_register_tokens:
        raise UserError(
            f"num_register_tokens = {config.num_register_tokens}: {part} 'autoencoder_kl' has no register "
            "tokens, set it to 0."
        )
    fields = SimpleNamespace(**(FIELDS[part] | options))
    vae: Any = import_diffusers().models.autoencoders.vae
    sizes = {
        "in_channels": 3 if part == "encoder" else fields.latent_channels,
        "out_channels": fields.latent_channels if part == "encoder" else 3,
        "block_out_channels": fields.block_out_channels,
        "layers_per_block": fields.layers_per_block,
        "norm_num_groups": fields.norm_num_groups,
        "act_fn": fields.act_fn,
        "mid_block_add_attention": fields.mid_block_add_attention,
    }
    try:
        if part == "encoder":
            network = vae.Encoder(down_block_types=fields.down_block_types, double_z=True, **sizes)
        else:
            network = vae.Decoder(up_block_types=fields.up_block_types, **sizes)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{part}_options are not those of an AutoencoderKL: {reason}") from error
    channels = 2 * fields.latent_channels if part == "encoder" else fields.latent_channels
    has_convolution = fields.use_quant_conv if part == "encoder" else fields.use_post_quant_conv
    return VAEPart(
        network,
        nn.Conv2d(channels, channels, 1) if has_convolution else None,
        2 ** (len(fields.block_out_channels) - 1),
        fields.latent_channels,
        fields.scaling_factor,
        fields.shift_factor or 0.0,
    )


def tokenizer_fields(vae_config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a continuous UniTokConfig for an AutoencoderKL's config.

    Raises:
        UserError: it does not have three colour channels, or normalises its latents per channel.
    """
    channels = (vae_config.get("in_channels", 3), vae_config.get("out_channels", 3))
    if channels != (3, 3):
        raise UserError(f"An AutoencoderKL with in_channels and out_channels of {channels}: both must be 3.")
    if vae_config.get("latents_mean") or vae_config.get("latents_std"):
        raise UserError(
            "An AutoencoderKL with latents_mean or latents_std: only one scale and shift are supported."
        )
    options = {
        part: {name: _plain(vae_config.get(name, default)) for name, default in fields.items()}
        for part, fields in FIELDS.items()
    }
    width = options["encoder"]["latent_channels"]
    return {
        "encoder": "autoencoder_kl",
        "encoder_options": options["encoder"],
        "decoder": "autoencoder_kl",
        "decoder_options": options["decoder"],
        "patch_size": 2 ** (len(options["encoder"]["block_out_channels"]) - 1),
        "hidden_size": width,
        "num_attention_heads": 1,
        "projection": "none",
        "embed_dim": 0,
        "quantizer": "none",
        "num_codebooks": 1,
        "codebook_dim": width,
    }


def read_diffusers(
    path: str | Path, subfolder: str | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fields of UniTokConfig and weights, by the names in a `UniTok`, of a diffusers folder or hub id.

    Raises:
        UserError: diffusers is not installed; the folder is not an AutoencoderKL or broken.
    """
    cls = import_diffusers().AutoencoderKL
    with loading(path):
        vae: Any = cls.from_pretrained(str(path), **({"subfolder": subfolder} if subfolder else {}))
    with loading(path):
        fields = tokenizer_fields(dict(vae.config))
    return fields, by_tokenizer_names(vae.state_dict())


def by_tokenizer_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' names -> those of a `UniTok` with these parts."""
    own = {"quant_conv": "encoder.convolution", "post_quant_conv": "decoder.convolution"}
    own |= {"encoder": "encoder.network", "decoder": "decoder.network"}
    found = {}
    for name, tensor in weights.items():
        part, _, rest = name.partition(".")
        found[f"{own[part]}.{rest}"] = tensor.float()
    return found


def import_diffusers() -> Any:
    """
    Raises:
        UserError: diffusers is not installed.
    """
    try:
        import diffusers
        import diffusers.models.autoencoders.vae
    except ImportError as error:
        raise UserError(
            f"encoder and decoder 'autoencoder_kl' need diffusers ({error}): pip install 'open-unitok[vae]'."
        ) from error
    return diffusers


def _plain(value: Any) -> Any:
    """As config.json stores it."""
    return list(value) if isinstance(value, list | tuple) else value
