"""vLLM behind HTTP: token ids in, ids, log-probs and the version of each token out, weights through its own transfer protocol."""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Literal

from posttrain.errors import EngineError, EngineGoneError
from posttrain.protocols import Weights
from posttrain.rollout.folder import OwnFolder
from posttrain.rollout.http import LateError, RefusedError
from posttrain.rollout.routed import of_sampled, routed_of
from posttrain.rollout.transfer import TRANSFERS, TransferMessage, TransferOptions
from posttrain.rollout.vllm import asking
from posttrain.rollout.vllm.adapter import write_adapter
from posttrain.rollout.vllm.server import Server
from posttrain.types import Completion, EngineInfo, Moved, Request, SamplingParams

Pause = Literal["wait", "keep", "abort"]
_LONGEST_S = 24 * 3600.0
"""Nobody waits longer than this for one completion; whether the server lives is asked all the while."""
_BEAT_S = 2.0
_GENERATE = "/inference/v1/generate"


@dataclass(frozen=True)
class Served:
    """What a server is and how it is used. `model`: the name of the base there. `at_once`: requests under way together.

    `pause`: what an update does with completions that are being sampled. `serves_adapters`: whether an adapter is loaded
    by name, or merged and pushed whole. `routed_experts`: whether it says which experts it took. `num_workers`: processes that the model is split over, where that is known. `stop_token_ids`: what ends a completion besides what a request says.
    """

    model: str
    version: str
    dtype: Literal["float32", "bfloat16", "float16"]
    max_model_len: int
    stop_token_ids: tuple[int, ...]
    at_once: int
    serves_adapters: bool
    transfer: str = "file"
    delta_anchor: int = 1
    pause: Pause = "wait"
    num_workers: int = 1
    sleeps: bool = False
    routed_experts: bool = False


