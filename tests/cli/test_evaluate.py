import json
import re

import pytest

from posttrain.cli.app import main
from posttrain.cli.evaluate import table
from posttrain.evidence import EvalReport, ItemRecord


def run(*argv):
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in argv])
    return caught.value.code


def write_suite(path, count=6, split="gate", **columns):
    rows = [
        {"id": f"q{n}", "messages": [{"role": "user", "content": f"What is {n} plus 1?"}], "target": str(n + 1), "split": split, **columns}
        for n in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def suite(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_suite(tmp_path / "sums.jsonl", scorer="last_number")


def test_a_model_is_scored_and_the_table_shows_the_report(suite, model_dir, tmp_path, capsys):
    assert run("eval", model_dir("qwen3"), "--suite", suite, "--max-tokens", 3, "--out", "out") == 0
    report = EvalReport.load(tmp_path / "out" / "sums-gate")
    assert [len(item.completions) for item in report.items] == [1] * 6
    assert max(count for item in report.items for count in item.num_tokens) <= 3
    output = capsys.readouterr().out
    assert re.search(rf"^sums +gate +last_number +6 +{report.mean:.4f} +\[0\.", output, re.MULTILINE)
    assert output.splitlines()[-1] == "reports  out"


def test_what_was_measured_is_not_measured_again_unless_it_is_asked_for_otherwise(suite, model_dir, tmp_path):
    arguments = ("eval", model_dir("qwen3"), "--suite", suite, "--out", "out")
    stored = tmp_path / "out" / "sums-gate" / "report.json"
    run(*arguments, "--max-tokens", 2)
    first = stored.read_bytes()  # the time it took is in there
    run(*arguments, "--max-tokens", 2)
    assert stored.read_bytes() == first
    run(*arguments, "--max-tokens", 3)
    assert json.loads(stored.read_text())["decoding"]["max_tokens"] == 3


def test_each_model_has_a_folder_of_its_own_that_the_gate_reads(suite, model_dir, tmp_path, capsys):
    for name in ("qwen3", "llama"):
        assert run("eval", model_dir(name), "--suite", suite, "--max-tokens", 2) == 0
    ours, theirs = (line.split()[-1] for line in capsys.readouterr().out.splitlines() if line.startswith("reports"))
    (tmp_path / "gate.yaml").write_text("guards: [{suite: sums, margin: 0.9}]\n")
    assert run("gate", ours, theirs, "--spec", "gate.yaml") == 64
    assert "this gate could not decide: guard sums has 6 items" in capsys.readouterr().err


def test_pass_at_k_of_four_samples():
    """1 of 4 right: 1/4, 1 - (3 2)/(4 2) = 1/2, 1. None right: 0. Means: 1/8, 1/4, 1/2."""
    items = (ItemRecord("a", "a", (1.0, 0.0, 0.0, 0.0)), ItemRecord("b", "b", (0.0,) * 4))
    head, row = table({"sums": EvalReport("sums", "gate", "s", "m", "exact", items)}).splitlines()
    assert head.split()[-3:] == ["pass@1", "pass@2", "pass@4"]
    assert row.split()[-3:] == ["0.1250", "0.2500", "0.5000"]


def test_one_sample_or_a_graded_score_has_no_pass_at_k():
    reports = {
        "one": EvalReport("one", "gate", "s", "m", "exact", (ItemRecord("a", "a", (1.0,)),)),
        "graded": EvalReport("graded", "gate", "s", "m", "code", (ItemRecord("a", "a", (0.3, 0.5)),)),
    }
    assert "pass@" not in table(reports)


def test_wilson_is_shown_for_right_and_wrong():
    """5 of 10: centre 0.5, half-width 1.96 sqrt(0.025 + 0.0096) / 1.384 = 0.2634 (Wilson 1927)."""
    items = tuple(ItemRecord(f"{n}", f"{n}", (float(n < 5),)) for n in range(10))
    assert "[0.2366, 0.7634]" in table({"s": EvalReport("s", "gate", "s", "m", "exact", items)})


def test_several_samples_at_temperature_0_are_refused(suite, model_dir, capsys):
    assert run("eval", model_dir("qwen3"), "--suite", suite, "--num-samples", 4) == 64
    assert "num_samples=4 at temperature 0 gives the same answer 4 times" in capsys.readouterr().err


def test_samples_differ_at_a_temperature(suite, model_dir, tmp_path):
    options = ("--num-samples", 4, "--temperature", 1.0, "--max-tokens", 6, "--out", "out")
    assert run("eval", model_dir("qwen3"), "--suite", suite, *options) == 0
    report = EvalReport.load(tmp_path / "out" / "sums-gate")
    assert all(len(item.scores) == 4 for item in report.items)
    assert any(len(set(item.completions)) > 1 for item in report.items)


@pytest.fixture
def pipeline(suite, model_dir, data_dir, tmp_path):
    path = tmp_path / "pipeline.yaml"
    path.write_text(
        f"name: sums\nbase_model: {model_dir('qwen3')}\n"
        f"evals: {{ additions: {{ path: {suite}, max_tokens: 2 }} }}\n"
        f"stages: [{{ sft: {{ datasets: [{{ path: {data_dir / 'sft.jsonl'} }}] }} }}]\n"
    )
    return path


def test_a_pipeline_gives_its_suites_and_its_base(pipeline, model_dir, tmp_path, capsys):
    assert run("eval", pipeline, "--out", "out") == 0
    report = EvalReport.load(tmp_path / "out" / "additions-gate")
    assert (report.suite, report.decoding["max_tokens"]) == ("additions", 2)
    assert run("eval", pipeline, "--model", model_dir("llama"), "--out", "other") == 0
    assert EvalReport.load(tmp_path / "other" / "additions-gate").model_digest != report.model_digest
    assert f"model    {model_dir('llama')}" in capsys.readouterr().out


def test_a_single_stage_gives_its_model_and_takes_suites(suite, model_dir, data_dir, tmp_path, capsys):
    (tmp_path / "sft.yaml").write_text(
        f"base_model: {model_dir('qwen3')}\ndatasets: [{{ path: {data_dir / 'sft.jsonl'} }}]\n"
    )
    assert run("eval", "sft.yaml") == 64
    assert "sft.yaml: got no suite; add --suite FILE" in capsys.readouterr().err
    assert run("eval", "sft.yaml", "--suite", suite, "--max-tokens", 2) == 0


def test_wrong_usage_says_what_to_do(suite, model_dir, tmp_path, capsys):
    model = model_dir("qwen3")
    (tmp_path / "other").mkdir()
    twin = write_suite(tmp_path / "other" / "sums.jsonl", scorer="last_number")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    expected = {
        ("./nowhere", "--suite", suite): "./nowhere: no such folder",
        (model, "--suite", suite, "--suite", twin): "would both be suite 'sums'",
        (model, "--suite", suite, "--split", "dev"): "no items with split 'dev'; it has 6 on gate",
        (model,): "got no suite",
        (model, "--suite", suite, "--model", model): "expected a YAML first",
        (
            "./adapter",
            "--suite",
            suite,
        ): "./adapter is an adapter, not a model; merge it first: posttrain merge ./adapter",
    }
    for arguments, message in expected.items():
        assert run("eval", *arguments) == 64
        assert message in capsys.readouterr().err


def test_best_of_n_is_shown_under_a_verifier_and_a_second_grader(suite, model_dir, tmp_path, capsys):
    (tmp_path / "own.py").write_text(
        "def length(completions, **_):\n    return [float(len(c[0]['content'])) for c in completions]\n"
        "def short(completions, **_):\n    return [-float(len(c[0]['content'])) for c in completions]\n"
    )
    options = ("eval", model_dir("qwen3"), "--suite", suite, "--max-tokens", 3, "--out", "out", "--best-of", 4)
    assert run(*options, "--verifier", "own.py:length", "--grader", "own.py:short") == 0
    output = capsys.readouterr().out
    assert "best of n on sums (6 items)" in output
    assert "over-optimised: own.py:short is best at n = 1" in output
    record = json.loads((tmp_path / "out" / "best-of-sums-gate.json").read_text())
    report = EvalReport.load(tmp_path / "out" / "sums-gate")
    assert (report.decoding["num_samples"], report.decoding["temperature"]) == (4, 1.0)
    assert record["report"] == report.digest
    assert [at["n"] for at in record["curve"]] == [1, 2, 4]
    longest = [max(len(text) for text in item.completions) for item in report.items]
    assert record["curve"][-1]["verifier"] == pytest.approx(sum(longest) / 6)
    assert record["curve"][-1]["graders"]["own.py:short"] == pytest.approx(-sum(longest) / 6)
    assert run(*options) == 0  # the suite's own scorer chooses; nothing is sampled again
    assert "verifier last_number (suite)" in capsys.readouterr().out


def test_graders_of_one_file_name_are_told_apart(suite, model_dir, tmp_path, capsys):
    for folder, value in (("one", 1.0), ("two", 0.0)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "own.py").write_text(
            f"def score(completions, **_):\n    return [{value}] * len(completions)\n"
        )
    options = ("eval", model_dir("qwen3"), "--suite", suite, "--max-tokens", 3, "--out", "out", "--best-of", 2)
    assert run(*options, "--grader", "one/own.py:score", "--grader", "two/own.py:score") == 0
    record = json.loads((tmp_path / "out" / "best-of-sums-gate.json").read_text())
    graders = record["curve"][0]["graders"]
    assert (graders["one/own.py:score"], graders["two/own.py:score"]) == (1.0, 0.0)
    assert len(record["items"][0]["graders"]) == 3
    assert re.search(r"one/own.py:score, 95 % +two/own.py:score, 95 %", capsys.readouterr().out)


def test_options_of_best_of_that_do_nothing_or_name_nothing_are_refused(suite, model_dir, capsys):
    options = ("eval", model_dir("qwen3"), "--suite", suite)
    assert run(*options, "--verifier", "own.py:length") == 64
    assert "--verifier does nothing without --best-of N" in capsys.readouterr().err
    assert run(*options, "--best-of", 4, "--num-samples", 2) == 64
    assert "--num-samples 2 beside --best-of 4" in capsys.readouterr().err
    assert run(*options, "--best-of", 4, "--verifier", "own.py:length") == 64
    assert "own.py does not exist" in capsys.readouterr().err
