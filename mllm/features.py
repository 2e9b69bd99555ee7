"""Continuous features of images that an MLLM reads, beside or instead of their codes (UniToken, arXiv
2504.04423; the LLaVA probe of arXiv 2502.20321, section 4.3).

J images that are read, M features per image, F width of a feature, D decoder width, N visual tokens per
image, K sub-codebooks.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from open_unitok.core.codes import as_int64
from open_unitok.core.errors import UserError, did_you_mean
from open_unitok.tokenizer import UniTok, UniTokConfig
from open_unitok.tokenizer.encoders import build_encoder
from open_unitok.tokenizer.encoders.vision_tower import TOWER_OPTIONS, load_tower, tower_sizes
from open_unitok.tokenizer.images import to_pixels
from open_unitok.tokenizer.quantizers import describe_quantizer

VISUAL_INPUTS = ("discrete", "continuous", "dual")
# quantised: the tokenizer's up projection of its looked-up codes; latents: the input of its quantiser;
# encoder: the input of its down projection; tower: the last layer of another vision model
FEATURE_SOURCES = ("quantised", "latents", "encoder", "tower")
ADAPTER_NORM_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class FeatureOptions:
    """The field `features` of `UniTokMLLMConfig`.

    Args:
        source: one of `FEATURE_SOURCES`; all are frozen.
        tower: of source "tower" alone: folder or hub id of a transformers vision model, or {path, layer,
            norm, mean, std} as of `read_tower`; it reads the whole image, squashed to its own square.
        norm: a LayerNorm before the adapter's MLP; None = for visual_input "continuous" (as the LLaVA probe).
        separator: a separator token between codes and features; None = for visual_input "dual".
    """

    source: str
    tower: str | dict[str, Any] | None = None
    norm: bool | None = None
    separator: bool | None = None

    @classmethod
    def from_config(cls, value: Any, visual_input: str) -> FeatureOptions:
        """The options of a config, with the defaults of its `visual_input`.

        Raises:
            UserError: an unknown key or source, a tower without source "tower" or the other way round.
        """
        allowed = [field.name for field in dataclasses.fields(cls)]
        given = dict(value) if isinstance(value, Mapping) else {}
        for key in given:
            if key not in allowed:
                raise UserError(f"features.{key} is not an option." + did_you_mean(str(key), allowed))
        source = given.get("source")
        if source not in FEATURE_SOURCES:
            raise UserError(
                f"features.source = {source!r}; visual_input = {visual_input!r} needs one of "
                f"{', '.join(FEATURE_SOURCES)}."
            )
        if (source == "tower") != bool(given.get("tower")):
            raise UserError(
                f"features.source = {source!r} with features.tower = {given.get('tower')!r}: the source "
                "'tower', and no other, takes the folder or hub id of a vision model as features.tower."
            )
        if not isinstance(given.get("tower"), (str, Mapping, type(None))):
            raise UserError(
                f"features.tower = {given['tower']!r}: must be a folder, a hub id, or {{path, ...}}."
            )
        if isinstance(given.get("tower"), Mapping):
            given["tower"] = dict(given["tower"])
            for key in given["tower"]:
                if key not in ("path", *TOWER_OPTIONS):
                    raise UserError(
                        f"features.tower.{key} is not an option." + did_you_mean(key, TOWER_OPTIONS)
                    )
            if not isinstance(given["tower"].get("path"), str):
                raise UserError("features.tower.path must be the folder or hub id of a vision model.")
        defaults = {"norm": visual_input == "continuous", "separator": visual_input == "dual"}
        given = {**defaults, **{key: v for key, v in given.items() if v is not None}}
        for key in defaults:
            if not isinstance(given[key], bool):
                raise UserError(f"features.{key} = {given[key]!r}: must be true or false.")
        if given["separator"] and visual_input != "dual":
            raise UserError(
                "features.separator stands between codes and features: set visual_input = 'dual'."
            )
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """The form stored in configs."""
        return dataclasses.asdict(self)

    @property
    def tower_options(self) -> dict[str, Any]:
        """The arguments of `read_tower` and `load_tower`."""
        given = self.tower if isinstance(self.tower, dict) else {"path": self.tower}
        return {"path": "", **given, "key": "features.tower.path"}

    @property
    def from_codes(self) -> bool:
        """Whether features follow from the codes, so that they need not be stored beside them."""
        return self.source == "quantised"


def feature_sizes(options: FeatureOptions, unitok: UniTokConfig) -> tuple[int, int]:
    """(M, F) of the features of an image.

    Raises:
        UserError: the tower is not there.
    """
    if options.source == "tower":
        return tower_sizes(**options.tower_options)
    quantizer = describe_quantizer(unitok)
    tokens = quantizer.num_embedded(unitok.layout)
    if options.source == "encoder":
        with torch.device("meta"):
            return tokens, build_encoder(unitok).width
    return tokens, unitok.decoder_width if options.source == "quantised" else quantizer.latent_dim


def feature_fields(unitok: UniTokConfig, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes of the features that `fields` of a config ask for; {} with discrete input.

    Raises:
        UserError: the features' options are not valid.
    """
    visual_input, names = fields.get("visual_input", "discrete"), ("num_continuous_tokens", "continuous_dim")
    if visual_input not in VISUAL_INPUTS or visual_input == "discrete":
        return {}
    options = FeatureOptions.from_config(fields.get("features"), visual_input)
    if all(fields.get(name) for name in names):  # a tower need not be on this machine to plan a run
        return {name: fields[name] for name in names}
    return dict(zip(names, feature_sizes(options, unitok)))


