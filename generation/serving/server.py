"""The state of one server: pipeline, job queue, metrics, and the threads that parse and decode."""

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from fastapi import Request

from ..pipeline import Pipeline
from .batcher import Batcher, Job, ShuttingDown
from .body_reader import BodyReader
from .image_urls import ImageLoader
from .limits import Limits
from .metrics import ServerMetrics
from .request_body import parse_body
from .requests import Conversation, RequestParser
from .schema import ChatRequest, ImageRequest
from .worker import AnswerKey, AnswerTask, ModelWorker

_Result = TypeVar("_Result")
_Request = TypeVar("_Request", ChatRequest, ImageRequest)
_LIGHT_PIXELS = 4 * 2**20  # images of a request up to this need no decoder thread: some 0.1 s


class ClientDisconnected(Exception):
    """The client closed the connection before the response."""


class UnknownModel(Exception):
    """The request names a model that is not served."""


class Server:
    """One pipeline with a queue.

    Args:
        name: the model's name in the API.
        files: the folder that file: URLs may read; None = file: URLs are rejected.
    """

    def __init__(self, pipe: Pipeline, name: str, limits: Limits, files: Path | None = None):
        self.name, self.limits, self.created = name, limits, int(time.time())
        self.parser = RequestParser(pipe, limits.max_new_tokens)
        max_pixels = max(limits.max_pixels, limits.max_side**2)
        self.images = ImageLoader(pipe.processor, limits.max_side, max_pixels, limits.max_body, files)
        # lambdas, because metrics and batcher refer to each other
        self.metrics = ServerMetrics(lambda: self.batcher.waiting, lambda: self.batcher.running)
        self.batcher = Batcher(
            ModelWorker(pipe),
            limits.max_batch_size,
            limits.max_queue_size,
            limits.batch_window,
            lambda kind, size: self.metrics.batch_rows.labels(kind).observe(size),
        )
        self.draining = asyncio.Event()
        self.bodies = BodyReader(limits)
        # few threads: parsing and decoding must not compete with the model for the CPU. Large images have
        # their own, so that texts and small images do not wait for them.
        self.executor = ThreadPoolExecutor(2, thread_name_prefix="unitok-parser")
        self.decoders = ThreadPoolExecutor(
            max(1, min(4, (os.cpu_count() or 1) // 2)), thread_name_prefix="unitok-decoder"
        )

    def drain(self) -> None:
        """Answer requests that wait with 503 and finish those that run (called on the event loop)."""
        self.draining.set()
        self.bodies.drain()
        self.batcher.drain()

    def close(self) -> None:
        """Stop the threads; pending jobs fail."""
        self.batcher.stop()
        for executor in (self.executor, self.decoders):
            executor.shutdown(wait=False, cancel_futures=True)

    async def read(self, request: Request, model: type[_Request]) -> _Request:
        """The validated body of a request.

        Raises:
            InvalidBody: see `parse_body`.
            UnknownModel: the request names another model.
        """
        # not `request.body`: it would keep the body as long as the request
        data = b"".join([chunk async for chunk in request.stream()])
        parsed = await self.run_in_thread(parse_body, data, request.headers.get("content-type", ""), model)
        self.check_model(parsed.model)
        return parsed

    async def parse_chat(self, body: ChatRequest) -> tuple[Conversation, list[tuple[AnswerKey, AnswerTask]]]:
        """The conversation and key and task of each of its answers; cancelling it stops the decoding.

        Raises:
            UserError: see `RequestParser.parse_chat` and `ImageLoader`.
        """
        conversation = await self.run_in_thread(self.parser.parse_chat, body)
        contents, pixels = await self.run_in_thread(self.images.read, conversation.urls)
        cancelled = threading.Event()
        try:
            images = await asyncio.get_running_loop().run_in_executor(
                self.executor if pixels <= _LIGHT_PIXELS else self.decoders,
                self.images.decode,
                contents,
                cancelled,
            )
        finally:
            cancelled.set()  # a running thread ends after its current image
        return conversation, conversation.jobs(images)

    def check_model(self, name: str | None) -> None:
        """
        Raises:
            UnknownModel: `name` is not the served model.
        """
        if name is not None and name != self.name:
            raise UnknownModel(
                f"The model {name[:100]!r} does not exist; this server has only {self.name!r}."
            )

    async def run_in_thread(self, function: Callable[..., _Result], *arguments: Any) -> _Result:
        """Run a blocking function on a parser thread."""
        return await asyncio.get_running_loop().run_in_executor(self.executor, function, *arguments)

    @contextlib.contextmanager
    def submitted(self, jobs: Sequence[Job]) -> Iterator[None]:
        """Context manager: queue the jobs; at the end cancel those that are not finished.

        Raises:
            QueueFull, ShuttingDown: see `Batcher.submit`.
        """
        # outside the try: rejected jobs do not count as cancelled
        self.batcher.submit(jobs)
        try:
            yield
        finally:
            unfinished = sum(not job.finished for job in jobs)
            if unfinished:
                self.metrics.cancelled.inc(unfinished)
            for job in jobs:
                job.cancel()

    async def or_disconnect(
        self, request: Request, work: Awaitable[_Result], until_draining: bool = False
    ) -> _Result:
        """Await `work`.

        Args:
            until_draining: give up when the server begins to shut down.

        Raises:
            ClientDisconnected: the client disconnects first; `work` is cancelled.
            ShuttingDown: the server shuts down first; `work` is cancelled.
        """
        task = asyncio.ensure_future(work)
        others: set[asyncio.Future[Any]] = {asyncio.ensure_future(until_disconnect(request))}
        if until_draining:
            others.add(asyncio.ensure_future(self.draining.wait()))
        try:
            await asyncio.wait({task, *others}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return await task
            if until_draining and self.draining.is_set():
                raise ShuttingDown("The server is shutting down.")
            raise ClientDisconnected
        finally:
            for future in (task, *others):
                future.cancel()


async def until_disconnect(request: Request) -> None:
    """Return when the client disconnects."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
