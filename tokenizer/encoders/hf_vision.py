"""A transformers vision tower as the encoder: SigLIP, CLIP, DINOv2 from a folder or hub id, or a new ViT.

B images, N visual tokens, D width of the tower, (H, W) image size in pixels.
"""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import CONFIG_MAPPING

from open_unitok.core.errors import UserError

from ..config import UniTokConfig
from ..entries import check_options
from .vision_tower import TOWER_OPTIONS, VisionTower, check_tower, read_tower


class HFVisionEncoder(VisionTower):
    """(B, 3, H, W) pixels in [-1, 1] -> (B, N, D) tokens of the tower's patches.

    `encoder_options` are

    - {"path": folder or hub id, "layer", "norm", "mean", "std"}, see `read_tower`: a new `UniTok` takes over
      the weights and stores the tower's own fields in place of the path: a saved folder needs nothing else;
    - or the fields of a new tower's transformers config, "model_type" among them, e.g. {"model_type": "vit",
      "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}. Image and patch size default to
      the tokenizer's.

    With "resize": true a tower of another patch size sees the image resized to as many of its patches as the
    tokenizer has tokens, e.g. 224 of 256 pixels for patches of 14.

    Raises:
        UserError: there is no such tower, its patch size differs, or the tokenizer has register tokens.
    """

    def __init__(self, config: UniTokConfig) -> None:
        fields = {"image_size": config.image_size, "patch_size": config.patch_size}
        fields |= {"use_mask_token": False, "vision_use_head": False} | (config.encoder_options or {})
        resizes = fields.pop("resize", False)
        if fields.pop("merge", None) is not None:
            raise UserError("encoder_options.merge: encoder 'hf_vision' cannot merge tokens, 'vitamin' can.")
        if config.num_register_tokens:
            raise UserError(
                f"num_register_tokens = {config.num_register_tokens}: encoder 'hf_vision' has no register "
                "tokens, set it to 0."
            )
        _check_new_tower(config.encoder_options or {}, resizes)
        super().__init__(fields)
        if not self.tower_patch:
            raise UserError(
                f"encoder 'hf_vision': {fields['model_type']!r} is not a vision transformer with one "
                "patch size."
            )
        if self.tower_patch != config.patch_size and not resizes:
            raise UserError(
                f"encoder 'hf_vision' has patches of {self.tower_patch} pixels, but patch_size = "
                f"{config.patch_size}: set patch_size to it, or encoder_options.resize to true, which "
                "resizes images for the tower."
            )
        check_tower(fields, self._tower_size(*config.image_shape, config.patch_size))
        self.patch_size = config.patch_size

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return super().forward(pixels, self._tower_size(*pixels.shape[2:], self.patch_size))  # pyright: ignore

    def layer_outputs(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """The output of every layer of the tower; the last one is that of `forward`."""
        return super().layer_outputs(pixels, self._tower_size(*pixels.shape[2:], self.patch_size))  # pyright: ignore

    @staticmethod
    def resolve(config: UniTokConfig) -> tuple[dict[str, Any], dict[str, str]]:
        """`encoder_options` with the tower's own fields in place of a path; the path by submodule.

        Raises:
            UserError: the path holds no vision tower, or an option does not fit it.
        """
        options = dict(config.encoder_options or {})
        if options.get("path") is None:
            if options.get("model_type") is None:
                raise UserError(
                    "encoder 'hf_vision' needs encoder_options.path, the folder or hub id of a vision model, "
                    "or model_type (vit, dinov2, siglip_vision_model) and the fields of a new one."
                )
            options.pop("path", None)
            return options, {}
        check_options("encoder", config.encoder, options, ("path", *TOWER_OPTIONS, "resize"))
        path, resizes = str(options.pop("path")), options.pop("resize", None)
        fields = read_tower(path, **options)
        return fields | ({"resize": True} if resizes else {}), {"": path}

    def _tower_size(self, height: int, width: int, patch: int) -> tuple[int, int]:
        return height // patch * self.tower_patch, width // patch * self.tower_patch


def _check_new_tower(options: Mapping[str, Any], resizes: Any) -> None:
    """
    Raises:
        UserError: an option has another type, or is not a field of the tower's transformers config.
    """
    for name, value in (("norm", options.get("norm")), ("resize", resizes)):
        if value is not None and not isinstance(value, bool):
            raise UserError(f"encoder_options.{name} is {value!r}: it must be true or false.")
    kind = options.get("model_type")
    # a config that was read from a folder has both, and may hold fields that transformers does not know
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING or {"mean", "std"} <= set(options):
        return
    own = ("norm", "mean", "std", "resize", "merge", "model_type", "image_size", "patch_size")
    allowed = (*own, "use_mask_token", "vision_use_head", *CONFIG_MAPPING[kind]().to_dict())
    check_options("encoder", "hf_vision", options, allowed)
