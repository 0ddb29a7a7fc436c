"""vLLM behind rows: a server of our own for each model, on a Unix socket, or one given by URL with the model that it has."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from posttrain.config.stages import ModelKeys
from posttrain.errors import EngineError
from posttrain.files import digest_bytes
from posttrain.models.device import place, weight_dtype
from posttrain.models.slots import Factors
from posttrain.models.stored import stored_dtype
from posttrain.rollout.decoding import DecodingRow, Likeliest
from posttrain.rollout.folder import OwnFolder
from posttrain.rollout.vllm.options import VLLMOptions, require_vllm
from posttrain.rollout.vllm.server import BASE, OwnServer
from posttrain.serve.backends import StartedEngine
from posttrain.serve.loop import News
from posttrain.serve.options import ServeOptions
from posttrain.serve.pool import ModelVersion
from posttrain.serve.remote import Connection, RejectedError, RemoteRows, connect_given, likeliest
from posttrain.serve.remote_model import RemoteModel, write_factors
from posttrain.serve.shapers import AnswerShaper

_SEED_MASK = (1 << 63) - 1


@dataclass(frozen=True)
class VLLMDialect:
    """`lora_rank`: the largest rank that it was started for, where that is known. `served`: what it calls its model."""

    served: str = BASE
    lora_rank: int | None = None
    echoes_adapters: bool = True
    name: str = "vLLM"
    path: str = "/inference/v1/generate"

    def body(self, row: DecodingRow) -> Mapping[str, Any]:
        params, shaper = row.params, row.shaper
        sampling: dict[str, Any] = {
            "max_tokens": row.ends.max_tokens, "temperature": params.temperature, "top_p": params.top_p, "top_k": params.top_k,
            "min_p": params.min_p, "seed": row.request.seed & _SEED_MASK, "logprobs": row.num_top,
            "stop_token_ids": sorted(row.ends.stop_ids), "ignore_eos": True, "detokenize": False,
        }  # fmt: skip
        if shaper is not None:
            assert isinstance(shaper, AnswerShaper), "what it does is told in fields"
            sampling |= {"presence_penalty": shaper.presence, "frequency_penalty": shaper.frequency}
            sampling |= {"logit_bias": {str(token): value for token, value in shaper.bias.items()} or None}
            sampling |= {"structured_outputs": {"grammar": shaper.grammar}} if shaper.grammar is not None else {}
        return self._of(row.request.prompt_ids, row.adapter, sampling) | {"stream": True}

    def _of(self, ids: Sequence[int], adapter: str | None, sampling: Mapping[str, Any]) -> dict[str, Any]:
        # The salt keeps what is cached of one adapter from all others, whatever vLLM knows of their names.
        model = adapter or self.served
        return {
            "model": model,
            "token_ids": list(ids),
            "cache_salt": digest_bytes(model.encode()),
            "sampling_params": dict(sampling),
        }

    def taken(self, row: DecodingRow, event: Any) -> News:
        before, choice = len(row.ids), event["choices"][0]
        scored = (choice["logprobs"] or {"content": None})["content"] or ()
        for number, token in enumerate(choice["token_ids"] or []):
            logp = 0.0
            if row.num_top is not None:
                logp = float(scored[number]["logprob"])
                scores = {int(other["token_id"]): float(other["logprob"]) for other in scored[number]["top_logprobs"]}
                row.likeliest.append(likeliest(scores | {token: logp}, token, row.num_top))
            row.take(token, logp)
            if row.finish is not None:
                break
        if row.finish is None and choice["finish_reason"] is not None:
            raise EngineError(f"it ended an answer after {len(row.ids)} tokens with {choice['finish_reason']}")
        return News(tuple(row.ids[before:]), tuple(row.likeliest[before:]), row.finish)

    async def prompt_scores(
        self, connection: Connection, ids: tuple[int, ...], num_top: int, adapter: str | None
    ) -> list[Likeliest]:
        if not self.echoes_adapters:
            # Its kernel for adapters on a CPU ends the process there.
            raise RejectedError("echo with logprobs beside adapters is not had from vLLM on a CPU; leave one out")
        sampling = {"max_tokens": 1, "prompt_logprobs": num_top, "detokenize": False}
        answer = await connection.post(self.path, self._of(ids, adapter, sampling))
        return [
            likeliest({int(other): float(one["logprob"]) for other, one in scores.items()}, token, num_top)
            for token, scores in zip(ids[1:], answer["prompt_logprobs"][1:], strict=True)
        ]

    async def begin(self, connection: Connection) -> None:
        """Ours was started with the model."""

    async def trouble(self, connection: Connection, adapters: Collection[str], timeout_s: float) -> str:
        # Asked of the process that decodes, between two of its steps.
        await connection.get("/is_paused", timeout_s)
        return ""

    async def load(self, connection: Connection, name: str, factors: Factors) -> None:
        rank = max((a.shape[0] for a, _ in factors.values()), default=0)
        if self.lora_rank is not None and rank > self.lora_rank:
            raise RejectedError(f"rank {rank}, and vLLM was started for {self.lora_rank}: --max-lora-rank {rank}")
        folder = await asyncio.to_thread(write_factors, connection.folder.path, name, factors)
        await connection.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})

    async def unload(self, connection: Connection, name: str) -> None:
        await connection.post("/v1/unload_lora_adapter", {"lora_name": name})


@dataclass(frozen=True)
class GivenVLLM(VLLMDialect):
    """Somebody else's: it keeps the model that it was started with, which must be `folder`, and the adapters that we load."""

    folder: Path = Path()

    async def begin(self, connection: Connection) -> None:
        card = await model_card(connection)
        if card["root"] is None or Path(card["root"]).resolve() != self.folder.resolve() or card["id"] != self.served:
            raise EngineError(
                f"vLLM at {connection.server.client.address} serves {card['root']} as {card['id']}, expected {self.folder} "
                f"as {self.served}: start it with --model {self.folder}"
            )
        try:
            await connection.post(self.path, {**self._of([0], None, {"max_tokens": 1}), "stream": False})
        except EngineError as error:
            raise EngineError(
                f"vLLM at {connection.server.client.address} takes no token ids ({error}); start it with --enable-scale-out"
            ) from error

    async def trouble(self, connection: Connection, adapters: Collection[str], timeout_s: float) -> str:
        known = [card["id"] for card in (await connection.get("/v1/models", timeout_s))["data"]]
        gone = [name for name in (self.served, *adapters) if name not in known]
        return f"it does not have {gone[0]} any more: it was started anew" if gone else ""

    async def load(self, connection: Connection, name: str, factors: Factors) -> None:
        with contextlib.suppress(EngineError):  # of a router before us; it mostly has none of that name
            await self.unload(connection, name)
        await super().load(connection, name, factors)


