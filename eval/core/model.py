"""The one place of `eval` that runs a model: codes, copies, embeddings, answers and drawings.

B images, N visual tokens, K sub-codebooks, E width of the joint image-text space.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing, model_path, read_json

from .crops import find_crop
from .harness import SAMPLING_KEYS, Settings

DEFAULTS = Settings()
DTYPES = ("float32", "bfloat16", "float16")
TOKENIZER, MLLM = "unitok", "unitok_mllm"


class Reconstructions(NamedTuple):
    """Images as the tokenizer saw them and gave them back, uint8 (B, H, W, 3), and codes (B, N, K)."""

    originals: np.ndarray
    decoded: np.ndarray
    codes: np.ndarray
    codebook_size: int  # V
    reencoded: np.ndarray | None = None  # the codes of the decoded images, if asked for


class Model:
    """A tokenizer folder or an MLLM folder (which holds its tokenizer in `unitok/`), loaded when needed.

    Raises:
        UserError: the folder is missing or holds no model of ours.
    """

    def __init__(self, folder: str | Path, settings: Settings = DEFAULTS, device: str = "cpu"):
        self.folder, self.device, self.settings = existing(model_path(folder)), device, settings
        if settings.dtype not in DTYPES:
            raise UserError(f"dtype is {settings.dtype!r}; allowed: {', '.join(DTYPES)}.")
        if settings.crop is not None:
            find_crop(settings.crop)
        self.kind = model_kind(self.folder)
        self.tokenizer_folder = self.folder / "unitok" if self.kind == "mllm" else self.folder
        self._unitok = self._pipeline = self._captions = None

    @property
    def sampling(self):
        """How it draws; a UserError where a setting is out of range."""
        from open_unitok.generation import Sampling

        return Sampling(**{name: getattr(self.settings, name) for name in SAMPLING_KEYS})

    def needs(self, kind: str, benchmark: str) -> None:
        """Raise UserError where a benchmark asks for more than this model can do, or for the impossible."""
        if kind != "tokenizer" and self.kind != "mllm":
            raise UserError(
                f"{benchmark} needs a model that reads and draws, but {self.folder} holds a tokenizer alone; "
                "give the folder that an MLLM stage wrote."
            )
        if kind != "tokenizer":
            _ = self.sampling  # its checks come before the first batch

    def describe(self) -> dict[str, Any]:
        """Path, kind and fingerprint, for the result; nothing is loaded for it."""
        return {"path": str(self.folder), "kind": self.kind, "fingerprint": fingerprint(self.folder)}

    @property
    def dtype(self):
        """The torch dtype of the settings."""
        import torch

        return getattr(torch, self.settings.dtype)

    @property
    def unitok(self):
        """The visual tokenizer, in evaluation mode."""
        if self._unitok is None:
            from open_unitok.tokenizer import UniTok

            if self._pipeline is not None:
                self._unitok = self._pipeline.unitok
            else:
                model = UniTok.from_pretrained(self.tokenizer_folder, dtype=self.dtype)
                self._unitok = model.to(self.device).eval()
        return self._unitok

    @property
    def pipeline(self):
        """The Pipeline that answers and draws."""
        if self._pipeline is None:
            from open_unitok.generation import Pipeline

            self._pipeline = Pipeline.from_pretrained(self.folder, device=self.device, dtype=self.dtype)
        return self._pipeline

    def pixels(self, images: Sequence[Image.Image], crop: str = "bicubic"):
        """Images cropped to the tokenizer's size, (B, 3, H, W) in [-1, 1], by the settings' crop first."""
        import torch

        cut, size = find_crop(self.settings.crop or crop), self.unitok.config.image_size
        return torch.stack([cut(image, size) for image in images])

    def reconstruct(self, images: Sequence[Image.Image], reencode: bool = False) -> Reconstructions:
        """Encode and decode; with `reencode` encode the 8-bit copies once more."""
        import torch

        from open_unitok.tokenizer.images import to_uint8

        pixels = self.pixels(images)
        second = None
        with torch.inference_mode():
            codes = self.unitok.encode(pixels.to(self.device))
            copies = to_uint8(self.unitok.decode(codes).float())
            if reencode:
                second = self.unitok.encode(copies.float() / 127.5 - 1).cpu().numpy()
        channels_last = [p.permute(0, 2, 3, 1).cpu().numpy() for p in (to_uint8(pixels), copies)]
        size = self.unitok.config.codebook_size
        return Reconstructions(channels_last[0], channels_last[1], codes.cpu().numpy(), size, second)

    def embed_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Unit embeddings (B, E); images are cropped as the published zero-shot evaluation crops them."""
        return self.pooled(images, "embedding")

    def pooled(self, images: Sequence[Image.Image], pooling: str) -> np.ndarray:
        """One vector per image (B, F): see `probe.POOLINGS`."""
        import torch

        with torch.inference_mode():
            pixels = self.pixels(images, "lanczos").to(self.device)
            if pooling == "embedding":
                found = self.unitok.embed_image(pixels)
            else:
                found = self.unitok.encode_latents(pixels)
                if pooling == "quantised":
                    found = self.unitok.quantizer.embed(self.unitok.quantizer.encode(found))
                found = found.mean(dim=1)
            return found.float().cpu().numpy()

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit embeddings (B, E) of captions."""
        import torch

        if self._captions is None:
            from open_unitok.tokenizer.caption_tokenizer import CaptionTokenizer

            length = self.unitok.config.text_context_length
            self._captions = CaptionTokenizer.from_model_folder(self.tokenizer_folder, length)
        with torch.inference_mode():
            return self.unitok.embed_text(self._captions(list(texts)).to(self.device)).float().cpu().numpy()

    def answer(
        self, images: Sequence[Image.Image], questions: Sequence[str], max_new_tokens: int
    ) -> list[str]:
        """One short text per image and question, decoded greedily."""
        return self.pipeline.answer(list(images), list(questions), max_new_tokens=max_new_tokens)

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """One image per prompt; its seed alone decides it, not the batch around it."""
        return self.pipeline.generate(list(prompts), self.sampling, seed=list(seeds))


def model_kind(folder: Path) -> str:
    """ "tokenizer" or "mllm"; a published single file is a tokenizer."""
    if folder.is_file():
        return "tokenizer"
    config = folder / "config.json"
    if not config.exists():
        raise UserError(
            f"{folder} holds no config.json: it is not a model folder. Expected OUT/model of a run."
        )
    kind = read_json(config).get("model_type")
    if kind == TOKENIZER:
        return "tokenizer"
    if kind == MLLM or (folder / "unitok").is_dir():
        return "mllm"
    raise UserError(f"{folder}/config.json: model_type is {kind!r}; allowed: {TOKENIZER!r}, {MLLM!r}.")


def fingerprint(folder: Path) -> str:
    """Hex sha256 over the weight files and configs of a model folder, its tokenizer's included."""
    if folder.is_file():
        files = [folder]
    else:
        files = [
            p for p in folder.rglob("*") if p.suffix in (".safetensors", ".bin", ".pth", ".json", ".model")
        ]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
