"""Validated requests to tasks: messages to ids, URLs to images, checks of lengths.

Runs on a separate thread; an invalid request raises `UserError` before it is queued.
"""

import base64
import binascii
import secrets
from pathlib import Path
from urllib.parse import unquote, urlsplit

from PIL import Image

from open_unitok.core.errors import UserError
from open_unitok.mllm.prompts import IMAGE_MARK
from open_unitok.tokenizer.images import to_pil

from ..image_files import open_image
from ..pipeline import Pipeline
from ..sampling import check_seed
from ..validation import check_prompts, check_texts
from .schema import MAX_IMAGES, ChatRequest, ImagePart, ImageRequest, Message
from .worker import AnswerKey, AnswerTask, ImageKey, ImageTask

_DEFAULT_NEW_TOKENS = 256


class RequestParser:
    """Turns validated requests into tasks for one pipeline.

    Args:
        max_side: maximum longer side of an image in pixels; it determines the cost, because images are
            padded.
        files: the folder that file: URLs may read; None = file: URLs are rejected.
        max_new_tokens: of one answer.
    """

    def __init__(
        self, pipe: Pipeline, max_side: int = 8192, files: Path | None = None, max_new_tokens: int = 1024
    ):
        self.pipe, self.max_side, self.max_new_tokens = pipe, max_side, max_new_tokens
        self.files = None if files is None else files.resolve()
        self.context = pipe.model.config.context_length
        layout, patch_size = pipe.layout, pipe.unitok.config.patch_size
        self.output_size = f"{layout.columns * patch_size}x{layout.rows * patch_size}"  # width x height

    def parse_chat(self, request: ChatRequest) -> tuple[AnswerKey, AnswerTask]:
        """
        Raises:
            UserError: the order of roles is not valid, an image is not readable, or there are too many
                tokens.
        """
        questions, answers, urls = parse_chat_messages(request.messages)
        if len(urls) > MAX_IMAGES:
            raise UserError(f"The conversation has {len(urls)} images; at most {MAX_IMAGES} are allowed.")
        processor = self.pipe.processor
        ids = processor.question_ids(questions[-1], len(urls), history=list(zip(questions, answers)))
        # without a context limit only the server's limit applies
        available = self.max_new_tokens if self.context is None else self.context - len(ids)
        limit = request.limit or max(1, min(_DEFAULT_NEW_TOKENS, available, self.max_new_tokens))
        if limit > self.max_new_tokens:
            raise UserError(f"max_tokens is {limit}; this server allows at most {self.max_new_tokens}.")
        if limit > available:
            raise UserError(
                f"The conversation has {len(ids)} tokens with its images; {limit} new ones exceed the "
                f"model's context of {self.context}: shorten the conversation or lower max_tokens."
            )
        images = [self.load_image_url(url) for url in urls]
        temperature = request.temperature or 0.0
        key = AnswerKey()  # greedy
        if temperature > 0:
            # object() is equal only to itself: an answer with a seed shares no batch
            key = AnswerKey(
                True, max(temperature, 0.01), request.top_k or 0, request.top_p or 1.0, request.seed,
                object() if request.seed is not None else None,
            )  # fmt: skip
        return key, AnswerTask(ids, images, limit, [stop for stop in request.stops if stop])

    def parse_image(self, request: ImageRequest) -> tuple[ImageKey, list[ImageTask]]:
        """
        Raises:
            UserError: the prompt is empty or too long, or the model does not generate this size.
        """
        allowed = (None, "auto", self.output_size)
        if request.size not in allowed:
            raise UserError(f"size is {request.size!r}; this model generates {self.output_size} ('auto').")
        if request.stream and (request.n or 1) > 1:
            raise UserError("stream needs n = 1: one image per stream.")
        ids = self._ids(request.prompt, "Prompt")
        # a negative prompt replaces the unconditional prompt of classifier-free guidance
        unconditional_ids = self.pipe.processor.unconditional_ids()
        if request.negative_prompt:
            unconditional_ids = self._ids(request.negative_prompt, "Negative prompt")
        # a random seed is returned with the image, so that the image can be reproduced
        first = secrets.randbelow(2**32) if request.seed is None else request.seed
        seeds = [check_seed(first + i) for i in range(request.n or 1)]
        previews = self._preview_rows(request.partial_images or 0) if request.stream else frozenset()
        return ImageKey(self.pipe.sampling.override(request.model_dump())), [
            ImageTask(ids, unconditional_ids, seed, previews) for seed in seeds
        ]

    def _ids(self, text: str, name: str) -> list[int]:
        check_texts([text], name.lower())
        rows = self.pipe.prompt_ids([text], name)
        check_prompts(rows, [0], self.pipe.model.config, name)
        return rows[0]

    def _preview_rows(self, previews: int) -> frozenset[int]:
        """The rows after which a preview is sent, evenly spaced, without the last row."""
        rows = self.pipe.layout.rows
        previews = min(previews, rows - 1)
        return frozenset(round(rows * (i + 1) / (previews + 1)) for i in range(previews)) - {0, rows}

    def load_image_url(self, url: str) -> Image.Image:
        """The image of a data: or allowed file: URL, padded and scaled to the model's input size.

        Raises:
            UserError: the URL is not allowed, or is not an image within the limits.
        """
        is_file = self.files is not None and url.startswith("file:")
        data = self._read_file_url(url) if is_file else read_data_url(url)
        # Scale now: full-size images in the queue would need much memory. Preprocessing on the model's thread
        # is then the identity.
        return to_pil(self.pipe.processor.pixels(open_image(data, self.max_side)))

    def _read_file_url(self, url: str) -> bytes:
        assert self.files is not None
        path = Path(unquote(urlsplit(url).path))
        rejected = UserError("image_url is a file outside the folder that this server may read.")
        if "\0" in str(path):  # resolve() would raise ValueError
            raise rejected
        # resolve before the check: absolute paths, `..` and links may point outside the folder
        path = (self.files / path).resolve()
        if not path.is_relative_to(self.files) or not path.is_file():
            raise rejected
        return path.read_bytes()


