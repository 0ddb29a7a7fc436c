"""What moved between two runs."""

import json
import shutil

import pytest

from posttrain.errors import DataError
from posttrain.report.diff import comparison_text, diff_runs


@pytest.fixture
def twin(own_run, tmp_path):
    """A second run with the same records at other times."""
    folder = tmp_path / "twin"
    shutil.copytree(own_run, folder)
    for path in folder.glob("stages/*/metrics.jsonl"):
        _edit_lines(path, lambda row: row | {"time": row["time"] + 999, "step_time": 3.0})
    return folder


def _edit_lines(path, change):
    path.write_text("".join(json.dumps(change(json.loads(line))) + "\n" for line in path.read_text().splitlines()))


def _edit_json(path, change):
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def test_equal_runs_differ_in_nothing_though_their_clocks_do(own_run, twin):
    diff = diff_runs(own_run, twin)
    assert diff.is_empty
    assert comparison_text(diff).endswith("No pin, key, metric or score differs.")


def test_the_pin_that_moved_is_named(own_run, twin):
    _edit_json(twin / "pipeline.json", lambda p: p | {"pins": p["pins"] | {"environment": {"torch": "2.14.0"}}})
    diff = diff_runs(own_run, twin)
    assert [(c.name, c.a, c.b) for c in diff.pins] == [("environment.torch", "2.13.0", "2.14.0")]
    assert "Pins that moved\n  environment.torch  2.13.0 → 2.14.0" in comparison_text(diff)


def test_digests_are_shown_short(own_run, twin):
    _edit_json(twin / "pipeline.json", lambda p: p | {"pins": p["pins"] | {"base": "sha256:" + 64 * "0"}})
    (change,) = diff_runs(own_run, twin).pins
    assert (change.name, change.b) == ("base", "sha256:000000000000…")


def test_packages_that_moved_are_named(own_run, twin):
    record = {
        "python": "3.11.7",
        "machine": "x86_64",
        "cpu": {"model": "one"},
        "packages": {"torch": "2.13.0", "numpy": "2.1"},
    }
    (own_run / "environment.json").write_text(json.dumps(record))
    moved = record | {"python": "3.12.1", "packages": {"torch": "2.14.0", "numpy": "2.1"}}
    (twin / "environment.json").write_text(json.dumps(moved))
    diff = diff_runs(own_run, twin)
    assert [(c.name, c.a, c.b) for c in diff.environment] == [
        ("python", "3.11.7", "3.12.1"),
        ("torch", "2.13.0", "2.14.0"),
    ]
    assert not diff.is_empty
    assert "Environment that moved\n  python  3.11.7 → 3.12.1" in comparison_text(diff)


def test_runs_that_differ_from_the_start_are_said_to(own_run, twin):
    _edit_lines(twin / "stages" / "02-dpo" / "metrics.jsonl", lambda row: row | {"loss": row["loss"] + 1.0})
    assert "metrics differ from the first step" in comparison_text(diff_runs(own_run, twin))


def test_keys_are_named_with_their_place(own_run, twin):
    for folder, rate in ((own_run, "1e-3"), (twin, "2e-3")):
        (folder / "config.yaml").write_text(
            f"name: x\nstages:\n  - sft: {{learning_rate: {rate}}}\n  - dpo: {{beta: 0.1}}\n"
        )
    assert [(c.name, c.a, c.b) for c in diff_runs(own_run, twin).keys] == [
        ("stages.1.sft.learning_rate", "1e-3", "2e-3")
    ]


def test_the_first_step_that_differs_is_found(own_run, twin):
    _edit_lines(
        twin / "stages" / "01-sft" / "metrics.jsonl",
        lambda row: row | ({"loss": row["loss"] + 1e-9} if row["step"] >= 37 else {}),
    )
    diff = diff_runs(own_run, twin)
    assert {stage.name: stage.first_difference for stage in diff.stages} == {
        "01-sft": 37,
        "02-dpo": None,
        "03-grpo": None,
    }
    assert "Stage 01-sft (120 logged steps), metrics equal until step 37, where they part" in comparison_text(diff)


def test_a_shorter_run_parts_where_it_ends(own_run, twin):
    path = twin / "stages" / "02-dpo" / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:30]))
    stage = diff_runs(own_run, twin).stages[1]
    assert (stage.first_difference, stage.num_steps) == (31, (40, 30))


def test_scores_are_compared_item_by_item(own_run, twin):
    from posttrain.evidence import EvalReport

    ours, folder = own_run / "evals" / "base" / "heldout-gate", twin / "evals" / "03-grpo" / "heldout-gate"
    EvalReport.load(ours).save(folder)
    (change,) = diff_runs(own_run, twin).scores
    assert change.name == "03-grpo heldout/gate"
    assert change.a.endswith(" %") and "(−" in change.b


def test_a_stage_that_only_one_run_has(own_run, twin):
    shutil.rmtree(twin / "stages" / "03-grpo")
    _edit_json(twin / "pipeline.json", lambda p: p | {"stages": p["stages"][:2]})
    assert [(c.name, c.b) for c in diff_runs(own_run, twin).stages[2].metrics] == [("stage", "(absent)")]


def test_no_run_folder(own_run, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty is not a run folder"):
        diff_runs(own_run, tmp_path / "empty")