async def model_card(connection: Connection) -> Any:
    """What vLLM says of the model that it was started with."""
    return (await connection.get("/v1/models", connection.server.client.timeout_s))["data"][0]


async def start_vllm(options: ServeOptions, version: ModelVersion, takes_adapters: bool) -> StartedEngine:
    model = await asyncio.to_thread(RemoteModel.of, version.folder)
    start = _given if options.url else _own
    rows, card = await start(options, model, takes_adapters)
    return model.started(rows, int(card["max_model_len"]), options.max_model_len)


async def _own(options: ServeOptions, model: RemoteModel, takes_adapters: bool) -> tuple[RemoteRows, Any]:
    require_vllm()
    source = ModelKeys(base_model=str(model.folder))
    placement = place(source)
    computed = placement.autocast_dtype or weight_dtype(source, placement, stored_dtype(model.config), trainable=False)
    lora_rank = options.max_lora_rank if takes_adapters else None
    wanted = VLLMOptions(
        model=str(model.folder), stop_token_ids=(), device=placement.device.type,
        dtype=str(computed).removeprefix("torch."), max_num_seqs=options.max_num_seqs, max_model_len=options.max_model_len,
        memory_gib=options.kv_memory_gib, lora_rank=lora_rank, max_loras=options.max_loras,
        beside={"logprobs_mode": "raw_logprobs", "structured_outputs_config": {"backend": "guidance"}},
    )  # fmt: skip

    def connect() -> Connection:
        folder = OwnFolder()
        try:
            log = folder.path / "vllm.log"
            return Connection.to(OwnServer(wanted, folder.path, log, options.engine_timeout_s), folder)
        except BaseException:
            folder.remove()
            raise

    dialect = VLLMDialect(lora_rank=lora_rank, echoes_adapters=lora_rank is None or wanted.device != "cpu")
    rows = RemoteRows(dialect, connect, options.start_timeout_s, options.engine_timeout_s)
    await rows.start()
    return rows, await model_card(await rows.live())


async def _given(options: ServeOptions, model: RemoteModel, takes_adapters: bool) -> tuple[RemoteRows, Any]:
    asking = connect_given(options)
    try:
        card = await model_card(asking)
    except httpx.HTTPError as error:
        raise EngineError(f"{options.url} cannot be asked for its models ({error or type(error).__name__})") from error
    finally:
        await asking.close()
    dialect = GivenVLLM(served=card["id"], folder=model.folder)
    rows = RemoteRows(dialect, lambda: connect_given(options), options.start_timeout_s, options.engine_timeout_s)
    await rows.start()
    return rows, card
