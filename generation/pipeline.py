"""`Pipeline`: one loaded model that draws, answers and reconstructs (arXiv 2502.20321, section 3.3)."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from open_unitok.errors import UserError
from open_unitok.mllm import UniTokForConditionalGeneration, UniTokProcessor
from open_unitok.tokenizer import UniTok
from open_unitok.tokenizer.images import Picture, load_image, to_pil, to_pixels

from .answering import answer_ids, check_whole
from .drawing import draw_codes, draw_steps
from .folders import check_belongs, check_device, check_dtype, find_model
from .sampling import Sampling, check_seed


class Pipeline:
    """A model, its processor and its visual tokenizer on one device.

    Attributes:
        model: `UniTokForConditionalGeneration`; processor: `UniTokProcessor`; unitok: `UniTok`.
    """

    def __init__(self, model: UniTokForConditionalGeneration, processor: UniTokProcessor, unitok: UniTok):
        self.model, self.processor, self.unitok = model.eval(), processor, unitok.eval()

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | str | None = None
    ) -> "Pipeline":
        """Load an MLLM folder (model, processor, `unitok/`) or a hub id.

        Args:
            device: "cpu", "cuda", "cuda:1", "mps".
            dtype: of the decoder and the visual tokenizer; None = bfloat16 on cuda, float32 elsewhere.

        Raises:
            UserError: nothing is there, it is of another kind, its parts do not belong together, or there is
                no such device or dtype; the message says which.
        """
        device = check_device(device)
        dtype = check_dtype(dtype, device)
        folder = find_model(folder)
        unitok = UniTok.from_pretrained(folder / "unitok", dtype=torch.float32)
        model = UniTokForConditionalGeneration.from_pretrained(folder, dtype=dtype)
        processor = UniTokProcessor.from_pretrained(folder)
        check_belongs(model, unitok, processor, folder)  # before rounding, which changes the fingerprint
        return cls(model.to(device), processor, unitok.to(device=device, dtype=dtype))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    def generate(
        self,
        prompts: Sequence[str],
        sampling: Sampling | None = None,
        seed: int | Sequence[int] = 0,
        batch_size: int = 64,
    ) -> list[Image.Image]:
        """One picture per prompt.

        Args:
            seed: of the first picture, the next one's is one more; or a list with one seed per prompt.
            batch_size: pictures drawn together; each depends on its own prompt and seed alone.

        Raises:
            UserError: an empty or over-long prompt, a wrong seed.
        """
        codes = self.draw(prompts, sampling, seed, batch_size)
        return [image for part in codes.split(batch_size) for image in self.decode(part)]

    def draw(
        self,
        prompts: Sequence[str],
        sampling: Sampling | None = None,
        seed: int | Sequence[int] = 0,
        batch_size: int = 64,
    ) -> Tensor:
        """The codes (B, N, K) of one picture per prompt; arguments and errors as `generate`."""
        sampling, seeds = sampling or Sampling(), spread_seeds(seed, len(check_texts(prompts, "prompt")))
        check_whole("batch_size", batch_size)
        ids = self.prompt_ids(prompts)
        free = self.processor.unconditional_ids()
        parts = [
            draw_codes(self.model, ids[i : i + batch_size], sampling, seeds[i : i + batch_size], free)
            for i in range(0, len(ids), batch_size)
        ]
        shape = (0, self.model.config.num_image_tokens, self.model.config.num_codebooks)
        return torch.cat(parts) if parts else torch.empty(shape, dtype=torch.long, device=self.device)

    def prompt_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """Ids to draw from.

        Raises:
            UserError: a prompt that the processor would cut.
        """
        rows, limit = [self.processor.drawing_ids(prompt) for prompt in prompts], self.processor.max_prompt
        for i, row in enumerate(rows):
            if len(row) > limit:  # the cut ids and boi
                raise UserError(f"Prompt {i} has {limit} tokens or more: shorten the prompt.")
        return rows

    def stream(
        self, prompts: Sequence[str], sampling: Sampling | None = None, seed: int | Sequence[int] = 0
    ) -> Iterator[list[Image.Image]]:
        """The pictures of one batch as they grow: all so far after every row of visual tokens, grey below.

        The last ones are exactly what `generate` returns. Arguments and errors as `generate`.
        """
        sampling, seeds = sampling or Sampling(), spread_seeds(seed, len(check_texts(prompts, "prompt")))
        ids = self.prompt_ids(prompts)
        registers = self.unitok.config.num_register_tokens
        count = self.model.config.num_image_tokens
        columns = round((count - registers) ** 0.5)
        for codes in draw_steps(self.model, ids, sampling, seeds, self.processor.unconditional_ids()):
            drawn = codes.shape[1] - registers
            if drawn > 0 and drawn % columns == 0:
                yield self.preview(codes, count, drawn // columns)

    def preview(self, codes: Tensor, count: int, rows: int) -> list[Image.Image]:
        """Pictures of the first `rows` rows of visual tokens, codes (B, n, K) of `count`; grey below."""
        missing = count - codes.shape[1]
        if not missing:
            return self.decode(codes)
        # the decoder looks at all places: the last codes go on to the end, for want of better
        images = self.decode(torch.cat([codes, codes[:, -1:].expand(-1, missing, -1)], dim=1))
        for image in images:
            top = rows * self.unitok.config.patch_size
            image.paste((128, 128, 128), (0, top, image.width, image.height))
        return images

    def decode(self, codes: Tensor) -> list[Image.Image]:
        """Codes (B, N, K) -> B pictures."""
        return [to_pil(pixels) for pixels in self.unitok.decode(codes).float().cpu()] if len(codes) else []

    def answer(
        self,
        images: Sequence[Any],
        questions: Sequence[str],
        max_new_tokens: int = 32,
        batch_size: int = 128,
        **options: Any,
    ) -> list[str]:
        """One answer per question.

        Args:
            images: one per question: a picture (PIL, path or bytes), a list of several, or None.
                A picture that comes again (same object or path) is encoded once.
            max_new_tokens: an answer is cut there at the latest.
            batch_size: questions answered together.
            options: of transformers' `generate`, such as do_sample=True, temperature=0.7; none = greedy.

        Raises:
            UserError: not one image entry per question, a file that is no image, an empty or long question.
        """
        check_texts(questions, "question")
        if len(images) != len(questions):
            raise UserError(
                f"{len(images)} images for {len(questions)} questions: give one entry per question."
            )
        groups = [_as_list(entry) for entry in images]
        pictures = {_identity(picture): picture for group in groups for picture in group}
        place = {key: i for i, key in enumerate(pictures)}
        codes = self.encode_to_read(list(pictures.values()), batch_size=64)
        asked = [(question, len(group)) for question, group in zip(questions, groups)]
        ids = {key: self.processor.question_ids(*key) for key in set(asked)}  # the same question comes often
        prompts = [ids[key] for key in asked]
        image_codes = [codes[[place[_identity(picture)] for picture in group]] for group in groups]
        new = answer_ids(self.model, prompts, image_codes, max_new_tokens, batch_size, **options)
        return [self.processor.decode(ids).strip() for ids in new]

    @torch.no_grad()
    def encode_to_read(self, pictures: Sequence[Picture], batch_size: int = 64) -> Tensor:
        """Codes (I, N, K) of pictures as the model reads them: padded to a square, then scaled."""
        codes = [
            self.unitok.encode(
                torch.stack([self.processor.pixels(load_image(p)) for p in part]).to(self.unitok.device)
            )
            for part in _batches(pictures, batch_size)
        ]
        shape = (0, self.model.config.num_image_tokens, self.model.config.num_codebooks)
        return torch.cat(codes) if codes else torch.empty(shape, dtype=torch.long, device=self.device)

    def reconstruct(self, images: Sequence[Picture], batch_size: int = 16) -> list[Image.Image]:
        """Each picture, cropped to a square of the tokenizer's size, encoded and decoded again."""
        return [copy for _, copy in reconstruct(self.unitok, images, batch_size)]


