"""The teacher losses: a head predicts a frozen network's features from the codes (VQ-KD, arXiv 2411.04406;
FQGAN, arXiv 2411.16681, section 3.2; TokenFlow, arXiv 2412.03069).

B images of this rank, G images of all ranks, N visual tokens, D width of the teacher's features.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_unitok.core import distributed
from open_unitok.core.errors import UserError
from open_unitok.tokenizer import Quantizer, UniTok, UniTokOutput
from open_unitok.tokenizer.precision import exact_float32
from open_unitok.tokenizer.quantizers.base import places_before
from open_unitok.tokenizer.token_transformer import ClassTokenHead, SemanticDecoder

from ..core.collectives import all_gather_with_grad
from ..data import seeding
from .config import TeacherOptions, TokenizerRunConfig
from .teacher_networks import Teacher, build_teacher


def cosine_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean of 1 - cosine of (..., D) predictions and targets; the targets get no gradient."""
    with exact_float32(predicted.device):
        predicted, target = predicted.float(), target.detach().float()
        lengths = [(vector.square().sum(dim=-1) + 1e-12).sqrt() for vector in (predicted, target)]
        return (1 - (predicted * target).sum(dim=-1) / (lengths[0] * lengths[1])).mean()


def contrast_loss(predicted: Tensor, targets: Tensor, group: int, first: int = 0) -> Tensor:
    """Cross-entropy of each image's own target among those of its group, by cosine without a temperature.

    Args:
        predicted: (B, D) of the images `first` to `first + B - 1`.
        targets: (G, D) of all images, without gradient; groups are `group` consecutive ones.
    """
    with exact_float32(predicted.device):
        unit, units = F.normalize(predicted.float(), dim=-1), F.normalize(targets.detach().float(), dim=-1)
        own = torch.arange(first, first + len(predicted), device=predicted.device)
        every = torch.arange(len(targets), device=predicted.device)
        other = own[:, None] // group != every // group
        return F.cross_entropy((unit @ units.T).masked_fill(other, -torch.inf), own)


class TeacherHead(nn.Module):
    """The trained head of one teacher, and its loss; the frozen network is not in its state dict.

    Args:
        teacher: instead of the network that the config names.
    """

    def __init__(self, options: TeacherOptions, model: UniTok, teacher: Teacher | None = None) -> None:
        super().__init__()
        self.options = options
        self._frozen = [teacher or build_teacher(options)]  # a list hides it from nn.Module
        layout, width = model.config.layout, self.teacher.width
        if layout.tokens and options.kind == "cosine":
            raise UserError(
                "teacher.kind is cosine, which compares each token with the teacher's patch there, but "
                f"{layout} (token_layout) have no place: set it to contrast."
            )
        self.channels = teacher_channels(model.quantizer, options.books)
        seen, contrast = len(self.channels), options.kind == "contrast"
        layers = options.head_layers or (3 if contrast else 1)
        heads = options.head_heads or (8 if contrast else 12)
        inner = width if contrast else options.head_width or 768
        if inner % heads:
            raise UserError(f"teacher.head_heads is {heads}: it must divide the head's width {inner}.")
        self.head: Any
        if contrast:
            self.head = ClassTokenHead(seen, width, layout, layers, heads)
        else:
            self.head = SemanticDecoder(seen, width, layout, inner, layers, heads)

    @property
    def teacher(self) -> Teacher:
        return self._frozen[0]

    def forward(
        self, quantised: Tensor, pixels: Tensor, grid: tuple[int, int], order: Sequence[int] | None = None
    ) -> Tensor:
        """The loss of (B, N, latent_dim) quantised latents of (B, 3, H, W) pixels.

        Args:
            order: numbers of the B images in this rank's micro-batch before it was reordered; None = as now.
        """
        target = self.teacher(pixels)
        predicted = self.head(quantised[..., self.channels], grid)
        if self.options.kind == "contrast":
            # groups are of consecutive images
            whole, own = target.whole, predicted[:, 0]
            if order is not None:
                places = places_before(tuple(order), predicted.device)
                whole, own = whole[places], own[places]
            every = all_gather_with_grad(whole)
            first = distributed.rank() * len(predicted)
            return contrast_loss(own, every, self.options.contrast_group, first)
        patches = target.patches
        if patches.shape[-2:] != grid:
            patches = F.interpolate(patches, size=grid, mode="bicubic", align_corners=False)
        count = grid[0] * grid[1]  # registers, which come first, have no patch
        return cosine_loss(predicted[:, -count:], patches.flatten(2).transpose(1, 2))


def teacher_channels(quantizer: Quantizer, books: Sequence[int] | None) -> list[int]:
    """The channels of the quantised latents that a head sees: those of some books.

    Raises:
        UserError: there is no such book.
    """
    if books is None:
        # a quantiser whose latents have a semantic half shows that
        return quantizer.semantic_channels or list(range(quantizer.latent_dim))
    count = len(quantizer.code_sizes)
    wrong = [book for book in books if not 0 <= book < count]
    if wrong or not books or len(set(books)) != len(books) or quantizer.latent_dim % count:
        raise UserError(f"teacher.books is {list(books)}: expected distinct books from 0 to {count - 1}.")
    width = quantizer.latent_dim // count
    return [book * width + channel for book in books for channel in range(width)]


class TaughtTokenizer(nn.Module):
    """A tokenizer with its teachers' heads: one module for the engine, of which only `model` is saved.

    Its output is the tokenizer's, with the loss "teacher".

    Attributes:
        order: see `TeacherHead.forward`; set before each forward pass.
    """

    order: Sequence[int] | None = None

    def __init__(self, model: UniTok, heads: Sequence[TeacherHead]) -> None:
        super().__init__()
        self.model = model
        self.teacher_heads = nn.ModuleList(heads)

    def forward(self, pixels: Tensor, *args: Any, **kwargs: Any) -> UniTokOutput:
        out = self.model(pixels, *args, **kwargs)
        step = self.model.config.patch_size
        grid = (pixels.shape[2] // step, pixels.shape[3] // step)
        losses = [head(out.quantised, pixels, grid, self.order) for head in self.teacher_heads]
        return out._replace(losses={**out.losses, "teacher": torch.stack(losses).sum()})


def build_taught(model: UniTok, config: TokenizerRunConfig, device: torch.device) -> TaughtTokenizer:
    """The tokenizer with the heads that the config's teachers need; new heads are random by the seed.

    Raises:
        UserError: a teacher cannot be loaded, or an option does not fit it.
    """
    torch.manual_seed(seeding.derive_seed(config.seed, "teacher"))
    taught = TaughtTokenizer(model, [TeacherHead(options, model) for options in config.teachers])
    taught.to(device)
    for head in taught.teacher_heads:
        head.teacher.to(device)  # pyright: ignore
        with torch.no_grad():  # a trial pass: rejects images and sizes that do not fit before training starts
            head.teacher(torch.zeros(2, 3, *model.config.image_shape, device=device))  # pyright: ignore
    return taught
