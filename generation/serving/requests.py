"""From a checked request to what the model's thread takes: images opened, texts as ids, lengths checked.

It runs on one thread beside the model's, and refuses with a `UserError` before anything is queued.
"""

import base64
import binascii
import secrets
from pathlib import Path
from urllib.parse import unquote, urlsplit

from PIL import Image

from open_unitok.core.errors import UserError
from open_unitok.mllm.prompts import IMAGE_MARK
from open_unitok.tokenizer.images import pad_to_square

from ..image_files import open_image
from ..image_sampling import check_prompts
from ..kv_cache import context_length
from ..pipeline import Pipeline
from ..sampling import check_seed
from ..validation import check_texts
from .schema import MAX_ROWS, ChatRequest, ImagePart, ImageRequest, Message
from .worker import AnswerKey, AnswerTask, DrawKey, DrawTask

DEFAULT_NEW_TOKENS = 256


class Inbox:
    """Prepares requests for one pipeline.

    Args:
        max_side: pixels; an image is padded to a square, so its longer side decides what it costs.
        files: the folder from which file: URLs may be read; None = no file at all.
        max_new_tokens: of one answer.
    """

    def __init__(
        self, pipe: Pipeline, max_side: int = 8192, files: Path | None = None, max_new_tokens: int = 1024
    ):
        self.pipe, self.max_side, self.max_new_tokens = pipe, max_side, max_new_tokens
        self.files = None if files is None else files.resolve()
        self.context = context_length(pipe.model.config)
        self.image_size = pipe.unitok.config.image_size

    def chat(self, request: ChatRequest) -> tuple[AnswerKey, AnswerTask]:
        """
        Raises:
            UserError: turns in a wrong order, an image that cannot be read, too many tokens.
        """
        questions, answers, urls = read_turns(request.messages)
        if len(urls) > MAX_ROWS:
            raise UserError(f"The conversation has {len(urls)} images; at most {MAX_ROWS} are allowed.")
        processor = self.pipe.processor
        ids = processor.question_ids(questions[-1], len(urls), history=list(zip(questions, answers)))
        room = self.max_new_tokens if self.context is None else self.context - len(ids)
        limit = request.limit or max(1, min(DEFAULT_NEW_TOKENS, room, self.max_new_tokens))
        if limit > self.max_new_tokens:
            raise UserError(f"max_tokens is {limit}; this server writes at most {self.max_new_tokens}.")
        if limit > room:
            raise UserError(
                f"The conversation has {len(ids)} tokens, images included; with {limit} new ones more than "
                f"the context of {self.context}: shorten it or lower max_tokens."
            )
        images = [self.open(url) for url in urls]
        temperature = request.temperature or 0.0
        key = AnswerKey()
        if temperature > 0:
            key = AnswerKey(
                True, max(temperature, 0.01), request.top_k or 0, request.top_p or 1.0, request.seed,
                object() if request.seed is not None else None,
            )  # fmt: skip
        return key, AnswerTask(ids, images, limit, [stop for stop in request.stops if stop])

    def drawing(self, request: ImageRequest) -> tuple[DrawKey, list[DrawTask]]:
        """
        Raises:
            UserError: an empty or over-long prompt, a size that the model does not draw.
        """
        allowed = (None, "auto", f"{self.image_size}x{self.image_size}")
        if request.size not in allowed:
            raise UserError(f"size is {request.size!r}; this model draws {allowed[2]} ('auto').")
        if request.stream and (request.n or 1) > 1:
            raise UserError("stream needs n = 1: one image a stream.")
        ids = self._ids(request.prompt, "Prompt")
        away = self.pipe.processor.unconditional_ids()
        if request.negative_prompt:
            away = self._ids(request.negative_prompt, "Negative prompt")
        first = secrets.randbelow(2**32) if request.seed is None else request.seed
        seeds = [check_seed(first + i) for i in range(request.n or 1)]
        shown = self._shown_rows(request.partial_images or 0) if request.stream else frozenset()
        return DrawKey(self.pipe.sampling.but(request.model_dump())), [
            DrawTask(ids, away, seed, shown) for seed in seeds
        ]

    def _ids(self, text: str, name: str) -> list[int]:
        check_texts([text], name.lower())
        rows = self.pipe.prompt_ids([text], name)
        check_prompts(rows, [0], self.pipe.model.config, name)
        return rows[0]

    def _shown_rows(self, previews: int) -> frozenset[int]:
        """The rows after which a preview is sent: `previews` of them, spread evenly, without the last."""
        registers = self.pipe.unitok.config.num_register_tokens
        rows = round((self.pipe.model.config.num_image_tokens - registers) ** 0.5)
        previews = min(previews, rows - 1)
        return frozenset(round(rows * (i + 1) / (previews + 1)) for i in range(previews)) - {0, rows}

    def open(self, url: str) -> Image.Image:
        """The image of a data: URL, as a square of the size that the model reads.

        Raises:
            UserError: it is no such URL, or no image within the limits.
        """
        data = self._file(url) if self.files is not None and url.startswith("file:") else read_data_url(url)
        image = pad_to_square(open_image(data, self.max_side))
        size = self.pipe.processor.image_size
        return image.resize((size, size), Image.Resampling.BILINEAR)  # as `processor.pixels` does it

    def _file(self, url: str) -> bytes:
        assert self.files is not None
        path = Path(unquote(urlsplit(url).path))
        refused = UserError("image_url names a file that is not in the folder that this server may read.")
        if "\0" in str(path):
            raise refused
        path = (self.files / path).resolve()  # an absolute path replaces the folder, a link is followed
        if not path.is_relative_to(self.files) or not path.is_file():
            raise refused
        return path.read_bytes()


