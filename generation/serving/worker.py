"""What the model's thread does for the server: a batch of images, or a batch of answers, step by step."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

from PIL import Image

from ..image_sampling import iter_image_codes
from ..kv_cache import context_length
from ..pipeline import Pipeline
from ..sampling import Sampling
from ..text_generation import iter_text_ids
from .batcher import Job, is_open

DECODED_TOGETHER = 8  # images; between such parts others get their turn


@dataclasses.dataclass(frozen=True)
class DrawKey:
    """Images with the same settings share a batch; prompts and seeds may differ."""

    sampling: Sampling
    kind: ClassVar[str] = "draw"


@dataclasses.dataclass(frozen=True)
class AnswerKey:
    """Answers with the same settings share a batch; one with a seed of its own is alone in its."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    request: object = None
    kind: ClassVar[str] = "answer"


class DrawTask(NamedTuple):
    """One image: ids to draw from, ids to lead away from, its seed, and after which rows to show it."""

    ids: list[int]
    away: list[int]
    seed: int
    shown_rows: frozenset[int] = frozenset()


class AnswerTask(NamedTuple):
    """One answer: ids with places for the images, the images, and where to end."""

    ids: list[int]
    images: list[Image.Image]
    limit: int
    stops: Sequence[str] = ()


class Answer(NamedTuple):
    """A finished answer; `reason` is "stop" or "length"."""

    text: str
    reason: str
    tokens: int


class Work:
    """The `work` of a `Batcher` around one pipeline."""

    def __init__(self, pipe: Pipeline):
        self.pipe = pipe

    def __call__(self, jobs: list[Job]) -> Iterator[None]:
        """One batch; see `Batcher`."""
        return self.draw(jobs) if isinstance(jobs[0].key, DrawKey) else self.answer(jobs)

    def draw(self, jobs: list[Job]) -> Iterator[None]:
        """Images of one batch; a job is sent previews where it asks for them, then its image."""
        pipe, tasks = self.pipe, [job.payload for job in jobs]
        count, registers = pipe.model.config.num_image_tokens, pipe.unitok.config.num_register_tokens
        columns = round((count - registers) ** 0.5)
        ids, away, seeds = ([task[i] for task in tasks] for i in range(3))
        codes = None
        key = jobs[0].key
        assert isinstance(key, DrawKey)
        for codes in iter_image_codes(pipe.model, ids, key.sampling, seeds, away, weights=pipe.weights):
            row, rest = divmod(codes.shape[1] - registers, columns)
            showing = [
                i for i, job in enumerate(jobs) if not rest and row in tasks[i].shown_rows and is_open(job)
            ]
            if showing:
                for i, image in zip(showing, pipe.preview(codes[showing], count, row)):
                    jobs[i].send(image)
            yield
        assert codes is not None
        for start in range(0, len(jobs), DECODED_TOGETHER):
            part = [i for i in range(start, min(start + DECODED_TOGETHER, len(jobs))) if is_open(jobs[i])]
            for i, image in zip(part, pipe.decode(codes[part])):
                jobs[i].finish(image)
            yield

    def answer(self, jobs: list[Job]) -> Iterator[None]:
        """Answers of one batch; a job is sent the pieces of its text, then the whole."""
        for group in groups_within(jobs, context_length(self.pipe.model.config)):
            yield from self._answer(group)

    def _answer(self, jobs: list[Job]) -> Iterator[None]:
        pipe, key = self.pipe, jobs[0].key
        assert isinstance(key, AnswerKey)
        tasks: list[AnswerTask] = [job.payload for job in jobs]
        codes = pipe.encode_for_reading([image for task in tasks for image in task.images])
        parts = codes.split([len(task.images) for task in tasks])
        writers = [Writer(pipe.processor, task) for task in tasks]
        steps = iter_text_ids(
            pipe.model,
            [task.ids for task in tasks],
            parts,
            max(task.limit for task in tasks),
            **{name: getattr(key, name) for name in ("seed", "do_sample", "temperature", "top_k", "top_p")},
        )
        for new in steps:
            for job, writer, token in zip(jobs, writers, new):
                if is_open(job):
                    if piece := writer.add(token):
                        job.send(piece)
                    if writer.reason:
                        job.finish(writer.answer())
            yield
            if not any(map(is_open, jobs)):
                return
        for job, writer in zip(jobs, writers):
            if is_open(job):
                if piece := writer.add(None):
                    job.send(piece)
                job.finish(writer.answer())


class Writer:
    """Turns the ids of one answer into text, piece by piece, up to its end.

    Attributes:
        reason: None while it goes on, then "stop" or "length".
    """

    def __init__(self, processor: Any, task: AnswerTask):
        self.processor, self.task = processor, task
        self.ids: list[int] = []
        self.shown = ""
        self.reason: str | None = None

    def add(self, token: int | None) -> str:
        """Take the next id, or None at the end; the new text that is certain to stay."""
        if token is None:
            self.reason = "stop"
        else:
            self.ids.append(token)
            if len(self.ids) >= self.task.limit:
                self.reason = "length"
        text = self.processor.decode(self.ids).strip()
        found = [place for stop in self.task.stops if (place := text.find(stop)) >= 0]
        if found:
            text, self.reason = text[: min(found)].rstrip(), "stop"
        if not self.reason:
            text = self._certain(self.processor.decode_settled(self.ids).strip())
        new = text[len(self.shown) :]
        self.shown = text if len(text) > len(self.shown) else self.shown
        return new

    def _certain(self, text: str) -> str:
        """The text without what may become a stop text."""
        held = max(
            (n for stop in self.task.stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
        )
        return text[: len(text) - held]

    def answer(self) -> Answer:
        """The whole; call it at the end."""
        return Answer(self.shown, self.reason or "stop", len(self.ids))


def groups_within(jobs: Sequence[Job], context: int | None) -> list[list[Job]]:
    """The jobs in groups whose longest prompt leaves room for their longest answer: nearly always one."""
    groups: list[list[Job]] = []
    for job in sorted(jobs, key=lambda job: len(job.payload.ids)):
        for group in groups:
            limit = max(other.payload.limit for other in [*group, job])
            if context is None or len(job.payload.ids) + limit <= context:
                group.append(job)
                break
        else:
            groups.append([job])
    return groups