class FeatureAdapter(nn.Sequential):
    """[LayerNorm -] Linear - GELU - Linear: (..., F) features -> (..., D) input vectors of the decoder.

    Features get no scale and no positions of their own; the decoder's positions run on.
    """

    def __init__(self, features: int, width: int, norm: bool) -> None:
        layers: list[nn.Module] = [nn.Linear(features, width), nn.GELU(), nn.Linear(width, width)]
        super().__init__(*([nn.LayerNorm(features, eps=ADAPTER_NORM_EPS)] if norm else []), *layers)
        self.num_features = features

    def insert(self, vectors: Tensor, places: Tensor, features: Tensor | None, tokens: int) -> Tensor:
        """(B, L, D) input vectors with the adapted features (J, M, F) at `places` (J * M,) of the flattened
        batch.

        Args:
            tokens: M.

        Raises:
            UserError: features and places do not match, or have another shape.
        """
        count = 0 if features is None else features.shape[0]
        if features is not None and (
            features.dim() != 3 or features.shape[1:] != (tokens, self.num_features)
        ):
            raise UserError(
                f"image_features have shape {tuple(features.shape)}; expected (images, {tokens} features, "
                f"width {self.num_features})."
            )
        if len(places) != count * tokens:
            raise UserError(
                f"input_ids hold {len(places)} feature placeholders, but image_features hold {count} images "
                f"of {tokens} features = {count * tokens}: only images that are read have features."
            )
        if features is None or not count:
            if self.training and torch.is_grad_enabled():
                # zero-weighted dummy: every rank must run every module, or ZeRO-3's all-gathers deadlock
                dummy = vectors.new_zeros(1, self.num_features)
                vectors = vectors + 0.0 * self(dummy).sum().to(vectors.dtype)
            return vectors
        adapted = self(features.to(vectors.dtype)).to(vectors.dtype)
        # index_copy instead of an in-place write: gradients flow to both
        return vectors.flatten(0, 1).index_copy(0, places, adapted.flatten(0, 1)).view_as(vectors)


