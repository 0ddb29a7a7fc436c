"""The command as one of several ranks, which holds still once at a point of its work, so that whoever watches can strike it there.

Points: `generating` (answers are half made), `syncing` (the engine's copy has the first tensor of a version,
and not the others), `checking` (the canary that follows a sync is half made), `saving` (the steps after `VERSION` are under way, the
checkpoint of it lacks this rank's parts).
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from posttrain.recipes.run.train_state import Checkpoints
from posttrain.rollout.cached import CachedRows
from posttrain.rollout.embedded import EmbeddedEngine

HELD_S = 120.0
VERSION = 2
"""Of the engine's weights, when it holds still: there is a checkpoint to go on from."""
_CANARY_TOKENS = 2


def hold_once(marker: Path) -> None:
    """The process id in `marker`, and a wait that nobody ends; nothing at all where a marker is there."""
    if marker.exists():
        return
    named = marker.with_suffix(f".{os.getpid()}")
    named.write_text(str(os.getpid()))
    named.rename(marker)
    time.sleep(HELD_S)
    os._exit(1)  # nobody struck


def _in_generate(act: Callable[[], None], is_due: Callable[[int], bool], token: int) -> None:
    """`act` before the step that makes this token of a completion; of shares, while a layer of it is gathered."""
    plain_generate, plain_step, steps_left = EmbeddedEngine.generate, CachedRows.step, [0]

    def generate(self, requests, params):
        steps_left[0] = token - 1 if self.policy_version == VERSION and is_due(params.max_tokens) else 0
        return plain_generate(self, requests, params)

    def step(self, ids):
        steps_left[0] -= 1
        if steps_left[0] == 0:
            if self._policy.sharded:
                last_layer = list(self._policy.base.get_decoder().layers)[-1]
                last_layer.register_forward_pre_hook(lambda *_: act())
            else:
                act()
        return plain_step(self, ids)

    EmbeddedEngine.generate, CachedRows.step = generate, step


class _Held:
    """Weights of which the second tensor is held back."""

    def __init__(self, weights, act: Callable[[], None]) -> None:
        self._weights, self._act = weights, act

    def weights(self, only):
        for number, pair in enumerate(self._weights.weights(only)):
            if number == 1:
                self._act()
            yield pair


def _in_update(act: Callable[[], None]) -> None:
    plain = EmbeddedEngine.update

    def update(self, weights, version):
        return plain(self, _Held(weights, act) if version == VERSION else weights, version)

    EmbeddedEngine.update = update


def _in_save(act: Callable[[], None]) -> None:
    for name in ("_write", "_write_parts"):
        plain = getattr(Checkpoints, name)

        def write(self, step, *parts, plain=plain):
            if step == VERSION:
                act()
            return plain(self, step, *parts)

        setattr(Checkpoints, name, write)


POINTS = {
    "generating": lambda act: _in_generate(act, lambda tokens: tokens > _CANARY_TOKENS, token=3),
    "checking": lambda act: _in_generate(act, lambda tokens: tokens == _CANARY_TOKENS, token=2),
    "syncing": _in_update,
    "saving": _in_save,
}


def arm(point: str, rank: int, marker: Path) -> None:
    if point and int(os.environ["RANK"]) == rank:
        POINTS[point](lambda: hold_once(marker))


if __name__ == "__main__":
    from posttrain.cli.app import main

    point, rank, marker, *arguments = sys.argv[1:]
    arm(point, int(rank), Path(marker))
    main(arguments)
