"""Rows answered by vLLM: a server of our own for each model, on a Unix socket, started anew when it dies or hangs.

What it was answering then is lost, and told so; who asks meanwhile waits for the new one. All our rules of where an answer ends
stay here: of vLLM only tokens are wanted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from safetensors.torch import save_file

from posttrain.config.stages import ModelKeys
from posttrain.errors import EngineError, EngineGoneError, ModelError
from posttrain.files import digest_bytes
from posttrain.models.device import place, weight_dtype
from posttrain.models.generation import stored_stop_token_ids
from posttrain.models.load import load_config, load_tokenizer, stored_dtype
from posttrain.models.slots import Factors
from posttrain.rollout.decoding import DecodingRow, Likeliest
from posttrain.rollout.folder import OwnFolder
from posttrain.rollout.vllm.options import VLLMOptions, require_vllm
from posttrain.rollout.vllm.server import BASE, OwnServer, await_ready
from posttrain.serve.backends import StartedEngine
from posttrain.serve.codec import ServedCodec
from posttrain.serve.faults import ApiRefusal, bad_request
from posttrain.serve.loop import News
from posttrain.serve.options import ServeOptions
from posttrain.serve.pool import ModelVersion
from posttrain.serve.shapers import AnswerShaper

log = logging.getLogger(__name__)

_GENERATE = "/inference/v1/generate"
_BEAT_S = 1.0
_BACKOFF_S = (0.0, 1.0, 5.0, 30.0)
_SEED_MASK = (1 << 63) - 1


@dataclass(eq=False)
class _Process:
    """One server while it lives, and the folder of its socket, log and adapters."""

    server: OwnServer
    http: httpx.AsyncClient
    folder: OwnFolder

    @staticmethod
    def start(options: VLLMOptions, timeout_s: float) -> _Process:
        folder = OwnFolder()
        try:
            server = OwnServer(options, folder.path, folder.path / "vllm.log", timeout_s)
        except BaseException:
            folder.remove()
            raise
        http = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=server.client.address.path, limits=httpx.Limits(max_connections=None)),
            base_url="http://localhost", headers={"Authorization": f"Bearer {server.client.token}"},
            timeout=httpx.Timeout(None, connect=timeout_s),
        )  # fmt: skip
        return _Process(server, http, folder)

    async def post(self, path: str, body: Any) -> httpx.Response:
        """Raises: EngineError where it refuses."""
        answer = await self.http.post(path, json=body)
        if answer.is_error:
            raise _error(answer)
        return answer

    async def close(self) -> None:
        await self.http.aclose()
        await asyncio.to_thread(self.server.close)
        self.folder.remove()


@dataclass(eq=False)
class VLLMRows:
    """Rows of one model, and of the adapters that were loaded by name."""

    options: VLLMOptions
    start_timeout_s: float
    timeout_s: float
    num_restarts: int = 0
    _adapters: dict[str, Factors] = field(default_factory=dict[str, Factors])
    _rows: dict[DecodingRow, asyncio.Task[None]] = field(default_factory=dict[DecodingRow, asyncio.Task[None]])
    _tells: dict[DecodingRow, Callable[[News], None]] = field(default_factory=dict[DecodingRow, Callable[[News], None]])
    _in_flight: set[DecodingRow] = field(default_factory=set[DecodingRow])
    _suspected: asyncio.Event = field(default_factory=asyncio.Event)

    async def start(self) -> None:
        """Raises: EngineGoneError where it does not start."""
        self._live = asyncio.create_task(self._started())
        try:
            await self._live
        except asyncio.CancelledError:
            self._live.cancel()
            raise
        self._watching = asyncio.create_task(self._watch())

    async def close(self) -> None:
        self._watching.cancel()
        self._fail_rows(self._rows, "the server is shutting down")
        self._live.cancel()
        with contextlib.suppress(asyncio.CancelledError, EngineError):
            await (await self._live).close()

    async def max_model_len(self) -> int:
        answer = await (await self._process()).http.get("/v1/models")
        return int(answer.json()["data"][0]["max_model_len"])

    # --- rows ------------------------------------------------------------------------------------------------------

    def submit(self, row: DecodingRow, tell: Callable[[News], None]) -> None:
        self._tells[row] = tell
        self._rows[row] = asyncio.create_task(self._answer(row))

    def cancel(self, row: DecodingRow) -> None:
        self._tells.pop(row, None)
        if (task := self._rows.pop(row, None)) is not None:
            task.cancel()

    async def _answer(self, row: DecodingRow) -> None:
        try:
            while not await self._asked_of_a_live_one(row):
                pass
        except _RejectedError as error:
            self._end(row, News(refusal=f"vLLM: {error}"))
        except (EngineError, httpx.HTTPError) as error:
            self._suspected.set()
            self._end(row, News(failure=f"vLLM: {error or type(error).__name__}"))
        finally:
            self._end(row, News(failure="a defect of the server; its log says more"))  # of nobody who was told
            self._rows.pop(row, None)
            self._in_flight.discard(row)

    async def _asked_of_a_live_one(self, row: DecodingRow) -> bool:
        """False where nobody was there to be asked: nothing of it was lost."""
        process = await self._process()
        self._in_flight.add(row)
        try:
            async with contextlib.aclosing(_stream(process, self._body(row))) as events:
                async for choice in events:
                    news = _taken(row, choice)
                    if news.is_last:
                        self._end(row, news)
                        return True
                    self._tells[row](news)
        except httpx.ConnectError:
            self._in_flight.discard(row)
            self._suspected.set()
            await asyncio.sleep(0.05)
            return False
        raise EngineGoneError("its answer ended early")

    def _end(self, row: DecodingRow, news: News) -> None:
        if (tell := self._tells.pop(row, None)) is not None:
            tell(news)

    def _fail_rows(self, rows: Collection[DecodingRow], why: str) -> None:
        for row in list(rows):
            self._end(row, News(failure=why))
            self.cancel(row)

    def _body(self, row: DecodingRow) -> dict[str, Any]:
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
        model = adapter or BASE
        return {
            "model": model,
            "token_ids": list(ids),
            "cache_salt": digest_bytes(model.encode()),
            "sampling_params": dict(sampling),
        }

    async def prompt_scores(self, ids: tuple[int, ...], num_top: int, adapter: str | None) -> list[Likeliest]:
        if self.options.lora_rank is not None and self.options.device == "cpu":
            # Its kernel for adapters on a CPU ends the process there.
            raise bad_request("echo with logprobs beside adapters is not had from vLLM on a CPU; leave one out", "echo")
        sampling = {"max_tokens": 1, "prompt_logprobs": num_top, "detokenize": False}
        try:
            answer = await (await self._process()).post(_GENERATE, self._of(ids, adapter, sampling))
        except _RejectedError as error:
            raise bad_request(f"vLLM: {error}") from error
        except (EngineError, httpx.HTTPError) as error:
            self._suspected.set()
            raise ApiRefusal(503, f"vLLM: {error}; ask again", code="interrupted", retry_after_s=1) from error
        found: list[Likeliest] = []
        for token, likely in zip(ids[1:], answer.json()["prompt_logprobs"][1:], strict=True):
            scores = {int(other): float(one["logprob"]) for other, one in likely.items()}
            found.append(Likeliest(scores[token], _top(scores, num_top)))
        return found

    # --- adapters --------------------------------------------------------------------------------------------------

    async def load_adapter(self, name: str, factors: Factors) -> None:
        rank = max((a.shape[0] for a, _ in factors.values()), default=0)
        if self.options.lora_rank is not None and rank > self.options.lora_rank:
            raise ModelError(
                f"{name} has rank {rank}, and vLLM was started for {self.options.lora_rank}: --max-lora-rank {rank}"
            )
        process = None
        while process is not await self._process():  # one that was started meanwhile does not have it
            process = await self._process()
            try:
                await _load(process, name, factors)
            except (EngineError, httpx.HTTPError) as error:
                self._suspected.set()
                raise ModelError(f"{name}: {error}") from error
            self._adapters[name] = factors

    async def unload_adapter(self, name: str) -> None:
        del self._adapters[name]
        with contextlib.suppress(EngineError, httpx.HTTPError):  # a new process does not load it
            await (await self._process()).post("/v1/unload_lora_adapter", {"lora_name": name})

    # --- its process -----------------------------------------------------------------------------------------------

    async def _process(self) -> _Process:
        """The one that lives, waited for where it is being started anew. Raises: EngineError where it does not start."""
        while True:
            live = self._live
            process = await asyncio.shield(live)
            if live is self._live:
                return process

    async def _started(self, wait_s: float = 0.0, instead_of: _Process | None = None) -> _Process:
        if instead_of is not None:
            await instead_of.close()
        await asyncio.sleep(wait_s)
        process = _Process.start(self.options, self.timeout_s)
        try:
            await asyncio.to_thread(await_ready, process.server, self.start_timeout_s, "--start-timeout-s")
            for name, factors in list(self._adapters.items()):
                await _load(process, name, factors)
        except BaseException:
            await process.close()
            raise
        return process

    async def _watch(self) -> None:
        failures = 0
        while True:
            try:
                process = await asyncio.shield(self._live)
            except (EngineError, httpx.HTTPError) as error:
                failures += 1
                wait_s = _BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)]
                log.error("vLLM does not start again, tried anew in %g s: %s", wait_s, error)
                self._live = asyncio.create_task(self._started(wait_s))
            else:
                failures = 0
                why = await self._trouble(process)
                log.error("vLLM is started anew: %s", why)
                self._live = asyncio.create_task(self._started(instead_of=process))
                # Who only waits for a server goes on waiting.
                self._fail_rows(self._in_flight, f"vLLM is gone: {why.partition('; its log')[0]}")
            self.num_restarts += 1

    async def _trouble(self, process: _Process) -> str:
        """Returns when it ended, or does not answer any more: why."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._suspected.wait(), _BEAT_S)
            self._suspected.clear()
            if why := await asyncio.to_thread(process.server.ended):
                return why
            try:
                # Asked of the process that decodes, between two of its steps.
                await process.http.get("/is_paused", timeout=self.timeout_s)
            except httpx.HTTPError as error:
                return f"it does not answer ({type(error).__name__})"


