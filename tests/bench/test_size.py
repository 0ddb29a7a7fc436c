"""That every kind of size is made and measured; no time is asserted."""

import pytest

import size

KINDS = [pytest.param(name, marks=pytest.mark.slow) if name == "merge" else name for name in size.KINDS]


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_runs_on_little(name, tmp_path, monkeypatch):
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    kind = size.KINDS[name]
    kind.prepare(tmp_path, 64)
    point = size.measure(kind, tmp_path, 64)
    assert point["size"] == 64 and point["seconds"] >= 0
    assert kind.small == tuple(sorted(kind.small)) and kind.full == tuple(sorted(kind.full))


def test_a_line_has_the_exponent_and_the_memory_over_what_is_necessary():
    found = [{"size": n, "seconds": 1e-3 * n**1.5, "peak": 3e6 * n, "necessary": 2e6 * n} for n in (10, 20, 40)]
    assert size.exponent(found) == pytest.approx(1.5)
    line = size.line(size.KINDS["gate"], found)
    assert "**1.50**" in line and "| 120 MB | 1.5× |" in line and "≤ 2 s at 100,000" in line
