"""From logits to a token, and when to stop: pure functions, one uniform number per row, so a row's choice is its own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch

from posttrain.types import SamplingParams

_LEAST_TEMPERATURE = 1e-30
"""Logits divided by less are no numbers any more; the most likely token is certain long before."""
_DRAWN_AT_ONCE = 64
"""Random numbers of a request."""

StopTest = Callable[[Sequence[int]], bool]
"""Whether the ids sampled so far end a completion."""


def request_seed(*parts: int | str) -> int:
    """A 64-bit seed that is a pure function of its parts (run seed, generation batch, prompt, sample …)."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def uniforms(seed: int, count: int, first: int = 0) -> np.ndarray:
    """The request's random numbers in [0, 1), by a counter-based generator: number t does not depend on the others.

    `first`: that of the first of them, a multiple of 4, because one count of the generator makes four.
    """
    assert first % 4 == 0, first
    return np.random.Generator(np.random.Philox(key=seed, counter=first // 4)).random(count, dtype=np.float64)


class RequestUniforms:
    """`uniforms(seed, …)`, a block at a time: a request that waits holds none, one under way a block, however long it may become."""

    __slots__ = ("_block", "_drawn", "_seed")

    def __init__(self, seed: int) -> None:
        self._seed, self._block = seed, -1
        self._drawn: np.ndarray | None = None

    def __getitem__(self, number: int) -> np.float64:
        block, place = divmod(number, _DRAWN_AT_ONCE)
        if self._drawn is None or block != self._block:
            self._block, self._drawn = block, uniforms(self._seed, _DRAWN_AT_ONCE, block * _DRAWN_AT_ONCE)
        # Not a float: of a list of those torch makes single precision, which is another number.
        return self._drawn[place]


def sample(
    logits_RV: torch.Tensor, uniform_R: torch.Tensor, params: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and their log-probs under the temperature-scaled, uncut distribution. Shapes: [R, V], [R] → [R], [R].

    Sampling inverts the cumulative distribution at `uniform_R`; temperature 0 takes the most likely token and reports
    its log-prob at temperature 1.
    """
    logits_RV = logits_RV.float()
    if params.temperature == 0:
        logp_RV = torch.log_softmax(logits_RV, -1)
        ids_R = logp_RV.argmax(-1)
        return ids_R, logp_RV.gather(-1, ids_R.unsqueeze(-1)).squeeze(-1)
    if params.temperature != 1.0:
        logits_RV = logits_RV / max(params.temperature, _LEAST_TEMPERATURE)
    whole_RV = torch.softmax(logits_RV, -1)
    ids_R1 = _draw(whole_RV, uniform_R, params)
    return ids_R1.squeeze(-1), whole_RV.gather(-1, ids_R1).squeeze(-1).log()


def sample_scored(
    logp_RV: torch.Tensor, uniform_R: torch.Tensor, params: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `sample`, from log-probs that the temperature is in already: what is reported is an entry of what was given."""
    ids_R1 = _draw(logp_RV.exp(), uniform_R, params) if params.temperature else logp_RV.argmax(-1, keepdim=True)
    return ids_R1.squeeze(-1), logp_RV.gather(-1, ids_R1).squeeze(-1)


def _draw(probs_RV: torch.Tensor, uniform_R: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Token ids, [R, 1], by inverting the cumulative distribution of what is not cut off."""
    if params.top_k or params.top_p < 1 or params.min_p > 0:
        probs_RV = cut(probs_RV, params)
    cdf_RV = probs_RV.cumsum(-1)
    # The last entry is the total, which rounding leaves near 1. A level below it finds a token with probability; a
    # uniform number next to 1 would round up to it.
    total_R = cdf_RV[:, -1]
    level_R = torch.minimum(uniform_R.to(cdf_RV.dtype) * total_R, torch.nextafter(total_R, torch.zeros_like(total_R)))
    return torch.searchsorted(cdf_RV, level_R.unsqueeze(-1), right=True)


def cut(probs_RV: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Zero what top-k, top-p and min-p leave out, in vLLM's order; the most likely token always stays."""
    keep_RV = torch.ones_like(probs_RV, dtype=torch.bool)
    if params.top_k or params.top_p < 1:
        ordered_RV, order_RV = torch.sort(probs_RV, dim=-1, descending=True, stable=True)
        kept_RV = torch.ones_like(keep_RV)
        if params.top_k:
            kept_RV[:, params.top_k :] = False
        if params.top_p < 1:
            mass_RV = torch.where(kept_RV, ordered_RV, 0.0)
            mass_RV = mass_RV / mass_RV.sum(-1, keepdim=True)
            kept_RV &= mass_RV.cumsum(-1) - mass_RV < params.top_p
        kept_RV[:, 0] = True
        keep_RV = torch.zeros_like(keep_RV).scatter(-1, order_RV, kept_RV)
    if params.min_p > 0:
        keep_RV &= probs_RV >= params.min_p * probs_RV.max(-1, keepdim=True).values
    return torch.where(keep_RV, probs_RV, 0.0)


def stop_test(stop: Sequence[str], decode: Callable[[Sequence[int]], str]) -> StopTest | None:
    """True once the newest tokens complete one of the strings; decoded text decides, as in vLLM."""
    if not stop:
        return None
    longest = max(len(text) for text in stop)

    def hit(ids: Sequence[int]) -> bool:
        # A token is at least one byte long, so the string ends within this many tokens.
        tail = decode(ids[-4 * longest - 4 :])
        return any(text in tail for text in stop)

    return hit
