"""Dynamic batching: jobs with equal settings share a batch, which runs on the model's thread.

At most one batch per kind (images, answers) runs at a time. Their steps alternate, so that a short answer
does not wait for a long image generation.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from typing import Any, Protocol

from open_unitok.core.errors import UserError

_log = logging.getLogger(__name__)


class QueueFull(Exception):
    """The queue is too full for the jobs."""


class ShuttingDown(Exception):
    """The server stopped before the job was finished."""


class BatchKey(Protocol):
    """Jobs whose keys are equal (==) may share a batch."""

    @property
    def kind(self) -> str:
        """At most one batch per kind runs at a time."""
        ...


class Job:
    """One row of a batch: passes a request to the model's thread and its results back to the event loop.

    Attributes:
        key: jobs with equal keys may share a batch.
        task: the input; its type depends on the key.
        arrived: creation time on the monotonic clock.
        cancelled: the client no longer waits; a batch of cancelled jobs only is dropped.
        finished: the result or the error has been sent.
        started: it is in a batch, or was.
        siblings: the jobs of the same request, this one included.
    """

    def __init__(self, key: BatchKey, task: Any):
        self.key, self.task = key, task
        self.cancelled = False
        self.finished = False
        self.started = False
        self.siblings: Sequence[Job] = (self,)
        self.arrived = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()

    @property
    def pending(self) -> bool:
        """True while a client waits for the result."""
        return not (self.finished or self.cancelled)

    def send_partial(self, value: Any) -> None:
        """Send a partial result (called on the model's thread)."""
        self._put("partial", value)

    def finish(self, result: Any) -> None:
        """Send the result (called on the model's thread)."""
        if not self.finished:
            self.finished = True
            self._put("result", result)

    def fail(self, error: Exception) -> None:
        """Send an error instead of a result (called on the model's thread)."""
        if not self.finished:
            self.finished = True
            self._put("error", error)

    def cancel(self) -> None:
        """Stop waiting for the result (called on the event loop)."""
        self.cancelled = True

    def _put(self, kind: str, value: Any) -> None:
        if not self.cancelled:
            # asyncio queues are not thread-safe: call from the loop's thread; RuntimeError: the loop is
            # closed
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._events.put_nowait, (kind, value))

    async def events(self) -> AsyncIterator[tuple[str, Any]]:
        """Yield any number of ("partial", value), then ("result", value); raise if the job fails."""
        while True:
            kind, value = await self._events.get()
            if kind == "error":
                raise value
            yield kind, value
            if kind == "result":
                return

    async def result(self) -> Any:
        """The final result; raises if the job fails."""
        *_, (_, value) = [event async for event in self.events()]
        return value


