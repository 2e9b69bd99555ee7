"""The routes: OpenAI's chat completions and image generations, the model list, health and metrics."""

import asyncio
import base64
import contextlib
import dataclasses
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from open_unitok import __version__
from open_unitok.core.errors import UserError

from ..image_files import image_bytes
from ..pipeline import Pipeline
from ..sampling import Sampling
from .batcher import Batcher, Job, QueueFull, ShuttingDown
from .metrics import ROWS, SECONDS, Metrics
from .middleware import Guard, Limits, error_body
from .requests import Inbox
from .schema import ChatRequest, ImageRequest
from .worker import Answer, Work

log = logging.getLogger(__name__)
Result = TypeVar("Result")


class ClientGone(Exception):
    """Nobody reads the response any more."""


class UnknownModel(Exception):
    """The request names another model than the one served."""


class Server:
    """One pipeline, its queue and its numbers.

    Args:
        name: under which the model is listed and asked for.
        files: the folder that file: URLs may name; None = no files.
    """

    def __init__(self, pipe: Pipeline, name: str, limits: Limits, files: Path | None = None):
        self.name, self.limits, self.created = name, limits, int(time.time())
        self.inbox = Inbox(pipe, limits.max_side, files, limits.max_new_tokens)
        self.metrics = Metrics()
        self.batcher = Batcher(
            Work(pipe),
            limits.max_batch_size,
            limits.max_queue_size,
            limits.window,
            lambda kind, size: self.metrics.observe("unitok_batch_rows", size, kind=kind),
        )
        # one thread: opening images and reading texts must not starve the model of the processor
        self.beside = ThreadPoolExecutor(1, thread_name_prefix="unitok-inbox")
        self._announce()

    def _announce(self) -> None:
        m = self.metrics
        m.counter("unitok_requests_total", "Requests by route and status; 499: the client left.")
        m.histogram("unitok_request_seconds", "Seconds from a request's arrival to its end.", SECONDS)
        m.histogram("unitok_batch_rows", "Images or answers that share a batch.", ROWS)
        m.counter("unitok_images_total", "Images drawn.")
        m.counter("unitok_tokens_total", "Text tokens read (prompt) and written (completion).")
        m.counter("unitok_cancelled_total", "Images and answers given up because nobody waited any more.")
        m.gauge("unitok_waiting", "Images and answers in the queue.", lambda: self.batcher.waiting)
        m.gauge("unitok_running", "Images and answers under way.", lambda: self.batcher.running)

    def check_model(self, asked: str | None) -> None:
        """
        Raises:
            UnknownModel: it is not the one served.
        """
        if asked is not None and asked != self.name:
            raise UnknownModel(f"There is no model {asked[:100]!r} here, only {self.name!r}.")

    async def aside(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Run on the thread beside the model's."""
        return await asyncio.get_running_loop().run_in_executor(self.beside, function, *arguments)

    @contextlib.contextmanager
    def queued(self, jobs: Sequence[Job]) -> Iterator[None]:
        """Queue the jobs; whatever ends the block, nobody waits for them behind it."""
        self.batcher.put(jobs)
        try:
            yield
        finally:
            left = sum(not job.finished for job in jobs)
            if left:
                self.metrics.count("unitok_cancelled_total", left)
            for job in jobs:
                job.cancel()

    async def while_there(self, request: Request, work: Awaitable[Result]) -> Result:
        """The result of `work`, unless the client leaves first.

        Raises:
            ClientGone: it left.
        """
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(_until_gone(request))
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ClientGone
            return await task
        finally:
            task.cancel()
            gone.cancel()


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def create_app(
    pipe: Pipeline,
    name: str,
    limits: Limits | None = None,
    token: str | None = None,
    files: Path | None = None,
    hosts: frozenset[str] | None = None,
) -> FastAPI:
    """The server as an ASGI application; arguments as `Server` and `Guard`."""
    server = Server(pipe, name, limits or Limits(), files)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        server.batcher.start()
        yield
        server.batcher.stop()
        server.beside.shutdown(wait=False, cancel_futures=True)

    # the documentation pages would load their scripts from the web
    app = FastAPI(title="OpenUniTok", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.server = server
    _add_routes(app, server)
    _add_errors(app)
    routes = frozenset(getattr(route, "path", "") for route in app.routes)
    app.add_middleware(
        Guard, limits=server.limits, metrics=server.metrics, routes=routes, token=token, hosts=hosts
    )
    return app


def _add_routes(app: FastAPI, server: Server) -> None:
    @app.get("/health")
    async def health() -> Response:
        alive = server.batcher.alive
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(server.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model_card(server)]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        server.check_model(model)
        return _model_card(server)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        server.check_model(body.model)
        return await answer_chat(server, body, request)

    @app.post("/v1/images/generations")
    async def images(body: ImageRequest, request: Request) -> Response:
        server.check_model(body.model)
        return await draw_images(server, body, request)


def _model_card(server: Server) -> dict[str, Any]:
    return {"id": server.name, "object": "model", "created": server.created, "owned_by": "open-unitok"}


def _add_errors(app: FastAPI) -> None:
    def failed(status: int, code: str | None, headers: dict[str, str] | None = None) -> Any:
        async def handle(_: Request, error: Exception) -> Response:
            return JSONResponse(error_body(str(error), status, code), status, headers)

        return handle

    app.add_exception_handler(UserError, failed(400, None))
    app.add_exception_handler(UnknownModel, failed(404, "model_not_found"))
    app.add_exception_handler(QueueFull, failed(429, "queue_full", {"retry-after": "1"}))
    app.add_exception_handler(ShuttingDown, failed(503, "shutting_down"))

    @app.exception_handler(TimeoutError)
    async def too_late(request: Request, _: Exception) -> Response:
        seconds = request.app.state.server.limits.timeout
        message = f"Not done within {seconds:g} s, this server's limit: ask for less, or try again later."
        return JSONResponse(error_body(message, 504, "timeout"), 504)

    @app.exception_handler(ClientGone)
    async def gone(_: Request, __: Exception) -> Response:
        return Response(status_code=499)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: Any) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part)[:60] for part in first["loc"] if part != "body")[:200]
        message = f"{where or 'The body'}: {first['msg']}"
        return JSONResponse(error_body(message[:500], 400, first["type"], where or None), 400)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: Any) -> Response:
        return JSONResponse(
            error_body(str(error.detail), error.status_code), error.status_code, error.headers
        )

    @app.exception_handler(Exception)
    async def broken(_: Request, __: Exception) -> Response:
        message = "The server failed on this request; its log says why."
        return JSONResponse(error_body(message, 500, "internal_error"), 500)


