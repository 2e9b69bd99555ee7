"""`BodyReader`: bodies within limits on size, time and memory."""

import asyncio
import contextlib

import pytest

from open_unitok.generation.serving.body_reader import BodyReader
from open_unitok.generation.serving.errors import RequestRejected
from open_unitok.generation.serving.limits import Limits

LIMITS = Limits(max_body=100, body_timeout=30)


def messages(*chunks, more=False):
    """An ASGI `receive` of these chunks; with `more` the body never ends."""
    rest = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    rest[-1]["more_body"] = more

    async def receive():
        if rest:
            return rest.pop(0)
        return await asyncio.Event().wait()

    return receive


async def status(reader, receive, length=None):
    """The status of a rejection, else the body."""
    try:
        async with reader.read(length, receive) as found:
            return found[0]["body"] if found else None
    except RequestRejected as rejected:
        return rejected.status


def test_sizes():
    async def run():
        reader = BodyReader(LIMITS)
        assert await status(reader, messages(b"a", b"b" * 99)) == b"a" + b"b" * 99
        assert await status(reader, messages(b"a" * 101)) == 413
        assert await status(reader, messages(b"a" * 60, b"a" * 60, more=True)) == 413
        for length in (b"101", b"-1", b"", b"1e3", b"9" * 40):
            assert await status(reader, messages(b""), length) == 413
        assert reader._held == 0 and not reader._incomplete

    asyncio.run(run())


def test_a_client_that_leaves():
    async def leave():
        return {"type": "http.disconnect"}

    assert asyncio.run(status(BodyReader(LIMITS), leave)) is None


def test_incomplete_bodies_time_out_or_are_rejected_at_shutdown():
    async def run():
        assert await status(BodyReader(Limits(body_timeout=0.02)), messages(b"a", more=True)) == 408
        reader = BodyReader(LIMITS)
        waiting = asyncio.create_task(status(reader, messages(b"a", more=True)))
        await asyncio.sleep(0.01)
        reader.drain()
        assert await waiting == 503
        assert await status(reader, messages(b"a", more=True)) == 503

    asyncio.run(run())


def test_the_oldest_incomplete_body_makes_room_for_others():
    async def run():
        reader = BodyReader(LIMITS)
        held = []
        for _ in range(20):  # of 16 that fit
            held.append(asyncio.create_task(status(reader, messages(b"a" * 99, more=True))))
            await asyncio.sleep(0.001)
        done = [task.result() for task in held if task.done()]
        assert done == [408] * 4 and all(task.done() for task in held[:4])
        assert await status(reader, messages(b"a" * 50)) == b"a" * 50
        for task in held:
            task.cancel()
        await asyncio.gather(*held, return_exceptions=True)
        assert reader._held == 0

        # complete bodies are not given up
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(16):
                await stack.enter_async_context(reader.read(None, messages(b"a" * 100)))
            with pytest.raises(RequestRejected) as rejected:
                await stack.enter_async_context(reader.read(None, messages(b"a", b"a" * 9, more=True)))
            assert rejected.value.status == 429

    asyncio.run(run())
