"""Any transformers vision tower as an encoder, randomly initialised: a plain ViT, DINOv2, SigLIP, ...

B batch, N visual tokens, D width of the tower, (H, W) image size in pixels.
"""

import inspect
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel

from open_unitok.core.errors import UserError, did_you_mean

from ..config import UniTokConfig

# Omit weights that the tokens do not depend on: they get no gradient, but weight decay would shrink them.
_NO_EXTRAS = {"use_mask_token": False, "vision_use_head": False}  # DINOv2; SigLIP


class HFVisionEncoder(nn.Module):
    """(B, 3, H, W) pixels in [-1, 1] -> (B, N, D) tokens of the tower's last layer, without its CLS token.

    `encoder_options` are the fields of the tower's transformers config, "model_type" among them, e.g.
    {"model_type": "vit", "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}. Image and
    patch size default to the tokenizer's.

    Raises:
        UserError: there is no such model type, or the tokenizer has register tokens.
    """

    def __init__(self, config: UniTokConfig) -> None:
        super().__init__()
        options = {"image_size": config.image_size, "patch_size": config.patch_size, **_NO_EXTRAS}
        options |= config.encoder_options or {}
        kind = options.pop("model_type", None)
        if kind not in CONFIG_MAPPING:
            hint = did_you_mean(str(kind), ("vit", "dinov2", "siglip_vision_model"))
            raise UserError(f"encoder_options.model_type = {kind!r} is not a transformers model type.{hint}")
        if config.num_register_tokens:
            raise UserError(
                f"num_register_tokens = {config.num_register_tokens}: encoder 'hf_vision' has no register "
                "tokens, set it to 0."
            )
        tower_config = AutoConfig.for_model(kind, **options)
        self.patch_size: int = tower_config.patch_size
        self.width: int = tower_config.hidden_size
        self.tower: Any = AutoModel.from_config(tower_config)
        if getattr(self.tower, "pooler", None) is not None:  # of ViT; pools the CLS token, which is not used
            self.tower.pooler = None
        # Some towers resize their position embeddings to the image only on request.
        forward = inspect.signature(self.tower.forward).parameters
        self._forward_options = (
            {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in forward else {}
        )

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._patches(
            self.tower(pixel_values=pixels, **self._forward_options).last_hidden_state, pixels
        )

    @property
    def num_layers(self) -> int:
        """Number of `layer_outputs`."""
        return self.tower.config.num_hidden_layers

    def layer_outputs(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """The output of every layer of the tower; the last one is that of `forward`."""
        found = self.tower(pixel_values=pixels, output_hidden_states=True, **self._forward_options)
        # the first is the embedding, the last lacks the tower's own norm
        return [self._patches(x, pixels) for x in (*found.hidden_states[1:-1], found.last_hidden_state)]

    def _patches(self, hidden: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        count = (pixels.shape[2] // self.patch_size) * (pixels.shape[3] // self.patch_size)
        return hidden[:, -count:]  # the CLS token and the tower's own registers come first
