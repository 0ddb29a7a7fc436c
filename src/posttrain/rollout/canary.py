"""Did the weights arrive? An engine's own log-probs of a few tokens against the trainer's for the same tokens.

The two come from different objects: one that compares an engine with itself accepts a transfer that moved nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
    """Decode canaries, score them by the trainer. Returns the largest gap in nats. Raises: EngineError beyond the dtype's rounding."""
    info = engine.describe()
    tolerance = 0.0 if info.exact_logprobs else TOLERANCE[info.dtype]
    version = engine.policy_version
    # The first token comes from the prefill, the second from a decode step; not all end at the first.
    requests = [Request(_PROMPT, seed=version + number) for number in range(_COMPLETIONS)]
    sampled = in_order(engine.generate(requests, SamplingParams(max_tokens=2, temperature=1.0)))
    expected = trainer([(_PROMPT + completion.ids, len(_PROMPT)) for completion in sampled])
    pairs = [zip(completion.logp, scored, strict=True) for completion, scored in zip(sampled, expected, strict=True)]
    gap = max(abs(a - b) for pair in pairs for a, b in pair)
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
