"""The endpoints of Tinker's API that its SDK asks, under its own types: a field it does not know is refused."""

from __future__ import annotations

import datetime
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response
from tinker import types
from tinker.types.client_config_request import ClientConfigRequest
from tinker.types.create_sampling_session_request import CreateSamplingSessionRequest
from tinker.types.create_session_request import CreateSessionRequest
from tinker.types.future_retrieve_request import FutureRetrieveRequest
from tinker.types.get_info_request import GetInfoRequest
from tinker.types.session_heartbeat_request import SessionHeartbeatRequest

import posttrain
from posttrain.errors import DataError
from posttrain.serve.app import add_errors
from posttrain.serve.faults import ApiRefusal, bad_request
from posttrain.serve.guard import ServeGuard
from posttrain.serve.tinker.messages import read_pass
from posttrain.serve.tinker.models import WEIGHTS_OF_SAMPLER, WEIGHTS_OF_STATE, ClientModel
from posttrain.serve.tinker.requests import RequestResult
from posttrain.serve.tinker.service import TinkerService

_PROTO = "application/x-protobuf"
Record = dict[str, Any]


def make_tinker_app(service: TinkerService) -> FastAPI:
    app = FastAPI(
        title="posttrain tinker", version=posttrain.__version__, docs_url=None, redoc_url=None, openapi_url=None
    )
    app.add_middleware(ServeGuard, options=service.options.serve)
    add_errors(app)
    _add_sessions(app, service)
    _add_training(app, service)
    _add_saves(app, service)
    _add_sampling(app, service)
    _add_lists(app, service)
    return app


def _add_sessions(app: FastAPI, service: TinkerService) -> None:
    @app.get("/api/v1/healthz")
    async def healthz() -> Record:
        return {"status": "ok"}

    @app.post("/api/v1/client/config")
    async def client_config(asked: ClientConfigRequest) -> Record:
        # Half of a body: what the SDK counts leaves out names and lengths. One after the other: with the first one last, as
        # it would send them, a full queue would never come to it.
        return {
            "fwdbwd_max_chunk_bytes_count": service.options.serve.max_body_bytes // 2,
            "parallel_fwdbwd_chunks": False,
        }

    @app.post("/api/v1/client/dynamic_config")
    async def dynamic_config(asked: ClientConfigRequest) -> Record:
        return {}

    @app.post("/api/v1/create_session")
    async def create_session(asked: CreateSessionRequest) -> Record:
        return {"type": "create_session", "session_id": service.session(), "warning_message": service.warning or None}

    @app.post("/api/v1/session_heartbeat")
    async def heartbeat(asked: SessionHeartbeatRequest) -> Record:
        return {"type": "session_heartbeat"}

    @app.post("/api/v1/sessions/{session_id}/finish")
    async def finish(session_id: str) -> Response:
        service.finish_session(session_id)
        return Response(status_code=204)

    @app.post("/api/v1/telemetry")
    async def telemetry() -> Record:
        return {"status": "accepted"}  # and forgotten


def _add_training(app: FastAPI, service: TinkerService) -> None:
    @app.post("/api/v1/create_model")
    async def create_model(asked: types.CreateModelRequest) -> Record:
        return _future(service.create(asked))

    @app.post("/api/v1/get_info")
    async def get_info(asked: GetInfoRequest) -> Record:
        model = service.model(asked.model_id)
        begun = model.beginning
        source = service.shelf.source(begun.base)
        return {
            "type": "get_info", "model_id": model.id, "model_name": begun.base, "is_lora": True, "lora_rank": begun.rank,
            "model_data": {"arch": None, "model_name": begun.base, "tokenizer_id": source},
        }  # fmt: skip

    @app.post("/api/v1/forward_backward")
    async def forward_backward(request: Request) -> Record:
        if request.headers.get("content-encoding") or _PROTO not in request.headers.get("content-type", ""):
            raise ApiRefusal(415, f"expected a body of {_PROTO}, not compressed: tinker 0.25 or newer sends it")
        try:
            asked = read_pass(await request.body())
        except DataError as error:
            raise bad_request(str(error)) from error
        return _future(service.pass_over(asked))

    @app.post("/api/v1/optim_step")
    async def optim_step(asked: types.OptimStepRequest) -> Record:
        return _future(service.step(asked))

    @app.post("/api/v1/retrieve_future")
    async def retrieve_future(asked: FutureRetrieveRequest) -> Response:
        outcome = await service.outcome(asked.request_id)
        if outcome is None:
            waits = {"type": "try_again", "request_id": asked.request_id, "queue_state": "active"}
            return JSONResponse(waits)
        return _told(outcome)


