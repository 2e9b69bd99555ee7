"""The state of one server: pipeline, job queue, metrics, and the parser thread."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from fastapi import Request

from ..pipeline import Pipeline
from .batcher import Batcher, Job
from .metrics import ServerMetrics
from .middleware import Limits
from .requests import RequestParser
from .worker import ModelWorker

_Result = TypeVar("_Result")


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
        self.parser = RequestParser(pipe, limits.max_side, files, limits.max_new_tokens)
        # lambdas, because metrics and batcher refer to each other
        self.metrics = ServerMetrics(lambda: self.batcher.waiting, lambda: self.batcher.running)
        self.batcher = Batcher(
            ModelWorker(pipe),
            limits.max_batch_size,
            limits.max_queue_size,
            limits.batch_window,
            lambda kind, size: self.metrics.batch_rows.labels(kind).observe(size),
        )
        # one thread: decoding images and tokenizing must not compete with the model for the CPU
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="unitok-parser")

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
        """Run a blocking function on the parser thread."""
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

    async def or_disconnect(self, request: Request, work: Awaitable[_Result]) -> _Result:
        """Await `work`.

        Raises:
            ClientDisconnected: the client disconnects first; `work` is cancelled.
        """
        task = asyncio.ensure_future(work)
        disconnect = asyncio.ensure_future(until_disconnect(request))
        try:
            await asyncio.wait({task, disconnect}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ClientDisconnected
            return await task
        finally:
            task.cancel()
            disconnect.cancel()


async def until_disconnect(request: Request) -> None:
    """Return when the client disconnects."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
