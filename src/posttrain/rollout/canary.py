"""Did the weights arrive? An engine's own log-probs of a few tokens against the trainer's for the same tokens.

The two come from different objects: one that compares an engine with itself accepts a transfer that moved nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median

from posttrain.errors import EngineError
from posttrain.protocols import Engine
from posttrain.types import Request, SamplingParams, in_order

ScoreIds = Callable[[Sequence[tuple[Sequence[int], int]]], list[list[float]]]
"""Log-probs of `ids[start:]` for each `(ids, start)`, as `Engine.score` gives them."""

TOLERANCE = {"float32": 2e-3, "float16": 5e-2, "bfloat16": 0.2}
"""Nats that the rounding of an engine's dtype can move a log-prob; none where the engine's are the trainer's to the bit."""
_PROMPT = tuple(range(1, 9))
_COMPLETIONS = 4


def check_arrival(engine: Engine, trainer: ScoreIds) -> float:
    """Decode canaries, score them by the trainer; the gap in nats of the first token or the second. Raises: EngineError beyond the dtype's rounding.

    Of each place the largest gap counts; in half precision the middle one of all completions, for rounding may send a
    single token to another expert there, and other weights move them all. What is not a number always rings.
    """
    info = engine.describe()
    tolerance = 0.0 if info.exact_logprobs else TOLERANCE[info.dtype]
    of_place = max if info.dtype == "float32" else median
    version = engine.policy_version
    # The first token comes from the prefill, the second from a decode step; not all end at the first.
    requests = [Request(_PROMPT, seed=version + number) for number in range(_COMPLETIONS)]
    sampled = in_order(engine.generate(requests, SamplingParams(max_tokens=2, temperature=1.0)))
    expected = trainer([(_PROMPT + completion.ids, len(_PROMPT)) for completion in sampled])
    gaps: list[list[float]] = [[], []]
    for completion, scored in zip(sampled, expected, strict=True):
        for place, (ours, theirs) in enumerate(zip(completion.logp, scored, strict=True)):
            gaps[place].append(abs(ours - theirs))
    finite = all(math.isfinite(gap) for place in gaps for gap in place)
    gap = max(of_place(place) for place in gaps if place) if finite else math.nan
    if not gap <= tolerance:
        raise EngineError(
            f"after the sync to policy version {version} the engine's log-probs differ from the trainer's by {gap:.2e} "
            f"(tolerance {tolerance:.0e}): it decodes with other weights"
            + (
                ", or this machine's kernels round by a token's place; set rollout.exact: false"
                if info.exact_logprobs
                else ""
            )
        )
    return gap
