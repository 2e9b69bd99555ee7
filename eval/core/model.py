"""The model interface of the benchmarks: reconstructions, embeddings, answers and generated images.

B images, N visual tokens, K sub-codebooks, V entries of each, E embedding width, F feature width.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from open_unitok.core.devices import set_device
from open_unitok.core.errors import UserError
from open_unitok.core.files import existing, model_path
from open_unitok.core.text_files import read_json
from open_unitok.generation import Pipeline, Sampling
from open_unitok.mllm.loading import CLASS_TYPE
from open_unitok.tokenizer import UniTok
from open_unitok.tokenizer.caption_tokenizer import CaptionTokenizer
from open_unitok.tokenizer.images import to_uint8

from .crops import find_crop
from .generated_images import CLASS_CONDITIONAL
from .results import model_fingerprint

_DTYPES = ("float32", "bfloat16", "float16")


class Reconstructions(NamedTuple):
    """Cropped originals and their reconstructions, uint8 (B, H, W, 3), and codes (B, N, K) if any."""

    originals: np.ndarray
    decoded: np.ndarray
    codes: np.ndarray | None
    codebook_size: int  # V
    reencoded: np.ndarray | None = None  # (B, N, K), codes of the reconstructions, if requested
    code_sizes: list[int] | None = None  # of the K codes; None = V each
    bits_per_token: float = 0.0  # where there are no codes alone: with the continuous numbers as float32


class Model:
    """A tokenizer folder, or an MLLM or class-conditional folder (with its tokenizer in `unitok/`); weights
    load on first use.

    Args:
        crop: name of the crop to the tokenizer's input size; None = the default of each method.
        sampling: fields of `Sampling` that override the model's sampling.json.

    Raises:
        UserError: the folder is missing or not a model folder, or an argument is not allowed.
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
        set_device(device)
        if dtype not in _DTYPES:
            raise UserError(f"dtype is {dtype!r}; allowed: {', '.join(_DTYPES)}.")
        if crop is not None:
            find_crop(crop)
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.kind = model_kind(self.folder)
        # the command line overrides the model's sampling.json
        self.sampling = dataclasses.replace(Sampling.from_folder(self.folder), **(sampling or {}))
        self.tokenizer_folder = self.folder if self.kind == "tokenizer" else self.folder / "unitok"
        self._unitok = self._pipeline = self._captions = None

    def check_needs(self, needs: str, benchmark: str) -> None:
        """Raise UserError if a benchmark needs an MLLM, or one that generates, and this is another model.

        A generator that needs classes may still be one that reads prompts: see `check_classes`.
        """
        if needs == "mllm" and self.kind == CLASS_CONDITIONAL:
            raise UserError(
                f"{benchmark} needs an MLLM, but {self.folder} is a class-conditional model, without text."
            )
        if needs != "tokenizer" and self.kind == "tokenizer":
            raise UserError(
                f"{benchmark} needs an MLLM, but {self.folder} is a tokenizer; pass the folder of an MLLM."
            )

    def check_classes(self, benchmark: str, count: int | None) -> None:
        """Check a class-conditional model against a benchmark of generated images with `count` classes.

        Raises:
            UserError: the benchmark has prompts instead of classes, or another number of classes.
        """
        if self.kind != CLASS_CONDITIONAL:
            return
        if count is None:
            raise UserError(
                f"{benchmark} has prompts, but {self.folder} is a class-conditional model, without text."
            )
        own = read_json(self.folder / "config.json").get("num_classes")
        if own != count:
            raise UserError(f"{benchmark} has {count} classes, but {self.folder} has {own} (num_classes).")

    def describe(self) -> dict[str, Any]:
        """Path, kind and fingerprint for run.json; loads no weights."""
        return {"path": str(self.folder), "kind": self.kind, "fingerprint": model_fingerprint(self.folder)}

    @property
    def unitok(self) -> UniTok:
        """The visual tokenizer, in evaluation mode."""
        if self._unitok is None:
            # the pipeline of an MLLM has already loaded its tokenizer
            if self._pipeline is not None:
                self._unitok = self._pipeline.unitok
            else:
                model = UniTok.from_pretrained(self.tokenizer_folder, dtype=self.dtype)
                self._unitok = model.to(self.device).eval()
        return self._unitok

    @property
    def pipeline(self) -> Pipeline:
        """The generation pipeline of the MLLM."""
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
        """Encode and decode images; with `reencode`, also encode the reconstructions."""
        pixels = self.pixels(images)
        if not self.unitok.quantizer.discrete:
            decoded = to_uint8(self.unitok.reconstruct(pixels.to(self.device)).float())
            both = (p.permute(0, 2, 3, 1).cpu().numpy() for p in (to_uint8(pixels), decoded))
            bits = self.unitok.quantizer.bits_per_token
            return Reconstructions(*both, None, 0, bits_per_token=bits)  # pyright: ignore
        codes = self.unitok.encode(pixels.to(self.device))
        decoded = to_uint8(self.unitok.decode(codes).float())
        second = None
        # from 8 bits: agreement is measured on the image as it is saved
        if reencode:
            second = self.unitok.encode(decoded.float() / 127.5 - 1).cpu().numpy()
        originals, decoded = (p.permute(0, 2, 3, 1).cpu().numpy() for p in (to_uint8(pixels), decoded))
        sizes = self.unitok.quantizer.code_sizes
        return Reconstructions(originals, decoded, codes.cpu().numpy(), max(sizes), second, sizes)

    def embed_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Unit-length embeddings (B, E)."""
        return self.features(images, "embedding")

    @torch.inference_mode()
    def features(self, images: Sequence[Image.Image], pooling: str) -> np.ndarray:
        """One vector per image (B, F); `pooling` is a key of `linear_probe.POOLINGS`."""
        # lanczos: the crop of the published zero-shot evaluation
        pixels = self.pixels(images, "lanczos").to(self.device)
        if pooling == "embedding":
            found = self.unitok.embed_image(pixels)
        else:
            found = self.unitok.encode_latents(pixels)
            if pooling == "quantised":
                found = self.unitok.quantizer.quantise(found)
            # (B, N, F) -> (B, F)
            found = found.mean(dim=1)
        return found.float().cpu().numpy()

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit-length embeddings (B, E) of captions."""
        if self._captions is None:
            length = self.unitok.config.text_context_length
            self._captions = CaptionTokenizer.from_model_folder(self.tokenizer_folder, length)
        return self.unitok.embed_text(self._captions(list(texts)).to(self.device)).float().cpu().numpy()

    def answer(
        self, images: Sequence[Image.Image], questions: Sequence[str], max_new_tokens: int
    ) -> list[str]:
        """One greedily decoded answer per image-question pair."""
        return self.pipeline.answer(list(images), list(questions), max_new_tokens=max_new_tokens)

    def tokens_left(self, images: Any, question: str) -> int | None:
        """Tokens that the context leaves for an answer; None = the context has no limit."""
        limit = self.pipeline.model.config.context_length
        count = len(images) if isinstance(images, list) else int(images is not None)
        return limit and limit - len(self.pipeline.processor.question_ids(question, count))

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """One image per prompt, determined by its seed and independent of the batch."""
        return self.pipeline.generate(list(prompts), self.sampling, seed=list(seeds))

    def generate_classes(self, classes: Sequence[int], seeds: Sequence[int]) -> list[Image.Image]:
        """One image per class of a class-conditional model, determined by its seed."""
        return self.pipeline.generate(classes=list(classes), sampling=self.sampling, seed=list(seeds))


def model_kind(folder: Path) -> str:
    """Returns "tokenizer", "class-conditional" or "mllm"; a published .pth file is a tokenizer."""
    if folder.is_file():
        return "tokenizer"
    config = folder / "config.json"
    if not config.exists():
        raise UserError(
            f"{folder} has neither a config.json nor images: expected a model folder, such as OUT/model of a "
            "training run, or images to score."
        )
    model_type = read_json(config).get("model_type")
    if model_type == "unitok":
        return "tokenizer"
    if model_type == CLASS_TYPE:
        return CLASS_CONDITIONAL
    # a folder that contains its tokenizer is an MLLM of any model_type
    if model_type == "unitok_mllm" or (folder / "unitok").is_dir():
        return "mllm"
    raise UserError(
        f"{config}: model_type is {model_type!r}; allowed: 'unitok', 'unitok_mllm', 'unitok_c2i'."
    )
