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
from .middleware import error_body
from .schema import ChatRequest, ImageRequest
from .server import Server, until_disconnect
from .worker import Completion

_log = logging.getLogger(__name__)


async def chat_completions(server: Server, body: ChatRequest, request: Request) -> Response:
    """POST /v1/chat/completions."""
    # for a stream this covers only parsing; `_EventStream` has its own timeout
    async with asyncio.timeout(server.limits.timeout):
        parsing = server.run_in_thread(server.parser.parse_chat, body)
        key, task = await server.or_disconnect(request, parsing)
        job = Job(key, task)
        server.metrics.tokens.labels("prompt").inc(len(task.prompt_ids))
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": server.name}
        if body.stream:
            return _submit_stream(server, [job], _chat_events(server, body, job, head))
        with server.submitted([job]):
            completion: Completion = await server.or_disconnect(request, job.result())
    server.metrics.tokens.labels("completion").inc(completion.tokens)
    message = {"role": "assistant", "content": completion.text, "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": completion.finish_reason, "logprobs": None}
    usage = _usage(len(task.prompt_ids), completion.tokens)
    return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": usage})


async def image_generations(server: Server, body: ImageRequest, request: Request) -> Response:
    """POST /v1/images/generations."""
    async with asyncio.timeout(server.limits.timeout):
        parsing = server.run_in_thread(server.parser.parse_image, body)
        key, tasks = await server.or_disconnect(request, parsing)
        jobs = [Job(key, task) for task in tasks]
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
    server: Server, body: ChatRequest, job: Job, head: dict[str, Any]
) -> AsyncIterator[str]:
    """The server-sent events of a chat completion."""

    def chunk(delta: dict[str, str], finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return _data({**head, "object": "chat.completion.chunk", "choices": [choice]})

    yield chunk({"role": "assistant", "content": ""})
    async for kind, value in job.events():
        if kind == "partial":
            yield chunk({"content": value})
            continue
        server.metrics.tokens.labels("completion").inc(value.tokens)
        yield chunk({}, value.finish_reason)
        # as in OpenAI's API, the usage comes in a last chunk without choices, only on request
        if body.stream_options and body.stream_options.include_usage:
            usage = _usage(len(job.task.prompt_ids), value.tokens)
            yield _data({**head, "object": "chat.completion.chunk", "choices": [], "usage": usage})
    yield "data: [DONE]\n\n"


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
