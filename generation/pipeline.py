"""`Pipeline`: one loaded model generates images, answers and reconstructs (arXiv 2502.20321, section 3.4)."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from open_unitok.core.devices import check_dtype, set_device
from open_unitok.core.errors import UserError
from open_unitok.mllm import ClassConditionalModel, UniTokForConditionalGeneration, UniTokProcessor
from open_unitok.mllm.features import ReadImages
from open_unitok.mllm.loading import CLASS_TYPE, folder_type
from open_unitok.tokenizer import UniTok
from open_unitok.tokenizer.folder_checks import loading
from open_unitok.tokenizer.images import ImageSource, load_image, to_pil, to_pixels
from open_unitok.tokenizer.token_layout import TokenLayout

from .backends import check_backend, choose_backend
from .class_prompts import ClassProcessor, load_class_parts
from .image_sampling import generate_image_codes, iter_image_codes
from .loading import check_quantization, find_model, load_mllm
from .prompt_ids import History, chat_tokens, image_prompts, prompt_ids, question_prompts
from .reconstruction import iter_reconstructions, split_batches
from .sampling import Sampling
from .text_generation import eos_ids, generate_text_ids, iter_text_ids, stream_text
from .validation import check_prefix, check_whole


class Pipeline:
    """A model, its processor and its visual tokenizer on one device.

    Attributes:
        model: `UniTokForConditionalGeneration`, or a `ClassConditionalModel`, which has no texts; processor:
            `UniTokProcessor`, or a `ClassProcessor`; unitok: `UniTok`.
        quantization: "int8" if the linear layers have 8-bit weights, else None.
        backend: "auto", "torch", "native" or "cuda_graph"; see `backends.choose_backend`.
        sampling: the default settings of `generate`.
    """

    def __init__(
        self,
        model: UniTokForConditionalGeneration | ClassConditionalModel,
        processor: UniTokProcessor | ClassProcessor,
        unitok: UniTok,
        quantization: str | None = None,
        sampling: Sampling | None = None,
        backend: str = "auto",
    ):
        self.model: Any = model.eval()
        self.processor: Any = processor
        self.unitok = unitok.eval()
        processor.unitok = self.unitok  # calls of the processor share it  # pyright: ignore
        self.quantization, self.sampling, self.backend = quantization, sampling or Sampling(), backend
        _ = self.chosen_backend  # refuses here what the first image would refuse, and logs the choice
        if isinstance(processor, UniTokProcessor):
            # every way to generate text reads the ids that end it from here
            self.model.generation_config.eos_token_id = sorted(eos_ids(model) | processor.end_token_ids())

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | str | None = None,
        adapter: str | Path | None = None,
        quantization: str | None = None,
        backend: str = "auto",
    ) -> "Pipeline":
        """Load an MLLM folder (model, processor, `unitok/`), a class-conditional folder (model, `unitok/`), a
        shipped model ("scenes", "emoji") or a hub id.

        Args:
            device: "cpu", "cuda", "cuda:1", "mps"; a GPU becomes this thread's current one.
            dtype: of the decoder and the visual tokenizer; None = bfloat16 on cuda, float32 elsewhere.
            adapter: folder or hub id of a LoRA adapter trained on this model; it is merged into the weights.
            quantization: "int8" = 8-bit weights in the linear layers of the decoder, for images and answers,
                on a CPU; they take the place of the float weights.
            backend: "torch" = the modules themselves; "native" = C++ steps on a CPU; "cuda_graph" = captured
                steps on CUDA; "auto" = the fastest of them with equal results. Models with hooks, adapters
                that are not merged, or changed methods need "torch", which "auto" then takes.

        Raises:
            UserError: there is no such model, it is of another type, its parts do not match, or the device,
                dtype, quantization or backend is not available.
        """
        device = set_device(device)
        dtype = check_dtype(dtype, device)
        check_quantization(quantization, device, dtype)
        check_backend(backend)
        folder = find_model(folder)
        if folder_type(folder) == CLASS_TYPE:
            class_model, classes, unitok = load_class_parts(folder, dtype, adapter, quantization)
            with loading(folder):
                unitok, class_model = unitok.to(device=device, dtype=dtype), class_model.to(device)  # pyright: ignore
            return cls(class_model, classes, unitok, None, Sampling.from_folder(folder), backend)
        model, processor, unitok = load_mllm(folder, dtype, adapter, quantization)
        with loading(folder):  # out of GPU memory
            unitok, model = unitok.to(device=device, dtype=dtype), model.to(device)  # pyright: ignore
        return cls(model, processor, unitok, quantization, Sampling.from_folder(folder), backend)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.model.device

    @property
    def chosen_backend(self) -> str:
        """What `backend` means for the model as it is now: "torch", "native" or "cuda_graph".

        Raises:
            UserError: `backend` cannot run the model.
        """
        return choose_backend(self.model, self.backend)

    @property
    def layout(self) -> TokenLayout:
        """The layout of the visual tokens of a generated image."""
        config, registers = self.model.config, self.unitok.config.num_register_tokens
        return TokenLayout.from_config(config.token_layout, config.num_image_tokens, registers)

    # ---- text -> images ----

    def generate(
        self,
        prompts: Sequence[str] | None = None,
        sampling: Sampling | None = None,
        seed: int | Sequence[int] = 0,
        batch_size: int = 64,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        num_images: int = 1,
        prefix: Tensor | None = None,
        classes: Sequence[int] | None = None,
    ) -> list[Image.Image]:
        """Generate `num_images` images per prompt or class, in their order.

        Args:
            prompts: texts; None with a class-conditional model.
            sampling: None = the model's own settings.
            seed: seed of the first image, incremented for the others; or a list with one seed per image.
            batch_size: images generated together; an image depends only on its own prompt and seed.
            negative_prompt: replaces the unconditional prompt of classifier-free guidance; one text for all
                prompts or one per prompt.
            num_images: >= 1.
            prefix: (1 or B, n, K) codes of the first n visual tokens; see `first_rows`.
            classes: integers below the number of classes, for a class-conditional model.

        Raises:
            UserError: an empty or over-long prompt; a seed, number or prefix that is not valid.
        """
        options = {"negative_prompt": negative_prompt, "num_images": num_images, "prefix": prefix}
        options["classes"] = classes
        codes = self.generate_codes(prompts, sampling, seed, batch_size, **options)
        return [image for part in codes.split(batch_size) for image in self.decode(part)]

    def generate_codes(
        self,
        prompts: Sequence[str] | None = None,
        sampling: Sampling | None = None,
        seed: int | Sequence[int] = 0,
        batch_size: int = 64,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        num_images: int = 1,
        prefix: Tensor | None = None,
        classes: Sequence[int] | None = None,
    ) -> Tensor:
        """The codes (B, N, K) of the images; arguments and errors as `generate`."""
        check_whole("batch_size", batch_size)
        sampling = sampling or self.sampling
        ids, unconditional, seeds = image_prompts(
            self.processor, prompts, negative_prompt, seed, num_images, classes
        )
        if prefix is not None:
            check_prefix(prefix, len(ids), self.model.config)
        parts = []
        for i in range(0, len(ids), batch_size):
            batch = slice(i, i + batch_size)
            own_prefix = prefix if prefix is None or len(prefix) == 1 else prefix[batch]
            without = unconditional and unconditional[batch]
            arguments = (ids[batch], sampling, seeds[batch], without, own_prefix)
            parts.append(generate_image_codes(self.model, *arguments, self.backend))
        return torch.cat(parts) if parts else self._no_codes()

    def prompt_ids(self, prompts: Sequence[str], name: str = "Prompt") -> list[list[int]]:
        """The ids of text-to-image prompts, each ending in boi.

        Raises:
            UserError: a prompt that the processor would truncate.
        """
        return prompt_ids(self.processor, prompts, name)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> list[Image.Image]:
        """Codes (B, N, K) -> B images."""
        pixels = self.unitok.decode(codes, self.layout.grid).float().cpu() if len(codes) else ()
        return [to_pil(image) for image in pixels]

    def stream(
        self,
        prompts: Sequence[str] | None = None,
        sampling: Sampling | None = None,
        seed: int | Sequence[int] = 0,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        num_images: int = 1,
        prefix: Tensor | None = None,
        classes: Sequence[int] | None = None,
    ) -> Iterator[list[Image.Image]]:
        """Yield previews of one batch after every complete row of visual tokens, grey below.

        The last ones equal the result of `generate`. Closing the iterator stops generation. Arguments and
        errors as `generate`.
        """
        ids, unconditional, seeds = image_prompts(
            self.processor, prompts, negative_prompt, seed, num_images, classes
        )
        sampling, layout = sampling or self.sampling, self.layout
        steps = iter_image_codes(self.model, ids, sampling, seeds, unconditional, prefix, self.backend)

        # an inner generator: arguments are checked by the call of `stream`, not by the first step
        def previews() -> Iterator[list[Image.Image]]:
            for codes in steps if ids else ():
                if codes.shape[1] in layout.row_ends:
                    yield self.preview(codes)

        return previews()

    def preview(self, codes: Tensor) -> list[Image.Image]:
        """Images of the complete rows of the first codes (B, n, K); grey below."""
        layout = self.layout
        missing = layout.num_tokens - codes.shape[1]
        if not missing:
            return self.decode(codes)
        # the pixel decoder needs a full grid: pad with copies of the last token
        images = self.decode(torch.cat([codes, codes[:, -1:].expand(-1, missing, -1)], dim=1))
        for image in images:
            top = layout.complete_rows(codes.shape[1]) * self.unitok.config.patch_size
            image.paste((128, 128, 128), (0, top, image.width, image.height))
        return images

    @torch.no_grad()
    def first_rows(self, images: Sequence[ImageSource], rows: int) -> Tensor:
        """Codes (I, n, K) of the first `rows` rows of visual tokens of images, for `generate(prefix=...)`.

        The images are cropped to the shape of generated ones; register tokens come first.

        Raises:
            UserError: a file is missing or not an image; `rows` is not in 1 .. (rows of an image) - 1.
        """
        layout, config = self.layout, self.unitok.config
        if layout.tokens:
            raise UserError(
                f"The {layout.tokens} visual tokens of an image have no rows: give their codes as prefix."
            )
        if not isinstance(rows, int) or isinstance(rows, bool) or not 1 <= rows < layout.rows:
            raise UserError(f"rows is {rows!r}; it must be a whole number from 1 to {layout.rows - 1}.")
        shape = (layout.rows * config.patch_size, layout.columns * config.patch_size)
        pixels = torch.stack([to_pixels(load_image(image, needed=shape), shape) for image in images])
        return self.unitok.encode(pixels.to(self.unitok.device))[:, : layout.tokens_of_rows(rows)]

    # ---- images and questions -> text ----

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
        """Answer each question.

        Args:
            images: one entry per question: an image (PIL, path or bytes), a list of several, or None.
                Repeated images (same object or path) are encoded once.
            max_new_tokens: maximum length of an answer.
            batch_size: questions answered together.
            histories: per question the earlier (question, answer) pairs of its conversation. The images are
                then those of the conversation, at the `<image>` marks of its questions or before the first.
            seed: for options that sample; None = torch's global generator.
            options: of transformers' `generate`, such as do_sample=True, temperature=0.7; none = greedy.

        Raises:
            UserError: not one image entry per question, not an image, an empty or over-long question.
        """
        ids, read = self._question_prompts(images, questions, histories)
        new = generate_text_ids(
            self.model, ids, read, max_new_tokens, batch_size, seed, backend=self.backend, **options
        )
        return [self.processor.decode(row).strip() for row in new]

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
        """Yield one new piece of text per question and step, possibly empty; closing the iterator stops.

        In float32 the concatenated greedy pieces equal the result of `answer`.

        Args:
            do_sample: sample with temperature, top_k (0 = all) and top_p; else greedy.

        Raises:
            UserError: as `answer`; a number out of range.
        """
        ids, read = self._question_prompts(images, questions, histories)
        steps = iter_text_ids(
            self.model, ids, read, max_new_tokens, seed, do_sample, temperature, top_k, top_p, self.backend
        )
        return stream_text(self.processor, steps, len(ids))

    def chat(
        self,
        question: str,
        images: Any = None,
        history: History = (),
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> str:
        """Answer the next question of a conversation; options and errors as `answer`.

        Args:
            images: those of the whole conversation: an image, a list, or None.
            history: earlier (question, answer) pairs.
            max_new_tokens: None = 256, or the rest of the context if that is shorter.
        """
        max_new_tokens = chat_tokens(
            self.model.config.context_length, self.processor, question, images, history, max_new_tokens
        )
        return self.answer([images], [question], max_new_tokens, histories=[history], **options)[0]

    def chat_stream(
        self,
        question: str,
        images: Any = None,
        history: History = (),
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """Yield the answer of `chat` in pieces; options as `answer_stream`."""
        max_new_tokens = chat_tokens(
            self.model.config.context_length, self.processor, question, images, history, max_new_tokens
        )
        steps = self.answer_stream([images], [question], max_new_tokens, histories=[history], **options)
        return (pieces[0] for pieces in steps if pieces[0])

    def _question_prompts(
        self, images: Sequence[Any], questions: Sequence[str], histories: Sequence[History] | None
    ) -> tuple[list[list[int]], list[ReadImages]]:
        """The ids of each question, and its images."""
        ids, unique, places = question_prompts(self.processor, images, questions, histories)
        read = self.encode_for_reading(unique, batch_size=64)
        return ids, [read.select(own) for own in places]

    def encode_for_reading(self, images: Sequence[ImageSource], batch_size: int = 64) -> ReadImages:
        """Input images of questions: padded to the aspect ratio, then scaled; their features as well."""
        parts = [self.processor.read_images(batch) for batch in split_batches(images, batch_size)]
        if not parts:
            return ReadImages(self._no_codes())
        features = [part.features for part in parts if part.features is not None]
        return ReadImages(
            torch.cat([part.codes for part in parts]), torch.cat(features) if features else None
        )

    # ---- images -> images ----

    def reconstruct(self, images: Sequence[ImageSource], batch_size: int = 16) -> list[Image.Image]:
        """Crop each image to the tokenizer's training size, encode and decode it."""
        return [decoded for _, decoded in iter_reconstructions(self.unitok, images, batch_size)]

    def _no_codes(self) -> Tensor:
        """(0, N, K)."""
        shape = (0, self.model.config.num_image_tokens, self.model.config.num_codebooks)
        return torch.empty(shape, dtype=torch.long, device=self.device)
