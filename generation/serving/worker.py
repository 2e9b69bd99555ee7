"""Run batches of images or answers step by step, on the model's thread."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

from PIL import Image

from open_unitok.core.devices import set_device

from ..image_sampling import iter_image_codes
from ..pipeline import Pipeline
from ..sampling import Sampling
from ..text_generation import iter_text_ids
from .batcher import Job

_DECODE_BATCH_SIZE = 8  # images per step of the pixel decoder; between steps the other batch runs


@dataclasses.dataclass(frozen=True)
class ImageKey:
    """Images with equal sampling settings share a batch; prompts and seeds may differ."""

    sampling: Sampling
    kind: ClassVar[str] = "image"


@dataclasses.dataclass(frozen=True)
class AnswerKey:
    """Answers with equal sampling settings share a batch; an answer with a seed has its own batch."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    request: object = None  # unique if there is a seed: other rows would use random numbers of the generator
    kind: ClassVar[str] = "answer"


class ImageTask(NamedTuple):
    """One image to generate.

    Attributes:
        prompt_ids, unconditional_ids: conditional and unconditional prompt of classifier-free guidance.
        preview_rows: numbers of complete rows of visual tokens after which a preview is sent.
    """

    prompt_ids: list[int]
    unconditional_ids: list[int]
    seed: int
    preview_rows: frozenset[int] = frozenset()


class AnswerTask(NamedTuple):
    """One answer to generate: ids with placeholders for the images, images, length limit, stop texts."""

    prompt_ids: list[int]
    images: list[Image.Image]
    max_new_tokens: int
    stop: Sequence[str] = ()


class Completion(NamedTuple):
    """A finished answer; `finish_reason` is "stop" or "length"."""

    text: str
    finish_reason: str
    tokens: int


class ModelWorker:
    """The `run_batch` of a `Batcher` for one pipeline."""

    def __init__(self, pipe: Pipeline):
        self.pipe, self.layout = pipe, pipe.layout

    def __call__(self, jobs: list[Job]) -> Iterator[None]:
        """Run one batch; see `Batcher`."""
        set_device(self.pipe.device)  # of the batcher's thread
        return self.generate(jobs) if isinstance(jobs[0].key, ImageKey) else self.answer(jobs)

    def generate(self, jobs: list[Job]) -> Iterator[None]:
        """Generate a batch of images; send each job its requested previews, then its image."""
        pipe, key = self.pipe, jobs[0].key
        assert isinstance(key, ImageKey)
        tasks: list[ImageTask] = [job.task for job in jobs]
        steps = iter_image_codes(
            pipe.model,
            [task.prompt_ids for task in tasks],
            key.sampling,
            [task.seed for task in tasks],
            [task.unconditional_ids for task in tasks],
            backend=pipe.backend,
        )
        codes = None
        for codes in steps:
            self._send_previews(jobs, codes)
            yield
        assert codes is not None
        # the pixel decoder needs more memory per image than the language model: decode in parts
        for start in range(0, len(jobs), _DECODE_BATCH_SIZE):
            part = [i for i in range(start, min(start + _DECODE_BATCH_SIZE, len(jobs))) if jobs[i].pending]
            for i, image in zip(part, pipe.decode(codes[part])):
                jobs[i].finish(image)
            yield

    def _send_previews(self, jobs: list[Job], codes: Any) -> None:
        """Decode the rows so far for the jobs that request a preview here; codes (B, n, K)."""
        rows = self.layout.complete_rows(codes.shape[1])
        if codes.shape[1] != self.layout.tokens_of_rows(rows):  # within a row, or within the registers
            return
        wanted = [i for i, job in enumerate(jobs) if rows in job.task.preview_rows and job.pending]
        if wanted:
            for i, image in zip(wanted, self.pipe.preview(codes[wanted])):
                jobs[i].send_partial(image)

    def answer(self, jobs: list[Job]) -> Iterator[None]:
        """Generate a batch of answers; send each job its text in pieces, then the `Completion`."""
        for group in group_by_context(jobs, self.pipe.model.config.context_length):
            yield from self._answer_group(group)

    def _answer_group(self, jobs: list[Job]) -> Iterator[None]:
        pipe, key = self.pipe, jobs[0].key
        assert isinstance(key, AnswerKey)
        tasks: list[AnswerTask] = [job.task for job in jobs]
        # encode the images of all answers together
        images = pipe.encode_for_reading([image for task in tasks for image in task.images])
        detokenizers = [IncrementalDetokenizer(pipe.processor, task) for task in tasks]
        steps = iter_text_ids(
            pipe.model,
            [task.prompt_ids for task in tasks],
            images.split([len(task.images) for task in tasks]),
            max(task.max_new_tokens for task in tasks),
            **{name: getattr(key, name) for name in ("seed", "do_sample", "temperature", "top_k", "top_p")},
            backend=pipe.backend,
        )
        for new_ids in steps:
            # finished and cancelled rows stay in the batch until all are
            for job, detokenizer, token_id in zip(jobs, detokenizers, new_ids):
                if job.pending:
                    if text := detokenizer.add(token_id):
                        job.send_partial(text)
                    if detokenizer.finish_reason:
                        job.finish(detokenizer.completion())
            yield
            if not any(job.pending for job in jobs):
                return
        # answers that ended with eos: `steps` ends when all have
        for job, detokenizer in zip(jobs, detokenizers):
            if job.pending:
                if text := detokenizer.add(None):
                    job.send_partial(text)
                job.finish(detokenizer.completion())


