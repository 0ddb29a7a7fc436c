"""What is common to vLLM in this process and behind HTTP: what may be asked, and how an answer is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from posttrain.errors import EngineError
from posttrain.rollout.sampling import stop_test
from posttrain.types import Decode, Finish, Request, SamplingParams

SEED_BITS = 63
"""vLLM's seeds are signed 64-bit numbers."""
_FINISH: dict[str, Finish] = {"stop": "stop", "length": "length", "abort": "aborted"}


def seed_of(request: Request) -> int:
    return request.seed & ((1 << SEED_BITS) - 1)


def check_requests(requests: Sequence[Request], params: SamplingParams, longest: int) -> None:
    """Raises: EngineError for an empty prompt, and for one that leaves no room for its answer."""
    for number, request in enumerate(requests):
        if not request.prompt_ids:
            raise EngineError(f"request {number} has an empty prompt; expected at least one token (a BOS, for example)")
        wanted = len(request.prompt_ids) + request.most(params)
        if wanted > longest:
            raise EngineError(
                f"request {number}: {len(request.prompt_ids)} tokens of prompt and up to {request.most(params)} of answer are "
                f"more than the {longest} that the engine was started for; raise rollout.max_model_len (and memory_gib)"
            )


def check_scored(sequences: Sequence[tuple[Sequence[int], int]], temperature: float, longest: int) -> None:
    """Raises: EngineError for what `prompt_logprobs` cannot say."""
    if temperature != 1.0:
        raise EngineError(
            f"vLLM scores given tokens at temperature 1 only, got {temperature}; at another one the trainer scores them"
        )
    for ids, start in sequences:
        if not 1 <= start <= len(ids):
            raise EngineError(
                f"score: start={start} of a sequence of {len(ids)} tokens; the first token has no log-prob"
            )
        if len(ids) >= longest:
            raise EngineError(
                f"score: a sequence of {len(ids)} tokens; the engine was started for {longest}, one of them to be "
                "sampled; raise rollout.max_model_len"
            )


def sampling_options(params: SamplingParams, stop_token_ids: Sequence[int]) -> dict[str, Any]:
    """As fields of vLLM's sampling parameters, whose names are those of a completion request too."""
    return {
        "max_tokens": params.max_tokens, "temperature": params.temperature, "top_p": params.top_p,
        "top_k": params.top_k, "min_p": params.min_p, "logprobs": 0, "stop": list(params.stop),
        "stop_token_ids": sorted({*stop_token_ids, *params.stop_token_ids}), "ignore_eos": True,
        # The strings are looked for in all of the text, and the token that completes one is part of the answer.
        "include_stop_str_in_output": True, "skip_special_tokens": False, "spaces_between_special_tokens": False,
    }  # fmt: skip


def of_request(request: Request, params: SamplingParams) -> dict[str, Any]:
    """The fields that are a request's own."""
    return {"seed": seed_of(request), "max_tokens": request.most(params)}


def kept_length(ids: Sequence[int], stop: Sequence[str], decode: Decode) -> int:
    """How many of the ids the contract keeps: up to the first that completes a stop string."""
    hit, kept = stop_test(stop, decode), len(ids)
    while hit is not None and kept > 1 and hit(ids[: kept - 1]):
        kept -= 1
    return kept


def finish_of(reason: str | None) -> Finish:
    """Raises: EngineError for an end that is none of ours."""
    if reason not in _FINISH:
        raise EngineError(f"vLLM ended a completion with {reason!r}; expected stop, length or abort")
    return _FINISH[reason]
