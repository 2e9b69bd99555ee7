"""Runs a model for the benchmarks: codes, reconstructions, embeddings, answers and generated images.

B images, N visual tokens, K sub-codebooks, V entries of each, E width of the joint image-text space.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing, model_path, read_json
from open_unitok.generation import Pipeline, Sampling
from open_unitok.tokenizer import UniTok
from open_unitok.tokenizer.caption_tokenizer import CaptionTokenizer
from open_unitok.tokenizer.images import to_uint8

from .crops import find_crop

_DTYPES = ("float32", "bfloat16", "float16")
_FINGERPRINTED_SUFFIXES = (".safetensors", ".bin", ".pth", ".json", ".model")


class Reconstructions(NamedTuple):
    """Images as the tokenizer saw them and their reconstructions, uint8 (B, H, W, 3), and codes (B, N, K)."""

    originals: np.ndarray
    decoded: np.ndarray
    codes: np.ndarray
    codebook_size: int  # V
    reencoded: np.ndarray | None = None  # the codes of the reconstructions, on request


class Model:
    """A tokenizer folder or an MLLM folder (with its tokenizer in `unitok/`); weights load on first use.

    Args:
        crop: name of the crop to the tokenizer's input size; None = the default of each method.
        sampling: fields of `Sampling` that replace those of the model's sampling.json.

    Raises:
        UserError: the folder is missing or holds no model, or an argument is not allowed.
    """

    def __init__(
        self,
        folder: str | Path,
        device: str = "cpu",
        dtype: str = "float32",
        crop: str | None = None,
        sampling: Mapping[str, Any] | None = None,
    ):
        self.folder, self.device, self.crop = existing(model_path(folder)), device, crop
        if dtype not in _DTYPES:
            raise UserError(f"dtype is {dtype!r}; allowed: {', '.join(_DTYPES)}.")
        if crop is not None:
            find_crop(crop)
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.kind = model_kind(self.folder)
        # the model's own settings, and over them those of the command line
        self.sampling = dataclasses.replace(Sampling.from_folder(self.folder), **(sampling or {}))
        self.tokenizer_folder = self.folder / "unitok" if self.kind == "mllm" else self.folder
        self._unitok = self._pipeline = self._captions = None

    def check_needs(self, needs: str, benchmark: str) -> None:
        """Raise UserError where a benchmark needs an MLLM and this is a tokenizer."""
        if needs != "tokenizer" and self.kind != "mllm":
            raise UserError(
                f"{benchmark} needs an MLLM, but {self.folder} holds a tokenizer; give the folder of an MLLM."
            )

    def describe(self) -> dict[str, Any]:
        """Path, kind and fingerprint, for run.json, without loading weights."""
        return {"path": str(self.folder), "kind": self.kind, "fingerprint": model_fingerprint(self.folder)}

    @property
    def unitok(self) -> UniTok:
        """The visual tokenizer, in evaluation mode."""
        if self._unitok is None:
            # an MLLM's pipeline has loaded the tokenizer already
            if self._pipeline is not None:
                self._unitok = self._pipeline.unitok
            else:
                model = UniTok.from_pretrained(self.tokenizer_folder, dtype=self.dtype)
                self._unitok = model.to(self.device).eval()
        return self._unitok

    @property
    def pipeline(self) -> Pipeline:
        """The pipeline that answers and generates."""
        if self._pipeline is None:
            self._pipeline = Pipeline.from_pretrained(self.folder, device=self.device, dtype=self.dtype)
        return self._pipeline

    def pixels(self, images: Sequence[Image.Image], crop: str = "bicubic") -> Tensor:
        """Images cropped to the tokenizer's input size, (B, 3, H, W) in [-1, 1].

        Args:
            crop: used unless the `crop` option of the model is set.
        """
        crop_image = find_crop(self.crop or crop)
        # (height, width): a token layout may have more columns than rows
        return torch.stack([crop_image(image, self.unitok.config.image_shape) for image in images])

    @torch.inference_mode()
    def reconstruct(self, images: Sequence[Image.Image], reencode: bool = False) -> Reconstructions:
        """Encode and decode; with `reencode` also encode the 8-bit reconstructions."""
        pixels = self.pixels(images)
        codes = self.unitok.encode(pixels.to(self.device))
        decoded = to_uint8(self.unitok.decode(codes).float())
        second = None
        if reencode:  # from 8 bit, as a reader of the saved image would encode it
            second = self.unitok.encode(decoded.float() / 127.5 - 1).cpu().numpy()
        originals, decoded = (p.permute(0, 2, 3, 1).cpu().numpy() for p in (to_uint8(pixels), decoded))
        size = self.unitok.config.codebook_size
        return Reconstructions(originals, decoded, codes.cpu().numpy(), size, second)

    def embed_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Unit embeddings (B, E); images are cropped as in the published zero-shot evaluation."""
        return self.features(images, "embedding")

    @torch.inference_mode()
    def features(self, images: Sequence[Image.Image], pooling: str) -> np.ndarray:
        """One vector per image (B, F): see `linear_probe.POOLINGS`."""
        pixels = self.pixels(images, "lanczos").to(self.device)
        if pooling == "embedding":
            found = self.unitok.embed_image(pixels)
        else:
            found = self.unitok.encode_latents(pixels)
            if pooling == "quantised":
                found = self.unitok.quantizer.embed(self.unitok.quantizer.encode(found))
            # (B, N, F) -> (B, F)
            found = found.mean(dim=1)
        return found.float().cpu().numpy()

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit embeddings (B, E) of captions."""
        if self._captions is None:
            length = self.unitok.config.text_context_length
            self._captions = CaptionTokenizer.from_model_folder(self.tokenizer_folder, length)
        return self.unitok.embed_text(self._captions(list(texts)).to(self.device)).float().cpu().numpy()

    def answer(
        self, images: Sequence[Image.Image], questions: Sequence[str], max_new_tokens: int
    ) -> list[str]:
        """One short text per image and question, decoded greedily."""
        return self.pipeline.answer(list(images), list(questions), max_new_tokens=max_new_tokens)

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """One image per prompt; it depends on its own seed, not on the batch."""
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
    model_type = read_json(config).get("model_type")
    if model_type == "unitok":
        return "tokenizer"
    if model_type == "unitok_mllm" or (folder / "unitok").is_dir():
        return "mllm"
    raise UserError(f"{config}: model_type is {model_type!r}; allowed: 'unitok', 'unitok_mllm'.")


def model_fingerprint(folder: Path) -> str:
    """Hex sha256 over the weight files and configs of a model folder, including its tokenizer's."""
    if folder.is_file():
        files = [folder]
    else:
        files = [p for p in folder.rglob("*") if p.suffix in _FINGERPRINTED_SUFFIXES]
    digest = hashlib.sha256()
    for path in sorted(files):
        # names without folders: a moved model keeps its fingerprint
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
