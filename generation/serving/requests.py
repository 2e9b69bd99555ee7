"""Validated requests to tasks: messages to ids, checks of lengths, seeds.

Runs on a separate thread; an invalid request raises `UserError` before it is queued.
"""

import dataclasses
import secrets
from collections.abc import Sequence

from PIL import Image

from open_unitok.core.errors import UserError
from open_unitok.mllm.prompts import IMAGE_MARK

from ..pipeline import Pipeline
from ..sampling import check_seed
from ..validation import check_prompts, check_texts
from .schema import MAX_IMAGES, ChatRequest, ImageRequest, Message
from .worker import AnswerKey, AnswerTask, ImageKey, ImageTask

_DEFAULT_NEW_TOKENS = 256


@dataclasses.dataclass
class Conversation:
    """A parsed chat request before its images are decoded.

    Attributes:
        ids: of the whole conversation, with placeholders for the images.
        urls: of the images, in their order.
        limit: new tokens.
    """

    request: ChatRequest
    ids: list[int]
    urls: list[str]
    limit: int

    def jobs(self, images: Sequence[Image.Image]) -> list[tuple[AnswerKey, AnswerTask]]:
        """Key and task of each of the n answers."""
        request, temperature = self.request, self.request.temperature or 0.0
        stops = [stop for stop in request.stops if stop]
        task = AnswerTask(self.ids, list(images), self.limit, stops)
        if temperature == 0:  # greedy: the n answers are equal
            return [(AnswerKey(), task)] * (request.n or 1)
        keys = []
        for number in range(request.n or 1):
            seed = None if request.seed is None else check_seed(request.seed + number)
            # object() is equal only to itself: an answer with a seed shares no batch
            own = None if seed is None else object()
            settings = (max(temperature, 0.01), request.top_k or 0, request.top_p or 1.0)
            keys.append(AnswerKey(True, *settings, seed, own))
        return [(key, task) for key in keys]


class RequestParser:
    """Turns validated requests into tasks for one pipeline.

    Args:
        max_new_tokens: of one answer.
    """

    def __init__(self, pipe: Pipeline, max_new_tokens: int = 1024):
        self.pipe, self.max_new_tokens = pipe, max_new_tokens
        self.context = pipe.model.config.context_length
        layout, patch_size = pipe.layout, pipe.unitok.config.patch_size
        self.output_size = f"{layout.columns * patch_size}x{layout.rows * patch_size}"  # width x height

    def parse_chat(self, request: ChatRequest) -> Conversation:
        """
        Raises:
            UserError: the messages are not a conversation, or there are too many tokens.
        """
        questions, answers, urls = parse_chat_messages(request.messages)
        if len(urls) > MAX_IMAGES:
            raise UserError(f"The conversation has {len(urls)} images; at most {MAX_IMAGES} are allowed.")
        processor = self.pipe.processor
        ids = processor.question_ids(questions[-1], len(urls), history=list(zip(questions, answers)))
        # without a context limit only the server's limit applies
        available = self.max_new_tokens if self.context is None else self.context - len(ids)
        name = "max_completion_tokens" if request.max_completion_tokens else "max_tokens"
        limit = request.limit or max(1, min(_DEFAULT_NEW_TOKENS, available, self.max_new_tokens))
        if limit > self.max_new_tokens:
            raise UserError(f"{name} is {limit}; this server allows at most {self.max_new_tokens}.")
        if limit > available:
            raise UserError(
                f"messages has {len(ids)} tokens with its images; {limit} new ones exceed the "
                f"model's context of {self.context}: shorten the conversation or lower {name}."
            )
        return Conversation(request, ids, urls, limit)

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


def parse_chat_messages(messages: Sequence[Message]) -> tuple[list[str], list[str], list[str]]:
    """Messages -> questions with image marks, the answers to all but the last one, and image URLs in order.

    The models know questions and answers only. Neighbouring messages of one side are one turn; system
    messages belong to the question that follows, or to the last one.

    Raises:
        UserError: the last turn is not a question or is empty, or a message has images it may not have.
    """
    turns: list[tuple[bool, list[str]]] = []  # (is an answer, texts)
    marks: list[int] = []  # images per turn
    urls: list[str] = []
    for i, message in enumerate(messages):
        text, images = message.text.strip(), message.image_urls
        if IMAGE_MARK in text:  # would be counted as an image
            raise UserError(
                f"messages[{i}] has the text {IMAGE_MARK}, which is reserved for images: rephrase it."
            )
        if message.role != "user" and images:
            raise UserError(
                f"messages[{i}] has role {message.role} and images; only user messages may have images."
            )
        is_answer = message.role == "assistant"
        if not turns and is_answer:  # a greeting: an answer without a question
            turns.append((False, []))
            marks.append(0)
        if not turns or turns[-1][0] != is_answer:
            turns.append((is_answer, []))
            marks.append(0)
        turns[-1][1].append(text)
        marks[-1] += len(images)
        urls += images
    last = len(messages) - 1
    if turns[-1][0]:
        raise UserError(f"messages[{last}] has role assistant; the last message must have role user.")
    if not any(turns[-1][1]) and not marks[-1]:
        raise UserError(f"messages[{last}] has no text and no image: there is nothing to answer.")
    texts = [
        f"{IMAGE_MARK}\n" * count + "\n".join(filter(None, parts)) for (_, parts), count in zip(turns, marks)
    ]
    return texts[::2], texts[1::2], urls
