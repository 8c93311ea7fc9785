"""The HTTP server's paths."""

from importlib.metadata import version
from pathlib import Path

from starlette.requests import Request
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from engine.errors import NotFound
from gateway.http.answer import Answer
from gateway.http.context import HttpContext
from gateway.http.endpoint import Endpoint, Surroundings
from gateway.http.generate import Generate
from gateway.http.openapi import document
from gateway.http.status import Status
from gateway.server import Gateway
from protos.v1.gateway_pb2 import ListModelsRequest, Model

_PAGE = Path(__file__).with_name("page.html")
_PAGE_HEADERS = {
    # The page is one file that asks its own origin alone.
    "content-security-policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def application(gateway: Gateway, around: Surroundings, status: Status) -> ASGIApp:
    """The ASGI application over a gateway."""
    generate, pages = Generate(gateway, around.max_bytes), _Pages()
    models = _Models(gateway)

    async def missing(scope: Scope, receive: Receive, send: Send) -> None:
        await Endpoint(around, {scope["method"]: _nothing}, open_to_all=True)(scope, receive, send)

    return Router(
        [
            Route("/v1/completions", Endpoint(around, {"POST": generate.completions})),
            Route("/v1/chat/completions", Endpoint(around, {"POST": generate.chat})),
            Route("/v1/models", Endpoint(around, {"GET": models.list})),
            Route("/v1/models/{model:path}", Endpoint(around, {"GET": models.get})),
            Route("/status", Endpoint(around, {"GET": status.get})),
            Route("/health", Endpoint(around, {"GET": pages.health}, open_to_all=True)),
            Route("/openapi.json", Endpoint(around, {"GET": pages.openapi}, open_to_all=True)),
            Route("/", Endpoint(around, {"GET": pages.page}, open_to_all=True)),
        ],
        redirect_slashes=False,
        default=missing,
    )


class _Models:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def list(self, _request: Request, context: HttpContext, answer: Answer) -> None:
        listed = await self._gateway.ListModels(ListModelsRequest(), context)  # type: ignore[arg-type]
        await answer.json({"object": "list", "data": [_shown(model) for model in listed.models]})

    async def get(self, request: Request, _context: HttpContext, answer: Answer) -> None:
        model, _tokenizer = await self._gateway.served(request.path_params["model"])
        await answer.json(_shown(self._gateway.describe(model)))


class _Pages:
    """What does not change while the process lives."""

    def __init__(self) -> None:
        self._page = _PAGE.read_bytes()
        self._document = document(version("enginehouse"))

    async def page(self, _request: Request, _context: HttpContext, answer: Answer) -> None:
        await answer.bytes(self._page, "text/html; charset=utf-8", headers=_PAGE_HEADERS)

    async def openapi(self, _request: Request, _context: HttpContext, answer: Answer) -> None:
        await answer.json(self._document)

    async def health(self, _request: Request, _context: HttpContext, answer: Answer) -> None:
        await answer.json({"status": "ok"})


async def _nothing(request: Request, _context: HttpContext, _answer: Answer) -> None:
    raise NotFound(f"there is nothing at {request.url.path}: /openapi.json says what there is", reason="PATH_NOT_FOUND")


def _shown(model: Model) -> dict[str, object]:
    return {
        "id": model.name,
        "object": "model",
        "created": 0,
        "owned_by": "enginehouse",
        "engine_id": model.engine_id,
        "ready_executors": model.ready_executors,
        "max_model_len": model.max_seq_len,
        "has_chat_template": model.has_chat_template,
    }
