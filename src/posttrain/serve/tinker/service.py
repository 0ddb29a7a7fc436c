"""What the endpoints do, without HTTP: requests of clients in, in the order of their numbers, and their outcomes out.

In the thread of the event loop; what computes is handed to the queue.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tinker import types

from posttrain.config.stages import ModelKeys
from posttrain.errors import ConfigError, DataError
from posttrain.files import digest_json
from posttrain.models.load import load_config
from posttrain.names import FREE
from posttrain.recipes.tinker import AdamStep
from posttrain.serve.faults import ApiRefusal, bad_request
from posttrain.serve.tinker.journal import EXPORT, SAVE
from posttrain.serve.tinker.messages import PassAsked
from posttrain.serve.tinker.models import WEIGHTS_OF_SAMPLER, ClientModel, ClientRecord, ModelShelf
from posttrain.serve.tinker.options import TinkerOptions
from posttrain.serve.tinker.requests import ComputeJob, ComputeQueue, RequestResult
from posttrain.serve.tinker.samplers import SamplingSession, SamplingSessions, alike, check_sample, seed_asked

_MOST_RANK = 512
_POLL_S = 25.0
"""How long a client that asks for an outcome waits for it; the SDK hangs up after 45 s."""


@dataclass
class _Line:
    """Of one model: what came before its turn, and whose turn it is."""

    next_seq: int
    early: dict[int, ComputeJob] = field(default_factory=dict[int, ComputeJob])


class TinkerService:
    def __init__(self, options: TinkerOptions) -> None:
        self.options, self.shelf = options, ModelShelf(options)
        self.samplers = SamplingSessions(options.folder / "samplers", self.shelf)
        self.queue = ComputeQueue(options.max_results_bytes)
        self._lines: dict[str, _Line] = {}
        self._is_draining = False
        configs = {name: load_config(ModelKeys(base_model=source)) for name, source in options.models.items()}
        self.windows = {name: _window(config) for name, config in configs.items()}
        """Name of each base → its most tokens."""
        tied = [name for name, config in configs.items() if config.get_text_config().tie_word_embeddings]
        self.warning = (
            f"{', '.join(tied)}: embedding and head are one weight, so train_unembed adapts nothing there"
            if tied
            else ""
        )
        """What each client is told."""
        for name in options.models:
            self.shelf.digest(name)

    # --- sessions and models ---

    def session(self) -> str:
        return f"session-{secrets.token_hex(6)}"

    def finish_session(self, session_id: str) -> None:
        """Its models leave the memory; what they saved stays."""
        for model in self.shelf.in_memory():
            if model.id.startswith(f"{session_id}:"):
                self._submit(f"{model.id}:finish:{secrets.token_hex(4)}", partial(_leave, model))

    def create(self, asked: types.CreateModelRequest) -> str:
        """The request's id, which begins with the model's. Raises: ApiRefusal."""
        lora = asked.lora_config or types.LoraConfig(rank=32)
        if not 1 <= lora.rank <= _MOST_RANK:
            raise bad_request(f"lora_config.rank: got {lora.rank}, expected 1 to {_MOST_RANK}", "lora_config.rank")
        if not (lora.train_attn or lora.train_mlp or lora.train_unembed):
            raise bad_request("lora_config trains nothing; set train_attn, train_mlp or train_unembed", "lora_config")
        _check_optimizer(asked.optimizer_config)
        seed = secrets.randbits(31) if lora.seed is None else lora.seed
        with _refusing():
            beginning = ClientRecord(
                f"{asked.session_id}:train:{asked.model_seq_id}", asked.base_model, self.shelf.digest(asked.base_model), lora.rank,
                lora.train_attn, lora.train_mlp, lora.train_unembed, seed, time.time(), metadata=asked.user_metadata or {},
            )  # fmt: skip
            return self._begin(beginning)

    def create_from(self, asked: types.LoadWeightsRequest) -> str:
        """A model that begins with saved weights. Raises: ApiRefusal."""
        if asked.optimizer_config is not None:
            _check_optimizer(asked.optimizer_config)
        with _refusing():
            model, kind, _ = self.shelf.resolve(asked.path)
            if asked.optimizer and kind == WEIGHTS_OF_SAMPLER:
                raise ConfigError(f"{asked.path} holds no optimizer; give the path of a save_state")
            base = asked.base_model or model.beginning.base
            of = model.beginning
            beginning = ClientRecord(
                f"{asked.session_id}:train:{asked.model_seq_id}", base, self.shelf.digest(base), of.rank, of.attention, of.mlp,
                of.head, of.seed, time.time(), asked.path, asked.optimizer, asked.user_metadata or {},
            )  # fmt: skip
            return self._begin(beginning)

    def _begin(self, beginning: ClientRecord) -> str:
        request_id = f"{beginning.model_id}:create"
        if self.queue.find(request_id) is None:
            self._let_in()
            model = self.shelf.begin(beginning)
            self._submit(request_id, partial(_made, model))
        return request_id

    def resolve(self, path: str) -> ClientModel:
        """The model of a tinker:// path. Raises: ApiRefusal."""
        with _refusing():
            return self.shelf.resolve(path)[0]

    def model(self, model_id: str) -> ClientModel:
        """Raises: ApiRefusal."""
        found = self.shelf.find(model_id)
        if found is None:
            raise ApiRefusal(404, f"model_id: there is no {model_id} here", code="model_not_found", param="model_id")
        return found

    # --- requests with a number ---

    def pass_over(self, asked: PassAsked) -> str:
        kind = "forward_backward" if asked.backward else "forward"
        model = self.model(asked.model_id)
        return self._in_line(model, asked.seq, kind, asked.digest, lambda: RequestResult(message=model.run(asked)))

    def step(self, asked: types.OptimStepRequest) -> str:
        model, given = self.model(asked.model_id), asked.optim_params

        def work() -> RequestResult:
            if not isinstance(given, types.AdamParams):
                raise ConfigError(f"optim_params: got {type(given).__name__}; this server has AdamParams")
            betas = (given.beta1, given.beta2)
            adam = AdamStep(given.learning_rate, betas, given.eps, given.weight_decay, given.grad_clip_norm)
            return RequestResult(model.step(adam))

        return self._in_line(model, _seq(asked.seq_id), "optim_step", _digest(asked), work)

    def save(self, asked: types.SaveWeightsRequest) -> str:
        model, seq = self.model(asked.model_id), _seq(asked.seq_id)
        name = asked.path or f"request-{seq}"

        def work() -> RequestResult:
            _check_name(name)
            return RequestResult(model.save(seq, name, overwrite=asked.overwrite))

        return self._in_line(model, seq, SAVE, _digest(asked), work, name)

    def save_for_sampler(self, asked: types.SaveWeightsForSamplerRequest) -> str:
        model, seq = self.model(asked.model_id), _seq(asked.seq_id)
        name = asked.path

        def work() -> RequestResult:
            if name is not None:
                _check_name(name)
                return RequestResult(model.export(name))
            sampler = SamplingSession(f"{model.id}:sample:{seq}", model.beginning.base, model_id=model.id)
            self.samplers.begin(sampler)
            return RequestResult(model.keep_snapshot(sampler.id))

        return self._in_line(model, seq, EXPORT, _digest(asked), work)

    def load(self, asked: types.LoadWeightsRequest) -> str:
        model, seq = self.model(asked.model_id or ""), _seq(asked.seq_id)

        def work() -> RequestResult:
            of, kind, folder = self.shelf.resolve(asked.path)
            if kind == WEIGHTS_OF_SAMPLER or of.beginning.shape != model.beginning.shape:
                raise ConfigError(f"{asked.path}: expected the save_state of an adapter of the same rank and parts")
            model.replace_by(folder, optimizer=asked.optimizer)
            return RequestResult({"path": asked.path, "model_id": model.id, "type": "load_weights"})

        return self._in_line(model, seq, "load_weights", _digest(asked), work)

    def _in_line(
        self, model: ClientModel, seq: int, kind: str, digest: str, work: Callable[[], RequestResult], name: str = ""
    ) -> str:
        """Let it in; it is computed when all with lower numbers are. Raises: ApiRefusal."""
        request_id = f"{model.id}:{seq}"
        line = self._lines.setdefault(model.id, _Line(model.journal.last + 1))
        known = model.journal.entries.get(seq)
        if known is not None:
            if known.digest != digest:
                raise bad_request(
                    f"request {known} of {model.id} came before with other content; numbers are given once", "seq_id"
                )
            return request_id
        if self.queue.find(request_id) is not None:
            return request_id
        self._let_in()
        if model.lost:
            self.queue.note(job := ComputeJob(request_id, RequestResult))
            self.queue.end(job, RequestResult(failure=model.lost))
            return request_id
        if seq < line.next_seq:
            raise bad_request(f"seq_id: got {seq}, the next one of {model.id} is {line.next_seq}", "seq_id")
        model.journal.accept(seq, kind, digest, name)
        done = partial(_noted, model, seq)
        self.queue.note(job := ComputeJob(request_id, work, done))
        line.early[seq] = job
        while line.next_seq in line.early:
            self.queue.submit(line.early.pop(line.next_seq))
            line.next_seq += 1
        return request_id

    # --- sampling ---

    def begin_sampling(self, asked: types.CreateSamplingSessionRequest) -> str:
        with _refusing():
            if asked.model_path is None and asked.base_model is None:
                raise ConfigError("model_path and base_model are both missing; expected one of them")
            base = asked.base_model or ""
            if asked.model_path is not None:
                base = self.shelf.resolve(asked.model_path)[0].beginning.base
            sampler = SamplingSession(
                f"{asked.session_id}:sample:{asked.sampling_session_seq_id}", base, path=asked.model_path or ""
            )
            self.samplers.begin(sampler)
        return sampler.id

    def sampler(self, sampler_id: str) -> SamplingSession:
        """Raises: ApiRefusal."""
        found = self.samplers.find(sampler_id)
        if found is None:
            raise ApiRefusal(404, f"there is no sampling session {sampler_id} here", code="sampler_not_found")
        return found

    def sample(self, asked: types.SampleRequest) -> tuple[str, list[str]]:
        """The request's id, and one for each sample. Raises: ApiRefusal."""
        sampler = self.sampler(asked.sampling_session_id or "")
        request_id = f"{sampler.id}:{_seq(asked.seq_id, least=0)}"
        ids = [f"{request_id}:{number}" for number in range(asked.num_samples)]
        if self.queue.find(request_id) is None:
            with _refusing():
                check_sample(asked)
            self._let_in()
            job = ComputeJob(
                request_id, RequestResult, together=alike(sampler.id, asked), join=partial(self.samplers.sample, sampler),
                asked=(asked, seed_asked(asked)),
            )  # fmt: skip
            self.queue.note(job)
            self.queue.submit(job)
        return request_id, ids

    # --- outcomes ---

    async def outcome(self, request_id: str) -> RequestResult | None:
        """None: not yet. Raises: ApiRefusal for what is neither here nor known of."""
        job = self.queue.find(request_id)
        if job is None:
            return self._outcome_of_before(request_id)
        if job.outcome is None:
            try:
                async with asyncio.timeout(0.0 if self._is_draining else _POLL_S):
                    await job.ended.wait()
            except TimeoutError:
                return None
        return job.outcome

    def _outcome_of_before(self, request_id: str) -> RequestResult:
        """Of a request that the process before this one let in, or whose outcome was too old to be kept."""
        model_id, _, number = request_id.rpartition(":")
        model = self.shelf.find(model_id)
        if model is not None and number == "create":
            return _begun(model)
        if model is not None and number.isdecimal():
            record = model.recorded(int(number))
            return RequestResult(record) if record is not None else RequestResult(failure=model.failure_of(int(number)))
        # The SDK samples again what is gone.
        raise ApiRefusal(410, f"there is no request {request_id} any more", code="request_gone")

    # --- limits and the end ---

    @property
    def num_open(self) -> int:
        return self.queue.num_open

    async def drain(self, within_s: float) -> None:
        """Let in nobody; return when what was let in is done, or it takes too long."""
        self._is_draining = True
        await self.queue.settle(within_s)

    def unsaved(self) -> Iterator[str]:
        """A line for each model whose end here loses something."""
        for model in self.shelf.in_memory():
            if unsaved := model.journal.unsaved:
                yield f"{model.id} ends with requests in no save: {', '.join(map(str, unsaved))}"

    async def close(self) -> None:
        await self.queue.close()
        self.shelf.close()

    def _let_in(self) -> None:
        if self._is_draining:
            raise ApiRefusal(503, "the server is shutting down", code="shutting_down", retry_after_s=5)
        most = self.options.serve.max_queue
        early = sum(len(line.early) for line in self._lines.values())
        if self.queue.num_open + early >= most:
            raise ApiRefusal(
                429, f"{self.queue.num_open + early} requests are open, of {most}; ask again later", code="queue_full", retry_after_s=1
            )  # fmt: skip

    def _submit(self, request_id: str, work: Callable[[], RequestResult]) -> None:
        self.queue.note(job := ComputeJob(request_id, work))
        self.queue.submit(job)