class FeatureSource:
    """Computes the features of images with a frozen visual tokenizer or another frozen vision model.

    Args:
        tower: the loaded model of `options.tower`, to share it; None = load it.

    Attributes:
        tower: None for the sources of the tokenizer.
    """

    def __init__(self, options: FeatureOptions, unitok: UniTok, tower: Any = None) -> None:
        self.options, self.unitok, self.tower = options, unitok, tower
        if options.source == "tower" and tower is None:
            self.tower = load_tower(**options.tower_options)

    def tower_pixels(self, image: Any) -> Tensor | None:
        """An image as the tower reads it: the whole image squashed to its square, in [-1, 1]; None without a
        tower."""
        if self.tower is None:
            return None
        return to_pixels(image, self.tower_side, mode="squash", resample=Image.Resampling.BICUBIC)

    @property
    def tower_side(self) -> int:
        """Side in pixels of the tower's images, 0 without one; SigLIP's 384 exceed its 27 patches of 14."""
        size = 0 if self.tower is None else getattr(self.tower.tower.config, "image_size", 0)
        return int(size if isinstance(size, int) else size[0]) or getattr(self.tower, "image_size", 0)

    def image_shape(self, own: tuple[int, int]) -> tuple[int, int]:
        """(height, width) in pixels at which an image file is decoded: `own`, or the tower's larger one."""
        return max(own[0], self.tower_side), max(own[1], self.tower_side)

    def tower_batch(self, images: Sequence[Any]) -> Tensor | None:
        """`tower_pixels` of several images, stacked on the tower's device."""
        pixels = [p for image in images if (p := self.tower_pixels(image)) is not None]
        return torch.stack(pixels).to(self.unitok.device) if pixels else None

    @torch.no_grad()
    def encode(self, pixels: Tensor, tower_pixels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(J, 3, H, W) pixels of the tokenizer's images, and of `tower_pixels` -> codes (J, N, K) and
        features (J, M, F) as in training: float16, as stored, or float32 where they follow from codes."""
        codes, features = self._encode(pixels, tower_pixels)
        return codes, features if self.options.from_codes else features.half()

    def _encode(self, pixels: Tensor, tower_pixels: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.options.source == "latents":
            latents = self.unitok.encode_latents(pixels)
            return self.unitok.quantizer.encode(latents), latents
        codes = self.unitok.encode(pixels)
        if self.options.from_codes:
            return codes, self.of_codes(codes)
        if self.tower is not None:
            assert tower_pixels is not None
            tower = self.tower.to(pixels.device)
            # what the patches leave over is cut off, as by a strided convolution
            side = tower.image_size
            return codes, tower(tower_pixels.to(pixels.device)[..., :side, :side])
        encoder = self.unitok.encoder
        return codes, encoder(pixels.to(next(encoder.parameters()).dtype))

    @torch.no_grad()
    def of_codes(self, codes: Tensor) -> Tensor:
        """(J, N, K) codes -> (J, M, F) float32, for source "quantised": the tokenizer's own bidirectional
        projection of the looked-up rows."""
        return self.unitok.up_project(self.unitok.quantizer.embed(as_int64(codes)))

    def fingerprint(self) -> str:
        """Hex sha256 of all that determines the features; call it on float32 weights."""
        digest = hashlib.sha256(self.options.source.encode())
        if self.tower is not None:
            digest.update(self.tower.fingerprint().encode())
            return digest.hexdigest()
        digest.update(self.unitok.fingerprint().encode())
        if self.options.source == "quantised":  # not part of the tokenizer's fingerprint
            for name, tensor in sorted(self.unitok.up_projection.state_dict().items()):
                digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
                digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def check_fingerprint(self, expected: str | None, place: str) -> None:
        """
        Raises:
            UserError: these are not the features that a model was trained on; None = not known.
        """
        if expected is not None and expected != (found := self.fingerprint()):
            raise UserError(
                f"{place}: the model was trained on features ({self.options.source}) of {expected[:12]}, but "
                f"these have {found[:12]}: give the tokenizer or tower of training."
            )


@dataclasses.dataclass(frozen=True)
class ReadImages:
    """The images of prompts as an MLLM reads them.

    Attributes:
        codes: (J, N, K); none with visual_input "continuous".
        features: (J, M, F), or None with "discrete".
    """

    codes: Tensor
    features: Tensor | None = None

    def __len__(self) -> int:
        return len(self.codes) if self.features is None else len(self.features)

    def select(self, numbers: Sequence[int]) -> ReadImages:
        """The images of these numbers, in their order."""
        index, has_codes = list(numbers), len(self.codes) > 0
        features = None if self.features is None else self.features[index]
        return ReadImages(self.codes[index] if has_codes else self.codes, features)

    def split(self, counts: Sequence[int]) -> list[ReadImages]:
        """Consecutive groups of these sizes."""
        ends = [sum(counts[: i + 1]) for i in range(len(counts))]
        return [self.select(range(end - count, end)) for count, end in zip(counts, ends)]

    def inputs(self, device: torch.device) -> dict[str, Tensor | None]:
        """The keyword arguments of the model's `forward`, `embed_inputs` and `generate`."""
        features = None if self.features is None else self.features.to(device)
        return {"image_codes": as_int64(self.codes).to(device), "image_features": features}
