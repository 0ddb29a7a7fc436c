"""SGLang by URL behind rows: one server, which is given the weights that are served, and adapters by name.

Every answer says which weights it was sampled from; what was sampled from others is an error. Its log-probs are those after
temperature, bias and penalties: where these act, none are promised.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.errors import EngineError
from posttrain.models.slots import Factors
from posttrain.rollout.decoding import DecodingRow, Likeliest
from posttrain.rollout.sglang import DETERMINISTIC, SEED_BITS, sglang_finish, update_body
from posttrain.serve.backends import StartedEngine
from posttrain.serve.loop import News
from posttrain.serve.options import ServeOptions
from posttrain.serve.pool import ModelVersion
from posttrain.serve.remote import Connection, RejectedError, RemoteRows, connect_given, likeliest
from posttrain.serve.remote_model import RemoteModel, write_factors
from posttrain.serve.shapers import AnswerShaper

_NEVER_PUSHED = "default"
"""What a server says of the weights that it was started with."""


@dataclass(eq=False)
class SGLangDialect:
    version: ModelVersion
    takes_adapters: bool
    update_timeout_s: float
    grammar_backend: str = ""
    is_pushed: bool = False
    name: str = "SGLang"
    path: str = "/generate"

    def body(self, row: DecodingRow) -> Mapping[str, Any]:
        params = row.params
        options: dict[str, Any] = {
            "max_new_tokens": row.ends.max_tokens, "temperature": params.temperature, "top_p": params.top_p,
            "top_k": params.top_k or -1, "min_p": params.min_p, "stop_token_ids": sorted(row.ends.stop_ids), "ignore_eos": True,
            "sampling_seed": row.request.seed & ((1 << SEED_BITS) - 1),
        }  # fmt: skip
        if row.shaper is not None:
            assert isinstance(row.shaper, AnswerShaper), "what it does is told in fields"
            options |= self._shaped(row.shaper)
        if row.num_top is not None and (row.shaper is not None or params.temperature not in (0.0, 1.0)):
            raise RejectedError(
                "its log-probs are those after temperature, bias, penalties and grammar; ask for logprobs at temperature 0 or 1 "
                "and without them"
            )
        return self._of(row.request.prompt_ids, row.adapter, options, row.num_top or 0) | {"stream": True}

    def _shaped(self, shaper: AnswerShaper) -> dict[str, Any]:
        options: dict[str, Any] = {"presence_penalty": shaper.presence, "frequency_penalty": shaper.frequency}
        if shaper.bias:
            options["logit_bias"] = {str(token): value for token, value in shaper.bias.items()}
        if shaper.grammar is not None:
            if self.grammar_backend != "llguidance":
                raise RejectedError("schemas and forced tool calls need a server that has --grammar-backend llguidance")
            options["ebnf"] = shaper.grammar  # llguidance takes its own Lark under this name
        return options

    def _of(
        self, ids: tuple[int, ...], adapter: str | None, sampling: Mapping[str, Any], num_top: int
    ) -> dict[str, Any]:
        body = {
            "input_ids": list(ids),
            "sampling_params": dict(sampling),
            "return_logprob": True,
            "top_logprobs_num": num_top,
        }
        return body | ({"lora_path": adapter} if adapter is not None else {})  # fmt: skip

    def taken(self, row: DecodingRow, event: Any) -> News:
        meta, before = event["meta_info"], len(row.ids)
        self._check_weights(meta)
        # Streams hold all tokens so far, or with --incremental-streaming-output the new ones: the last of either are new.
        new = int(meta["completion_tokens"]) - before
        scored = meta["output_token_logprobs"][-new:] if new else []
        tops: list[Any] = meta["output_top_logprobs"][-new:] if new and row.num_top else [()] * new
        if len(scored) != new:
            raise EngineError(f"it counts {new} new tokens, and names {len(scored)}")
        for (logp, token, *_), top in zip(scored, tops, strict=True):
            if row.num_top is not None:
                scores = {int(other): float(value) for value, other, *_ in top} | {int(token): float(logp)}
                row.likeliest.append(likeliest(scores, int(token), row.num_top))
            row.take(int(token), float(logp))
            if row.finish is not None:
                break
        if row.finish is None and meta["finish_reason"] is not None:
            row.finish = self._finish(row, meta["finish_reason"])
        return News(tuple(row.ids[before:]), tuple(row.likeliest[before:]), row.finish)

    def _finish(self, row: DecodingRow, reason: Mapping[str, Any]) -> Any:
        """A grammar that is through ends an answer without a token for it; nothing else ends one that our rules do not end."""
        by_grammar = isinstance(row.shaper, AnswerShaper) and row.shaper.grammar is not None
        if by_grammar and sglang_finish(reason) == "stop":
            return "stop"
        raise EngineError(f"it ended an answer after {len(row.ids)} tokens with {reason}")

    def _check_weights(self, meta: Mapping[str, Any]) -> None:
        if meta["weight_version"] != self.version.digest:
            raise EngineError(f"it answered with the weights {meta['weight_version']}, expected {self.version.digest}")

    async def prompt_scores(
        self, connection: Connection, ids: tuple[int, ...], num_top: int, adapter: str | None
    ) -> list[Likeliest]:
        body = self._of(ids, adapter, {"max_new_tokens": 1, "temperature": 1.0}, num_top) | {"logprob_start_len": 0}
        meta = (await connection.post(self.path, body))["meta_info"]
        self._check_weights(meta)
        rows = meta["input_token_logprobs"][1:]
        tops: list[Any] = meta["input_top_logprobs"][1:] if num_top else [()] * len(rows)
        if [int(token) for _, token, *_ in rows] != list(ids[1:]):
            raise EngineError(f"it scored {len(rows)} tokens, asked were {len(ids) - 1}, or others were scored")
        found: list[Likeliest] = []
        for (logp, token, *_), top in zip(rows, tops, strict=True):
            scores = {int(other): float(value) for value, other, *_ in top} | {int(token): float(logp)}
            found.append(likeliest(scores, int(token), num_top))
        return found

    # --- its weights -----------------------------------------------------------------------------------------------

    async def begin(self, connection: Connection) -> None:
        """Give it the weights. It takes them when what it is answering is answered; who asks meanwhile waits there."""
        address = connection.server.client.address
        info = await connection.get("/server_info", connection.server.client.timeout_s)
        wanted = DETERMINISTIC | ({"enable_lora": "--enable-lora"} if self.takes_adapters else {})
        if missing := [flag for name, flag in wanted.items() if not info[name]]:
            raise EngineError(f"SGLang at {address} was started without {' '.join(missing)}; start it with that")
        self._check_alone(info)
        self.grammar_backend = str(info["grammar_backend"])
        body = update_body(self.version.folder, self.version.digest)
        answer = await connection.post("/update_weights_from_disk", body, self.update_timeout_s)
        if not answer["success"]:
            raise EngineError(f"SGLang at {address} could not take {self.version.id}: {answer['message']}")
        self.is_pushed = True

    def _check_alone(self, info: Mapping[str, Any]) -> None:
        held = info["weight_version"]
        if self.is_pushed and held not in (self.version.digest, _NEVER_PUSHED):
            raise EngineError(
                f"it has the weights {held}, which somebody else gave it; give each router and each run a server of its own"
            )

    async def trouble(self, connection: Connection, adapters: Collection[str], timeout_s: float) -> str:
        # Asked of the process that decodes too.
        held = (await connection.get("/server_info", timeout_s))["weight_version"]
        return "" if held == self.version.digest else f"it has the weights {held}, not {self.version.digest} any more"

    async def load(self, connection: Connection, name: str, factors: Factors) -> None:
        folder = await asyncio.to_thread(write_factors, connection.folder.path, name, factors)
        with contextlib.suppress(EngineError):  # of a router before us; it mostly has none of that name
            await self.unload(connection, name)
        answer = await connection.post("/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        if not answer["success"]:
            raise EngineError(f"SGLang could not load it: {answer['error_message']}")

    async def unload(self, connection: Connection, name: str) -> None:
        await connection.post("/unload_lora_adapter", {"lora_name": name})


async def start_sglang(options: ServeOptions, version: ModelVersion, takes_adapters: bool) -> StartedEngine:
    model = await asyncio.to_thread(RemoteModel.of, version.folder)
    dialect = SGLangDialect(version, takes_adapters, options.start_timeout_s)
    rows = RemoteRows(dialect, lambda: connect_given(options), options.start_timeout_s, options.engine_timeout_s)
    await rows.start()
    info = await (await rows.live()).get("/server_info", options.engine_timeout_s)
    return model.started(rows, int(info["max_req_input_len"]), options.max_model_len)
