"""The config of stage 1, the visual tokenizer (arXiv 2502.20321, section 3 and 4.1); imports no torch."""

import dataclasses
from typing import Any, Literal

from open_unitok.core.errors import UserError

from ..core.options import Optimizer, RunConfig, Schedule, ShardOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """From a tar's sample to (pixels, caption).

    A random rectangle of `crop_scale` of the area and `crop_ratio` width/height is resized to the model's
    image_size; [1, 1] twice takes the image as it is. `captions`: "txt" reads key.txt, "json" draws one of
    key.json's "captions".
    """

    crop_scale: tuple[float, float] = (0.9, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    captions: Literal["txt", "json"] = "txt"

    def check(self) -> None:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise UserError(f"images.crop_scale is {list(self.crop_scale)}: 0 < low <= high <= 1.")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise UserError(f"images.crop_ratio is {list(self.crop_ratio)}: 0 < low <= high.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of the summed losses, published values but for `adversarial`; 0 leaves a loss out.

    `entropy` makes the codes of a batch varied and each one certain; `clip` contrasts images with captions;
    `lpips` needs `lpips_weights` (a file, a folder that holds it, or a hub id); `adversarial` (published:
    0.4) is what a discriminator adds, see `DiscriminatorOptions`.
    """

    l1: float = 0.2
    l2: float = 1.0
    vq: float = 1.0
    entropy: float = 0.0
    clip: float = 1.0
    lpips: float = 1.0
    lpips_weights: str | None = None
    adversarial: float = 0.0

    def check(self) -> None:
        for name in ("l1", "l2", "vq", "entropy", "clip", "lpips", "adversarial"):
            if getattr(self, name) < 0:
                raise UserError(f"losses.{name} is {getattr(self, name)}: zero or more.")
        if self.lpips > 0 and self.lpips_weights is None:
            raise UserError(
                f"losses.lpips is {self.lpips}, but losses.lpips_weights is not set: name the file "
                "lpips_with_vgg.pth, or set losses.lpips to 0."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiscriminatorOptions:
    """Who judges the reconstructions where losses.adversarial > 0; constants as published, times in steps.

    `kind`: "dino" trains small heads on a frozen DINOv2 whose `weights` are a file, a folder or a hub id;
    "patch" trains `layers` strided convolutions from `width` channels on, from scratch. `norm` and
    `spectral_norm` are of the heads: "gn" group norm, "bn" batch norm over groups of 8 of
    a micro-batch (how it is cut then matters), "sbn" over all ranks.
    `loss`: what tells real from reconstructed. `adaptive`: the adversarial term is scaled until it moves the
    decoder's last layer as much as the reconstruction losses do, within limits that the number chooses
    (`losses.LIMITS`); null leaves it unscaled. `consistency`: weight of judging an image and its strong
    augmentation alike. `augment`: chance of each augmentation; `cutout`: side of the box that it blanks.
    Nothing happens before step `start`; then the term rises over `warmup` steps, while a blur of what is
    judged fades over twice as many. `schedule` counts from `start`.
    """

    kind: Literal["dino", "patch"] = "dino"
    weights: str | None = None
    norm: Literal["gn", "bn", "sbn"] = "gn"
    spectral_norm: bool = False
    width: int = 32
    layers: int = 3
    loss: Literal["hinge", "softplus", "linear"] = "hinge"
    adaptive: Literal[0, 1, 2, 3, 4] | None = 1
    consistency: float = 4.0
    augment: float = 1.0
    cutout: float = 0.2
    start: int = 0
    warmup: float = 0.0
    optimizer: Optimizer = dataclasses.field(
        default_factory=lambda: Optimizer(lr=2e-5, betas=(0.5, 0.9), weight_decay=0.2)
    )
    schedule: Schedule = dataclasses.field(default_factory=Schedule)

    def check(self) -> None:
        for name in ("consistency", "start", "warmup"):
            if getattr(self, name) < 0:
                raise UserError(f"discriminator.{name} is {getattr(self, name)}: zero or more.")
        for name in ("augment", "cutout"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"discriminator.{name} is {getattr(self, name)}: between 0 and 1.")
        if self.width < 1 or self.layers < 1:
            raise UserError("discriminator.width and discriminator.layers are 1 or more.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodebookOptions:
    """Keeping all entries in use.

    `init_images` > 0: entries begin as encoder outputs of that many images. `reset_after` > 0: an entry not
    hit for so many steps is moved onto an encoder output, during the first `reset_share` of the run.
    """

    init_images: int = 0
    reset_after: int = 0
    reset_share: float = 0.6

    def check(self) -> None:
        if self.init_images < 0 or self.reset_after < 0:
            raise UserError("codebooks.init_images and codebooks.reset_after are 0 (never) or more.")
        if not 0 <= self.reset_share <= 1:
            raise UserError(f"codebooks.reset_share is {self.reset_share}: between 0 and 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerRunConfig(RunConfig):
    """A run of stage 1.

    Attributes:
        model: `size` (a named size) and any field of UniTokConfig; may be omitted with `init_from` and
            without the contrastive loss.
        init_from_clip: an open_clip ViTamin checkpoint (file, folder or hub id) that initialises image and
            text tower of a new model.
        resume_from: a checkpoint of a run with another number of ranks or workers. Weights, step and schedule
            are kept, Adam's moments start at zero, and tars that were already begun are skipped in its epoch.
        decoder_init: initialisation of the pixel decoder's convolutions, see `tokenizer.layers`: "published"
            nearly mutes depthwise convolutions at first, which matters in short runs; "kaiming" does not.
        caption_tokenizer: path or hub id of a CLIP vocabulary, or a sentencepiece tokenizer.model.
        reconstruct_share: share of each micro-batch that is decoded, rounded up to whole images (the
            contrastive loss needs large batches, reconstruction does not).
        ema: decay of the averaged weights, which are then saved as the model; null keeps none.
        freeze: parts that keep the weights of `init_from`.
        lr_factors: part of a parameter's name -> factor on its learning rate.
    """

    data: ShardOptions
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    init_from_clip: str | None = None
    resume_from: str | None = None
    decoder_init: Literal["published", "kaiming"] = "published"
    caption_tokenizer: str | None = None
    images: ImageOptions = ImageOptions()
    losses: LossWeights
    discriminator: DiscriminatorOptions = dataclasses.field(default_factory=DiscriminatorOptions)
    codebooks: CodebookOptions = CodebookOptions()
    reconstruct_share: float = 1.0
    ema: float | None = None
    freeze: list[
        Literal["encoder", "down_projection", "quantizer", "up_projection", "decoder", "text_encoder"]
    ] = dataclasses.field(default_factory=list)
    lr_factors: dict[str, float] = dataclasses.field(default_factory=dict)

    def check(self) -> None:
        super().check()
        if not self.model and (self.init_from is None or self.losses.clip):
            raise UserError(
                "Config key 'model' is missing: name the sizes, or give init_from and set losses.clip to 0."
            )
        if self.losses.clip > 0 and not self.caption_tokenizer:
            raise UserError(
                f"losses.clip is {self.losses.clip}, but caption_tokenizer is not set: name a CLIP "
                "vocabulary or a sentencepiece model, or set losses.clip to 0."
            )
        if not 0 < self.reconstruct_share <= 1:
            raise UserError(f"reconstruct_share is {self.reconstruct_share}: above 0, up to 1.")
        if self.ema is not None and not 0 < self.ema < 1:
            raise UserError(f"ema is {self.ema}: between 0 and 1, or null for none.")
        if self.freeze and not self.init_from:
            raise UserError(
                f"freeze is {self.freeze} without init_from: frozen random weights learn nothing."
            )
        if "quantizer" in self.freeze and (self.codebooks.init_images or self.codebooks.reset_after):
            raise UserError(
                "freeze holds quantizer, but codebooks.init_images or codebooks.reset_after would move its "
                "entries: set both to 0."
            )
        if self.init_from and self.init_from_clip:
            raise UserError("init_from and init_from_clip both say how to begin: keep one of them.")
        if self.engine.zero_stage == 3:
            raise UserError(
                "engine.zero_stage 3 is for the MLLM: the tokenizer's codebooks stay whole, take 0 to 2."
            )
        if self.losses.adversarial > 0:
            self._check_adversary()

    def _check_adversary(self) -> None:
        if self.discriminator.kind == "dino" and not self.discriminator.weights:
            raise UserError(
                f"losses.adversarial is {self.losses.adversarial}, but discriminator.weights is not set: "
                "name the file dinov2_vits14_pretrain.pth, take discriminator.kind=patch, or set "
                "losses.adversarial to 0."
            )
        if "decoder" in self.freeze:
            raise UserError("freeze holds decoder, which losses.adversarial would train: set that to 0.")
        if self.discriminator.adaptive is not None and not (
            self.losses.l1 or self.losses.l2 or self.losses.lpips
        ):
            raise UserError(
                "discriminator.adaptive weighs the adversarial term against l1, l2 and lpips, which are all "
                "0: set one of them, or discriminator.adaptive=null."
            )
        if self.discriminator.start >= self.steps:
            raise UserError(
                f"discriminator.start is {self.discriminator.start}, but the run has {self.steps} steps."
            )
