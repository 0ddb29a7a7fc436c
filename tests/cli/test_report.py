"""`posttrain report` and `posttrain diff` on run folders, through the command."""

import json

import pytest
import typer
from typer.testing import CliRunner

from posttrain.cli.diff import diff
from posttrain.cli.report import report
from posttrain.errors import DataError
from posttrain.evidence import EvalReport, ItemRecord


@pytest.fixture
def run_folder(tmp_path):
    def make(name, right=30, rate="1e-3"):
        folder = tmp_path / name
        stage = folder / "stages" / "01-sft"
        stage.mkdir(parents=True)
        (folder / "config.yaml").write_text(f"base_model: ./base\nlearning_rate: {rate}\n")
        (stage / "metrics.jsonl").write_text(
            "".join(json.dumps({"step": s, "time": 1.0, "loss": 1 / s}) + "\n" for s in (1, 2, 3))
        )
        (stage / "result.json").write_text(json.dumps({"kind": "sft", "steps": 3, "tokens": 900, "wall_s": 4.5}))
        for model, score in (("base", 10), ("01-sft", right)):
            items = tuple(ItemRecord(f"q{n}", f"p{n}", (float(n < score),)) for n in range(40))
            EvalReport("heldout", "gate", "sha256:s", model, "exact", items).save(
                folder / "evals" / model / "heldout-gate"
            )
        return folder

    return make


def _run(verb, *arguments):
    app = typer.Typer()
    app.command()(verb)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_report_writes_the_page_and_prints_the_table(run_folder):
    folder = run_folder("a")
    lines = _run(report, folder).output.splitlines()
    assert lines[1].startswith("heldout/gate  25.0 % (14.2–40.2)  75.0 % (59.8–85.8)  +50.0 (+33.6 to +66.2)")
    assert lines[-1] == f"report    {folder / 'report.html'}"
    assert "On “heldout” the score rose from 25.0 % to 75.0 %" in (folder / "report.html").read_text()


def test_report_of_something_else(tmp_path):
    with pytest.raises(DataError, match="is not a run folder"):
        _run(report, tmp_path)


def test_diff_names_the_key_and_the_score(run_folder):
    result = _run(diff, run_folder("a"), run_folder("b", right=35, rate="2e-3"))
    assert result.exit_code == 1
    assert "learning_rate  1e-3 → 2e-3" in result.output
    assert "01-sft heldout/gate  75.0 % → 87.5 %   +12.5" in result.output
    assert "metrics equal at every step" in result.output


def test_diff_of_equal_runs_exits_zero(run_folder):
    result = _run(diff, run_folder("a"), run_folder("b"))
    assert (result.exit_code, result.output.splitlines()[-1]) == (0, "No pin, key, metric or score differs.")