class IncrementalDetokenizer:
    """Turns the ids of one answer into pieces of text, until a stop text or the length limit.

    Attributes:
        finish_reason: None while the answer continues, then "stop" or "length".
    """

    def __init__(self, processor: Any, task: AnswerTask):
        self.processor, self.task = processor, task
        self.ids: list[int] = []
        self.text = ""  # sent so far
        self.finish_reason: str | None = None

    def add(self, token_id: int | None) -> str:
        """Append an id, or None at eos; returns the new text that later ids cannot change."""
        if token_id is None:
            self.finish_reason = "stop"
        else:
            self.ids.append(token_id)
            if len(self.ids) >= self.task.max_new_tokens:
                self.finish_reason = "length"
        text = self.processor.decode(self.ids).strip()
        # search the whole text: a stop text may span several pieces
        found = [start for stop in self.task.stop if (start := text.find(stop)) >= 0]
        if found:
            text, self.finish_reason = text[: min(found)].rstrip(), "stop"
        if not self.finish_reason:
            # hold back an incomplete character and a possible prefix of a stop text
            text = self._without_stop_prefix(self.processor.decode_settled(self.ids).strip())
        new = text[len(self.text) :]
        self.text = text if len(text) > len(self.text) else self.text
        return new

    def _without_stop_prefix(self, text: str) -> str:
        """The text without a suffix that may be the beginning of a stop text."""
        held = max(
            (n for stop in self.task.stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
        )
        return text[: len(text) - held]

    def completion(self) -> Completion:
        """The finished answer."""
        return Completion(self.text, self.finish_reason or "stop", len(self.ids))


def group_by_context(jobs: Sequence[Job], context: int | None) -> list[list[Job]]:
    """Groups in which the longest prompt plus the longest answer fit the context; usually one group.

    Prompts are padded to the longest of the batch, and all rows decode as many steps as the longest answer.
    """
    groups: list[list[Job]] = []
    # sorted by length, so that the current job has the longest prompt of its group
    for job in sorted(jobs, key=lambda job: len(job.task.prompt_ids)):
        for group in groups:
            limit = max(other.task.max_new_tokens for other in [*group, job])
            if context is None or len(job.task.prompt_ids) + limit <= context:
                group.append(job)
                break
        else:
            groups.append([job])
    return groups
