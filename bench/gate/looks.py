"""How often is one of several candidates that should not ship shipped? With and without the ledger, and chosen on dev.

Runs in a few seconds on one core and writes its table between the markers in docs/gate.md:

    python bench/gate/looks.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from posttrain.gate import GateSpec, Guard, tango
from posttrain.gate.distributions import normal_quantile

DOC = Path(__file__).resolve().parents[2] / "docs" / "gate.md"
START, END = "<!-- looks: start -->", "<!-- looks: end -->"
MARGIN, DISCORDANCE = 0.05, 0.2
NUM_ITEMS, NUM_DEV = 1000, 200
NUM_TRIALS = 20_000
LOOKS = (1, 2, 3, 5, 10)


def draw(rng: np.random.Generator, n: int, gain: float) -> tuple[np.ndarray, np.ndarray]:
    """(good, bad) counts of one candidate in each trial."""
    rates = [(DISCORDANCE + gain) / 2, (DISCORDANCE - gain) / 2, 1 - DISCORDANCE]
    counts = rng.multinomial(n, rates, size=NUM_TRIALS)
    return counts[:, 0], counts[:, 1]


def passes(good: np.ndarray, bad: np.ndarray, alpha: float) -> np.ndarray:
    """Tango's bound is above the line exactly when its score is above the quantile."""
    return tango.score_z(good, bad, NUM_ITEMS, -MARGIN) > normal_quantile(1 - alpha)


def shipped(rng: np.random.Generator, num_looks: int) -> dict[str, float]:
    """Share of trials in which any of `num_looks` candidates, each as bad as the margin, passes."""
    gate = GateSpec(guards=(Guard("suite", MARGIN),))
    spent = GateSpec(guards=(Guard("suite", MARGIN),), spend=True)
    found = {name: np.zeros(NUM_TRIALS, bool) for name in ("point", "full", "ledger", "dev")}
    waiting = np.ones(NUM_TRIALS, bool)  # trials in which no candidate has been chosen on dev yet
    for look in range(1, num_looks + 1):
        good, bad = draw(rng, NUM_ITEMS, -MARGIN)
        found["point"] |= (good - bad) / NUM_ITEMS >= -MARGIN
        found["full"] |= passes(good, bad, gate.alpha)
        found["ledger"] |= passes(good, bad, spent.alpha_at(look))
        dev_good, dev_bad = draw(rng, NUM_DEV, -MARGIN)
        chosen = waiting & (((dev_good - dev_bad) / NUM_DEV > -MARGIN) | (look == num_looks))
        found["dev"] |= chosen & passes(good, bad, gate.alpha)
        waiting &= ~chosen
    return {name: 100 * float(any_.mean()) for name, any_ in found.items()}


def power(num_looks: int) -> float:
    """Percent of candidates with no true loss that the last of so many looks passes, alpha spent."""
    spent = GateSpec(guards=(Guard("suite", MARGIN),), spend=True)
    return 100 * float(passes(*draw(np.random.default_rng(1), NUM_ITEMS, 0.0), spent.alpha_at(num_looks)).mean())


def table() -> str:
    """The Markdown between the markers."""
    rng = np.random.default_rng(0)
    lines = [
        f"Written by `python bench/gate/looks.py`: a guard with margin 5 points, alpha 0.05, {NUM_ITEMS:,} items, {DISCORDANCE} of "
        f"them differing, {NUM_TRIALS:,} simulated runs per row (standard error at most 0.4 points; 0.15 near 5 %). Every "
        "candidate is 5 points worse than the baseline, so everything that ships is a false ship; percent of runs in which "
        f"one does. \"dev\": the first that looks good enough on {NUM_DEV} other items has the one verdict. The last column is "
        "the percent of candidates as good as the baseline that pass at the last look.",
        "",
        "| looks | drop ≤ 5 | full alpha each (`looks: 0`) | ledger | dev, one verdict | ledger: power at the last look |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for looks in LOOKS:
        rates = shipped(rng, looks)
        lines.append(
            f"| {looks} | {rates['point']:.1f} | {rates['full']:.1f} | {rates['ledger']:.1f} | {rates['dev']:.1f} | {power(looks):.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    text = table()
    page = DOC.read_text()
    before, after = page.index(START) + len(START), page.index(END)
    DOC.write_text(f"{page[:before]}\n\n{text}\n\n{page[after:]}")
    print(text)


if __name__ == "__main__":
    main()