async def answer_chat(server: Server, body: ChatRequest, request: Request) -> Response:
    """POST /v1/chat/completions."""
    async with asyncio.timeout(server.limits.timeout):
        key, task = await server.while_there(request, server.aside(server.inbox.chat, body))
        job = Job(key, task)
        server.metrics.count("unitok_tokens_total", len(task.ids), kind="prompt")
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": server.name}
        if body.stream:
            return _stream(server, [job], _chat_events(server, body, job, head))
        with server.queued([job]):
            answer: Answer = await server.while_there(request, job.result())
    server.metrics.count("unitok_tokens_total", answer.tokens, kind="completion")
    message = {"role": "assistant", "content": answer.text, "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": answer.reason, "logprobs": None}
    usage = _usage(len(task.ids), answer.tokens)
    return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": usage})


async def _chat_events(
    server: Server, body: ChatRequest, job: Job, head: dict[str, Any]
) -> AsyncIterator[str]:
    def chunk(delta: dict[str, str], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return _data({**head, "object": "chat.completion.chunk", "choices": [choice]})

    yield chunk({"role": "assistant", "content": ""})
    async for kind, value in job.events():
        if kind == "piece":
            yield chunk({"content": value})
            continue
        server.metrics.count("unitok_tokens_total", value.tokens, kind="completion")
        yield chunk({}, value.reason)
        if body.stream_options and body.stream_options.include_usage:
            usage = _usage(len(job.payload.ids), value.tokens)
            yield _data({**head, "object": "chat.completion.chunk", "choices": [], "usage": usage})
    yield "data: [DONE]\n\n"


def _usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


async def draw_images(server: Server, body: ImageRequest, request: Request) -> Response:
    """POST /v1/images/generations."""
    async with asyncio.timeout(server.limits.timeout):
        key, tasks = await server.while_there(request, server.aside(server.inbox.drawing, body))
        jobs = [Job(key, task) for task in tasks]
        if body.stream:
            return _stream(server, jobs, _image_events(server, body, jobs[0], key.sampling))
        with server.queued(jobs):
            pictures = await server.while_there(request, _results(jobs))
        server.metrics.count("unitok_images_total", len(pictures))
        data = []
        for image, task in zip(pictures, tasks):
            encoded = await server.aside(_base64, image, body, key.sampling, task.seed)
            inline = f"data:image/{body.output_format or 'png'};base64,{encoded}"
            shown = {"url": inline} if body.response_format == "url" else {"b64_json": encoded}
            data.append({**shown, "seed": task.seed})
    size = f"{server.inbox.image_size}x{server.inbox.image_size}"
    return JSONResponse({"created": int(time.time()), "data": data, "size": size})


async def _results(jobs: Sequence[Job]) -> list[Any]:
    return [await job.result() for job in jobs]


async def _image_events(
    server: Server, body: ImageRequest, job: Job, sampling: Sampling
) -> AsyncIterator[str]:
    number = 0
    async for kind, image in job.events():
        event: dict[str, Any] = {"created_at": int(time.time()), "output_format": body.output_format or "png"}
        event["b64_json"] = await server.aside(_base64, image, body, sampling, job.payload.seed)
        event["size"] = f"{server.inbox.image_size}x{server.inbox.image_size}"
        if kind == "piece":
            event |= {"type": "image_generation.partial_image", "partial_image_index": number}
            number += 1
        else:
            server.metrics.count("unitok_images_total")
            event |= {"type": "image_generation.completed", "seed": job.payload.seed}
        yield f"event: {event['type']}\n{_data(event)}"


def _base64(image: Any, body: ImageRequest, sampling: Sampling, seed: int) -> str:
    settings = dataclasses.asdict(sampling)
    record = {"prompt": body.prompt, "seed": seed, "negative_prompt": body.negative_prompt, **settings}
    return base64.b64encode(image_bytes(image, body.output_format or "png", record)).decode()


def _stream(server: Server, jobs: list[Job], events: AsyncIterator[str]) -> Response:
    """Server-sent events of jobs, which are queued now: a full queue is a 429 and not a broken stream."""
    stack = contextlib.ExitStack()
    stack.enter_context(server.queued(jobs))
    return EventStream(server, stack, events)


class EventStream(StreamingResponse):
    """A stream that gives its jobs up when it ends, is cut off by its client, or takes too long."""

    def __init__(self, server: Server, stack: contextlib.ExitStack, events: AsyncIterator[str]):
        super().__init__(
            self._within(server, events),
            media_type="text/event-stream",
            headers={"cache-control": "no-cache"},
        )
        self._stack = stack

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send it; the client's leaving ends it at once, also while the model has nothing to send."""
        with self._stack:
            work = asyncio.ensure_future(self.stream_response(send))
            gone = asyncio.ensure_future(_until_gone(Request(scope, receive)))
            try:
                await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
                if work.done():
                    await work
            finally:
                work.cancel()
                gone.cancel()

    @staticmethod
    async def _within(server: Server, events: AsyncIterator[str]) -> AsyncIterator[str]:
        try:
            async with asyncio.timeout(server.limits.timeout):
                async for event in events:
                    yield event
        except TimeoutError:
            yield _data(error_body(f"Not done within {server.limits.timeout:g} s.", 504, "timeout"))
        except (UserError, ShuttingDown) as error:
            yield _data(error_body(str(error), 503 if isinstance(error, ShuttingDown) else 400))
        except Exception:
            # the head of the response has gone out: the error can only follow as an event
            log.exception("a stream failed")
            yield _data(error_body("The server failed on this request; its log says why.", 500))


def _data(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
