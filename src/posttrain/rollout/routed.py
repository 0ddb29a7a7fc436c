"""Routed experts of completions: joined where several make one, as text where they are written down or come over HTTP."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Sequence

import numpy as np

from posttrain.errors import EngineError
from posttrain.types import Completion


def experts_along(parts: Sequence[tuple[Completion, int]]) -> np.ndarray | None:
    """Those of completions in order, each with so many ids behind it that nobody sampled, which have zeros; None where nobody asked."""
    known = [one.routed_experts for one, _ in parts if one.routed_experts is not None]
    if not known:
        return None
    shape = known[0].shape[1:]
    pieces: list[np.ndarray] = []
    for one, unsampled in parts:
        sampled = np.zeros((0, *shape), known[0].dtype) if one.routed_experts is None else one.routed_experts
        assert len(sampled) == len(one.ids), (len(sampled), len(one.ids))
        pieces += [sampled, np.zeros((unsampled, *shape), known[0].dtype)]
    return np.concatenate(pieces)


def routed_text(routed: np.ndarray) -> str:
    """An `.npy` file in base64, as vLLM's server answers."""
    file = io.BytesIO()
    np.save(file, routed, allow_pickle=False)
    return base64.b64encode(file.getvalue()).decode()


def routed_of(text: str) -> np.ndarray:
    """What `routed_text` was given. Raises: EngineError for another text."""
    try:
        return np.load(io.BytesIO(base64.b64decode(text, validate=True)), allow_pickle=False)
    except (ValueError, binascii.Error, EOFError, OSError) as error:
        raise EngineError(f"routed experts: got {text[:40]!r}, expected an .npy file in base64 ({error})") from error


def of_sampled(routed: np.ndarray | None, prompt_len: int, num_sampled: int, engine: str) -> np.ndarray:
    """Of each sampled id those of the token before it, from what vLLM says of all ids but the last. Raises: EngineError where it says less."""
    wanted = prompt_len - 1 + num_sampled
    if routed is None or len(routed) < wanted:
        got = "none" if routed is None else f"{len(routed)} tokens"
        raise EngineError(
            f"{engine} gave routed experts of {got}, expected {wanted}: it must be started with --enable-return-routed-experts; "
            "or set rollout.routed_experts: off"
        )
    return routed[prompt_len - 1 : wanted]
