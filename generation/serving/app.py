"""The ASGI application: OpenAI's chat completions, image generations and models; health and metrics."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from open_unitok import __version__
from open_unitok.core.errors import UserError

from ..pipeline import Pipeline
from .batcher import QueueFull, ShuttingDown
from .errors import error_body
from .handlers import chat_completions, image_generations
from .limits import Limits
from .middleware import AccessMiddleware
from .request_body import InvalidBody
from .schema import ChatRequest, ImageRequest
from .server import ClientDisconnected, Server, UnknownModel


def create_app(
    pipe: Pipeline,
    name: str,
    limits: Limits | None = None,
    token: str | None = None,
    files: Path | None = None,
    hosts: frozenset[str] | None = None,
) -> FastAPI:
    """Build the application; arguments as `Server` and `AccessMiddleware`."""
    server = Server(pipe, name, limits or Limits(), files)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        server.batcher.start()
        yield
        server.close()

    # no /docs and /redoc: these pages load their scripts from the internet
    options: dict[str, Any] = {"docs_url": None, "redoc_url": None, "redirect_slashes": False}
    app = FastAPI(title="OpenUniTok", version=__version__, lifespan=lifespan, **options)
    app.state.server = server
    _add_routes(app, server)
    _add_error_handlers(app)
    # route labels of the request metrics
    routes = frozenset(getattr(route, "path", "") for route in app.routes)
    app.add_middleware(
        AccessMiddleware,
        limits=server.limits,
        metrics=server.metrics,
        bodies=server.bodies,
        routes=routes,
        token=token,
        hosts=hosts,
    )
    return app


def _add_routes(app: FastAPI, server: Server) -> None:
    @app.get("/health")
    async def health() -> Response:
        # the model's thread ends only at shutdown or after a bug
        alive = server.batcher.alive
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(server.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model_object(server)]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        server.check_model(model)
        return _model_object(server)

    @app.post("/v1/chat/completions", openapi_extra=_body_schema(ChatRequest))
    async def chat(request: Request) -> Response:
        return await chat_completions(server, request)

    @app.post("/v1/images/generations", openapi_extra=_body_schema(ImageRequest))
    async def images(request: Request) -> Response:
        return await image_generations(server, request)


def _body_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The body's schema for /openapi.json; FastAPI would parse the body on the event loop."""
    return {"requestBody": {"content": {"application/json": {"schema": model.model_json_schema()}}}}


def _model_object(server: Server) -> dict[str, Any]:
    return {"id": server.name, "object": "model", "created": server.created, "owned_by": "open-unitok"}


def _add_error_handlers(app: FastAPI) -> None:
    """Return every error in OpenAI's format."""

    def respond_with(status: int, code: str | None, headers: dict[str, str] | None = None) -> Any:
        async def handle(_: Request, error: Exception) -> Response:
            return JSONResponse(error_body(str(error), status, code), status, headers)

        return handle

    app.add_exception_handler(UserError, respond_with(400, None))
    app.add_exception_handler(UnknownModel, respond_with(404, "model_not_found"))
    app.add_exception_handler(QueueFull, respond_with(429, "queue_full", {"retry-after": "1"}))
    app.add_exception_handler(ShuttingDown, respond_with(503, "shutting_down"))

    @app.exception_handler(TimeoutError)
    async def timed_out(request: Request, _: Exception) -> Response:
        seconds = request.app.state.server.limits.timeout
        message = (
            f"The request timed out after {seconds:g} s, the server's limit: request less, or retry later."
        )
        return JSONResponse(error_body(message, 504, "timeout"), 504)

    @app.exception_handler(ClientDisconnected)
    async def disconnected(_: Request, __: Exception) -> Response:
        return Response(status_code=499)  # never received; the middleware records the status in the metrics

    @app.exception_handler(InvalidBody)
    async def invalid(_: Request, error: Any) -> Response:
        return JSONResponse(error_body(str(error), 400, error.code, error.param or None), 400)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: Any) -> Response:
        # the path is text of the client: ascii() and a limited length
        route = f"{request.method[:10]} {ascii(request.url.path)[1:-1][:100]}"
        reasons = {404: "is not a route of this server", 405: "is not allowed: use another method"}
        message = f"{route} {reasons[error.status_code]}." if error.status_code in reasons else error.detail
        return JSONResponse(error_body(message, error.status_code), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def internal_error(_: Request, __: Exception) -> Response:
        message = "Internal error; the server's log has the traceback."
        return JSONResponse(error_body(message, 500, "internal_error"), 500)