@contextmanager
def _refusing() -> Iterator[None]:
    """What the user can mend is told at once."""
    try:
        yield
    except (ConfigError, DataError) as error:
        raise bad_request(str(error)) from error


def _window(config: Any) -> int:
    return config.get_text_config().max_position_embeddings


def _made(model: ClientModel) -> RequestResult:
    model.bring()
    return _begun(model)


def _begun(model: ClientModel) -> RequestResult:
    if path := model.beginning.path:
        return RequestResult({"model_id": model.id, "path": path, "type": "load_weights"})
    return RequestResult({"model_id": model.id, "type": "create_model"})


def _leave(model: ClientModel) -> RequestResult:
    model.leave_memory()
    return RequestResult()


def _noted(model: ClientModel, seq: int, outcome: RequestResult) -> None:
    model.journal.finish(seq, outcome.record, outcome.failure)


def _check_name(name: str) -> None:
    """Raises: ConfigError."""
    if why := FREE.against(name):
        raise ConfigError(f"the name of a save: {why}")


def _check_optimizer(config: Any) -> None:
    """Raises: ApiRefusal."""
    if not isinstance(config, types.AdamOptimizerConfig):
        raise bad_request(f"optimizer: got {config.type}, this server has adamw", "optimizer_config")


def _seq(seq: int | None, *, least: int = 1) -> int:
    """Raises: ApiRefusal."""
    if seq is None or seq < least:
        raise bad_request(f"seq_id: got {seq}, expected at least {least}", "seq_id")
    return seq


def _digest(asked: Any) -> str:
    return digest_json(asked.model_dump(mode="json"))
