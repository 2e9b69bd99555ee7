"""A CLIP model of transformers as a judge of images and their prompts.

B images or texts, E embedding width.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from open_unitok.core.files import existing

from ..core.results import model_fingerprint
from .object_detector import load_pretrained, projected


class ClipModel:
    """A CLIP folder in transformers' layout.

    Args:
        option: the option that names the folder, for error texts.

    Raises:
        UserError: the folder is missing or not a CLIP model.
    """

    def __init__(self, folder: str, device: str, option: str):
        path = existing(folder, f"{option} must be a CLIP folder in transformers' layout.")
        self.processor, self.model = load_pretrained(path, device, "CLIPModel")
        self.device = device
        vision = self.model.config.vision_config
        self.about: dict[str, Any] = {
            "model": path.name,
            "fingerprint": model_fingerprint(path),
            # for `comparable`: ViT-L/14 at 336 pixels has 1024, 24, 14 and 336
            "vision": [vision.hidden_size, vision.num_hidden_layers, vision.patch_size, vision.image_size],
        }

    def embed_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Unit-length embeddings (B, E), with the processor's own resize and centre crop."""
        return self._embed(self.processor(images=list(images), return_tensors="pt")["pixel_values"])

    def embed_squares(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Unit-length embeddings (B, E) of images (H, W, 3): largest centre square, then Pillow's bicubic."""
        import torch

        size, settings = self.model.config.vision_config.image_size, self.processor.image_processor
        pixels = np.stack([centre_square(image, size) for image in images]).astype(np.float32) / 255
        pixels = (pixels - np.array(settings.image_mean)) / np.array(settings.image_std)
        return self._embed(torch.from_numpy(pixels.astype(np.float32)).permute(0, 3, 1, 2))

    def _embed(self, pixels: Any) -> np.ndarray:
        """(B, 3, H, W) normalised pixels -> unit-length embeddings (B, E)."""
        import torch
        import torch.nn.functional as F

        with torch.inference_mode():
            found = projected(self.model.get_image_features(pixel_values=pixels.to(self.device)))
        return F.normalize(found.float(), dim=-1).cpu().numpy()

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit-length embeddings (B, E); a text beyond the model's length is cut, with its end token kept."""
        import torch
        import torch.nn.functional as F

        length = self.model.config.text_config.max_position_embeddings
        inputs = self.processor(
            text=list(texts), return_tensors="pt", padding=True, truncation=True, max_length=length
        )
        with torch.inference_mode():
            found = projected(self.model.get_text_features(**inputs.to(self.device)))
        return F.normalize(found.float(), dim=-1).cpu().numpy()


def centre_square(image: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (size, size, 3): the largest square at the centre, resized by Pillow's bicubic."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(image[top : top + side, left : left + side])
    return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))


def clip_scores(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """(B, E) unit-length embeddings of images and of their texts -> (B,) 100 times the cosine, at least 0."""
    return np.maximum(100 * (images * texts).sum(axis=-1), 0)
