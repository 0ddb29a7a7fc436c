"""How often is the gate wrong? What each rule ships of null, regressed and improved candidates, and the worst it can do.

The exact test is enumerated, the clustered one simulated. Takes about five minutes on one core and writes the tables between the
markers in docs/gate.md:

    python bench/gate/operating_characteristics.py
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
from enumeration import percent, rates, shipped_by_estimate, worst_size, write_between

from posttrain.gate.measure import CLUSTERED, measure
from posttrain.gate.paired import fit_t
from posttrain.gate.pairing import PairedItems

DOC = Path(__file__).resolve().parents[2] / "docs" / "gate.md"
START, END = "<!-- operating characteristics: start -->", "<!-- operating characteristics: end -->"
ALPHA, POWER, ASSUMED = 0.05, 0.8, 0.2
NUM_CLUSTERED_TRIALS = 400
SIZES = (100, 250, 500, 1000, 2000)
LINES = {-0.05: "guard, margin 5", 0.0: "primary, min_delta 0", 0.05: "primary, min_delta 5"}


def worst_table() -> list[str]:
    """The largest false ship rate over every share of differing items, and the share where it is."""
    rows = ["| n | " + " | ".join(LINES.values()) + " |", "|---|" + "---|" * len(LINES)]
    for n in SIZES:
        found = [worst_size(n, line, ALPHA) for line in LINES]
        rows.append(f"| {n} | " + " | ".join(f"{percent(size, 2)} at {share:.2f}" for size, share in found) + " |")
    return rows


def binary_table(line: float, rules: dict[str, float], gains: tuple[float, ...]) -> list[str]:
    """Percent shipped per rule and true gain; for the gate pass / fail / inconclusive."""
    titles = [f"gain {100 * gain:+.0f}: gate" + "".join(f" · {rule}" for rule in rules) for gain in gains]
    rows = ["| n | differ | " + " | ".join(titles) + " |", "|---|---|" + "---|" * len(gains)]
    for share in (0.1, 0.2, 0.4):
        for n in SIZES:
            cells = [_cell(n, line, rules, gain, share) for gain in gains]
            rows.append(f"| {n} | {share} | " + " | ".join(cells) + " |")
    return rows


def _cell(n: int, line: float, rules: dict[str, float], gain: float, share: float) -> str:
    gate = rates(n, line, ALPHA, POWER, ASSUMED, gain, share)
    points = [shipped_by_estimate(n, limit, gain, share, strict=limit == 0.0) for limit in rules.values()]
    verdicts = f"**{percent(gate.passed)}** / {percent(gate.failed)} / {percent(gate.inconclusive)}"
    return " · ".join([verdicts, *map(percent, points)])


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
                pairs = PairedItems(values, np.zeros(n), cluster, num_clusters, binary=False)
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
        f"{ASSUMED}. Numbers are percent of candidates. All outcomes of the exact test are enumerated; the clustered table is "
        f"simulated with {NUM_CLUSTERED_TRIALS} candidates per cell (standard error about 1 point near 5 %).",
        "**The worst case.** The largest false ship rate of the exact test at its line, over every share of items on which the two "
        "models may differ, and that share.",
        *worst_table(),
        "In the next three tables \"differ\" is the true share of items on which the two models differ. The gate's cell is "
        "**pass** / fail / inconclusive; after it the percent that the point rules ship.",
        "**Guard, margin 5 points.** At −5 and −7 every pass is a false ship; at 0 everything that does not pass is "
        "a false block.",
        *binary_table(-0.05, {"drop ≤ 5": -0.05, "better": 0.0}, (-0.07, -0.05, 0.0)),
        "**Primary, min_delta 5 points.** At 0 and +5 every pass is a false ship; +10 shows the power.",
        *binary_table(0.05, {"gain ≥ 5": 0.05, "better": 0.0}, (0.0, 0.05, 0.1)),
        "**Primary, min_delta 0.** At −2 and 0 every pass is a false ship; +5 shows the power.",
        *binary_table(0.0, {"better": 0.0}, (-0.02, 0.0, 0.05)),
        "**Guard, margin 5 points, 10 items per cluster, correlation 0.3 (clustered t and BCa, both must clear).**",
        *clustered_table(0.05, 0.3, 10),
    ]  # fmt: skip
    text = "\n\n".join(parts).replace("|\n\n|", "|\n|")
    write_between(DOC, START, END, text)
    print(text)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
