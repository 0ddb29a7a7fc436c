"""vLLM in this process: token ids in, ids and log-probs out, weights through vLLM's own transfer protocol."""
# pyright: reportMissingImports=false

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, ClassVar

from posttrain.errors import EngineError
from posttrain.protocols import Weights
from posttrain.rollout.folder import OwnFolder
from posttrain.rollout.routed import of_sampled
from posttrain.rollout.transfer import TRANSFERS, TransferMessage, TransferOptions
from posttrain.rollout.vllm import asking
from posttrain.rollout.vllm.adapter import write_adapter
from posttrain.rollout.vllm.options import VLLMOptions, environment, require_vllm
from posttrain.types import Completion, EngineInfo, Moved, Request, SamplingParams


class VLLMEngine:
    """One `vllm.LLM`, driven step by step, so that a completion is there when it ends.

    Log-probs are those of the distribution that a token was drawn from: after temperature, top-k, top-p and min-p.
    """

    _open: ClassVar[set[VLLMEngine]] = set()
    _closed: ClassVar[set[VLLMEngine]] = set()

    def __init__(
        self, options: VLLMOptions, decode: asking.Decode, transfer: str = "copy", delta_anchor: int = 1
    ) -> None:  # fmt: skip
        self._options, self._decode, self._version = options, decode, 0
        self._vllm_version = require_vllm()
        self._dead = ""
        self._numbers, self._pushes = count(), count(1)
        self._ended: dict[str, Any] = {}
        self._lora: Any = None
        self._folder = OwnFolder()
        self._transfer, self._sender = (
            transfer,
            TRANSFERS[transfer].sender(TransferOptions(self._folder.path, options.dtype, delta_anchor)),
        )
        os.environ |= environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        with self._speaking("start"):
            from vllm import LLM

            args = options.engine_args()
            self._llm: Any = LLM(**args, disable_log_stats=True)
            self._sender.connect(self._init)
        self._engine: Any = self._llm.llm_engine
        self._longest = int(self._engine.model_config.max_model_len)
        self._open.add(self)

    @property
    def policy_version(self) -> int:
        return self._version

    def describe(self) -> EngineInfo:
        dtype: Any = self._options.dtype
        return EngineInfo("vllm", self._vllm_version, dtype, "processed", asking.SEED_BITS, exact_resume=False)

    # --- sampling --------------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[Completion]:
        """The seed of a request alone decides its tokens; another engine draws others from the same seed."""
        asking.check_requests(requests, params, self._longest)
        return self._completions(requests, params)

    def _completions(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[Completion]:
        options = asking.sampling_options(params, self._options.stop_token_ids)
        asked = {
            self._add(r.prompt_ids, {**options, **asking.of_request(r, params)}): n for n, r in enumerate(requests)
        }
        for name, output in self._outputs(list(asked)):
            place = asked[name]
            yield self._completion(output.outputs[0], params, place, len(requests[place].prompt_ids))

    def _completion(self, output: Any, params: SamplingParams, place: int, prompt_len: int) -> Completion:
        ids = tuple(output.token_ids)
        logp = tuple(at[token].logprob for token, at in zip(ids, output.logprobs, strict=True))
        kept = asking.kept_length(ids, params.stop, self._decode)
        routed = of_sampled(output.routed_experts, prompt_len, kept, "vLLM") if self._options.routed_experts else None
        finish = asking.finish_of(output.finish_reason)
        return Completion(ids[:kept], logp[:kept], finish, self._version, place, routed_experts=routed)

    def score(self, sequences: Sequence[tuple[Sequence[int], int]], temperature: float = 1.0) -> list[list[float]]:
        """At temperature 1 only. Raises: EngineError at another."""
        asking.check_scored(sequences, temperature, self._longest)
        options = {"max_tokens": 1, "prompt_logprobs": 0}
        # vLLM's kernel for adapters on a CPU ends the engine where the prompts of two requests are scored together.
        at_once = len(sequences) if self._options.lora_rank is None else 1
        if self._options.lora_rank is not None and self._engine.has_unfinished_requests():
            raise EngineError("vLLM cannot score while it samples with adapters; take the completions first")
        found: list[list[float]] = []
        for start in range(0, len(sequences), max(1, at_once)):
            found += self._scored(sequences[start : start + at_once], options)
        return found

    def _scored(self, sequences: Sequence[tuple[Sequence[int], int]], options: dict[str, Any]) -> list[list[float]]:
        asked = {self._add(ids, options): place for place, (ids, _) in enumerate(sequences)}
        found: list[list[float]] = [[] for _ in sequences]
        for name, output in self._outputs(list(asked)):
            ids, start = sequences[asked[name]]
            found[asked[name]] = [output.prompt_logprobs[at][ids[at]].logprob for at in range(start, len(ids))]
        return found

    def _add(self, prompt_ids: Sequence[int], options: dict[str, Any]) -> str:
        from vllm import SamplingParams as Params
        from vllm import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        name = f"posttrain-{next(self._numbers)}"
        params = Params(**options, detokenize=bool(options.get("stop")), output_kind=RequestOutputKind.FINAL_ONLY)
        with self._speaking("generate"):
            prompt = TokensPrompt(prompt_token_ids=list(prompt_ids))
            self._engine.add_request(name, prompt, params, lora_request=self._lora)
        return name

    def _outputs(self, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
        """Each request's output when it has ended. Who stops asking for more ends the others."""
        waiting = dict.fromkeys(names)
        try:
            while waiting:
                # Another generation may have been given ours while it waited for its own.
                for name in [name for name in waiting if name in self._ended]:
                    del waiting[name]
                    yield name, self._ended.pop(name)
                if waiting:
                    with self._speaking("generate"):
                        self._ended |= {output.request_id: output for output in self._engine.step() if output.finished}
        finally:
            if waiting and not self._dead:
                self._engine.abort_request(list(waiting))

    # --- weights ---------------------------------------------------------------------------------------------------

    def update(self, weights: Weights, version: int) -> Moved:
        """An adapter under a name of its own where vLLM serves it, else the whole model, an adapter merged into it.

        Raises: EngineError while completions are being sampled.
        """
        if self._engine.has_unfinished_requests():
            raise EngineError(
                f"weights of version {version} came while completions of version {self._version} are being sampled; "
                "take these, or close their iterator, first"
            )
        with self._speaking("take its weights"):
            by_name = weights.has_adapter and self._options.lora_rank is not None
            moved = self._take_adapter(weights, version) if by_name else self._take_all(weights, version)
            # What is cached was computed with other weights.
            if not self._llm.reset_prefix_cache():
                raise EngineError(f"after the push of version {version} the prefix cache could not be reset")
        self._version = version
        return moved

    def _take_all(self, weights: Weights, version: int) -> Moved:
        self._llm.start_weight_update()
        moved = self._sender.send(weights.weights("all"), version, self._update)
        self._llm.finish_weight_update(str(version))
        return moved

    def _init(self, details: TransferMessage) -> None:
        self._llm.init_weight_transfer_engine({"init_info": {"transfer": self._transfer, "details": details}})

    def _update(self, message: TransferMessage) -> None:
        self._llm.update_weights({"update_info": {"message": message}})

    def _take_adapter(self, weights: Weights, version: int) -> Moved:
        from vllm.lora.request import LoRARequest

        # Cached keys and values are kept under the adapter's name: one that has been used is never used again.
        number = next(self._pushes)
        folder = self._folder.path / f"{version}.{number}"
        num_bytes = write_adapter(weights, folder)
        taken = LoRARequest(f"run@{version}.{number}", number, str(folder))
        self._engine.add_lora(taken)
        if self._lora is not None:
            self._engine.remove_lora(self._lora.lora_int_id)
            shutil.rmtree(self._lora.lora_path)
        self._lora = taken
        return Moved(num_bytes, num_bytes)

    # --- end -------------------------------------------------------------------------------------------------------

    def rest(self) -> None:
        """Its memory is in this process, where vLLM's own allocator and the trainer's do not share."""

    def close(self) -> None:
        """Its memory is free once all engines of this process are closed: vLLM tears down what they share with the first."""
        self._open.discard(self)
        self._closed.add(self)
        if not self._open:
            while self._closed:
                self._closed.pop()._tear_down()
            gc.collect()

    def _tear_down(self) -> None:
        self._sender.close()
        self._engine.engine_core.shutdown()
        self._llm = self._engine = None
        self._folder.remove()

    @contextmanager
    def _speaking(self, doing: str) -> Iterator[None]:
        """vLLM's errors as ours; after one it is not asked again."""
        if self._dead:
            raise EngineError(f"vLLM ended before ({self._dead}); start again, and the run goes on from its checkpoint")
        try:
            yield
        except EngineError as error:
            self._dead = str(error)
            raise
        except Exception as error:  # vLLM raises whatever its parts do, and each means the same to a run
            lines = str(error).strip().splitlines() or [""]
            self._dead = f"{type(error).__name__}: {lines[0][:300]}"
            raise EngineError(f"vLLM could not {doing}: {self._dead}") from error
