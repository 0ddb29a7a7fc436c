"""What clients sample from: a base, saved weights, or a model's weights as they were; by ids that outlive the server where the weights do."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tinker.types import SampleRequest

from posttrain.errors import ConfigError, DataError
from posttrain.files import digest_json, read_json, write_json
from posttrain.names import FREE
from posttrain.recipes.tinker import AdapterHost, Tensors
from posttrain.recipes.tinker_saves import exported_tensors, find_state, load_state
from posttrain.rollout.sampling import request_seed
from posttrain.serve.prompt_scores import prompt_scores
from posttrain.serve.tinker.messages import ScoredPrompt, write_samples
from posttrain.serve.tinker.models import WEIGHTS_OF_SAMPLER, LostStepsError, ModelShelf
from posttrain.serve.tinker.requests import RequestResult
from posttrain.types import Request, SamplingParams

_MOST_TOP, _MOST_SAMPLES = 50, 1024
_REFUSED = {
    "topk_sample_logprobs": 0, "target_prompt_logprobs": None, "prompt_alt_tokens_k": 0, "record_stability_info": None,
}  # fmt: skip
"""Fields of a sample request that nothing here acts on → their value where nothing is asked."""


@dataclass(frozen=True, slots=True)
class SamplingSession:
    """`path`: saved weights. `model_id`: a model whose snapshot it is. Neither: the base."""

    id: str
    base: str
    path: str = ""
    model_id: str = ""


class SamplingSessions:
    def __init__(self, folder: Path, shelf: ModelShelf) -> None:
        self._folder, self._shelf = folder, shelf
        self._loaded: dict[str, Tensors] = {}
        self._of_snapshots: dict[str, SamplingSession] = {}

    def begin(self, sampler: SamplingSession) -> None:
        """Raises: ConfigError for weights that are not there, and an id that is no name."""
        if why := FREE.against(_name(sampler.id)):
            raise ConfigError(f"session_id: {why}")
        if sampler.model_id:
            self._of_snapshots[sampler.id] = sampler
            return
        if sampler.path:
            self._shelf.resolve(sampler.path)
        self._shelf.source(sampler.base)
        self._folder.mkdir(exist_ok=True)
        write_json(self._file(sampler.id), asdict(sampler))

    def find(self, sampler_id: str) -> SamplingSession | None:
        if sampler_id in self._of_snapshots:
            return self._of_snapshots[sampler_id]
        if FREE.against(_name(sampler_id)) or not self._file(sampler_id).exists():
            return None
        return SamplingSession(**read_json(self._file(sampler_id)))

    def _file(self, sampler_id: str) -> Path:
        return self._folder / f"{_name(sampler_id)}.json"

    def sample(self, sampler: SamplingSession, seeded: Sequence[tuple[SampleRequest, int]]) -> list[RequestResult]:
        """All that are sampled alike from the same weights, together. In the thread that computes."""
        host, tensors = self._weights(sampler)
        refused = [_refused(one, host) for one, _ in seeded]
        taken = [pair for pair, why in zip(seeded, refused, strict=True) if why is None]
        requests = [
            Request(tuple(one.prompt.to_ints()), request_seed("tinker", seed, number))
            for one, seed in taken
            for number in range(one.num_samples)
        ]
        completions = iter(())
        if taken:
            params, ends = asked_sampling(taken[0][0], host)
            completions = iter(host.generate(tensors, requests, params, ends=ends))
        outcomes: list[RequestResult] = []
        for (one, _), why in zip(seeded, refused, strict=True):
            if why is not None:
                outcomes.append(why)
                continue
            own = [next(completions) for _ in range(one.num_samples)]
            scored = self._scored(host, tensors, one) if one.prompt_logprobs or one.topk_prompt_logprobs else None
            outcomes.append(RequestResult(message=write_samples(own, scored)))
        return outcomes

    def _weights(self, sampler: SamplingSession) -> tuple[AdapterHost, Tensors | None]:
        """Raises: LostStepsError for a snapshot that is not kept any more."""
        if sampler.model_id:
            model = self._shelf.find(sampler.model_id)
            if model is None or model.host is None or sampler.id not in model.snapshots:
                raise LostStepsError(
                    f"the weights of {sampler.id} are not kept any more (the newest --max-snapshots of a model are, while the server "
                    "runs); take newer ones, or save_weights_for_sampler(NAME)"
                )
            return model.host, model.snapshots[sampler.id]
        if not sampler.path:
            return self._shelf.host(sampler.base), None
        model, kind, folder = self._shelf.resolve(sampler.path)
        host = self._shelf.host(model.beginning.base, model.beginning.shape)
        if kind != WEIGHTS_OF_SAMPLER:  # which may be overwritten
            return host, load_state(host, find_state(folder), optimizer=False, gradients=False).tensors
        if sampler.path not in self._loaded:
            self._loaded = {sampler.path: exported_tensors(host, folder)}
        return host, self._loaded[sampler.path]

    @staticmethod
    def _scored(host: AdapterHost, tensors: Tensors | None, asked: SampleRequest) -> ScoredPrompt:
        ids = tuple(asked.prompt.to_ints())
        logp = np.full(len(ids), np.nan, np.float32)
        if len(ids) < 2:
            return ScoredPrompt(logp)
        with host.sampling_from(tensors):
            likeliest = prompt_scores(host.policy, ids, asked.topk_prompt_logprobs, None, None)
        last = asked.prompt_logprobs_last_n or len(likeliest)
        logp[len(ids) - last :] = [one.logp for one in likeliest[-last:]]
        return ScoredPrompt(logp, [one.top for one in likeliest[-last:]], asked.topk_prompt_logprobs)


def _name(sampler_id: str) -> str:
    return sampler_id.replace(":", "-")


def alike(sampler_id: str, asked: SampleRequest) -> str:
    """What is equal for requests that can be sampled together."""
    given = asked.sampling_params
    room = asked.prompt.length if given.max_tokens is None else 0
    return digest_json([sampler_id, room, given.model_dump(exclude={"seed"}, mode="json")])


def seed_asked(asked: SampleRequest) -> int:
    seed = asked.sampling_params.seed
    return secrets.randbits(63) if seed is None else seed


def check_sample(asked: SampleRequest) -> None:
    """Raises: DataError for what cannot be sampled, or would be left out of the answer."""
    for name, idle in _REFUSED.items():
        if getattr(asked, name) not in (idle, False):
            raise DataError(f"{name}: got {getattr(asked, name)!r}; this server has no such thing, leave it out")
    if any(chunk.type != "encoded_text" for chunk in asked.prompt.chunks) or not asked.prompt.length:
        raise DataError("prompt: expected at least one token, and nothing but text")
    if not 1 <= asked.num_samples <= _MOST_SAMPLES:
        raise DataError(f"num_samples: got {asked.num_samples}, expected 1 to {_MOST_SAMPLES}")
    if not 0 <= asked.topk_prompt_logprobs <= _MOST_TOP:
        raise DataError(f"topk_prompt_logprobs: got {asked.topk_prompt_logprobs}, expected 0 to {_MOST_TOP}")
    if not 1 <= (asked.prompt_logprobs_last_n or 1) < max(2, asked.prompt.length):
        raise DataError(
            f"prompt_logprobs_last_n: got {asked.prompt_logprobs_last_n}, expected 1 to {asked.prompt.length - 1}"
        )


def _refused(asked: SampleRequest, host: AdapterHost) -> RequestResult | None:
    """What to answer a request that cannot be sampled; the others of its batch are."""
    try:
        asked_sampling(asked, host)
    except DataError as error:
        return RequestResult(failure=str(error), is_users=True)
    return None


def asked_sampling(asked: SampleRequest, host: AdapterHost) -> tuple[SamplingParams, bool]:
    """Ours, and whether the model's own stop tokens end a sample: not where the client says what does. Raises: DataError."""
    given, length = asked.sampling_params, asked.prompt.length
    room = host.window - length
    most = room if given.max_tokens is None else given.max_tokens
    if not 1 <= most <= room:
        raise DataError(
            f"max_tokens: got {given.max_tokens} after {length} of prompt; the model's window is {host.window}"
        )
    if max(asked.prompt.to_ints()) >= host.vocabulary or min(asked.prompt.to_ints()) < 0:
        raise DataError(f"prompt: expected ids 0 to {host.vocabulary - 1}")
    if given.temperature < 0 or not 0 < given.top_p <= 1:
        raise DataError(f"temperature {given.temperature}, top_p {given.top_p}; expected at least 0, and above 0 to 1")
    stop = [given.stop] if isinstance(given.stop, str) else list(given.stop or ())
    texts = tuple(one for one in stop if isinstance(one, str))
    tokens = tuple(one for one in stop if isinstance(one, int))
    params = SamplingParams(most, given.temperature, given.top_p, max(0, given.top_k), 0.0, tokens, texts)
    return params, given.stop is None