@torch.no_grad()
def reconstruct(
    unitok: UniTok, images: Sequence[Picture], batch_size: int = 16, size: int | None = None
) -> Iterator[tuple[Image.Image, Image.Image]]:
    """(what went in, what came out) per picture; `size` in pixels, the tokenizer's own if None.

    Raises:
        UserError: a file that is missing or no image, a size that is no multiple of 16.
    """
    size = size or unitok.config.image_size
    for part in _batches(images, batch_size):
        pixels = torch.stack([to_pixels(load_image(image), size, mode="crop") for image in part])
        copies = unitok.decode(unitok.encode(pixels.to(unitok.device))).float().cpu()
        yield from ((to_pil(a), to_pil(b)) for a, b in zip(pixels, copies))


def check_texts(texts: Any, name: str) -> Sequence[str]:
    """The texts; UserError where they are one string, or one of them is empty or no string."""
    if isinstance(texts, str):
        raise UserError(f"One string was given where a list of {name}s is needed: put it into [...].")
    for i, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{name.capitalize()} {i} is {text!r}; it must be a text that is not empty.")
    return texts


def spread_seeds(seed: int | Sequence[int], count: int) -> list[int]:
    """One seed per picture: the list given, or seed, seed + 1, ..."""
    if isinstance(seed, (list, tuple, range)):
        if len(seed) != count:
            raise UserError(f"{len(seed)} seeds for {count} prompts: give one seed per prompt.")
        return [check_seed(s) for s in seed]
    first = check_seed(seed)
    return [first + i for i in range(count)]


def _as_list(entry: Any) -> list[Any]:
    return [] if entry is None else list(entry) if isinstance(entry, (list, tuple)) else [entry]


def _identity(picture: Picture) -> Any:
    """What tells pictures apart: the object, or the name of the file."""
    return str(picture) if isinstance(picture, (str, Path)) else id(picture)


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))
