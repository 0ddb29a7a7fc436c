from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose

from posttrain.gate import exact
from posttrain.gate.power import (
    MIN_ITEMS,
    assumed_effect,
    design_effect,
    detectable,
    needed_items,
    needed_items_for_variance,
    zero_loss_items,
)


def test_wald_numbers_worked_by_hand():
    """(1.644854 + 0.841621)² = 6.182557; · 0.1 / 0.02² = 1545.6; at power 0.9: 8.563847 · 0.2 / 0.0004 = 4281.9."""
    assert needed_items_for_variance(-0.02, 0.05, 0.8, 0.1) == 1546
    assert needed_items_for_variance(-0.02, 0.05, 0.9, 0.2) == 4282


@pytest.mark.parametrize(
    ("line", "discordance"), [(-0.1, 0.2), (-0.05, 0.1), (0.1, 0.4), pytest.param(-0.05, 0.2, marks=pytest.mark.slow)]
)
def test_planned_items_give_the_planned_power(bench, line, discordance):
    """Against the enumeration of the test that decides; a few items fewer do not."""
    n, effect = needed_items(line, 0.05, 0.8, discordance), assumed_effect(line)

    def enumerated(n):
        first = bench("enumeration").first_passing(n, line, 0.05)
        return exact.probability(first, n, effect, np.array([discordance]))[0]

    assert 0.795 < enumerated(n) < 0.83
    assert enumerated(n - 12) < enumerated(n)


def test_no_loss_among_59_items_excludes_5_points():
    assert [zero_loss_items(margin, 0.05) for margin in (0.05, 0.02, 0.1)] == [59, 149, 29]
    assert zero_loss_items(1.0, 0.05) == 1


def test_fewer_items_for_wider_margins_and_more_for_more_power():
    assert needed_items(-0.02, 0.05, 0.8, 0.2) > needed_items(-0.05, 0.05, 0.8, 0.2)
    assert needed_items(-0.05, 0.05, 0.9, 0.2) > needed_items(-0.05, 0.05, 0.8, 0.2)
    assert needed_items(-0.9, 0.05, 0.8, 0.01) == MIN_ITEMS


def test_clusters_cost_items():
    assert design_effect(500, 50, 0.1) == pytest.approx(1.9)
    assert design_effect(50, 50, 0.5) == 1.0


def test_detectable_inverts_needed_items():
    n = needed_items_for_variance(-0.04, 0.05, 0.8, 0.2)
    assert_allclose(detectable(n, 0.05, 0.8, 0.2), 0.04, rtol=2e-3)


def test_the_table_in_the_docs_is_what_the_code_plans():
    page = (Path(__file__).parents[2] / "docs" / "gate.md").read_text()
    table = page[page.index("| margin |") :].split("\n\n")[0].splitlines()
    shares = [float(cell.removeprefix("discordance ")) for cell in _cells(table[0])[1:]]
    assert len(table) > 5
    for row in table[2:]:
        margin, *items = _cells(row)
        planned = [needed_items(-float(margin), 0.05, 0.8, share) for share in shares]
        assert [int(item.replace(",", "")) for item in items] == planned


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]
