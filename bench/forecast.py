"""How often the 90 % intervals of `posttrain forecast` hold the truth.

python bench/forecast.py 200                 on so many simulated curves of each scene, whose end is known
python bench/forecast.py RUNS [RUNS …]       on the rewards that are logged below these folders: forecast at half and at three quarters
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from posttrain.files import read_json_lines
from posttrain.planner.reward_curve import RewardForecast, forecast_reward


@dataclass(frozen=True, slots=True)
class Scene:
    """Steps in all, the share that is seen, the noise of a step and how alike that of neighbours is; completions scored 0 or 1 instead, if any."""

    steps: int
    seen: float
    alike: float
    noise: float
    completions: int = 0


SCENES = (
    Scene(200, 0.5, 0.0, 0.05), Scene(200, 0.6, 0.6, 0.04), Scene(200, 0.7, 0.8, 0.03), Scene(1000, 0.5, 0.6, 0.06),
    Scene(1000, 0.7, 0.8, 0.04), Scene(400, 0.5, 0.0, 0.0, 64), Scene(100, 0.6, 0.4, 0.03), Scene(1000, 0.5, 0.9, 0.05),
)  # fmt: skip
SEEN = (0.5, 0.75)
LEAST = 48
"""Rewards of a recorded curve: half of them are as many as a forecast needs."""


def curves(scene: Scene, num: int) -> Iterator[tuple[RewardForecast, dict[str, float]]]:
    """The forecast of each curve, and what it should hold."""
    for seed in range(num):
        draw = np.random.default_rng(seed)
        start, last = draw.uniform(0, 0.4), int(scene.seen * scene.steps)
        top, mid, exponent = (
            start + draw.uniform(0.2, 0.6),
            draw.uniform(0.05, 0.35) * scene.steps,
            draw.uniform(0.8, 3),
        )

        def level(step, start=start, top=top, mid=mid, exponent=exponent):
            return start + (top - start) / (1 + (mid / step) ** exponent)

        steps = np.arange(1, last + 1)
        rewards = level(steps) + scene.noise * _noise(draw, last, scene.alike)
        if scene.completions:
            rewards = draw.binomial(scene.completions, level(steps)) / scene.completions
        truth = {"asymptote": top, "end": level(scene.steps), "left": level(scene.steps) - level(last)}
        yield forecast_reward(steps.tolist(), rewards.tolist(), scene.steps), truth


def _noise(draw: np.random.Generator, num: int, alike: float) -> np.ndarray:
    noise = draw.normal(size=num)
    for place in range(1, num):
        noise[place] = alike * noise[place - 1] + np.sqrt(1 - alike**2) * noise[place]
    return noise


def coverage(scene: Scene, num: int) -> tuple[int, dict[str, int], Counter[str]]:
    """How many forecasts were given, how often each interval held, and why the others were refused."""
    given, held, why = 0, Counter[str](), Counter[str]()
    for made, truth in curves(scene, num):
        if made.refused:
            why[" ".join(made.refused.split()[:6])] += 1
            continue
        given += 1
        for name, value in truth.items():
            interval = getattr(made, name)
            held[name] += interval.low <= value <= interval.high
    return given, dict(held), why


@dataclass(frozen=True, slots=True)
class Recorded:
    """A forecast of a recorded curve from a part of it, and whether its end holds the mean of the last eighth, give or take the reading's own error."""

    name: str
    seen: float
    made: RewardForecast
    mean: float
    held: bool | None


def recorded(name: str, rewards: Sequence[float]) -> Iterator[Recorded]:
    """At each share of `SEEN`; what is refused holds nothing."""
    tail = np.array(rewards[-(len(rewards) // 8) :])
    error = 1.645 * float(tail.std(ddof=1)) / len(tail) ** 0.5
    for share in SEEN:
        last = int(share * len(rewards))
        made = forecast_reward(range(1, last + 1), rewards[:last], len(rewards))
        end = made.end
        held = None if end is None else bool(end.low - error <= tail.mean() <= end.high + error)
        yield Recorded(name, share, made, float(tail.mean()), held)


def logged_rewards(folder: Path) -> dict[str, list[float]]:
    """Folder of a stage → its rewards, of stages that logged at least `LEAST`; of a file what it holds."""
    if folder.is_file():
        return json.loads(folder.read_text())
    found: dict[str, list[float]] = {}
    for path in sorted(folder.rglob("metrics.jsonl")):
        rewards = [row["reward"] for _, row in read_json_lines(path) if "reward" in row]
        if len(rewards) >= LEAST:
            found[str(path.parent.relative_to(folder))] = rewards
    return found


def show_recorded(curves: Mapping[str, Sequence[float]]) -> None:
    told = [one for name, rewards in curves.items() for one in recorded(name, rewards)]
    for one in told:
        end = one.made.end
        said = one.made.refused if end is None else f"{end.value:.3f} ({end.low:.3f} to {end.high:.3f})"
        print(f"{one.name} at {one.seen:.0%}: end {one.mean:.3f}; {said}; held: {one.held}")
    for share in SEEN:
        given = [one.held for one in told if one.seen == share and one.held is not None]
        print(f"at {share:.0%}: {len(given)} of {len(curves)} curves forecast, {sum(given)} of them hold")


def main(num: int) -> None:
    for scene in SCENES:
        given, held, why = coverage(scene, num)
        shares = ", ".join(f"{name} {count / given:.3f}" for name, count in held.items())
        print(f"{scene}: {given} of {num} given; held: {shares or 'none'}; refused: {dict(why)}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:] and not sys.argv[1].isdigit():
        show_recorded(
            {f"{given}/{name}": curve for given in sys.argv[1:] for name, curve in logged_rewards(Path(given)).items()}
        )
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 400)
