import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from posttrain.cli.app import main
from posttrain.cli.gate import app
from posttrain.errors import ConfigError, GateError
from posttrain.evidence import EvalReport, ItemRecord, Verdict
from posttrain.gate import load_verdict
from posttrain.registry import Registry


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments, fails=False):
        result = CliRunner().invoke(app, list(arguments))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke


def save(folder, model, good, n=1000, suite="heldout", first=0):
    """`good` items right from row `first` on."""
    items = tuple(ItemRecord(f"q{row}", f"p{row}", (float(first <= row < first + good),)) for row in range(n))
    EvalReport(suite, "gate", "sha256:suite", model, "exact", items).save(folder / suite)


@pytest.fixture
def spec(tmp_path):
    (tmp_path / "gate.yaml").write_text("primary: [{suite: heldout, min_delta: 0.05}]\nalpha: 5e-2\n")
    return "--spec=gate.yaml"


@pytest.mark.parametrize(
    ("good", "first", "verdict"),
    [
        (700, 0, Verdict.PASS),
        (500, 0, Verdict.FAIL),
        (601, 0, Verdict.PASS),
        (560, 440, Verdict.INCONCLUSIVE),  # the models differ on nearly all items, far more than was planned for
    ],
)
def test_the_exit_code_is_the_verdict(run, spec, tmp_path, good, first, verdict):
    save(tmp_path / "a", "model-a", good, first=first)
    save(tmp_path / "b", "model-b", 500)
    result = run("a", "b", spec)
    assert result.exit_code == verdict.exit_code
    assert result.output.splitlines()[-1].startswith(verdict.value)
    assert "heldout" in result.output


def test_by_hand_a_gate_that_could_not_decide_is_refused_as_in_a_pipeline_and_is_no_look(run, tmp_path):
    (tmp_path / "gate.yaml").write_text("primary: [{suite: heldout, min_delta: 0.05}]\nlooks: 1\n")
    for n in (100, 1000):
        save(tmp_path / "a", "model-a", n, n)
        save(tmp_path / "b", "model-b", 0, n)
        arguments = ("a", "b", "--spec=gate.yaml", "--registry=registry")
        if n == 100:
            with pytest.raises(GateError, match=r"100 items, and min_delta 0\.05 needs 591"):
                run(*arguments)
        else:
            assert run(*arguments).exit_code == 0


def test_invalid_is_three(run, spec, tmp_path):
    save(tmp_path / "a", "same", 700)
    save(tmp_path / "b", "same", 500)
    result = run("a", "b", spec)
    assert result.exit_code == 3
    assert "candidate and baseline are the same model" in result.output


def test_the_verdict_is_written_and_recomputed(run, spec, tmp_path):
    save(tmp_path / "a", "model-a", 700)
    save(tmp_path / "b", "model-b", 500)
    first = run("a", "b", spec, "--out=out")
    assert load_verdict(tmp_path / "out").verdict is Verdict.PASS
    again = run("--recompute=out")
    assert (again.exit_code, again.output) == (0, first.output)


def test_a_split_of_new_items_renews_a_suite_whose_looks_are_spent_and_that_is_said(run, tmp_path):
    (tmp_path / "gate.yaml").write_text("primary: [{suite: heldout, min_delta: 0.05}]\nlooks: 1\n")

    def judged(candidate, suite_digest, kept):
        """`kept`: so many of the items are those of before."""
        for side, model, good in (("a", candidate, 700), ("b", "model-b", 500)):
            items = tuple(
                ItemRecord(f"q{n}", f"p{n}" if n < kept else f"{suite_digest} {n}", (float(n < good),))
                for n in range(1000)
            )
            EvalReport("heldout", "gate", suite_digest, model, "exact", items).save(tmp_path / side / "heldout")
        return run("a", "b", "--spec=gate.yaml", "--registry=registry")

    assert judged("model-a", "sha256:old", 1000).exit_code == 0
    with pytest.raises(GateError, match=r"look 2 .*: make a gate split of new items"):
        judged("model-c", "sha256:one item of before", 1)
    found = judged("model-c", "sha256:new", 0)
    assert found.exit_code == 0
    assert "suite heldout asks new items since" in found.output


def test_looks_are_counted_in_the_registry(run, tmp_path):
    (tmp_path / "gate.yaml").write_text("primary: [{suite: heldout, min_delta: 0.05}]\nlooks: 2\n")
    save(tmp_path / "b", "model-b", 500)
    with pytest.raises(GateError, match="add --registry DIR"):
        save(tmp_path / "a", "model-a", 700)
        run("a", "b", "--spec=gate.yaml")
    arguments = ("a", "b", "--spec=gate.yaml", "--registry=registry")
    assert "(alpha 0.0304)" in run(*arguments).output
    assert "(alpha 0.0304)" in run(*arguments).output
    save(tmp_path / "a", "model-c", 700)
    assert "(alpha 0.0076)" in run(*arguments, "--out=out").output
    assert run("--recompute=out").exit_code == 0
    save(tmp_path / "a", "model-d", 700)
    with pytest.raises(GateError, match="look 3"):
        run(*arguments)
    book = Registry(tmp_path / "registry")
    assert book.all_looks()[0].num_looks == 3
    book.close()


def test_wrong_usage_is_an_error_of_the_user(run, spec, tmp_path):
    with pytest.raises(GateError, match="got too little to judge"):
        run("a", spec)
    with pytest.raises(GateError, match="got no eval report on split 'gate'"):
        run("a", "b", spec)
    (tmp_path / "gate.yaml").write_text("primary: [{suite: heldout, min_dleta: 0.05}]\n")
    with pytest.raises(ConfigError, match="min_delta"):
        run("a", "b", spec)


@pytest.mark.parametrize(
    ("arguments", "code"), [(["a", "b"], 64), (["a", "b", "--nonsense"], 64), (["a", "b", "--spec=gate.yaml"], 2)]
)
def test_codes_of_the_whole_command_do_not_collide(run, spec, tmp_path, arguments, code):
    """Click's own usage error is 2, which is INCONCLUSIVE here."""
    save(tmp_path / "a", "model-a", 560, first=440)
    save(tmp_path / "b", "model-b", 500)
    with pytest.raises(SystemExit) as stopped:
        main(["gate", *arguments])
    assert stopped.value.code == code


# --- A/A ---


def suite_file(tmp_path, num_items=12):
    rows = [{"id": f"q{n}", "prompt": f"{n} + 1 =", "target": "1", "scorer": "contains"} for n in range(num_items)]
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_model_is_no_different_from_itself(run, tmp_path, model_dir):
    result = run("aa", str(model_dir("qwen3")), "--suite", str(suite_file(tmp_path)), "--times", "2")
    assert result.exit_code == 0
    assert result.stdout.count("0 of 12 items changed their score (0.00%") == 2
    assert "0 of 2 comparisons found a difference" in result.stdout
    assert EvalReport.load(tmp_path / "runs/aa/2/sums-gate").decoding["seed"] == 2


def test_a_model_that_differs_from_itself_exits_1_and_says_why(run, tmp_path, model_dir):
    command = ("aa", str(model_dir("qwen3")), "--suite", str(suite_file(tmp_path)))
    run(*command)
    report = EvalReport.load(tmp_path / "runs/aa/1/sums-gate")
    changed = [replace(item, scores=(1 - item.scores[0],)) if n == 0 else item for n, item in enumerate(report.items)]
    replace(report, items=tuple(changed)).save(tmp_path / "runs/aa/1/sums-gate")
    result = run(*command)
    assert result.exit_code == 1
    assert "greedy answers depend on what they are batched with" in result.stdout