class VLLMServerEngine:
    """The engine of one server. Log-probs are those of the distribution that a token was drawn from, after the cuts.

    Several threads may sample, also while another one brings weights.
    Raises, from what asks the server: EngineGoneError where it ended or hangs, EngineError where it refuses.
    """

    def __init__(self, server: Server, served: Served, decode: asking.Decode, folder: OwnFolder) -> None:
        self._server, self._served, self._decode = server, served, decode
        self._own_folder, self._folder = folder, folder.path
        self._half_updated: EngineError | None = None
        # Held while the name of the weights that a request asks for is chosen and counted; not while it is answered.
        self._lock = threading.RLock()
        self._version, self._pushes = 0, count(1)
        # A given server may have served another run, whose names and salts must not be met again.
        self._run = f"run-{self._folder.name.rpartition('-')[2]}"
        self._salt = f"{self._run}-0"
        self._adapter: tuple[str, int] | None = None
        self._under_way = Counter[str]()
        self._cache_is_stale, self._is_asleep = False, False
        self._sender = TRANSFERS[served.transfer].sender(
            TransferOptions(
                self._folder, served.dtype, served.delta_anchor, served.num_workers, server.client.timeout_s
            )
        )
        with self._asking("connect"):
            self._sender.connect(self._init)
            # The spans of versions that come with each completion speak of this label.
            self._post("/update_weight_version", {"new_version": "0"})

    @property
    def policy_version(self) -> int:
        return self._version

    def describe(self) -> EngineInfo:
        dtype, version = self._served.dtype, self._served.version
        return EngineInfo(
            "vllm_server", version, dtype, "processed", asking.SEED_BITS, exact_resume=False, sleeps=self._served.sleeps
        )

    # --- sampling --------------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[Completion]:
        """The seed of a request alone decides its tokens; another engine draws others from the same seed."""
        asking.check_requests(requests, params, self._served.max_model_len)
        return self._completions(requests, params)

    def _completions(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[Completion]:
        options = asking.sampling_options(params, self._served.stop_token_ids) | {"detokenize": bool(params.stop)}
        with self._lock:
            adapter = self._adapter
            asked = [self._body(r.prompt_ids, {**options, **asking.of_request(r, params)}) for r in requests]
            answers = self._ask(asked, self._served.at_once)
        for place, answer in answers:
            completion = self._completion(answer["choices"][0], params, place, adapter)
            yield self._with_experts(completion, answer["choices"][0], requests[place])

    def _with_experts(self, completion: Completion, choice: Mapping[str, Any], request: Request) -> Completion:
        if not self._served.routed_experts:
            return completion
        said = choice.get("routed_experts")
        found = None if said is None else routed_of(said)
        routed = of_sampled(found, len(request.prompt_ids), len(completion.ids), "vLLM's server")
        return replace(completion, routed_experts=routed)

    def _completion(
        self, choice: Mapping[str, Any], params: SamplingParams, place: int, adapter: tuple[str, int] | None
    ) -> Completion:
        ids = tuple(choice["token_ids"])
        content = choice["logprobs"]["content"] or []
        logp = tuple(float(token["logprob"]) for token in content)
        kept = asking.kept_length(ids, params.stop, self._decode)
        # An adapter's name is its version, whatever the base is called by then.
        versions = [adapter[1]] * len(ids) if adapter else _versions(choice["weight_versions"] or [])
        first = versions[0] if versions else self._version
        spread = () if len(set(versions[:kept])) < 2 else tuple(versions[:kept])
        return Completion(ids[:kept], logp[:kept], asking.finish_of(choice["finish_reason"]), first, place, spread)

    def score(self, sequences: Sequence[tuple[Sequence[int], int]], temperature: float = 1.0) -> list[list[float]]:
        """At temperature 1 only. Raises: EngineError at another."""
        asking.check_scored(sequences, temperature, self._served.max_model_len)
        if self._served.serves_adapters and self._under_way.total():
            raise EngineError("vLLM cannot score while it samples with adapters; take the completions first")
        options = {"max_tokens": 1, "prompt_logprobs": 0, "detokenize": False}
        found: list[list[float]] = [[] for _ in sequences]
        # vLLM's kernel for adapters on a CPU ends the engine where the prompts of two requests are scored together.
        at_once = 1 if self._served.serves_adapters else self._served.at_once
        with self._lock:
            answers = self._ask([self._body(ids, options) for ids, _ in sequences], at_once)
        for place, answer in answers:
            ids, start = sequences[place]
            at = answer["prompt_logprobs"]
            found[place] = [float(at[n][str(ids[n])]["logprob"]) for n in range(start, len(ids))]
        return found

    def _body(self, ids: Sequence[int], options: Mapping[str, Any]) -> dict[str, Any]:
        # The salt keeps what was cached under other weights from being found, whether or not the cache could be reset.
        model = self._adapter[0] if self._adapter else self._served.model
        return {"model": model, "token_ids": list(ids), "sampling_params": dict(options), "cache_salt": self._salt}

    def _ask(self, bodies: Sequence[dict[str, Any]], at_once: int) -> Iterator[tuple[int, Any]]:
        """The answers as they end. Who stops asking for more ends the others: the server is hung up on."""
        model = self._adapter[0] if self._adapter else ""
        with self._asking("generate"):
            self._wake()
            self._settle()
        self._under_way[model] += len(bodies)
        return self._answers(bodies, at_once, model)

    def _answers(self, bodies: Sequence[dict[str, Any]], at_once: int, model: str) -> Iterator[tuple[int, Any]]:
        left = len(bodies)
        try:
            with closing(self._calls(_GENERATE, bodies, at_once)) as calls:
                while True:
                    with self._asking("generate"):
                        found = next(calls, None)
                    if found is None:
                        break
                    left -= 1
                    self._count(model, -1)
                    yield found
        finally:
            self._count(model, -left)
        with self._lock, self._asking("generate"):
            self._settle()

    def _count(self, model: str, change: int) -> None:
        with self._lock:
            self._under_way[model] += change

    def _calls(self, path: str, bodies: Sequence[Any], at_once: int) -> Generator[tuple[int, Any]]:
        return self._server.client.calls(
            path, bodies, at_once=at_once, timeout_s=_LONGEST_S, beat=self._beat, every_s=_BEAT_S
        )

    def _beat(self) -> None:
        """Asked of the engine's own process, between two of its steps. Raises: EngineGoneError."""
        self._server.client.call("GET", "/is_paused")

    # --- weights ---------------------------------------------------------------------------------------------------

    def update(self, weights: Weights, version: int) -> Moved:
        """An adapter under a name of its own where the server can, else the whole model, an adapter merged into it."""
        label = f"{self._run}@{version}.{next(self._pushes)}"
        with self._lock, self._asking("take its weights"):
            self._wake()
            self._server.synced(-1)
            by_name = weights.has_adapter and self._served.serves_adapters
            moved = self._take_adapter(weights, version, label) if by_name else self._take_all(weights, version)
            self._salt, self._version = label.replace("@", "-"), version
            self._reset_cache()
            self._settle()
            self._server.synced(version)
        return moved

    def _take_all(self, weights: Weights, version: int) -> Moved:
        with self._paused():
            self._post("/start_weight_update")
            moved = self._sender.send(weights.weights("all"), version, self._update)
            self._post("/finish_weight_update", {"weight_version": str(version)})
        self._adapter = None
        return moved

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """Nothing is sampled meanwhile; it goes on afterwards unless the update failed, which leaves half of it."""
        sampling = self._under_way.total() > 0
        if sampling:
            how = f"/pause?mode={self._served.pause}&clear_cache=false"
            # Waiting for what is being sampled may take as long as that does.
            list(self._calls(how, [None], 1))
        try:
            yield
        except BaseException as error:
            # Who samples meanwhile asks another one where this one is lost.
            is_lost = isinstance(error, EngineGoneError) or (isinstance(error, RefusedError) and error.status >= 500)
            kind = EngineGoneError if is_lost else EngineError
            self._half_updated = kind(
                f"vLLM's server is not asked again: an update failed in the middle ({type(error).__name__})"
            )
            raise
        if sampling:
            self._post("/resume")

    def _take_adapter(self, weights: Weights, version: int, label: str) -> Moved:
        folder = self._folder / label
        num_bytes = write_adapter(weights, folder)
        self._post("/v1/load_lora_adapter", {"lora_name": label, "lora_path": str(folder)})
        self._adapter = (label, version)
        return Moved(num_bytes, num_bytes)

    def _settle(self) -> None:
        """Let go of what the last completion that was sampled under it has left."""
        for folder in list(self._folder.glob(f"{self._run}@*")):
            if (self._adapter is None or folder.name != self._adapter[0]) and not self._under_way[folder.name]:
                self._post("/v1/unload_lora_adapter", {"lora_name": folder.name})
                shutil.rmtree(folder)
        if self._cache_is_stale and not self._under_way.total():
            self._reset_cache()

    def _reset_cache(self) -> None:
        """What is cached was computed with other weights. While some of it is in use it stays, and its salt hides it."""
        self._cache_is_stale = not self._post("/reset_prefix_cache")["success"]

    def _init(self, details: TransferMessage) -> None:
        self._post(
            "/init_weight_transfer_engine", {"init_info": {"transfer": self._served.transfer, "details": details}}
        )

    def _update(self, message: TransferMessage) -> None:
        self._post("/update_weights", {"update_info": {"message": message}})

    # --- memory ----------------------------------------------------------------------------------------------------

    def rest(self) -> None:
        """Its weights go to the machine's memory, what is cached goes; the next call that needs them waits until they are back."""
        if not self._served.sleeps:
            return
        with self._lock, self._asking("sleep"):
            assert not self._under_way.total(), "somebody waits for completions"
            if not self._is_asleep:
                # What it was asked for and nobody takes any more may still be under way there.
                list(self._calls("/sleep?level=1&mode=wait", [None], 1))
                self._is_asleep = True

    def _wake(self) -> None:
        if self._is_asleep:
            list(self._calls("/wake_up", [None], 1))
            self._is_asleep = False

    # --- the server ------------------------------------------------------------------------------------------------

    def close(self) -> None:
        self._sender.close()
        if self._server.outlives_us and self._adapter is not None:
            with suppress(EngineError):  # it may be what is gone
                self._post("/v1/unload_lora_adapter", {"lora_name": self._adapter[0]})
        self._server.close()
        self._own_folder.remove()

    def _post(self, path: str, body: Any = None) -> Any:
        return self._server.client.call("POST", path, body)

    @contextmanager
    def _asking(self, doing: str) -> Iterator[None]:
        """Errors with what became of the server."""
        if self._half_updated is not None:
            raise self._half_updated
        try:
            yield
        except RefusedError as error:
            if error.status < 500 or self._lives():
                raise EngineError(f"vLLM's server could not {doing}: {error}") from error
            raise self._gone(doing, error) from error
        except EngineGoneError as error:
            raise self._gone(doing, error) from error

    def _gone(self, doing: str, error: EngineError) -> EngineGoneError:
        said = self._server.ended() or str(error)
        if isinstance(error, LateError):
            said += "; raise rollout.timeout_s if it only needs longer"
        return EngineGoneError(f"vLLM's server could not {doing}: {said}")

    def _lives(self) -> bool:
        try:
            self._beat()
            self._server.client.call("GET", "/health")
        except EngineError:
            return False
        return True


def _versions(spans: Sequence[Mapping[str, Any]]) -> list[int]:
    """The version of each token."""
    return [int(span["version"]) for span in spans for _ in range(span["start"], span["end"])]
