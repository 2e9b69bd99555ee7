"""The config of stage 1, the visual tokenizer (arXiv 2502.20321, section 3 and 4.1); imports no torch."""

import dataclasses
from typing import Any, Literal

from open_unitok.errors import UserError

from .options import RunConfig, ShardOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class PictureOptions:
    """From a tar's sample to (pixels, caption).

    A random rectangle of `crop_scale` of the area and `crop_ratio` width/height is resized to the model's
    image_size; [1, 1] twice takes the picture as it is. `captions`: "txt" reads key.txt, "json" draws one of
    key.json's "captions".
    """

    crop_scale: tuple[float, float] = (0.9, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    captions: Literal["txt", "json"] = "txt"

    def check(self) -> None:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise UserError(f"pictures.crop_scale is {list(self.crop_scale)}: 0 < low <= high <= 1.")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise UserError(f"pictures.crop_ratio is {list(self.crop_ratio)}: 0 < low <= high.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of the summed losses, published values; 0 leaves a loss out.

    `entropy` makes the codes of a batch varied and each one certain; `clip` contrasts images with captions;
    `lpips` needs `lpips_weights`, a file.
    """

    l1: float = 0.2
    l2: float = 1.0
    vq: float = 1.0
    entropy: float = 0.0
    clip: float = 1.0
    lpips: float = 1.0
    lpips_weights: str | None = None

    def check(self) -> None:
        for name in ("l1", "l2", "vq", "entropy", "clip", "lpips"):
            if getattr(self, name) < 0:
                raise UserError(f"losses.{name} is {getattr(self, name)}: zero or more.")
        if self.lpips > 0 and self.lpips_weights is None:
            raise UserError(
                f"losses.lpips is {self.lpips}, but losses.lpips_weights is not set: name the file "
                "lpips_with_vgg.pth, or set losses.lpips to 0."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodebookOptions:
    """Keeping all entries in use.

    `init_images` > 0: entries begin as encoder outputs of that many images. `restart_after` > 0: an entry not
    hit for so many steps is moved onto an encoder output, during the first `restart_share` of the run.
    """

    init_images: int = 0
    restart_after: int = 0
    restart_share: float = 0.6

    def check(self) -> None:
        if self.init_images < 0 or self.restart_after < 0:
            raise UserError("codebooks.init_images and codebooks.restart_after are 0 (never) or more.")
        if not 0 <= self.restart_share <= 1:
            raise UserError(f"codebooks.restart_share is {self.restart_share}: between 0 and 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerRun(RunConfig):
    """A run of stage 1.

    `model`: `size` (a named size) and any field of UniTokConfig. `decoder_init`: how the pixel decoder's
    convolutions begin; the published start all but mutes the depthwise ones, which a short run feels (see
    `begin_decoder`). `caption_tokenizer`: path or hub id of a CLIP vocabulary, or a sentencepiece
    tokenizer.model. `reconstruct_share`: the share of each micro-batch that is decoded (contrast needs large
    batches, reconstruction does not). `ema`: decay of averaged weights, which are then what is saved as the
    model; null keeps none. `freeze`: parts that stay as `start_from` has them. `lr_factors`: part of a
    parameter's name -> factor on its learning rate.
    """

    data: ShardOptions
    model: dict[str, Any]
    decoder_init: Literal["published", "kaiming"] = "published"
    caption_tokenizer: str | None = None
    pictures: PictureOptions = PictureOptions()
    losses: LossWeights
    codebooks: CodebookOptions = CodebookOptions()
    reconstruct_share: float = 1.0
    ema: float | None = None
    freeze: list[
        Literal["encoder", "down_projection", "quantizer", "up_projection", "decoder", "text_encoder"]
    ] = dataclasses.field(default_factory=list)
    lr_factors: dict[str, float] = dataclasses.field(default_factory=dict)

    def check(self) -> None:
        super().check()
        if self.losses.clip > 0 and not self.caption_tokenizer:
            raise UserError(
                f"losses.clip is {self.losses.clip}, but caption_tokenizer is not set: name a CLIP "
                "vocabulary or a sentencepiece model, or set losses.clip to 0."
            )
        if not 0 < self.reconstruct_share <= 1:
            raise UserError(f"reconstruct_share is {self.reconstruct_share}: above 0, up to 1.")
        if self.ema is not None and not 0 < self.ema < 1:
            raise UserError(f"ema is {self.ema}: between 0 and 1, or null for none.")
        if self.freeze and not self.start_from:
            raise UserError(
                f"freeze is {self.freeze} without start_from: frozen random weights learn nothing."
            )
        if self.engine.zero_stage == 3:
            raise UserError(
                "engine.zero_stage 3 is for the MLLM: the tokenizer's codebooks stay whole, take 0 to 2."
            )
