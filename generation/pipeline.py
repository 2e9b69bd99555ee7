"""`Pipeline`: one loaded model that draws, answers and reconstructs (arXiv 2502.20321, section 3.3)."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from open_unitok.core.devices import check_device
from open_unitok.core.errors import UserError
from open_unitok.mllm import UniTokForConditionalGeneration, UniTokProcessor
from open_unitok.mllm.lora import merge_adapter
from open_unitok.tokenizer import UniTok
from open_unitok.tokenizer.images import ImageSource, load_image, to_pil, to_pixels

from .image_sampling import check_prefix, generate_image_codes, iter_image_codes
from .kv_cache import context_length
from .loading import check_belongs, check_weights, find_model
from .sampling import Sampling
from .text_generation import generate_text_ids, iter_text_ids, text_pieces
from .validation import check_history, check_texts, check_whole, spread_seeds

CHAT_TOKENS = 256  # of one answer in a conversation, where nothing else is asked for
History = Sequence[tuple[str, str]]  # earlier questions of a conversation and their answers


class Pipeline:
    """A model, its processor and its visual tokenizer on one device.

    Attributes:
        model: `UniTokForConditionalGeneration`; processor: `UniTokProcessor`; unitok: `UniTok`.
        weights: "int8" where drawing rounds the model's weights to 8 bits, else None.
        sampling: how it draws where nothing else is said.
    """

    def __init__(
        self,
        model: UniTokForConditionalGeneration,
        processor: UniTokProcessor,
        unitok: UniTok,
        weights: str | None = None,
        sampling: Sampling | None = None,
    ):
        self.model, self.processor, self.unitok = model.eval(), processor, unitok.eval()
        self.weights, self.sampling = weights, sampling or Sampling()

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | str | None = None,
        adapter: str | Path | None = None,
    ) -> "Pipeline":
        """Load an MLLM folder (model, processor, `unitok/`), a shipped model ("scenes") or a hub id.

        Args:
            device: "cpu", "cuda", "cuda:1", "mps".
            dtype: of the decoder and the visual tokenizer; None = bfloat16 on cuda, float32 elsewhere.
                "int8", on a CPU with a C++ compiler: float32, but images are drawn with 8-bit weights.
            adapter: folder or hub id of a LoRA adapter trained on this model; it is merged into the weights.

        Raises:
            UserError: nothing is there, it is of another kind, its parts do not belong together, or there is
                no such device or dtype; the message says which.
        """
        device = check_device(device)
        dtype, weights = check_weights(dtype, device)
        folder = find_model(folder)
        unitok = UniTok.from_pretrained(folder / "unitok", dtype=torch.float32)
        model = UniTokForConditionalGeneration.from_pretrained(folder, dtype=dtype)
        processor = UniTokProcessor.from_pretrained(folder)
        check_belongs(model, unitok, processor, folder)  # before rounding, which changes the fingerprint
        if adapter is not None:
            model = merge_adapter(model, adapter)
        unitok = unitok.to(device=device, dtype=dtype)
        return cls(model.to(device), processor, unitok, weights, Sampling.of_model(folder))

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
        *,
        negative: str | Sequence[str] | None = None,
        num_images: int = 1,
        prefix: Tensor | None = None,
    ) -> list[Image.Image]:
        """`num_images` images per prompt, those of the first prompt first.

        Args:
            seed: of the first image, the next one's is one more; or a list with one seed per image.
            batch_size: images drawn together; each depends on its own prompt and seed alone.
            negative: what guidance leads away from, one text for all prompts or one per prompt; None =
                the unconditional prompt of training.
            num_images: >= 1.
            prefix: (1 or B, n, K) codes with which all images, or each of the B, begin; see `first_rows`.

        Raises:
            UserError: an empty or over-long prompt, a wrong seed, number or prefix.
        """
        codes = self.generate_codes(
            prompts, sampling, seed, batch_size, negative=negative, num_images=num_images, prefix=prefix
        )
        return [image for part in codes.split(batch_size) for image in self.decode(part)]

    def generate_codes(
        self,
        prompts: Sequence[str],
        sampling: Sampling | None = None,
        seed: int | Sequence[int] = 0,
        batch_size: int = 64,
        *,
        negative: str | Sequence[str] | None = None,
        num_images: int = 1,
        prefix: Tensor | None = None,
    ) -> Tensor:
        """The codes (B, N, K) of the images; arguments and errors as `generate`."""
        check_whole("batch_size", batch_size)
        sampling = sampling or self.sampling
        ids, seeds, free = self._drawing(prompts, seed, negative, num_images)
        if prefix is not None:
            check_prefix(prefix, len(ids), self.model.config)
        parts = []
        for i in range(0, len(ids), batch_size):
            part = slice(i, i + batch_size)
            begun = prefix if prefix is None or len(prefix) != len(ids) else prefix[part]
            parts.append(
                generate_image_codes(
                    self.model, ids[part], sampling, seeds[part], free[part], begun, self.weights
                )
            )
        shape = (0, self.model.config.num_image_tokens, self.model.config.num_codebooks)
        return torch.cat(parts) if parts else torch.empty(shape, dtype=torch.long, device=self.device)

    def _drawing(
        self, prompts: Any, seed: Any, negative: Any, num_images: Any
    ) -> tuple[list[list[int]], list[int], list[list[int]]]:
        """Ids to draw from, seeds, and ids to lead away from, one per image."""
        check_whole("num_images", num_images)
        count = len(check_texts(prompts, "prompt"))
        seeds = spread_seeds(seed, count * num_images)
        away = [self.processor.unconditional_ids()] * count
        if negative is not None:
            texts = [negative] * count if isinstance(negative, str) else negative
            if len(check_texts(texts, "negative prompt")) != count:
                raise UserError(f"{len(texts)} negative prompts for {count} prompts: give one, or one each.")
            away = self.prompt_ids(texts, "Negative prompt")
        ids, away = (
            [row for row in rows for _ in range(num_images)] for rows in (self.prompt_ids(prompts), away)
        )
        return ids, seeds, away

    def prompt_ids(self, prompts: Sequence[str], name: str = "Prompt") -> list[list[int]]:
        """Ids to draw from.

        Raises:
            UserError: a prompt that the processor would cut.
        """
        rows, limit = (
            [self.processor.text_to_image_ids(prompt) for prompt in prompts],
            self.processor.max_prompt,
        )
        for i, row in enumerate(rows):
            if len(row) > limit:  # the cut ids and boi
                raise UserError(f"{name} {i} has {limit} tokens or more: shorten the prompt.")
        return rows

    def stream(
        self,
        prompts: Sequence[str],
        sampling: Sampling | None = None,
        seed: int | Sequence[int] = 0,
        *,
        negative: str | Sequence[str] | None = None,
        num_images: int = 1,
        prefix: Tensor | None = None,
    ) -> Iterator[list[Image.Image]]:
        """The images of one batch as they grow: all so far after every row of visual tokens, grey below.

        The last ones are exactly what `generate` returns. Closing the iterator ends the work. Arguments and
        errors as `generate`.
        """
        ids, seeds, free = self._drawing(prompts, seed, negative, num_images)
        registers, columns = self.unitok.config.num_register_tokens, self._columns()
        steps = iter_image_codes(
            self.model, ids, sampling or self.sampling, seeds, free, prefix, self.weights
        )

        def previews() -> Iterator[list[Image.Image]]:
            for codes in steps if ids else ():
                drawn = codes.shape[1] - registers
                if drawn > 0 and drawn % columns == 0:
                    yield self.preview(codes, self.model.config.num_image_tokens, drawn // columns)

        return previews()  # so that mistakes are refused by the call itself, not by the first step

    def _columns(self) -> int:
        """Visual tokens in a row of a drawn image."""
        return round((self.model.config.num_image_tokens - self.unitok.config.num_register_tokens) ** 0.5)

    @torch.no_grad()
    def first_rows(self, pictures: Sequence[ImageSource], rows: int) -> Tensor:
        """Codes (I, n, K) of the first `rows` rows of visual tokens of images, for `generate(prefix=...)`.

        The images are cropped to squares; registers' codes, where the tokenizer has some, come first.

        Raises:
            UserError: a file that is missing or no image; `rows` is not 1 to one less than there are.
        """
        columns = self._columns()
        if not isinstance(rows, int) or isinstance(rows, bool) or not 1 <= rows < columns:
            raise UserError(f"rows is {rows!r}; it must be a whole number from 1 to {columns - 1}.")
        size = columns * self.unitok.config.patch_size
        pixels = torch.stack([to_pixels(load_image(picture), size, mode="crop") for picture in pictures])
        codes = self.unitok.encode(pixels.to(self.unitok.device))
        return codes[:, : self.unitok.config.num_register_tokens + rows * columns]

    def preview(self, codes: Tensor, count: int, rows: int) -> list[Image.Image]:
        """Images of the first `rows` rows of visual tokens, codes (B, n, K) of `count`; grey below."""
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
        """Codes (B, N, K) -> B images."""
        return [to_pil(pixels) for pixels in self.unitok.decode(codes).float().cpu()] if len(codes) else []

    def answer(
        self,
        images: Sequence[Any],
        questions: Sequence[str],
        max_new_tokens: int = 32,
        batch_size: int = 128,
        *,
        histories: Sequence[History] | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> list[str]:
        """One answer per question.

        Args:
            images: one per question: an image (PIL, path or bytes), a list of several, or None.
                An image that comes again (same object or path) is encoded once.
            max_new_tokens: an answer is cut there at the latest.
            batch_size: questions answered together.
            histories: per question the earlier (question, answer) pairs of its conversation; its images are
                those of the whole conversation, at the `<image>` marks in the questions or before the first.
            seed: of the draws where options sample; None = torch's global generator.
            options: of transformers' `generate`, such as do_sample=True, temperature=0.7; none = greedy.

        Raises:
            UserError: not one image entry per question, a file that is no image, an empty or long question.
        """
        prompts, codes = self._asking(images, questions, histories)
        new = generate_text_ids(self.model, prompts, codes, max_new_tokens, batch_size, seed, **options)
        return [self.processor.decode(ids).strip() for ids in new]

    def answer_stream(
        self,
        images: Sequence[Any],
        questions: Sequence[str],
        max_new_tokens: int = 32,
        *,
        histories: Sequence[History] | None = None,
        seed: int | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> Iterator[list[str]]:
        """The answers as they are written: each time one new piece of text per question, empty where there is
        nothing new. Joined, the greedy pieces are what `answer` returns, in float32; closing the iterator
        ends the work.

        Args:
            do_sample: draw with temperature, top_k (0 = all) and top_p; else the likeliest words.

        Raises:
            UserError: as `answer`, or a number out of range.
        """
        prompts, codes = self._asking(images, questions, histories)
        steps = iter_text_ids(
            self.model, prompts, codes, max_new_tokens, seed, do_sample, temperature, top_k, top_p
        )
        return text_pieces(self.processor, steps, len(prompts))

    def chat(
        self,
        question: str,
        images: Any = None,
        history: History = (),
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> str:
        """The answer to one more question of a conversation; options and errors as `answer`.

        Args:
            images: of the whole conversation: an image, a list, or None.
            history: earlier (question, answer) pairs.
            max_new_tokens: None = 256, or what the context has left where that is less.
        """
        max_new_tokens = self._room(question, images, history, max_new_tokens)
        return self.answer([images], [question], max_new_tokens, histories=[history], **options)[0]

    def chat_stream(
        self,
        question: str,
        images: Any = None,
        history: History = (),
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """`chat` piece by piece; options as `answer_stream`."""
        max_new_tokens = self._room(question, images, history, max_new_tokens)
        steps = self.answer_stream([images], [question], max_new_tokens, histories=[history], **options)
        return (pieces[0] for pieces in steps if pieces[0])

    def _room(self, question: str, images: Any, history: Any, wanted: int | None) -> int:
        """How long the next answer of a conversation may be: what is wanted, else what fits."""
        limit = context_length(self.model.config)
        if wanted is not None or limit is None:
            return CHAT_TOKENS if wanted is None else wanted
        check_texts([question], "question")
        ids = self.processor.question_ids(question, len(_as_list(images)), history=check_history(history))
        return max(1, min(CHAT_TOKENS, limit - len(ids)))

    def _asking(
        self, images: Sequence[Any], questions: Sequence[str], histories: Sequence[History] | None
    ) -> tuple[list[list[int]], list[Tensor]]:
        """The ids of each question and the codes (n, N, K) of its images."""
        check_texts(questions, "question")
        histories = [()] * len(questions) if histories is None else histories
        for name, given in (("images", images), ("histories", histories)):
            if not isinstance(given, Sequence):
                raise UserError(f"{name} is {given!r}; it must be a list with one entry per question.")
            if len(given) != len(questions):
                raise UserError(
                    f"{len(given)} {name} for {len(questions)} questions: give one entry per question."
                )
        earlier = [check_history(entry) for entry in histories]
        groups = [_as_list(entry) for entry in images]
        pictures = {_identity(picture): picture for group in groups for picture in group}
        place = {key: i for i, key in enumerate(pictures)}
        codes = self.encode_for_reading(list(pictures.values()), batch_size=64)
        asked = [(question, len(group), past) for question, group, past in zip(questions, groups, earlier)]
        # the same question comes often
        ids = {key: self.processor.question_ids(key[0], key[1], history=key[2]) for key in set(asked)}
        return [ids[key] for key in asked], [
            codes[[place[_identity(picture)] for picture in group]] for group in groups
        ]

    @torch.no_grad()
    def encode_for_reading(self, pictures: Sequence[ImageSource], batch_size: int = 64) -> Tensor:
        """Codes (I, N, K) of images as the model reads them: padded to a square, then scaled."""
        codes = [
            self.unitok.encode(
                torch.stack([self.processor.pixels(load_image(p)) for p in part]).to(self.unitok.device)
            )
            for part in _batches(pictures, batch_size)
        ]
        shape = (0, self.model.config.num_image_tokens, self.model.config.num_codebooks)
        return torch.cat(codes) if codes else torch.empty(shape, dtype=torch.long, device=self.device)

    def reconstruct(self, images: Sequence[ImageSource], batch_size: int = 16) -> list[Image.Image]:
        """Each image, cropped to a square of the tokenizer's size, encoded and decoded again."""
        return [copy for _, copy in reconstruct(self.unitok, images, batch_size)]


@torch.no_grad()
def reconstruct(
    unitok: UniTok, images: Sequence[ImageSource], batch_size: int = 16, size: int | None = None
) -> Iterator[tuple[Image.Image, Image.Image]]:
    """(what went in, what came out) per image; `size` in pixels, the tokenizer's own if None.

    Raises:
        UserError: a file that is missing or no image, a size that is no multiple of 16.
    """
    size = unitok.config.image_size if size is None else size
    check_whole("size", size)
    check_whole("batch_size", batch_size)
    for part in _batches(images, batch_size):
        pixels = torch.stack([to_pixels(load_image(image), size, mode="crop") for image in part])
        copies = unitok.decode(unitok.encode(pixels.to(unitok.device))).float().cpu()
        yield from ((to_pil(a), to_pil(b)) for a, b in zip(pixels, copies))


def _as_list(entry: Any) -> list[Any]:
    return [] if entry is None else list(entry) if isinstance(entry, (list, tuple)) else [entry]


def _identity(picture: ImageSource) -> Any:
    """What tells images apart: the object, or the name of the file."""
    return str(picture) if isinstance(picture, (str, Path)) else id(picture)


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))