class Batcher:
    """A queue of jobs and the thread that runs them in batches, oldest job first.

    Args:
        run_batch: takes the jobs of one batch (equal keys), yields after each small step so that the other
            kind's batch can run, and finishes or fails each job. If it raises, its pending jobs fail.
        max_batch_size: jobs per batch.
        max_queue_size: jobs in the queue; `submit` rejects more.
        window: seconds. A batch that is not full starts when no job has joined it for this time, at the
            latest after ten times as long.
        on_batch: called with kind and size of each batch that starts.
    """

    def __init__(
        self,
        run_batch: Callable[[list[Job]], Iterator[None]],
        max_batch_size: int = 16,
        max_queue_size: int = 64,
        window: float = 0.01,
        on_batch: Callable[[str, int], None] = lambda kind, size: None,
    ):
        self.run_batch, self.on_batch = run_batch, on_batch
        self.max_batch_size, self.max_queue_size, self.window = max_batch_size, max_queue_size, window
        self._queue: list[Job] = []
        # kind -> the jobs of its current batch and the generator that runs them
        self._active: dict[str, tuple[list[Job], Iterator[None]]] = {}
        self._idle_since: dict[str, float] = {}  # kind -> when its last batch ended
        self._changed = threading.Condition()
        self._stopping = False
        self._draining = False
        self._thread = threading.Thread(target=self._run, name="unitok-model", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout: float = 10.0) -> None:
        """Fail all pending jobs and stop the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        # a step may take seconds; the thread is a daemon, so the process ends in any case
        if self._thread.is_alive():
            self._thread.join(timeout)

    def drain(self) -> None:
        """Fail the jobs of requests that wait, and accept no new ones; requests that run are finished."""
        with self._changed:
            self._draining = True
            kept = [job for job in self._queue if any(other.started for other in job.siblings)]
            _fail_all([job for job in self._queue if job not in kept], _shutting_down())
            self._queue = kept

    @property
    def alive(self) -> bool:
        """True while the thread runs and jobs are accepted."""
        return self._thread.is_alive() and not self._draining

    @property
    def waiting(self) -> int:
        """Pending jobs in the queue."""
        with self._changed:
            return sum(not job.cancelled for job in self._queue)

    @property
    def running(self) -> int:
        """Pending jobs of the current batches."""
        # list(): the model's thread may change the dict at the same time
        return sum(job.pending for jobs, _ in list(self._active.values()) for job in jobs)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue all of the jobs of one request or none.

        Raises:
            UserError: there are more of them than the queue ever holds.
            QueueFull: the queue has no capacity for all of them now.
            ShuttingDown: the server is stopping.
        """
        if len(jobs) > self.max_queue_size:
            raise UserError(f"n is {len(jobs)}; the queue of this server holds {self.max_queue_size}.")
        for job in jobs:
            job.siblings = jobs
        with self._changed:
            # cancelled jobs must not count towards the limit
            self._queue = [job for job in self._queue if not job.cancelled]
            if self._stopping or self._draining:
                raise _shutting_down()
            if len(self._queue) + len(jobs) > self.max_queue_size:
                raise QueueFull(
                    f"The queue holds {len(self._queue)} images or answers; {len(jobs)} more would exceed "
                    f"its limit of {self.max_queue_size}: try again later."
                )
            self._queue.extend(jobs)
            self._changed.notify_all()

    def _run(self) -> None:
        while not self._stopping:
            for batch in self._next_batches():
                self._start_batch(batch)
            # round robin: one step of each kind
            for kind in list(self._active):
                self._step(kind)
        error = _shutting_down()
        for jobs, steps in self._active.values():
            _close(steps)
            _fail_all(jobs, error)
        with self._changed:
            _fail_all(self._queue, error)
            self._queue = []

    def _next_batches(self) -> list[list[Job]]:
        """Take the batches that start now from the queue; blocks only while no batch is active."""
        with self._changed:
            while True:
                self._queue = [job for job in self._queue if not job.cancelled]
                batches, soonest = self._ready_batches()
                if batches or self._active or self._stopping:
                    for job in (job for batch in batches for job in batch):
                        job.started = True
                    self._queue = [job for job in self._queue if not job.started]
                    return batches
                self._changed.wait(soonest)  # None: until a job is submitted or the server stops

    def _ready_batches(self) -> tuple[list[list[Job]], float | None]:
        """Per idle kind the batch of its oldest job if its window is over, and the seconds until the next."""
        now, batches, soonest = time.monotonic(), [], None
        seen = set(self._active)  # kinds that are running or already considered
        for oldest in self._queue:
            kind = oldest.key.kind
            if kind in seen:
                continue
            seen.add(kind)
            batch = [job for job in self._queue if job.key == oldest.key][: self.max_batch_size]
            # the window starts at the end of the last batch or later: its clients send their next requests
            # then
            idle_since = self._idle_since.get(kind, 0.0)
            start = min(
                max(batch[-1].arrived, idle_since),
                max(oldest.arrived, idle_since) + 9 * self.window,
            )
            remaining = start + self.window - now
            if len(batch) == self.max_batch_size or remaining <= 0:
                batches.append(batch)
            else:
                soonest = remaining if soonest is None else min(soonest, remaining)
        return batches, soonest

    def _start_batch(self, batch: list[Job]) -> None:
        kind = batch[0].key.kind
        self.on_batch(kind, len(batch))
        self._active[kind] = (batch, self.run_batch(batch))

    def _step(self, kind: str) -> None:
        """Run one step of a batch; drop the batch when it ends or none of its jobs is pending."""
        jobs, steps = self._active[kind]
        try:
            if any(job.pending for job in jobs):
                next(steps)
                return
            _close(steps)
        except StopIteration:
            _fail_all(jobs, RuntimeError("run_batch ended without finishing this job"))
        except Exception as error:
            # a failed batch must not end the thread; every request of the batch gets the error
            if not isinstance(error, UserError):
                _log.exception("a batch of %d failed", len(jobs))
            _fail_all(jobs, error)
        del self._active[kind]
        self._idle_since[kind] = time.monotonic()


def _shutting_down() -> ShuttingDown:
    return ShuttingDown("The server is shutting down: send the request to another one, or later.")


def _fail_all(jobs: Sequence[Job], error: Exception) -> None:
    for job in jobs:
        job.fail(error)  # a no-op for finished jobs


def _close(steps: Iterator[None]) -> None:
    if isinstance(steps, Generator):
        steps.close()
