"""`stage_runner` with a cheap engine in the place of vLLM's server: our own, on a copy of the weights, that may be lost and come back."""

import json
import sys
import threading

import torch
from tests import stage_runner

from posttrain.errors import EngineError, EngineGoneError
from posttrain.models.load import load_policy
from posttrain.recipes.experience import engines
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.rollout.transfer.whole import FileReceiver, FileSender
from posttrain.types import Moved

DEATHS = [{"generate": 25}, {"update": 1}, {}]
"""Of each life: after so many completions, or tensors of an update."""
LOADING = threading.Lock()
"""Replicas start in threads, and transformers makes models on a device that it sets for all of them."""


class Copy(EmbeddedEngine):
    """Gone after so many completions, or in the middle of an update."""

    def __init__(self, ask, deaths):
        with LOADING:
            policy = load_policy(ask.source.model, tokenizer=ask.source.policy.tokenizer).without_dropout()
        super().__init__(policy, stop_token_ids=(2,), shares_weights=False)
        self._deaths = dict(deaths)

    def _die(self, at):
        if at in self._deaths:
            if not self._deaths[at]:
                raise EngineGoneError(f"gone in {at}")
            self._deaths[at] -= 1

    def generate(self, requests, params):
        for completion in super().generate(requests, params):
            self._die("generate")
            yield completion

    def update(self, weights, version):
        if "update" in self._deaths:
            for _ in weights.weights("trained"):
                self._die("update")
        return super().update(weights, version)


class Sent(Copy):
    """Gets all weights by way of a file too, as a server does."""

    def __init__(self, ask, deaths):
        super().__init__(ask, deaths)
        self._folder = ask.folder

    def update(self, weights, version):
        got, receiver = {}, FileReceiver()
        FileSender(self._folder).send(
            weights.weights("all"), version, lambda message: got.update(receiver.take(message))
        )
        assert {tensor.dtype for tensor in got.values()} == {torch.float32}
        return super().update(weights, version)


class Refusing(Copy):
    def update(self, weights, version) -> Moved:
        next(iter(weights.weights("trained")))
        raise EngineError("these weights are refused")


def copies(lives=(), kind=Copy, replicas=1):
    left = iter(lives)
    return lambda ask: engines._restarted(ask, [lambda: kind(ask, next(left, {}))] * replicas, ask.source.policy)


ROWS = {
    "lost": lambda: copies(DEATHS),
    "refusing": lambda: copies(kind=Refusing),
    "two": lambda: copies(kind=Sent, replicas=2),
}


if __name__ == "__main__":
    engines.ENGINES["vllm_server"] = ROWS[sys.argv[2] if sys.argv[2:] else "lost"]()  # pyright: ignore[reportIndexIssue]
    stage_runner.main(json.loads(sys.argv[1]))
