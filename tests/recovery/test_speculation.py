"""A run that drafts and is stopped goes on to the bit: what it drafts from is in its checkpoint."""

import json

import pytest

OPTIONS = {"max_steps": 4, "save_steps": 2, "max_completion_length": 8, "learning_rate": 1e-4, "temperature": 0.3}


@pytest.fixture
def few_rows(data_dir, runner, tmp_path):
    """`few_rows(kind)`: few enough to come again in each step."""

    def write(kind):
        path = tmp_path / "few.jsonl"
        rows = (data_dir / f"{runner.FILES[kind]}.jsonl").read_text().splitlines(keepends=True)[:2]
        path.write_text("".join(rows))
        return [{"path": str(path)}]

    return write


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grpo", "distill", "ebft"])
def test_a_stopped_run_drafts_as_it_would_have(kind, runner, model_dir, data_dir, few_rows, tmp_path):
    options = {**OPTIONS, "datasets": few_rows(kind), "rollout": {"speculation": "suffix"}}
    keys = runner.keys_of(kind, model_dir("qwen3"), data_dir, **options)
    runner.run_stage(kind, tmp_path / "whole", keys)
    runner.run_stage(kind, tmp_path / "stopped", keys, stop_after=2)
    saved = json.loads((tmp_path / "stopped/checkpoints/step-00000002/state.json").read_text())["speculation"]
    assert len(saved) == 1 and saved[0]["store"] and saved[0]["counts"]["suffix"]
    runner.run_stage(kind, tmp_path / "stopped", keys)
    rows = runner.rows(tmp_path / "whole")
    assert runner.rows(tmp_path / "stopped") == rows
    assert all(row["speculation/tokens_per_pass"] >= 1 for row in rows)
    assert 0 < rows[-1]["speculation/acceptance_rate"] <= 1
    file = "model/model.safetensors"
    assert (tmp_path / "stopped" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
