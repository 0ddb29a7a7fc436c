"""How often the 90 % intervals of `posttrain forecast` hold the truth, on simulated curves whose end is known: `python bench/forecast.py [CURVES]`."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

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


def main(num: int) -> None:
    for scene in SCENES:
        given, held, why = coverage(scene, num)
        shares = ", ".join(f"{name} {count / given:.3f}" for name, count in held.items())
        print(f"{scene}: {given} of {num} given; held: {shares or 'none'}; refused: {dict(why)}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 400)