class _RejectedError(EngineError):
    """It takes no such request, and would not take it again."""


def _error(answer: httpx.Response) -> EngineError:
    # Others of 4xx (its key, a model that it does not have) are no mistake of whoever asks us.
    kind = _RejectedError if answer.status_code in (400, 413, 422) else EngineError
    return kind(f"it answered {answer.status_code}: {' '.join(answer.text.split())[:300]}")


async def _stream(process: _Process, body: Mapping[str, Any]) -> AsyncGenerator[Any]:
    """The choices of an answer's events. Raises: EngineError where one is an error."""
    async with process.http.stream("POST", _GENERATE, json=body) as answer:
        if answer.is_error:
            await answer.aread()
            raise _error(answer)
        async for line in answer.aiter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                event = json.loads(line[len("data: ") :])
                if "error" in event:
                    raise EngineError(f"it failed: {event['error']}")
                yield event["choices"][0]


def _taken(row: DecodingRow, choice: Any) -> News:
    """What a row takes of an event: tokens up to the one that ends it."""
    before = len(row.ids)
    scored = (choice["logprobs"] or {"content": None})["content"] or ()
    for number, token in enumerate(choice["token_ids"] or []):
        logp = 0.0
        if row.num_top is not None:
            logp = float(scored[number]["logprob"])
            scores = {int(other["token_id"]): float(other["logprob"]) for other in scored[number]["top_logprobs"]}
            row.likeliest.append(Likeliest(logp, _top(scores, row.num_top)))
        row.take(token, logp)
        if row.finish is not None:
            break
    if row.finish is None and choice["finish_reason"] is not None:
        raise EngineError(f"it ended an answer after {len(row.ids)} tokens with {choice['finish_reason']}")
    return News(tuple(row.ids[before:]), tuple(row.likeliest[before:]), row.finish)


