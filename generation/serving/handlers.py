"""Handlers of chat completions and image generations: parse, queue, respond in one piece or as a stream."""

import asyncio
import base64
import contextlib
import dataclasses
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from open_unitok.core.errors import UserError

from ..image_files import image_bytes
from ..sampling import Sampling
from .batcher import Job, ShuttingDown
from .errors import error_body
from .schema import ChatRequest, ImageRequest
from .server import Server, until_disconnect
from .worker import Completion

_log = logging.getLogger(__name__)


async def chat_completions(server: Server, request: Request) -> Response:
    """POST /v1/chat/completions."""
    # for a stream this covers only parsing; `_EventStream` has its own timeout
    async with asyncio.timeout(server.limits.timeout):
        body = await server.read(request, ChatRequest)
        parsing = server.parse_chat(body)
        conversation, parsed = await server.or_disconnect(request, parsing, until_draining=True)
        jobs = [Job(key, task) for key, task in parsed]  # pyright: ignore
        prompt_tokens = len(conversation.ids)
        server.metrics.tokens.labels("prompt").inc(prompt_tokens)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": server.name}
        if body.stream:
            return _submit_stream(server, jobs, _chat_events(server, body, jobs, prompt_tokens, head))
        with server.submitted(jobs):
            completions: list[Completion] = await server.or_disconnect(request, _results(jobs))
    choices = []
    for index, completion in enumerate(completions):
        message = {"role": "assistant", "content": completion.text, "refusal": None}
        choice = {"index": index, "message": message, "finish_reason": completion.finish_reason}
        choices.append({**choice, "logprobs": None})
    tokens = sum(completion.tokens for completion in completions)
    server.metrics.tokens.labels("completion").inc(tokens)
    usage = _usage(prompt_tokens, tokens)
    return JSONResponse({**head, "object": "chat.completion", "choices": choices, "usage": usage})


async def image_generations(server: Server, request: Request) -> Response:
    """POST /v1/images/generations."""
    async with asyncio.timeout(server.limits.timeout):
        body = await server.read(request, ImageRequest)
        parsing = server.run_in_thread(server.parser.parse_image, body)
        key, tasks = await server.or_disconnect(request, parsing, until_draining=True)
        jobs = [Job(key, task) for task in tasks]  # pyright: ignore
        if body.stream:
            return _submit_stream(server, jobs, _image_events(server, body, jobs[0], key.sampling))
        with server.submitted(jobs):
            images = await server.or_disconnect(request, _results(jobs))
        server.metrics.images.inc(len(images))
        data = []
        for image, task in zip(images, tasks):
            encoded = await server.run_in_thread(_to_base64, image, body, key.sampling, task.seed)
            data_url = f"data:image/{body.output_format or 'png'};base64,{encoded}"
            content = {"url": data_url} if body.response_format == "url" else {"b64_json": encoded}
            # our extension of the API: with the seed the client can reproduce the image
            data.append({**content, "seed": task.seed})
    return JSONResponse({"created": int(time.time()), "data": data, "size": server.parser.output_size})


async def _results(jobs: Sequence[Job]) -> list[Any]:
    return [await job.result() for job in jobs]


