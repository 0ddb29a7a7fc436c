"""How often is the gate wrong? Simulate null, regressed and improved candidates and count what each rule ships.

Runs in under two minutes on one core and writes the tables between the markers in docs/gate.md:

    python bench/gate/operating_characteristics.py
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np

from posttrain.gate import tango
from posttrain.gate.mcnemar import p_value
from posttrain.gate.measure import CLUSTERED, measure
from posttrain.gate.paired import fit_t
from posttrain.gate.pairing import Pairs
from posttrain.gate.power import needed_items

DOC = Path(__file__).resolve().parents[2] / "docs" / "gate.md"
START, END = "<!-- operating characteristics: start -->", "<!-- operating characteristics: end -->"
ALPHA, POWER, ASSUMED = 0.05, 0.8, 0.2
NUM_TRIALS = 20_000
NUM_CLUSTERED_TRIALS = 400
SIZES = (100, 250, 500, 1000, 2000)


def draw(
    rng: np.random.Generator, n: int, discordance: float, gain: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct (good, bad) counts of NUM_TRIALS candidates with a true `gain`, and the share of trials of each."""
    rates = [(discordance + gain) / 2, (discordance - gain) / 2, 1 - discordance]
    counts = rng.multinomial(n, rates, size=NUM_TRIALS)[:, :2]
    distinct, times = np.unique(counts, axis=0, return_counts=True)
    return distinct[:, 0], distinct[:, 1], times / NUM_TRIALS


def outcomes(good: np.ndarray, bad: np.ndarray, n: int, line: float) -> tuple[np.ndarray, np.ndarray]:
    """Which counts the gate passes, and which it fails; the rest are inconclusive. The rules of `decide`."""
    if line == 0.0:
        passed = np.array([p_value(int(g), int(b)) < ALPHA for g, b in zip(good, bad, strict=True)])
    else:
        passed = tango.lower_bound(good, bad, n, ALPHA) > line
    needed = {k: needed_items(line, ALPHA, POWER, max(ASSUMED, k / n)) for k in set((good + bad).tolist())}
    enough = np.array([n >= needed[k] for k in (good + bad).tolist()])
    below = tango.interval(good, bad, n)[1] <= line
    return passed, ~passed & (enough | below)


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def binary_table(line: float, rules: dict[str, float], gains: tuple[float, ...]) -> list[str]:
    """Percent shipped per rule and true gain; for the gate pass / fail / inconclusive."""
    titles = [f"gain {100 * gain:+.0f}: gate" + "".join(f" · {rule}" for rule in rules) for gain in gains]
    rows = ["| n | differ | " + " | ".join(titles) + " |", "|---|---|" + "---|" * len(gains)]
    rng = np.random.default_rng(0)
    for discordance in (0.1, 0.2, 0.4):
        for n in SIZES:
            cells = []
            for gain in gains:
                if abs(gain) > discordance:
                    cells.append("–")
                    continue
                good, bad, share = draw(rng, n, discordance, gain)
                passed, failed = outcomes(good, bad, n, line)
                split = [share[passed].sum(), share[failed].sum(), share[~passed & ~failed].sum()]
                points = [percent(share[(good - bad) / n > limit - 1e-12].sum()) if limit else percent(share[good > bad].sum()) for limit in rules.values()]  # fmt: skip
                cells.append(
                    f"**{percent(split[0])}** / {percent(split[1])} / {percent(split[2])} · " + " · ".join(points)
                )
            rows.append(f"| {n} | {discordance} | " + " | ".join(cells) + " |")
    return rows


def clustered_table(margin: float, icc: float, items_per_cluster: int) -> list[str]:
    """Percent passing a guard, when the items of a cluster move together."""
    head = "| clusters | items | gain −5: gate | gain −5: t ignoring clusters | gain −5: drop ≤ 5 | gain 0: gate | gain 0: drop ≤ 5 |"
    rows = [head, "|---|---|---|---|---|---|---|"]
    rng = np.random.default_rng(1)
    spread = math.sqrt(ASSUMED)
    for num_clusters in (20, 50, 100):
        cluster = np.repeat(np.arange(num_clusters), items_per_cluster)
        n = len(cluster)
        shipped: dict[tuple[float, str], int] = {}
        for gain in (-margin, 0.0):
            for _ in range(NUM_CLUSTERED_TRIALS):
                shared = rng.normal(0, spread * math.sqrt(icc), num_clusters)[cluster]
                values = gain + shared + rng.normal(0, spread * math.sqrt(1 - icc), n)
                pairs = Pairs(values, np.zeros(n), cluster, num_clusters, binary=False)
                for rule, passes in (
                    ("gate", measure(CLUSTERED, pairs, -margin, ALPHA).bound > -margin),
                    ("naive", fit_t(values).lower(ALPHA) > -margin),
                    ("point", values.mean() >= -margin),
                ):
                    shipped[gain, rule] = shipped.get((gain, rule), 0) + passes
        rate = {key: percent(count / NUM_CLUSTERED_TRIALS) for key, count in shipped.items()}
        cells = [
            rate[-margin, "gate"],
            rate[-margin, "naive"],
            rate[-margin, "point"],
            rate[0.0, "gate"],
            rate[0.0, "point"],
        ]
        rows.append(
            f"| {num_clusters} | {n} | **{cells[0]}** | {cells[1]} | {cells[2]} | **{cells[3]}** | {cells[4]} |"
        )
    return rows


def main() -> None:
    start = time.perf_counter()
    parts = [
        f"Written by `python bench/gate/operating_characteristics.py`: alpha {ALPHA}, power {POWER}, assumed discordance "
        f"{ASSUMED}, {NUM_TRIALS:,} simulated candidates per cell (standard error at most 0.4 points; 0.15 near 5 %), "
        f"{NUM_CLUSTERED_TRIALS} in the clustered table (about 1 point near 5 %). Numbers are percent of candidates. "
        "\"differ\" is the true share of items on which the two models differ. The gate's cell is "
        "**pass** / fail / inconclusive; after it the percent that the point rules ship.",
        "**Guard, margin 5 points (Tango).** At −5 and −7 every pass is a false ship; at 0 everything that does not pass is "
        "a false block.",
        *binary_table(-0.05, {"drop ≤ 5": -0.05, "better": 0.0}, (-0.07, -0.05, 0.0)),
        "**Primary, min_delta 5 points (Tango).** At 0 and +5 every pass is a false ship; +10 shows the power.",
        *binary_table(0.05, {"gain ≥ 5": 0.05, "better": 0.0}, (0.0, 0.05, 0.1)),
        "**Primary, min_delta 0 (exact McNemar).** At −2 and 0 every pass is a false ship; +5 shows the power.",
        *binary_table(0.0, {"better": 0.0}, (-0.02, 0.0, 0.05)),
        "**Guard, margin 5 points, 10 items per cluster, correlation 0.3 (clustered t and BCa, both must clear).**",
        *clustered_table(0.05, 0.3, 10),
    ]  # fmt: skip
    text = "\n\n".join(parts).replace("|\n\n|", "|\n|")
    page = DOC.read_text()
    before, after = page.index(START) + len(START), page.index(END)
    DOC.write_text(f"{page[:before]}\n\n{text}\n\n{page[after:]}")
    print(text)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
