"""A real child process, killed at its commit points and at random instants, and started again until it is done."""

import re

import pytest

KINDS = ("sft", "dpo", "grpo", "ppo", "online_dpo")
SHORT = {"max_steps": 3, "save_total_limit": 1}
QUICK = [kind if kind in ("sft", "grpo") else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]


@pytest.fixture(scope="module")
def drivers(harness, runner, model_dir, data_dir, tmp_path_factory):
    """`drivers(kind)`: the stage as it is killed hundreds of times; with `short`, three steps of it."""
    made = set()

    def make(kind, short=False):
        driver = harness.stage_driver(kind, runner, model_dir("llama"), data_dir, **(SHORT if short else {}))
        if kind not in made:
            # Once in this process, so that no child has to import.
            driver.run(tmp_path_factory.mktemp("first") / kind)
            made.add(kind)
        return driver

    return make


def check(tally, kills):
    assert tally.kills >= kills
    assert tally.runs
    assert tally.differences == []


@pytest.mark.parametrize("kind", QUICK)
def test_killed_at_commit_points_it_ends_the_same(kind, drivers, harness, tmp_path):
    """Each *kind* of commit point once (which step it is makes no difference), where a name appears, changes or goes."""
    died = set()

    def wanted(point):
        what = re.sub(r"\d+", "N", point)
        if not point.startswith(("rename", "rmdir")) or what in died:
            return False
        died.add(what)
        return True

    driver = drivers(kind, short=True)
    expected, _ = harness.uninterrupted(driver, tmp_path / "straight")
    assert expected["exactly once"]
    assert expected["leftovers"] == []
    tally = harness.kill_at_points(driver, tmp_path / "killed", expected, lambda point: _first(point, tmp_path, wanted))
    check(tally, 6)
    assert any("rename checkpoints/step-" in point for point in tally.points)
    assert any("rename result.json" in point for point in tally.points)


def _first(point, folder, wanted):
    """What earlier children died at is in the journal; a child knows no more of them."""
    for line in (folder / "killed.points").read_text().splitlines():
        wanted(line)
    return wanted(point)


@pytest.mark.parametrize("kind", QUICK)
def test_killed_at_random_instants_it_ends_the_same(kind, drivers, harness, tmp_path):
    driver = drivers(kind, short=True)
    expected, longest_s = harness.uninterrupted(driver, tmp_path / "straight")
    check(harness.kill_at_random(driver, tmp_path / "killed", expected, 3, longest_s), 3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_every_commit_point_it_ends_the_same(kind, drivers, harness, tmp_path):
    driver = drivers(kind)
    expected, longest_s = harness.uninterrupted(driver, tmp_path / "straight")
    check(harness.kill_at_points(driver, tmp_path / "killed", expected), 60)
    check(harness.kill_at_random(driver, tmp_path / "random", expected, 40, longest_s), 40)


def test_what_counts_as_exactly_once(harness):
    """The check can fail: a prompt issued twice, lost, trained twice or never issued, a batch of prompts repeated."""
    good = [
        {"generation": 0, "issued": [0, 1, 2], "trained": [0, 2], "passed_over": []},
        {"generation": 1, "issued": [4], "trained": [4], "passed_over": [3]},
    ]
    assert harness.is_exactly_once(good)
    for broken in (
        {"issued": [2, 3]}, {"issued": [5]}, {"trained": [0]}, {"trained": [4, 4]}, {"trained": [9]}, {"generation": 0},
    ):  # fmt: skip
        assert not harness.is_exactly_once([good[0], {**good[1], **broken}]), broken
    assert not harness.is_exactly_once([])


def test_commit_points_are_seen_by_what_they_do_and_to_what(harness, tmp_path):
    """One file and one folder, as everything is written here: each operation is died at once, and the end is the same."""
    from posttrain.files import write_folder, write_json

    def run(folder):
        folder.mkdir(exist_ok=True)
        write_json(folder / "a.json", 1)
        write_folder(folder / "b", lambda inside: (inside / "c").write_text("c") and None)

    def trace(folder):
        return {"a": (folder / "a.json").read_text(), "c": (folder / "b/c").read_text()}

    driver = harness.Driver("files", run, trace)
    expected, _ = harness.uninterrupted(driver, tmp_path / "straight")
    tally = harness.kill_at_points(driver, tmp_path / "killed", expected)
    check(tally, 6)
    assert {"write .a.json.* #1", "rename a.json #1", "mkdir .b.* #1", "write .b.*/c #1", "rename b #1"} <= tally.points
    assert tally.at_points == len(tally.points)
