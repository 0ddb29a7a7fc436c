"""`--ray` with an engine that is struck at points of its work: the trainer says once that it is there, and whoever watches strikes.

A plan is `generating:1,syncing:2`, points with the version of the weights: `generating` (completions are asked for and not all answered;
the trainer waits for them), `syncing` (the engine has the first tensors of that version, and not the others; the trainer holds still until
it was struck). That a point is reached is a file `MARKER.VERSION`, that it was struck one more, `….struck`.
"""

import sys
import threading
import time
from pathlib import Path

from posttrain.cli import roles
from posttrain.cli.app import main
from posttrain.rollout.vllm.server_engine import VLLMServerEngine

_BEGUN_S, _HELD_S = 0.3, 600.0
_CANARY_TOKENS = 2


def planned(plan, marker):
    """By point: version → the file that says that it is reached."""
    words = [word.split(":") for word in plan.split(",") if word]
    return {
        point: {int(v): Path(f"{marker}.{v}") for p, v in words if p == point} for point in ("generating", "syncing")
    }


def say(place):
    named = place.with_suffix(".said")
    named.write_text("")
    named.rename(place)


def _in_generate(places):
    plain = VLLMServerEngine._calls

    def calls(self, path, bodies, at_once):
        sampled = bodies[0] and bodies[0].get("sampling_params", {}).get("max_tokens", 0) > _CANARY_TOKENS
        if sampled and (place := places.pop(self.policy_version, None)) and not place.exists():
            threading.Timer(_BEGUN_S, say, [place]).start()
        return plain(self, path, bodies, at_once)

    VLLMServerEngine._calls = calls


def _in_update(places):
    plain_all, plain_update, versions = VLLMServerEngine._take_all, VLLMServerEngine._update, []

    def take_all(self, weights, version):
        versions.append(version)
        return plain_all(self, weights, version)

    def update(self, message):
        plain_update(self, message)
        if (place := places.pop(versions[-1], None)) and not place.exists():
            say(place)
            until = time.monotonic() + _HELD_S
            while not Path(f"{place}.struck").exists() and time.monotonic() < until:
                time.sleep(0.01)

    VLLMServerEngine._take_all, VLLMServerEngine._update = take_all, update


if __name__ == "__main__":
    part, plan, marker, *arguments = sys.argv[1:]
    if part == "rank":
        places = planned(plan, marker)
        _in_generate(places["generating"])
        _in_update(places["syncing"])
    else:
        roles.PROGRAM = ("{python}", "-m", "tests.distributed.struck_engine_runner", "rank", plan, marker)
    main(arguments)
