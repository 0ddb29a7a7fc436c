import json

import pytest
from typer.testing import CliRunner

from posttrain.cli.rewards import rewards
from posttrain.errors import ConfigError, DataError
from posttrain.rewards.certificate import Certificate


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    rows = [{"prompt": f"What is {i} and 3?", "answer": str(i + 3)} for i in range(8)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rewards.py").write_text(
        "def naive(completions, answer): return [float(a in c) for c, a in zip(completions, answer)]"
    )

    def invoke(reward, *arguments):
        (tmp_path / "rl.yaml").write_text(
            f"base_model: ./base\ndatasets: [{{path: p.jsonl, type: prompt}}]\nreward_funcs: [{reward}]\n"
        )
        result = CliRunner().invoke(rewards, ["check", "rl.yaml", "--cases", "4", *arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke


def test_check_prints_a_table_and_writes_the_certificate(run, tmp_path):
    samples = [{"index": 0, "completion": r"\boxed{9}"}, {"prompt": "What is 2 and 3?", "completion": r"\boxed{5}"}]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    result = run("boxed", "--samples", "s.jsonl")
    assert result.exit_code == 0, result.output
    assert "lists and hedges" in result.output and "verdict: pass" in result.output
    certificate = Certificate.from_json(json.loads((tmp_path / "runs/rl/certificate.json").read_text()))
    assert certificate.verdict == "pass" and certificate.config["num_samples"] == 2
    assert certificate.measures["num_natural_wrong"] == 1


def test_a_bad_reward_exits_with_one(run, tmp_path):
    result = run("rewards.py:naive", "--out", "here.json")
    assert result.exit_code == 1
    assert "failed: denial" in result.output and "verdict: fail" in result.output
    assert json.loads((tmp_path / "here.json").read_text())["verdict"] == "fail"


def test_of_a_pipeline_the_stage_that_has_rewards_is_checked(run, tmp_path):
    stage = "{ datasets: [{ path: p.jsonl, type: prompt }], reward_funcs: [boxed] }"
    sft = "{ datasets: [{ path: p.jsonl, type: completion }] }"
    head = "name: two\nbase_model: ./base\nstages:\n"
    (tmp_path / "pipeline.yaml").write_text(f"{head}  - sft: {sft}\n  - grpo: {stage}\n")
    result = CliRunner().invoke(rewards, ["check", "pipeline.yaml", "--cases", "4"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "runs/two/certificate.json").exists()
    for stages, number in ((f"  - sft: {sft}\n", 0), (f"  - grpo: {stage}\n" * 2, 2)):
        (tmp_path / "pipeline.yaml").write_text(head + stages)
        refused = CliRunner().invoke(rewards, ["check", "pipeline.yaml"]).exception
        assert isinstance(refused, ConfigError) and f"{number} of its" in str(refused)


def test_what_is_wrong_with_the_input_is_said(run, tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'boxed'"):
        run("boxd")
    with pytest.raises(DataError, match=r"no\.jsonl: no such file"):
        run("boxed", "--samples", "no.jsonl")
    (tmp_path / "s.jsonl").write_text('{"completion": "x"}\n')
    with pytest.raises(DataError, match=r"s\.jsonl:1: expected \{index or prompt, completion\}"):
        run("boxed", "--samples", "s.jsonl")
    (tmp_path / "s.jsonl").write_text('{"index": 99, "completion": "x"}\n')
    with pytest.raises(DataError, match="belongs to any of the 4 prompts"):
        run("boxed", "--samples", "s.jsonl")
