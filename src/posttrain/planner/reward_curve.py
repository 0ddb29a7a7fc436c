"""Where a reward that rises along a sigmoid of the steps will end, with intervals; refused where the steps so far cannot say.

The interval of a quantity is its profile likelihood: on a grid of mid-points and exponents the two levels are linear, so each cell
says in closed form which values it allows. Rewards of neighbouring steps are alike; so they are means of blocks, with AR(1) noise.
Knows no run and no metric.
"""
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

MIN_ROWS = 24
_MOST_BLOCKS, _POINTS_PER_BLOCK = 60, 4
_GRID, _ZOOMS = 28, 3
_EXPONENTS = (0.3, 12.0)
_BEYOND = 20.0
"""The furthest mid-point that is thought of, times the last step."""
_MOST_ALIKE = 0.9
_WAVES = 4
_LEVEL, _CAUTION = 0.92, 1.5
"""Of the profile, and standard errors added to how alike neighbours are: on simulated curves the 90 % intervals then hold (bench/forecast.py)."""
_MIN_INDEPENDENT = 12
_ROUNDING = 1e-12
_NO_RISE_P, _NO_SIGMOID_P = 0.01, 0.005


@dataclass(frozen=True, slots=True)
class Bounded:
    """An estimate with its 90 % interval."""

    value: float
    low: float
    high: float

    def times(self, scale: float) -> Bounded:
        return Bounded(self.value * scale, self.low * scale, self.high * scale)


@dataclass(frozen=True, slots=True)
class RewardForecast:
    """`end`, `now`, `asymptote`: the curve without its noise; `left`: end − now. `refused`: why there is none, in words, and the rest is None."""

    step: int
    end_step: int
    refused: str = ""
    now: Bounded | None = None
    end: Bounded | None = None
    asymptote: Bounded | None = None
    left: Bounded | None = None
    mid_step: Bounded | None = None
    exponent: float | None = None


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Means of rewards, and the steps at which each block's curve is read. Shapes: [n], [n, points]."""

    values: np.ndarray
    steps: np.ndarray


@dataclass(frozen=True, slots=True)
class _Cells:
    """A least-squares fit of R0 and A − R0 per (mid, exponent). Shapes: [m], `levels` [m, 2], `inverse` [m, 2, 2], `fitted` [m, n]."""

    mids: np.ndarray
    exponents: np.ndarray
    levels: np.ndarray
    inverse: np.ndarray
    rss: np.ndarray
    fitted: np.ndarray

    @property
    def best(self) -> int:
        return int(np.argmin(self.rss))


def forecast_reward(steps: Sequence[int], rewards: Sequence[float], end_step: int) -> RewardForecast:
    """The sigmoid through the rewards, at `end_step`. Of a step that is there twice, the later one counts.

    Source: arXiv 2510.13786 eq. 1, R(C) − R0 = (A − R0) / (1 + (C_mid/C)^B); differs: C counts steps, R0 is fitted too.
    """
    rows = dict(zip(steps, rewards, strict=True))
    rows = {step: rows[step] for step in sorted(rows) if step > 0 and np.isfinite(rows[step])}
    last = max(rows, default=0)
    if len(rows) < MIN_ROWS:
        return RewardForecast(last, end_step, f"{len(rows)} steps with a reward are too few: {MIN_ROWS} are needed")
    # Squares of what a reward may be overflow or vanish; a power of two changes no digit.
    scale = 2.0 ** (math.frexp(max(map(abs, rows.values())))[1] - 1)
    blocks = _blocks(np.array(list(rows), float), np.array(list(rows.values()), float) / scale)
    alike, cells, most = _fit(blocks, last)
    if reason := _why_not(blocks, cells, most, alike, last):
        return RewardForecast(last, end_step, reason)
    allowed = cells.rss <= most
    there, then = (_sigmoid(np.full(1, step), cells.mids, cells.exponents)[:, 0] for step in (last, end_step))
    ones = np.ones_like(then)
    return RewardForecast(
        last, end_step,
        now=_bounded(cells, most, ones, there).times(scale), end=_bounded(cells, most, ones, then).times(scale),
        asymptote=_bounded(cells, most, ones, ones).times(scale), left=_bounded(cells, most, 0 * ones, then - there).times(scale),
        mid_step=Bounded(float(cells.mids[cells.best]), float(cells.mids[allowed].min()), float(cells.mids[allowed].max())),
        exponent=float(cells.exponents[cells.best]),
    )  # fmt: skip


