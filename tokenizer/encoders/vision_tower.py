"""A vision tower of transformers (CLIP, SigLIP, DINOv2, ViT, ...) as pixels to tokens, new or from a folder.

B images, n tokens of the tower, N of them patches, D its width. Encoders, teachers and an MLLM's continuous
features load their towers here.
"""

import hashlib
import inspect
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoConfig, AutoModel

from open_unitok.core.errors import UserError, did_you_mean

from ..folder_checks import check_finite, loading, quiet_reports

TOWER_OPTIONS = ("layer", "norm", "mean", "std")  # of `read_tower`, in YAML files too
_OWN_FIELDS = ("norm", "mean", "std")  # of a tower's fields; the others are its transformers config
_HALF = (0.5, 0.5, 0.5)  # mean and deviation that map [0, 1] to [-1, 1]
# the final norm; a CLIP applies it to its class token only
_NORMS = ("post_layernorm", "layernorm", "norm", "rms_norm")
# weights that the tokens do not depend on: they get no gradient, but weight decay would shrink them
_NO_EXTRAS = {"use_mask_token": False, "vision_use_head": False}  # DINOv2; SigLIP
_ROPE_AUGMENTATION = ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale")  # DINOv3
# fields of a stored config that say nothing about the network
_DROPPED = ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "id2label")
_DROPPED += ("label2id", "out_features", "out_indices", "stage_names", "attn_implementation")


