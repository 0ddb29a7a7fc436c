"""`--ray` with an engine that is struck at points of its work: the trainer says once that it is there, and whoever watches strikes.

A plan is `generating:1,syncing:2`, points with the version of the weights: `generating` (completions are asked for and not all answered;
the trainer waits for them), `taking` (the first one was taken, and the others are not), `idle` (all were answered, and nothing of that version
was sent), `syncing` (the engine has the first tensors of that version, and not the others). At the last three the trainer holds still until
it was struck. That a point is reached is a file `MARKER.VERSION`, that it was struck one more, `….struck`.
"""

import sys
import threading
import time
from contextlib import closing
from pathlib import Path

from posttrain.cli import roles
from posttrain.cli.app import main
from posttrain.rollout.vllm.server_engine import VLLMServerEngine

_BEGUN_S, _HELD_S = 0.2, 600.0
_CANARY_TOKENS = 2


def planned(plan, marker):
    """By point: version → the file that says that it is reached."""
    words = [word.split(":") for word in plan.split(",") if word]
    return {point: {int(v): Path(f"{marker}.{v}") for p, v in words if p == point} for point in POINTS}


def say(place):
    named = place.with_suffix(".said")
    named.write_text("")
    named.rename(place)


def hold(place):
    say(place)
    until = time.monotonic() + _HELD_S
    while not Path(f"{place}.struck").exists() and time.monotonic() < until:
        time.sleep(0.01)


def samples(bodies):
    return bodies[0] and bodies[0].get("sampling_params", {}).get("max_tokens", 0) > _CANARY_TOKENS


def _in_generate(places):
    plain = VLLMServerEngine._calls

    def calls(self, path, bodies, at_once):
        if samples(bodies) and (place := places.pop(self.policy_version, None)) and not place.exists():
            threading.Timer(_BEGUN_S, say, [place]).start()
        return plain(self, path, bodies, at_once)

    VLLMServerEngine._calls = calls


def _in_taking(places):
    plain = VLLMServerEngine._calls

    def calls(self, path, bodies, at_once):
        place = places.pop(self.policy_version, None) if samples(bodies) else None
        with closing(plain(self, path, bodies, at_once)) as answers:
            for answer in answers:
                yield answer
                if place and not place.exists():
                    hold(place)

    VLLMServerEngine._calls = calls


def _in_update(places):
    plain_all, plain_update, versions = VLLMServerEngine._take_all, VLLMServerEngine._update, []

    def take_all(self, weights, version):
        versions.append(version)
        return plain_all(self, weights, version)

    def update(self, message):
        plain_update(self, message)
        if (place := places.pop(versions[-1], None)) and not place.exists():
            hold(place)

    VLLMServerEngine._take_all, VLLMServerEngine._update = take_all, update


def _before_update(places):
    plain = VLLMServerEngine.update

    def update(self, weights, version):
        if (place := places.pop(version, None)) and not place.exists():
            hold(place)
        return plain(self, weights, version)

    VLLMServerEngine.update = update


POINTS = {"generating": _in_generate, "taking": _in_taking, "idle": _before_update, "syncing": _in_update}


if __name__ == "__main__":
    part, plan, marker, *arguments = sys.argv[1:]
    if part == "rank":
        for point, places in planned(plan, marker).items():
            POINTS[point](places)
    else:
        roles.PROGRAM = ("{python}", "-m", "tests.distributed.struck_engine_runner", "rank", plan, marker)
    main(arguments)
