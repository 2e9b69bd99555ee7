"""The losses of stage 1 beside those of the quantiser (arXiv 2502.20321, section 3.1).

B images of this rank, G images of all ranks, E width of the joint image-text space.
"""

import torch
import torch.nn.functional as F

from open_unitok.core import distributed

from ..core.collectives import joined


def contrastive_loss(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, logit_scale: torch.Tensor
) -> torch.Tensor:
    """CLIP's loss of this rank's (B, E) pairs against all G; its mean over ranks is the global loss."""
    all_images, all_texts = joined(image_embeds), joined(text_embeds)
    count = len(image_embeds)
    labels = torch.arange(count, device=image_embeds.device) + distributed.rank() * count
    by_image = F.cross_entropy(logit_scale * image_embeds @ all_texts.T, labels)
    by_text = F.cross_entropy(logit_scale * text_embeds @ all_images.T, labels)
    return (by_image + by_text) / 2


def reconstruction_losses(copies: torch.Tensor, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Mean absolute and squared differences; `copies` (b, 3, H, W) are those of the first b images."""
    difference = copies.float() - pixels[: len(copies)]
    return {"l1": difference.abs().mean(), "l2": difference.square().mean()}


def weighted_sum(losses: dict[str, torch.Tensor], weights: object) -> torch.Tensor:
    """Sum of `weights.<name>` x loss; losses of weight 0 stay out of the graph."""
    parts = [getattr(weights, name) * loss for name, loss in losses.items() if getattr(weights, name)]
    return torch.stack(parts).sum()