class VisionTower(nn.Module):
    """(B, 3, H, W) pixels in [-1, 1] -> (B, N, D) tokens of the patches in raster order.

    The tower's own normalisation of pixels is applied inside; class token and registers are left out.

    Args:
        fields: of the tower's transformers config, "model_type" among them, and "norm": whether the final
            norm is applied (None = as in the tower's `last_hidden_state`), "mean" and "std" of its input,
            for pixels in [0, 1]. JSON: they describe a saved tower.
        network: the tower, if it is built already; None builds it with random weights.

    Attributes:
        patch_size: side of a patch in pixels; None for a network that halves its map in stages.
        width: D. image_size: the side that it was trained with, without what its patches leave over.

    Raises:
        UserError: there is no such model type, or it is not a vision tower.
    """

    def __init__(self, fields: Mapping[str, Any], network: Any = None) -> None:
        super().__init__()
        self.fields = dict(fields)
        config = tower_config(fields)
        if network is None:
            try:
                network = AutoModel.from_config(config)
            except (RuntimeError, TypeError, ValueError, KeyError, ArithmeticError) as error:
                reason = " ".join(str(error).split())[:150]
                raise UserError(
                    f"encoder_options of {fields['model_type']!r} build no tower: {reason}"
                ) from error
        self.tower: Any = getattr(network, "vision_model", network)  # nested up to transformers 5.17
        sizes = getattr(config, "hidden_sizes", None)
        self.width: int = sizes[-1] if sizes else config.hidden_size
        self.patch_size: Any = None if sizes else _side(getattr(config, "patch_size", None))
        self.tower_patch = self.patch_size  # an encoder that resizes images has another patch_size
        side = _side(getattr(config, "image_size", None)) or 224
        # 384 pixels are 27 patches of 14: the tower ignores the rest
        self.image_size: int = side // self.patch_size * self.patch_size if self.patch_size else side
        given = (_HALF if fields.get(name) is None else fields[name] for name in ("mean", "std"))
        self.mean, self.std = map(tuple, _check_normalisation(*given, "encoder_options"))  # pyright: ignore
        self.projection: nn.Module | None = None
        self._drop_unused()
        self._norm = self._set_norm(fields.get("norm"))
        # some towers resize their position embeddings to the image only on request
        forward = inspect.signature(self.tower.forward).parameters
        resizes = "interpolate_pos_encoding" in forward
        self._forward_options = {"interpolate_pos_encoding": True} if resizes else {}

    def forward(self, pixels: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """The tokens of (B, 3, H, W) pixels in [-1, 1], resized to (height, width) `size` first.

        Raises:
            UserError: a height or width that is not a multiple of its patch.
        """
        image, count = self._prepare(pixels, size)
        return self._patches(self.all_tokens(image), count)

    @property
    def num_layers(self) -> int:
        """Number of `layer_outputs`."""
        return self.tower.config.num_hidden_layers

    def layer_outputs(self, pixels: Tensor, size: tuple[int, int] | None = None) -> list[Tensor]:
        """The output of every layer, as `forward`, which gives the last one."""
        image, count = self._prepare(pixels, size)
        found = self.tower(pixel_values=image, output_hidden_states=True, **self._forward_options)
        # the first is the embedding, the last may lack the final norm
        states = [*found.hidden_states[1:-1], self._finish(found.last_hidden_state)]
        return [self._patches(hidden, count) for hidden in states]

    def all_tokens(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) normalised images -> (B, n, D), class token first, or (B, D, rows, columns)."""
        return self._finish(self.tower(pixel_values=image, **self._forward_options).last_hidden_state)

    def _finish(self, hidden: Tensor) -> Tensor:
        if self._norm:
            hidden = getattr(self.tower, self._norm)(hidden)
        return hidden if self.projection is None else self.projection(hidden)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels in [-1, 1] with the tower's mean and deviation."""
        if self.mean == self.std == _HALF:
            return pixels
        # Tensors of their own would come back from meta, where from_pretrained builds, without values.
        mean, std = (pixels.new_tensor(v, dtype=torch.float32).view(3, 1, 1) for v in (self.mean, self.std))
        return (((pixels.float() + 1) / 2 - mean) / std).to(pixels.dtype)

    def train(self, mode: bool = True) -> "VisionTower":
        """A frozen tower stays in evaluation mode, without dropout."""
        return super().train(mode and any(p.requires_grad for p in self.parameters()))

    def load_weights(self, path: str, key: str = "encoder_options.path") -> None:
        """Take the weights of a folder or hub id that `read_tower` has read.

        Raises:
            UserError: they are missing or broken.
        """
        loaded = VisionTower(self.fields, _load_network(path, tower_config(self.fields), key))
        self.load_state_dict(loaded.state_dict())

    def fingerprint(self) -> str:
        """Hex sha256 of its weights, as float32, and fields."""
        digest = hashlib.sha256(json.dumps(self.fields, sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
            digest.update(memoryview(tensor.detach().float().cpu().contiguous().numpy()).cast("B"))
        return digest.hexdigest()

    def _prepare(self, pixels: Tensor, size: tuple[int, int] | None) -> tuple[Tensor, int]:
        """The normalised image, and the number of its patches."""
        height, width = size or (pixels.shape[2], pixels.shape[3])
        if height % self.tower_patch or width % self.tower_patch:
            raise UserError(
                f"A vision tower with patches of {self.tower_patch} pixels cannot read images of {height} x "
                f"{width}: both must be multiples of it."
            )
        image = self.normalise(resize(pixels, (height, width)))
        return image, (height // self.tower_patch) * (width // self.tower_patch)

    def _patches(self, tokens: Tensor, count: int) -> Tensor:
        if tokens.dim() != 3 or tokens.shape[1] < count:
            raise UserError(
                f"{self.fields['model_type']!r} returns {tuple(tokens.shape)} for {count} patches: it is not "
                "a vision transformer with a token per patch."
            )
        return tokens[:, -count:]  # class token and registers come first

    def _drop_unused(self) -> None:
        if getattr(self.tower, "pooler", None) is not None:  # of ViT; reads the class token
            self.tower.pooler = None
        embeddings = getattr(self.tower, "embeddings", None)
        if isinstance(getattr(embeddings, "mask_token", None), nn.Parameter):  # of masked training
            embeddings.mask_token = None  # pyright: ignore[reportOptionalMemberAccess]

    def _set_norm(self, wanted: bool | None) -> str | None:
        """Leave out the final norm where it is not wanted; its name where `all_tokens` must apply it."""
        name = next((n for n in _NORMS if isinstance(getattr(self.tower, n, None), nn.Module)), None)
        applied = name is not None and not hasattr(self.tower, "pre_layrnorm")
        wanted = applied if wanted is None else wanted
        if wanted and name is None:
            raise UserError(f"norm is true, but {self.fields['model_type']!r} has no final norm: omit it.")
        if not wanted and name is not None:
            setattr(self.tower, name, nn.Identity())
        return name if wanted and not applied else None


def read_tower(
    path: str,
    layer: int | None = None,
    norm: bool | None = None,
    mean: Any = None,
    std: Any = None,
    key: str = "encoder_options.path",
) -> dict[str, Any]:
    """The fields of `VisionTower` for the tower of a folder or hub id: a vision model, or that of a CLIP.

    Args:
        layer: tokens behind a block, -1 the last, without the final norm unless `norm` is true; later blocks
            are left out. None = the tower's output.
        norm: whether the final norm is applied; None = as the tower does.
        mean, std: None = those of its preprocessor_config.json.
        key: config key of `path`, for error messages.

    Raises:
        UserError: it cannot be read, or is not a vision tower.
    """
    config = read_tower_config(path, key)
    vision = getattr(config, "vision_config", config)
    section = key.rpartition(".")[0]
    fields = {k: v for k, v in vision.to_diff_dict().items() if k not in _DROPPED}
    fields = {k: v for k, v in fields.items() if not k.startswith("_")} | {"model_type": vision.model_type}
    fields |= {k: v for k, v in _NO_EXTRAS.items() if k in fields}
    # training samples all random numbers by image, which the tower's own dropout and augmentation do not
    fields |= {k: 0.0 for k in fields if "dropout" in k or "drop_path" in k}
    fields |= {k: None for k in _ROPE_AUGMENTATION if k in fields}
    if layer is not None:
        depth = getattr(vision, "num_hidden_layers", None)
        if depth is None or getattr(vision, "hidden_sizes", None):
            raise UserError(f"{section}.layer is {layer}, but {path} has stages of blocks: omit it.")
        if not -depth <= layer <= -1:
            raise UserError(f"{section}.layer is {layer}: this network has {depth} blocks, -1 to -{depth}.")
        fields["num_hidden_layers"] = depth + 1 + layer
        norm = bool(norm)
    mean, std = _normalisation(path, mean, std, key)
    return fields | ({} if norm is None else {"norm": norm}) | {"mean": mean, "std": std}


def load_tower(path: str, key: str = "encoder_options.path", **options: Any) -> VisionTower:
    """The frozen tower of a folder or hub id with its weights in float32; `options` as of `read_tower`.

    Raises:
        UserError: it cannot be read, or is not a vision tower.
    """
    fields = read_tower(path, key=key, **options)
    tower = VisionTower(fields, _load_network(path, tower_config(fields), key))
    return tower.requires_grad_(False).eval()


def tower_sizes(path: str, key: str = "encoder_options.path", **options: Any) -> tuple[int, int]:
    """(M, D): patches of an image of the tower's own size, and their width; reads no weights.

    Raises:
        UserError: the path holds no vision tower with a token per patch.
    """
    fields = read_tower(path, key=key, **options)
    with torch.device("meta"):
        tower = VisionTower(fields)
    check_tower(fields, (tower.image_size, tower.image_size))
    return (tower.image_size // tower.tower_patch) ** 2, tower.width


def load_projected_tower(path: str, key: str = "encoder_options.path", **options: Any) -> VisionTower:
    """As `load_tower`, of a CLIP, whose norm and projection to the joint space are applied to every token.

    Raises:
        UserError: it is no CLIP.
    """
    full = read_tower_config(path, key)
    if not hasattr(full, "vision_config"):
        raise UserError(f"{key} is {path}: it is no CLIP with a visual projection.")
    fields = read_tower(path, key=key, **options) | {"norm": True}
    full.vision_config = tower_config(fields)
    network = _load_network(path, full, key)
    if not hasattr(network, "visual_projection"):
        raise UserError(f"{key} is {path}: it is no CLIP with a visual projection.")
    tower = VisionTower(fields, network.vision_model)
    tower.projection = network.visual_projection
    tower.width = network.visual_projection.out_features
    return tower.requires_grad_(False).eval()


def resize(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, 3, H, W) pixels at another (height, width), bicubic; unchanged where they have it."""
    if pixels.shape[-2:] == size:
        return pixels
    smooth = F.interpolate(pixels.float(), size, mode="bicubic", align_corners=False, antialias=True)
    return smooth.clamp(-1, 1).to(pixels.dtype)


def check_tower(fields: Mapping[str, Any], size: tuple[int, int]) -> None:
    """Run a tower on the meta device, which computes shapes alone.

    Raises:
        UserError: it does not give a token per patch of an image of (height, width) `size`.
    """
    with torch.device("meta"):
        tower = VisionTower(fields)
        if not tower.tower_patch:
            raise UserError(f"{fields['model_type']!r} is not a vision transformer with one patch size.")
        try:
            with torch.no_grad():
                tower(torch.zeros(1, 3, *size))
        except (RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            reason = " ".join(str(error).split())[:150]
            raise UserError(
                f"{fields['model_type']!r} cannot encode images of {size[0]} x {size[1]} pixels: {reason}"
            ) from error


def tower_config(fields: Mapping[str, Any]) -> Any:
    """The transformers config of a tower's fields.

    Raises:
        UserError: there is no such model type, it reads text, or a field has a wrong value.
    """
    fields = {name: value for name, value in fields.items() if name not in _OWN_FIELDS}
    kind = fields.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        hint = did_you_mean(str(kind), ("vit", "dinov2", "siglip_vision_model"))
        raise UserError(f"encoder_options.model_type = {kind!r} is not a transformers model type.{hint}")
    try:
        config = AutoConfig.for_model(kind, **fields)
    except Exception as error:  # of transformers' validation
        raise UserError(f"encoder_options of {kind!r}: {' '.join(str(error).split())[:200]}") from error
    _check_vision(config, f"encoder_options.model_type = {kind!r}")
    depth = getattr(config, "num_hidden_layers", 1)
    if not isinstance(depth, int) or depth < 1:
        raise UserError(f"encoder_options.num_hidden_layers is {depth!r}: it must be 1 or more.")
    return config


def read_tower_config(path: str, key: str) -> Any:
    """The transformers config of a folder or hub id: of a vision tower, or of a model that has one.

    Raises:
        UserError: there is no such folder or hub repository, or it holds no vision tower.
    """
    if not path or (not Path(path).exists() and path.count("/") != 1):  # a hub id is owner/name
        raise UserError(f"{key} is {path!r}, but there is no such folder.")
    with loading(path), quiet_reports():
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    _check_vision(getattr(config, "vision_config", config), f"{key} = {path}")
    return config


def _check_vision(config: Any, what: str) -> None:
    kind = config.model_type
    network = MODEL_MAPPING.get(type(config), None)
    network = network[0] if isinstance(network, tuple) else network
    if network is None or getattr(network, "main_input_name", "") != "pixel_values":
        raise UserError(f"{what}: {kind!r} is not a vision tower, such as that of CLIP, SigLIP or DINOv2.")
    needed = inspect.signature(network.forward).parameters.values()
    others = [p.name for p in needed if p.default is p.empty and p.name not in ("self", "pixel_values")]
    others = [name for name in others if name not in ("args", "kwargs")]
    if others:
        raise UserError(f"{what}: {kind!r} reads {', '.join(others)} as well, not images alone.")


def _load_network(path: str, config: Any, key: str) -> Any:
    with loading(path), quiet_reports():
        network, info = AutoModel.from_pretrained(
            path, config=config, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
    # the pooler is not used; any other missing weight would be random
    missing = sorted(name for name in info["missing_keys"] if "pooler" not in name)
    if missing:
        raise UserError(f"{key} ({path}) lacks weights, {missing[0]} among them: it is not complete.")
    check_finite(network, path)
    return network


def _normalisation(path: str, mean: Any, std: Any, key: str) -> tuple[list[float], list[float]]:
    """Mean and deviation as given, else those of the preprocessor_config.json."""
    section = key.rpartition(".")[0]
    advice = f"set {section}.mean and {section}.std"
    if mean is None or std is None:
        from transformers.image_processing_utils import BaseImageProcessor

        try:
            stored, _ = BaseImageProcessor.get_image_processor_dict(path)
        except (OSError, TypeError, ValueError):
            stored = {}
        factor = stored.get("rescale_factor", 1 / 255) if stored.get("do_rescale", True) else 0.0
        scaled = abs(factor * 255 - 1) < 1e-3
        if not stored.get("do_normalize", True):
            stored |= {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
        if not scaled or "image_mean" not in stored or "image_std" not in stored:
            raise UserError(
                f"{key} ({path}) has no preprocessor_config.json with image_mean and image_std for pixels in "
                f"[0, 1]: {advice}."
            )
        mean = stored["image_mean"] if mean is None else mean
        std = stored["image_std"] if std is None else std
    return _check_normalisation(mean, std, section)


def _check_normalisation(mean: Any, std: Any, section: str) -> tuple[list[float], list[float]]:
    try:
        means, stds = ([float(v) for v in value] for value in (mean, std))
        valid = len(means) == len(stds) == 3 and min(stds) > 0 and all(map(math.isfinite, means + stds))
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise UserError(f"{section}.mean = {mean}, std = {std}: expected three numbers each, std above 0.")
    return means, stds


def _side(value: Any) -> Any:
    """A side in pixels; some configs store (height, width)."""
    if isinstance(value, (list, tuple)):
        return value[0] if len(set(value)) == 1 else None
    return value