def read_turns(messages: list[Message]) -> tuple[list[str], list[str], list[str]]:
    """Questions with image marks, the answers to all but the last, and the URLs of the images in order.

    What the system says goes before the first question: the models know no other place for it.

    Raises:
        UserError: user and assistant do not take turns, or a turn has no text.
    """
    system: list[str] = []
    questions: list[str] = []
    answers: list[str] = []
    urls: list[str] = []
    for i, message in enumerate(messages):
        parts = message.parts()
        images = [part.image_url.url for part in parts if isinstance(part, ImagePart)]
        text = "\n".join(part.text for part in parts if not isinstance(part, ImagePart)).strip()
        if IMAGE_MARK in text:
            raise UserError(
                f"messages[{i}] holds the text {IMAGE_MARK}, which marks images: write it otherwise."
            )
        if message.role != "user" and images:
            raise UserError(f"messages[{i}] is of the {message.role} and shows images; only the user may.")
        if message.role in ("system", "developer"):
            if questions:
                raise UserError(f"messages[{i}] is of the {message.role}; such messages must come first.")
            system.append(text)
            continue
        if not text:
            raise UserError(f"messages[{i}] has no text.")
        if (message.role == "user") != (len(questions) == len(answers)):
            raise UserError(
                f"messages[{i}] is of the {message.role}; user and assistant must take turns, the user first."
            )
        if message.role == "assistant":
            answers.append(text)
            continue
        before = "\n".join(filter(None, system)) + "\n" if any(system) and not questions else ""
        questions.append(f"{IMAGE_MARK}\n" * len(images) + before + text)
        urls += images
    if len(questions) != len(answers) + 1:
        raise UserError("The last message must be of the user: there is nothing to answer.")
    return questions, answers, urls


def read_data_url(url: str) -> bytes:
    """The bytes of data:image/...;base64,...

    Raises:
        UserError: it is no such URL.
    """
    head, comma, body = url.partition(",")
    if not head.startswith("data:image/") or not head.endswith(";base64") or not comma:
        raise UserError(
            "image_url must be data:image/png;base64,... (or jpeg, webp, gif, bmp): nothing is fetched."
        )
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"image_url holds no valid base64: {error}.") from error
