"""Joins requests that may share a batch and runs them on one thread, which owns the model.

One batch of each kind may be under way, and they take turns step by step: an answer of a second does not wait
behind an image of a minute.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from typing import Any, Protocol

from open_unitok.core.errors import UserError

log = logging.getLogger(__name__)


class QueueFull(Exception):
    """More is waiting than may wait."""


class ShuttingDown(Exception):
    """The server ends before the work could."""


class Key(Protocol):
    """What jobs must have in common to share a batch; it is compared with ==."""

    @property
    def kind(self) -> str:
        """One batch of each kind is under way at a time."""
        ...


class Job:
    """One row of a batch on its way from a request to the model and back.

    Attributes:
        key: jobs with equal keys may share a batch.
        payload: what is to be done; the key's work knows its shape.
        arrived: when it was made, on the monotonic clock.
        cancelled: nobody waits any more; a batch in which nobody waits is given up.
        finished: its result or error has been sent.
    """

    def __init__(self, key: Key, payload: Any):
        self.key, self.payload = key, payload
        self.cancelled = False
        self.finished = False
        self.arrived = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()

    def send(self, piece: Any) -> None:
        """From the model's thread: one piece of a result that comes in pieces."""
        self._put("piece", piece)

    def finish(self, result: Any) -> None:
        """From the model's thread: the result; nothing follows it."""
        if not self.finished:
            self.finished = True
            self._put("result", result)

    def fail(self, error: Exception) -> None:
        """From the model's thread: what went wrong, instead of a result."""
        if not self.finished:
            self.finished = True
            self._put("error", error)

    def cancel(self) -> None:
        """From the request: nobody waits for the result any more."""
        self.cancelled = True

    def _put(self, kind: str, value: Any) -> None:
        if not self.cancelled:
            with contextlib.suppress(RuntimeError):  # the server has shut down meanwhile
                self._loop.call_soon_threadsafe(self._events.put_nowait, (kind, value))

    async def events(self) -> AsyncIterator[tuple[str, Any]]:
        """("piece", ...) any number of times, then ("result", ...); an error is raised."""
        while True:
            kind, value = await self._events.get()
            if kind == "error":
                raise value
            yield kind, value
            if kind == "result":
                return

    async def result(self) -> Any:
        """The result; pieces are passed over, an error is raised."""
        *_, (_, value) = [event async for event in self.events()]
        return value


class Batcher:
    """A queue of jobs and the thread that works on them, oldest first, with all that fits beside it.

    Args:
        work: takes the jobs of one batch (equal keys) and yields after each small step, so that others get
            their turn; it finishes or fails each job. An exception fails those that are open.
        max_batch_size: jobs in one batch.
        max_queue_size: jobs in the queue; `put` refuses more.
        window: seconds; a batch that is not full starts once no job has joined it for so long, and after ten
            times that at the latest.
        observe: is told the kind and the size of each batch.
    """

    def __init__(
        self,
        work: Callable[[list[Job]], Iterator[None]],
        max_batch_size: int = 16,
        max_queue_size: int = 64,
        window: float = 0.01,
        observe: Callable[[str, int], None] = lambda kind, size: None,
    ):
        self.work, self.observe = work, observe
        self.max_batch_size, self.max_queue_size, self.window = max_batch_size, max_queue_size, window
        self._queue: list[Job] = []
        self._active: dict[str, tuple[list[Job], Iterator[None]]] = {}
        self._free_since: dict[str, float] = {}  # kind -> when its last batch ended
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="unitok-model", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, seconds: float = 10.0) -> None:
        """Fail what waits and what is under way, and end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(seconds)

    @property
    def alive(self) -> bool:
        """True while the thread runs."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Jobs in the queue that somebody waits for."""
        with self._changed:
            return sum(not job.cancelled for job in self._queue)

    @property
    def running(self) -> int:
        """Jobs under way that somebody waits for."""
        return sum(is_open(job) for jobs, _ in list(self._active.values()) for job in jobs)

    def put(self, jobs: Sequence[Job]) -> None:
        """Queue all of the jobs or none.

        Raises:
            QueueFull: there is no room for all.
            ShuttingDown: there never will be.
        """
        with self._changed:
            self._queue = [job for job in self._queue if not job.cancelled]
            if self._stopping:
                raise ShuttingDown("The server is shutting down.")
            if len(self._queue) + len(jobs) > self.max_queue_size:
                raise QueueFull(
                    f"{len(self._queue)} images or answers are waiting and {len(jobs)} more would be more "
                    f"than {self.max_queue_size}: try again later."
                )
            self._queue.extend(jobs)
            self._changed.notify_all()

    def _run(self) -> None:
        while not self._stopping:
            for batch in self._take():
                self._begin(batch)
            for kind in list(self._active):
                self._step(kind)
        gone = ShuttingDown("The server is shutting down.")
        for jobs, steps in self._active.values():
            _close(steps)
            _fail_open(jobs, gone)
        with self._changed:
            _fail_open(self._queue, gone)
            self._queue = []

    def _take(self) -> list[list[Job]]:
        """The batches that start now; waits for one where nothing is under way."""
        with self._changed:
            while True:
                self._queue = [job for job in self._queue if not job.cancelled]
                batches, soonest = self._ready()
                if batches or self._active or self._stopping:
                    taken = {id(job) for batch in batches for job in batch}
                    self._queue = [job for job in self._queue if id(job) not in taken]
                    return batches
                self._changed.wait(soonest)

    def _ready(self) -> tuple[list[list[Job]], float | None]:
        """Per idle kind the batch of its oldest job, where it is time; else the seconds until it will be."""
        now, batches, soonest = time.monotonic(), [], None
        seen = set(self._active)
        for oldest in self._queue:
            kind = oldest.key.kind
            if kind in seen:
                continue
            seen.add(kind)
            batch = [job for job in self._queue if job.key == oldest.key][: self.max_batch_size]
            # the clients of the batch that has just ended get the time to come back
            free = self._free_since.get(kind, 0.0)
            start = min(max(batch[-1].arrived, free), max(oldest.arrived, free) + 9 * self.window)
            left = start + self.window - now
            if len(batch) == self.max_batch_size or left <= 0:
                batches.append(batch)
            else:
                soonest = left if soonest is None else min(soonest, left)
        return batches, soonest

    def _begin(self, batch: list[Job]) -> None:
        kind = batch[0].key.kind
        self.observe(kind, len(batch))
        self._active[kind] = (batch, self.work(batch))

    def _step(self, kind: str) -> None:
        """One step of a batch; at its end, or where nobody waits for it, the kind is free again."""
        jobs, steps = self._active[kind]
        try:
            if any(map(is_open, jobs)):
                next(steps)
                return
            _close(steps)
        except StopIteration:
            _fail_open(jobs, RuntimeError("the work forgot this job"))
        except Exception as error:
            # whatever one batch does, the next one gets its chance; each job's request hears of it
            if not isinstance(error, UserError):
                log.exception("a batch of %d failed", len(jobs))
            _fail_open(jobs, error)
        del self._active[kind]
        self._free_since[kind] = time.monotonic()


def is_open(job: Job) -> bool:
    """True while somebody waits for it."""
    return not (job.finished or job.cancelled)


def _fail_open(jobs: Sequence[Job], error: Exception) -> None:
    for job in jobs:
        job.fail(error)


def _close(steps: Iterator[None]) -> None:
    if isinstance(steps, Generator):
        steps.close()
