import json

import pytest

from posttrain.errors import GateError
from posttrain.evidence import Verdict
from posttrain.gate import GateSpec, Guard, Primary, decide, load_reports, load_verdict, recompute, save_verdict
from posttrain.gate import verdict_from_json as from_json

SPEC = GateSpec((Guard("format", 0.05),), (Primary("heldout", 0.05),))


@pytest.fixture
def runs(tmp_path, binary_pair):
    """Folders a and b with the reports of a candidate that passes."""
    pairs = {"format": binary_pair(5, 5, 600, "format"), "heldout": binary_pair(200, 50, 1000)}
    for suite, (candidate, baseline) in pairs.items():
        candidate.save(tmp_path / "a" / suite)
        baseline.save(tmp_path / "b" / suite)
    return tmp_path


def judge(runs, name="gate"):
    sides = [load_reports(runs / side, "gate") for side in ("a", "b")]
    reports = [{suite: report for suite, (_, report) in side.items()} for side in sides]
    paths = [{suite: path for suite, (path, _) in side.items()} for side in sides]
    verdict = decide(SPEC, *reports)
    save_verdict(runs / name, verdict, SPEC, *paths)
    return verdict


def test_stored_verdict_is_recomputed_bit_for_bit_without_a_model(runs):
    verdict = judge(runs)
    assert verdict.verdict is Verdict.PASS
    assert load_verdict(runs / "gate") == verdict
    assert recompute(runs / "gate") == verdict


def test_paths_are_relative_so_the_whole_run_can_move(runs, tmp_path):
    verdict = judge(runs)
    moved = tmp_path.with_name(tmp_path.name + "-moved")
    runs.rename(moved)
    assert recompute(moved / "gate") == verdict


def test_an_invalid_verdict_survives_too(runs, report):
    verdict = decide(SPEC, {}, {})
    save_verdict(runs / "gate", verdict, SPEC, {}, {})
    assert load_verdict(runs / "gate").digest == verdict.digest
    assert recompute(runs / "gate").verdict is Verdict.INVALID


def test_a_changed_item_is_found(runs):
    judge(runs)
    path = runs / "a" / "heldout" / "items.jsonl"
    path.write_text(path.read_text().replace('"scores":[0.0]', '"scores":[1.0]', 1))
    with pytest.raises(GateError, match=r"a/heldout: not a readable eval report: .*items.jsonl does not match"):
        recompute(runs / "gate")


def test_reports_exchanged_for_others_are_found(runs, binary_pair):
    judge(runs)
    binary_pair(300, 0, 1000)[0].save(runs / "a" / "heldout")
    with pytest.raises(GateError, match="not what was judged"):
        recompute(runs / "gate")


def test_a_changed_verdict_is_found(runs):
    judge(runs)
    path = runs / "gate" / "verdict.json"
    path.write_text(path.read_text().replace('"estimate": 0.15', '"estimate": 0.25'))
    with pytest.raises(GateError, match="has been changed"):
        recompute(runs / "gate")


def test_a_verdict_of_another_spec_is_found(runs):
    judge(runs)
    path = runs / "gate" / "spec.json"
    path.write_text(path.read_text().replace('"min_delta": 0.05', '"min_delta": 0.2'))
    with pytest.raises(GateError, match=r"recomputed FAIL .*, stored PASS"):
        recompute(runs / "gate")


def test_a_missing_report_is_named(runs):
    judge(runs)
    (runs / "b" / "format" / "items.jsonl").unlink()
    with pytest.raises(GateError, match="b/format: the eval report is gone"):
        recompute(runs / "gate")


def test_a_missing_verdict_says_how_to_get_one(tmp_path):
    with pytest.raises(GateError, match="no verdict here"):
        load_verdict(tmp_path)


def test_json_round_trip_keeps_the_digest(runs):
    verdict = judge(runs)
    record = json.loads(json.dumps(verdict.to_json()))
    assert from_json(record) == verdict
    assert from_json(record).digest == verdict.digest


def test_reports_are_found_by_suite_and_split(runs, binary_pair):
    from dataclasses import replace

    replace(binary_pair(0, 0, 40)[0], split="dev").save(runs / "a" / "heldout-dev")
    assert sorted(load_reports(runs / "a", "gate")) == ["format", "heldout"]
    assert list(load_reports(runs / "a" / "heldout", "gate")) == ["heldout"]
    with pytest.raises(GateError, match=r"on split 'other'.*found split dev, gate"):
        load_reports(runs / "a", "other")


def test_two_reports_on_one_suite_are_refused(runs, binary_pair):
    binary_pair(0, 0, 40)[0].save(runs / "a" / "again")
    with pytest.raises(GateError, match="both on suite 'heldout'"):
        load_reports(runs / "a", "gate")
