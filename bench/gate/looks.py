"""How often is one of several candidates that should not ship shipped? With and without the ledger, and chosen on dev.

Every number is enumerated, none simulated. Takes about two minutes on one core and writes its table between the markers in
docs/gate.md:

    python bench/gate/looks.py
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from enumeration import first_passing, percent, shipped_by_estimate, worst_size, write_between

from posttrain.gate import GateSpec, Guard, exact

DOC = Path(__file__).resolve().parents[2] / "docs" / "gate.md"
START, END = "<!-- looks: start -->", "<!-- looks: end -->"
MARGIN, DISCORDANCE = 0.05, 0.2
NUM_ITEMS = 1000
LOOKS = (1, 2, 3, 5, 10)
SPENT = GateSpec(guards=(Guard("suite", MARGIN),), spend=True)


def passes(alpha: float, gain: float) -> float:
    """Probability that one candidate passes."""
    first = first_passing(NUM_ITEMS, -MARGIN, alpha)
    return float(exact.probability(first, NUM_ITEMS, gain, np.array([DISCORDANCE]))[0])


def any_of(chances: list[float]) -> float:
    """Probability that at least one of independent candidates passes."""
    return 1.0 - math.prod(1.0 - chance for chance in chances)


def row(num_looks: int) -> list[float]:
    """What ships of `num_looks` candidates, each as bad as the margin, under each rule; then the power that is left."""
    alphas = [SPENT.alpha_at(look) for look in range(1, num_looks + 1)]
    point = shipped_by_estimate(NUM_ITEMS, -MARGIN, -MARGIN, DISCORDANCE, strict=False)
    return [
        any_of([point] * num_looks),
        any_of([passes(SPENT.alpha, -MARGIN)] * num_looks),
        any_of([passes(alpha, -MARGIN) for alpha in alphas]),
        sum(worst_size(NUM_ITEMS, -MARGIN, alpha)[0] for alpha in alphas),
        passes(SPENT.alpha, -MARGIN),
        passes(alphas[-1], 0.0),
    ]


def table() -> str:
    """The Markdown between the markers."""
    lines = [
        f"Written by `python bench/gate/looks.py`: a guard with margin 5 points, alpha {SPENT.alpha:g}, {NUM_ITEMS:,} items. Every "
        "candidate is 5 points worse than the baseline, so everything that ships is a false ship; percent of runs in which one "
        f"does, {DISCORDANCE} of the items differing and the candidates independent, by enumeration. \"Ledger, at worst\" is the "
        "sum of the worst rates of its looks over every share of differing items: no correlation of the candidates gives more. "
        "\"dev\": the first that looks good enough on other items has the one verdict. The last column is the percent of "
        "candidates as good as the baseline that pass at the last look.",
        "",
        "| looks | drop ≤ 5 | full alpha each (`looks: 0`) | ledger | ledger, at worst | dev, one verdict | ledger: power at the last look |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for looks in LOOKS:
        point, full, ledger, worst, dev, power = row(looks)
        cells = [percent(point), percent(full), percent(ledger, 2), percent(worst, 2), percent(dev), percent(power)]
        lines.append(f"| {looks} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    text = table()
    write_between(DOC, START, END, text)
    print(text)


if __name__ == "__main__":
    main()