def _add_saves(app: FastAPI, service: TinkerService) -> None:
    @app.post("/api/v1/save_weights")
    async def save_weights(asked: types.SaveWeightsRequest) -> Record:
        return _future(service.save(asked))

    @app.post("/api/v1/save_weights_for_sampler")
    async def save_weights_for_sampler(asked: types.SaveWeightsForSamplerRequest) -> Record:
        return _future(service.save_for_sampler(asked))

    @app.post("/api/v1/load_weights")
    async def load_weights(asked: types.LoadWeightsRequest) -> Record:
        return _future(service.load(asked) if asked.session_id is None else service.create_from(asked))

    @app.post("/api/v1/weights_info")
    async def weights_info(asked: dict[str, str]) -> Record:
        begun = service.resolve(asked.get("tinker_path", "")).beginning
        return {
            "base_model": begun.base, "is_lora": True, "lora_rank": begun.rank, "train_attn": begun.attention,
            "train_mlp": begun.mlp, "train_unembed": begun.head,
        }  # fmt: skip


def _add_sampling(app: FastAPI, service: TinkerService) -> None:
    @app.post("/api/v1/create_sampling_session")
    async def create_sampling_session(asked: CreateSamplingSessionRequest) -> Record:
        return {"type": "create_sampling_session", "sampling_session_id": service.begin_sampling(asked)}

    @app.get("/api/v1/samplers/{sampler_id}")
    async def sampler(sampler_id: str) -> Record:
        found = service.sampler(sampler_id)
        return {"sampler_id": found.id, "base_model": found.base, "model_path": found.path or None}

    @app.post("/api/v1/asample")
    async def asample(asked: types.SampleRequest) -> Record:
        request_id, sequence_ids = service.sample(asked)
        return {"request_id": request_id, "sample_sequence_ids": sequence_ids}


def _add_lists(app: FastAPI, service: TinkerService) -> None:
    @app.get("/api/v1/get_server_capabilities")
    async def capabilities() -> Record:
        return {
            "supported_models": [
                {"model_name": name, "max_context_length": window, "trainable": True, "sampleable": True}
                for name, window in service.windows.items()
            ]
        }

    @app.get("/api/v1/training_runs")
    async def training_runs(limit: int = 20, offset: int = 0) -> Record:
        ids = service.shelf.ids()
        runs = [_run(service.model(model_id)) for model_id in ids[offset : offset + limit]]
        return {"training_runs": runs, "cursor": {"offset": offset, "limit": limit, "total_count": len(ids)}}

    @app.get("/api/v1/training_runs/{model_id}")
    async def training_run(model_id: str) -> Record:
        return _run(service.model(model_id))

    @app.get("/api/v1/training_runs/{model_id}/checkpoints")
    async def checkpoints(model_id: str) -> Record:
        return {"checkpoints": _saves(service.model(model_id))}


def _future(request_id: str) -> Record:
    return {"request_id": request_id}


def _told(outcome: RequestResult) -> Response:
    if outcome.failure:
        return JSONResponse({"error": outcome.failure, "category": "user" if outcome.is_users else "server"})
    if outcome.record is None:
        return Response(outcome.message, media_type=_PROTO)
    return JSONResponse(dict(outcome.record))


def _run(model: ClientModel) -> Record:
    begun, saves = model.beginning, _saves(model)
    newest = {kind: [save for save in saves if save["checkpoint_type"] == kind] for kind in ("training", "sampler")}
    return {
        "training_run_id": model.id, "base_model": begun.base, "model_owner": "local", "is_lora": True, "lora_rank": begun.rank,
        "corrupted": bool(model.lost), "last_request_time": _when(model.used_s), "user_metadata": begun.metadata or None,
        "last_checkpoint": next(iter(newest["training"]), None), "last_sampler_checkpoint": next(iter(newest["sampler"]), None),
    }  # fmt: skip


def _saves(model: ClientModel) -> list[Record]:
    """The newest first."""
    found: list[tuple[float, Record]] = []
    for kind, said in ((WEIGHTS_OF_STATE, "training"), (WEIGHTS_OF_SAMPLER, "sampler")):
        for folder in (model.folder / kind).glob("[!.]*"):
            when = folder.stat().st_mtime
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            found.append((
                when,
                {
                    "checkpoint_id": f"{kind}/{folder.name}", "checkpoint_type": said, "time": _when(when),
                    "tinker_path": model.path(kind, folder.name), "size_bytes": size,
                },
            ))  # fmt: skip
    return [record for _, record in sorted(found, key=lambda pair: -pair[0])]


def _when(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat()
