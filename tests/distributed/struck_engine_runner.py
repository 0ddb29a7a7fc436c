"""`--ray` with an engine that is struck at a point of its work: the trainer says once that it is there, and whoever watches strikes.

Points: `generating` (completions are asked for and not all answered; the trainer waits for them), `syncing` (the engine has the first
tensors of a version, and not the others; the trainer holds still until that was done).
"""

import sys
import threading
import time
from pathlib import Path

from posttrain.cli import roles
from posttrain.cli.app import main
from posttrain.rollout.vllm.server_engine import VLLMServerEngine

VERSION = 1
"""Of the engine's weights when it is struck: there is a checkpoint to go on from."""
_BEGUN_S, _HELD_S = 0.3, 300.0
_CANARY_TOKENS = 2


def say(marker):
    named = marker.with_suffix(".said")
    named.write_text("")
    named.rename(marker)


def _in_generate(marker):
    plain = VLLMServerEngine._calls

    def calls(self, path, bodies, at_once):
        sampled = bodies[0] and bodies[0].get("sampling_params", {}).get("max_tokens", 0) > _CANARY_TOKENS
        if sampled and self.policy_version == VERSION and not marker.exists():
            threading.Timer(_BEGUN_S, say, [marker]).start()
        return plain(self, path, bodies, at_once)

    VLLMServerEngine._calls = calls


def _in_update(marker):
    plain_all, plain_update, versions = VLLMServerEngine._take_all, VLLMServerEngine._update, []

    def take_all(self, weights, version, label):
        versions.append(version)
        return plain_all(self, weights, version, label)

    def update(self, message):
        plain_update(self, message)
        if versions[-1] == VERSION and not marker.exists():
            say(marker)
            until = time.monotonic() + _HELD_S
            while not marker.with_suffix(".struck").exists() and time.monotonic() < until:
                time.sleep(0.01)

    VLLMServerEngine._take_all, VLLMServerEngine._update = take_all, update


POINTS = {"generating": _in_generate, "syncing": _in_update, "": lambda marker: None}

if __name__ == "__main__":
    part, point, marker, *arguments = sys.argv[1:]
    if part == "rank":
        POINTS[point](Path(marker))
    else:
        roles.PROGRAM = ("{python}", "-m", "tests.distributed.struck_engine_runner", "rank", point, marker)
    main(arguments)
