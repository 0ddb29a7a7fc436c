"""Tests that share what is costly to make run in one process."""

import pytest


@pytest.mark.xdist_group("groups")
def test_xdist_sees_the_group_of_a_test(request):
    """It reads the group at the end of a test's id, where it wrote it; it says nothing where that did not work, and every process makes all anew."""
    if not request.config.getoption("loadgroup", default=False):
        pytest.skip("not run in groups: pytest -n 2 --dist loadgroup")
    assert request.node.nodeid.endswith("@groups")
