"""The random numbers of a micro-batch: sampled on the CPU, so that they do not depend on the device, and sent
to it in one copy that nothing waits for.

B images of a micro-batch, b of them decoded.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from open_unitok.tokenizer import UniTok
from open_unitok.tokenizer.layers import drop_path_stacks

from ..data import seeding
from .gan import GAN


def place_noise(
    model: UniTok,
    gan: GAN | None,
    seed: int,
    step: int,
    samples: Sequence[int],
    num_decoded: int,
    size: tuple[int, int],
    device: torch.device,
) -> None:
    """Set the noise of the coming passes: drop path, posteriors, and views of the discriminator.

    Args:
        samples: numbers of the B images in the global batch; the first `num_decoded` are decoded.
        size: (height, width) of the images in pixels.
    """
    stacks = drop_path_stacks(model)
    posteriors = {
        name: part
        for name, part in (("encoder", model.encoder), ("quantizer", model.quantizer))
        if getattr(part, "samples_posterior", False)
    }
    views = gan.sample_views(samples[:num_decoded], size) if gan else {}
    noise = {
        f"drop path {name}": drop_path_noise(len(b), samples, seed, step, name) for name, b in stacks.items()
    }
    for name, part in posteriors.items():
        width: Any = part.width if name == "encoder" else part.latent_dim
        shape = (model.config.layout.num_tokens, width)
        noise[f"posterior {name}"] = posterior_noise(shape, samples, seed, step)
    noise |= {f"view {name}": view.noise.amounts for name, view in views.items()}
    placed = send(noise, device)
    for name, blocks in stacks.items():
        blocks.drop_path_noise = placed[f"drop path {name}"]
    for name, part in posteriors.items():
        part.noise = placed[f"posterior {name}"]
    if gan:
        gan.views = {
            name: view._replace(noise=view.noise._replace(amounts=placed[f"view {name}"]))
            for name, view in views.items()
        }


def drop_path_noise(depth: int, samples: Sequence[int], seed: int, step: int, name: str) -> Tensor:
    """(depth, 2, B) noise of the stack `name`."""
    return seeding.uniform_per_sample((depth, 2), samples, seed, "drop path", step, name)


def posterior_noise(shape: tuple[int, int], samples: Sequence[int], seed: int, step: int) -> Tensor:
    """(B, *shape) standard normal numbers."""
    generators = (seeding.torch_generator(seed, "posterior", step, n) for n in samples)
    return torch.stack([torch.randn(shape, generator=g) for g in generators])


def send(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """float32 CPU tensors on the device, by one copy from pinned memory."""
    if device.type == "cpu" or not tensors:
        return dict(tensors)
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
    # a pageable copy would make the host wait for all work that is queued on the device
    flat = (flat.pin_memory() if device.type == "cuda" else flat).to(device, non_blocking=True)
    pieces = flat.split([tensor.numel() for tensor in tensors.values()])
    return {name: piece.view(tensors[name].shape) for name, piece in zip(tensors, pieces)}