def _top(scores: Mapping[int, float], count: int) -> tuple[tuple[int, float], ...]:
    return tuple(sorted(scores.items(), key=lambda pair: (-pair[1], pair[0]))[:count])


async def _load(process: _Process, name: str, factors: Factors) -> None:
    folder = process.folder.path / f"adapter-{name.rpartition(':')[2]}"
    await asyncio.to_thread(_write, folder, factors)
    await process.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})


def _write(folder: Path, factors: Factors) -> None:
    """As PEFT writes an adapter; the scale of each module is in its B, so that vLLM's one scale for all is 1."""
    folder.mkdir(exist_ok=True)
    tensors = {
        f"base_model.model.{module}.lora_{side}.weight": part.contiguous()
        for module, pair in factors.items()
        for side, part in zip("AB", pair, strict=True)
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    rank = max(a.shape[0] for a, _ in factors.values())
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "bias": "none",
        "target_modules": sorted({module.rpartition(".")[2] for module in factors}),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


async def start_vllm(options: ServeOptions, version: ModelVersion, takes_adapters: bool) -> StartedEngine:
    require_vllm()
    source = ModelKeys(base_model=str(version.folder))
    config, tokenizer = await asyncio.to_thread(lambda: (load_config(source), load_tokenizer(source)))
    placement = place(source)
    computed = placement.autocast_dtype or weight_dtype(source, placement, stored_dtype(config), trainable=False)
    wanted = VLLMOptions(
        model=str(version.folder), stop_token_ids=(), device=placement.device.type,
        dtype=str(computed).removeprefix("torch."), max_num_seqs=options.max_num_seqs, max_model_len=options.max_model_len,
        memory_gib=options.kv_memory_gib, lora_rank=options.max_lora_rank if takes_adapters else None, max_loras=options.max_loras,
        beside={"logprobs_mode": "raw_logprobs", "structured_outputs_config": {"backend": "guidance"}},
    )  # fmt: skip
    rows = VLLMRows(wanted, options.start_timeout_s, options.engine_timeout_s)
    await rows.start()
    window, num_ids = await rows.max_model_len(), config.get_text_config().vocab_size

    def codec_of(tokenizer: Any) -> ServedCodec:
        stops = stored_stop_token_ids(str(version.folder), None, config, tokenizer)
        return ServedCodec(tokenizer, frozenset(stops), window, num_ids)

    return StartedEngine(rows, tokenizer, codec_of)
