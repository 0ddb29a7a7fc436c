"""The endpoints of OpenAI's API, with `/tokenize` and `/detokenize` of vLLM's, `/health` and `/metrics`."""

from __future__ import annotations

import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

import posttrain
from posttrain.serve.faults import ApiRefusal
from posttrain.serve.guard import ServeGuard
from posttrain.serve.replies import Reply
from posttrain.serve.service import Service
from posttrain.serve.wire import ChatAsked, CompletionAsked, DetokenizeAsked, TokenizeAsked, complaint


def make_app(service: Service) -> FastAPI:
    app = FastAPI(
        title="posttrain serve", version=posttrain.__version__, docs_url=None, redoc_url=None, openapi_url=None
    )
    app.add_middleware(ServeGuard, options=service.options)
    add_errors(app)
    _add_answers(app, service)
    _add_state(app, service)
    return app


def _add_answers(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def chat_completions(asked: ChatAsked) -> Response:
        return Reply(service, "chat", asked)

    @app.post("/v1/completions")
    async def completions(asked: CompletionAsked) -> Response:
        return Reply(service, "completions", asked)

    @app.post("/tokenize")
    async def tokenize(asked: TokenizeAsked) -> dict[str, Any]:
        return await service.tokenize(asked)

    @app.post("/detokenize")
    async def detokenize(asked: DetokenizeAsked) -> dict[str, Any]:
        return await service.detokenize(asked)


def _add_state(app: FastAPI, service: Service) -> None:
    begun = int(time.time())

    def described(name: str) -> dict[str, Any]:
        version = service.router.find(name)
        return {
            "id": name, "object": "model", "created": begun, "owned_by": "posttrain", "root": version.id, "digest": version.digest,
            "is_loaded": version.id in service.router.ids,
        }  # fmt: skip

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        names = {**service.router.names, **{version.id: version for version in service.router.names.values()}}
        return {"object": "list", "data": [described(name) for name in names]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        return described(model)

    @app.get("/health")
    async def health() -> Response:
        status = "draining" if service.is_draining else "ok"
        # Why a name does not follow may hold paths, which are for who has the token: /metrics and the log have it.
        return JSONResponse(
            {"status": status, "follows": not service.router.trouble}, 503 if service.is_draining else 200
        )

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.meter.page(), media_type="text/plain; version=0.0.4; charset=utf-8")


def add_errors(app: FastAPI) -> None:
    """Every refusal in OpenAI's form."""

    @app.exception_handler(ApiRefusal)
    async def refused(request: Request, error: ApiRefusal) -> Response:
        return JSONResponse(error.body, error.status, dict(error.headers))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        message, param = complaint(list(error.errors()))
        return JSONResponse(ApiRefusal(400, message, param=param).body, 400)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        said = f"{request.method} {request.url.path}: {error.detail}"
        if error.status_code == 404:
            there = ", ".join(sorted(route.path for route in app.routes if isinstance(route, APIRoute)))
            said = f"this server has no {request.url.path}; it has {there}"
        return JSONResponse(ApiRefusal(error.status_code, said).body, error.status_code, dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return JSONResponse(ApiRefusal(500, f"a defect of the server: {type(error).__name__}").body, 500)