def _blocks(steps: np.ndarray, rewards: np.ndarray) -> _Blocks:
    """Equal blocks; rows that fill none are left out at the start, where they say least of the end."""
    size = -(-len(steps) // _MOST_BLOCKS)
    num = len(steps) // size
    steps, rewards = steps[-num * size :].reshape(num, size), rewards[-num * size :].reshape(num, size)
    points = np.unique(np.linspace(0, size - 1, _POINTS_PER_BLOCK).round().astype(int))
    return _Blocks(rewards.mean(axis=1), steps[:, points])


def _sigmoid(steps: np.ndarray, mids: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """Shapes: [k], [m], [m] -> [m, k]."""
    with np.errstate(over="ignore"):
        return 1.0 / (1.0 + np.exp(exponents[:, None] * (np.log(mids)[:, None] - np.log(steps)[None, :])))


def _fit(blocks: _Blocks, last: int) -> tuple[float, _Cells, float]:
    """How alike neighbours are, the cells around the best one, and the largest sum of squares that is still allowed."""
    alike = 0.0
    for _ in range(2):
        cells, _ = _zoomed(blocks, last, alike)
        alike = _alikeness(blocks.values - cells.fitted[cells.best])
    return alike, *_zoomed(blocks, last, alike)


def _zoomed(blocks: _Blocks, last: int, alike: float) -> tuple[_Cells, float]:
    spans = np.log([[blocks.steps.min() / 2 + 0.5, _BEYOND * last], _EXPONENTS])
    degrees = len(blocks.values) - 5
    factor = 1.0 + float(stats.f.ppf(_LEVEL, 1, degrees)) / degrees
    cells, most = None, 0.0
    for _ in range(_ZOOMS):
        axes = np.linspace(spans[:, 0], spans[:, 1], _GRID, axis=1)
        mids, exponents = np.exp(np.repeat(axes[0], _GRID)), np.exp(np.tile(axes[1], _GRID))
        cells = _cells(blocks, mids, exponents, alike)
        most = float(cells.rss.min() * factor)
        near = np.log(np.stack([mids, exponents])[:, cells.rss <= most * 1.02])
        gaps = axes[:, 1] - axes[:, 0]
        low, high = np.maximum(spans[:, 0], near.min(axis=1) - gaps), np.minimum(spans[:, 1], near.max(axis=1) + gaps)
        spans = np.stack([low, high], axis=1)
    assert cells is not None
    return cells, most


def _cells(blocks: _Blocks, mids: np.ndarray, exponents: np.ndarray, alike: float) -> _Cells:
    num, points = blocks.steps.shape
    shares_MN = _sigmoid(blocks.steps.ravel(), mids, exponents).reshape(-1, num, points).mean(axis=2)
    one, rises, values = (_whitened(x, alike) for x in (np.ones(num), shares_MN, blocks.values))
    # The normal equations of two columns; a column that rises nowhere has no solution and no likelihood.
    a, b, c = one @ one, rises @ one, (rises * rises).sum(axis=1)
    p, q = one @ values, rises @ values
    determinant = a * c - b * b
    flat = determinant <= 1e-9 * a * np.maximum(c, 1e-12)
    safe = np.where(flat, 1.0, determinant)
    levels = np.stack([(c * p - b * q) / safe, (a * q - b * p) / safe], axis=1)
    inverse = np.stack([np.stack([c, -b], 1), np.stack([-b, np.full_like(b, a)], 1)], 1) / safe[:, None, None]
    fitted = levels[:, :1] + levels[:, 1:] * shares_MN
    rss = (_whitened(blocks.values - fitted, alike) ** 2).sum(axis=1) + _ROUNDING * (values @ values)
    return _Cells(mids, exponents, levels, inverse, np.where(flat | (levels[:, 1] <= 0), np.inf, rss), fitted)


def _whitened(series: np.ndarray, alike: float) -> np.ndarray:
    """AR(1) noise as independent noise of the same variance as its innovations. Shapes: [..., n]."""
    white = series - alike * np.concatenate([series[..., :1] * 0, series[..., :-1]], axis=-1)
    white[..., 0] *= np.sqrt(1.0 - alike**2)
    return white


def _alikeness(residuals: np.ndarray, num_fitted: int = 4) -> float:
    """The correlation of neighbours, without the bias that fitting brings, and standard errors more: too little is an interval too narrow."""
    num = len(residuals)
    found = float(residuals[1:] @ residuals[:-1] / max(residuals @ residuals, np.finfo(float).tiny))
    found = min(max((num * found + num_fitted) / (num - 3 - num_fitted), 0.0), _MOST_ALIKE)
    return min(found + _CAUTION * np.sqrt((1.0 - found**2) / num), _MOST_ALIKE)


def _bounded(cells: _Cells, most: float, of_r0: np.ndarray, of_rise: np.ndarray) -> Bounded:
    """Of R0·of_r0 + (A − R0)·of_rise: all values that some cell allows."""
    wanted = np.stack([of_r0, of_rise], axis=1)
    values = (wanted * cells.levels).sum(axis=1)
    spread = np.einsum("mi,mij,mj->m", wanted, cells.inverse, wanted)
    allowed = cells.rss <= most
    half = np.sqrt((most - cells.rss[allowed]) * spread[allowed])
    return Bounded(
        float(values[cells.best]), float((values[allowed] - half).min()), float((values[allowed] + half).max())
    )


def _why_not(blocks: _Blocks, cells: _Cells, most: float, alike: float, last: int) -> str:
    best, num = cells.best, len(blocks.values)
    if not np.isfinite(cells.rss[best]):
        return "the reward does not rise"
    one, values = _whitened(np.ones(num), alike), _whitened(blocks.values, alike)
    level = (one @ values) / (one @ one)
    without = float(((values - level * one) ** 2).sum())
    degrees = num - 5
    if stats.f.sf((without / cells.rss[best] - 1.0) * degrees / 3, 3, degrees) > _NO_RISE_P:
        return "the rise cannot be told from the noise"
    if _bends(blocks.values - cells.fitted[best]) < _NO_SIGMOID_P:
        return "the curve is no sigmoid: it strays from the best one by more than its noise, as after a fall or a change of the task"
    worth = num * (1 - alike) / (1 + alike)
    if worth < _MIN_INDEPENDENT:
        return f"the noise of neighbouring steps is so alike that they are worth {worth:.0f} independent readings; {_MIN_INDEPENDENT} are needed"
    mid = float(cells.mids[best])
    upper = float(cells.mids[cells.rss <= most].max())
    if mid > last or upper > last:
        return f"the mid-point of the rise is not passed for sure: step {mid:.0f}, at most {upper:.0f}, and the run is at {last}"
    return ""


def _bends(residuals: np.ndarray) -> float:
    """The p-value of slow waves in what is left, against noise as alike as it is without them."""
    num = len(residuals)
    waves = np.cos(np.pi * np.outer(np.arange(1, _WAVES + 1), np.arange(num) + 0.5) / num)
    rest = residuals - residuals @ waves.T @ waves * 2 / num
    alike = _alikeness(rest, 4 + _WAVES)
    white, design = _whitened(residuals, alike), _whitened(waves, alike)
    left = max(float(((white - np.linalg.lstsq(design.T, white)[0] @ design) ** 2).sum()), np.finfo(float).tiny)
    degrees = num - 5 - _WAVES
    return float(stats.f.sf((float(white @ white) / left - 1.0) * degrees / _WAVES, _WAVES, degrees))