def parse_chat_messages(messages: list[Message]) -> tuple[list[str], list[str], list[str]]:
    """Messages -> questions with image marks, the answers to all but the last one, and image URLs in order.

    System messages are put before the first question: the models are trained without a system role.

    Raises:
        UserError: user and assistant do not alternate, or a message has no text or images it may not have.
    """
    system: list[str] = []
    questions: list[str] = []
    answers: list[str] = []
    urls: list[str] = []
    for i, message in enumerate(messages):
        parts = message.parts()
        images = [part.image_url.url for part in parts if isinstance(part, ImagePart)]
        text = "\n".join(part.text for part in parts if not isinstance(part, ImagePart)).strip()
        if IMAGE_MARK in text:  # would be counted as an image
            raise UserError(
                f"messages[{i}] has the text {IMAGE_MARK}, which is reserved for images: rephrase it."
            )
        if message.role != "user" and images:
            raise UserError(
                f"messages[{i}] has role {message.role} and images; only user messages may have images."
            )
        if message.role in ("system", "developer"):
            if questions:
                raise UserError(f"messages[{i}] has role {message.role}; such messages must come first.")
            system.append(text)
            continue
        if not text:
            raise UserError(f"messages[{i}] has no text.")
        # a user message is due whenever every question so far has an answer
        if (message.role == "user") != (len(questions) == len(answers)):
            raise UserError(
                f"messages[{i}] has role {message.role}; user and assistant must alternate, user first."
            )
        if message.role == "assistant":
            answers.append(text)
            continue
        prefix = "\n".join(filter(None, system)) + "\n" if any(system) and not questions else ""
        questions.append(f"{IMAGE_MARK}\n" * len(images) + prefix + text)
        urls += images
    if len(questions) != len(answers) + 1:
        raise UserError("The last message must have role user: there is nothing to answer.")
    return questions, answers, urls


def read_data_url(url: str) -> bytes:
    """Decode data:image/...;base64,...

    Raises:
        UserError: not a data: URL of an image, or invalid base64.
    """
    # URLs are never fetched: a server that fetches can be used to reach hosts behind its firewall
    head, comma, body = url.partition(",")
    if not head.startswith("data:image/") or not head.endswith(";base64") or not comma:
        raise UserError(
            "image_url must be data:image/png;base64,... (or jpeg, webp, gif, bmp): URLs are not fetched."
        )
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"image_url is not valid base64: {error}.") from error