async def _chat_events(
    server: Server, body: ChatRequest, jobs: Sequence[Job], prompt_tokens: int, head: dict[str, Any]
) -> AsyncIterator[str]:
    """The server-sent events of a chat completion."""
    # as in OpenAI's API, the usage comes in a last chunk without choices, only on request; null before
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    empty = {"usage": None} if with_usage else {}

    def chunk(index: int, delta: dict[str, str], finish_reason: str | None = None) -> str:
        choice = {"index": index, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return _data({**head, "object": "chat.completion.chunk", "choices": [choice], **empty})

    for index in range(len(jobs)):
        yield chunk(index, {"role": "assistant", "content": ""})
    tokens = 0
    async for index, (kind, value) in _merged_events(jobs):
        if kind == "partial":
            yield chunk(index, {"content": value})
            continue
        tokens += value.tokens
        server.metrics.tokens.labels("completion").inc(value.tokens)
        yield chunk(index, {}, value.finish_reason)
    if with_usage:
        usage = _usage(prompt_tokens, tokens)
        yield _data({**head, "object": "chat.completion.chunk", "choices": [], "usage": usage})
    yield "data: [DONE]\n\n"


async def _merged_events(jobs: Sequence[Job]) -> AsyncIterator[tuple[int, tuple[str, Any]]]:
    """(index, event) of all jobs as they come; raises if one fails."""
    sources = [job.events() for job in jobs]
    waiting = {asyncio.ensure_future(anext(source)): i for i, source in enumerate(sources)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            # in the order of the jobs: asyncio.wait returns a set
            for future in sorted(done, key=waiting.__getitem__):
                index = waiting.pop(future)
                event = await future
                yield index, event
                if event[0] != "result":
                    waiting[asyncio.ensure_future(anext(sources[index]))] = index
    finally:
        for future in waiting:
            future.cancel()


async def _image_events(
    server: Server, body: ImageRequest, job: Job, sampling: Sampling
) -> AsyncIterator[str]:
    """The server-sent events of an image: previews, then the image."""
    number = 0  # of the preview
    async for kind, image in job.events():
        # encoding takes milliseconds, too long for the event loop
        event: dict[str, Any] = {"created_at": int(time.time()), "output_format": body.output_format or "png"}
        event["b64_json"] = await server.run_in_thread(_to_base64, image, body, sampling, job.task.seed)
        event["size"] = server.parser.output_size
        if kind == "partial":
            event |= {"type": "image_generation.partial_image", "partial_image_index": number}
            number += 1
        else:
            server.metrics.images.inc()
            event |= {"type": "image_generation.completed", "seed": job.task.seed}
        yield f"event: {event['type']}\n{_data(event)}"


def _usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _to_base64(image: Any, body: ImageRequest, sampling: Sampling, seed: int) -> str:
    settings = dataclasses.asdict(sampling)
    record = {"prompt": body.prompt, "seed": seed, "negative_prompt": body.negative_prompt, **settings}
    return base64.b64encode(image_bytes(image, body.output_format or "png", record)).decode()


def _data(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _submit_stream(server: Server, jobs: list[Job], events: AsyncIterator[str]) -> Response:
    """Queue the jobs before the response starts, so that a full queue is a 429 and not a broken stream."""
    stack = contextlib.ExitStack()
    stack.enter_context(server.submitted(jobs))
    return _EventStream(server, stack, events)


class _EventStream(StreamingResponse):
    """Server-sent events; jobs are cancelled when the stream ends, times out, or the client disconnects."""

    def __init__(self, server: Server, stack: contextlib.ExitStack, events: AsyncIterator[str]):
        super().__init__(
            self._with_timeout(server, events),
            media_type="text/event-stream",
            headers={"cache-control": "no-cache"},
        )
        self._stack = stack

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        # starlette detects a disconnect only when it sends, and the model may send nothing for a long time
        with self._stack:
            response = asyncio.ensure_future(self.stream_response(send))
            disconnect = asyncio.ensure_future(until_disconnect(Request(scope, receive)))
            try:
                await asyncio.wait({response, disconnect}, return_when=asyncio.FIRST_COMPLETED)
                if response.done():
                    await response
            finally:
                response.cancel()
                disconnect.cancel()

    @staticmethod
    async def _with_timeout(server: Server, events: AsyncIterator[str]) -> AsyncIterator[str]:
        # status 200 has been sent already: errors can only be sent as events
        try:
            async with asyncio.timeout(server.limits.timeout):
                async for event in events:
                    yield event
        except TimeoutError:
            yield _data(error_body(f"Timed out after {server.limits.timeout:g} s.", 504, "timeout"))
        except (UserError, ShuttingDown) as error:
            yield _data(error_body(str(error), 503 if isinstance(error, ShuttingDown) else 400))
        except Exception:
            _log.exception("a stream failed")
            yield _data(error_body("Internal error; the server's log has the traceback.", 500))
