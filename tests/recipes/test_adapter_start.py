"""`adapter_start: continue` in whole stages: the start is the reference, and a resumed stage ends where it would have."""

import math

import pytest
import torch

from posttrain.config.resolved import resolved_yaml

LORA = {"adapter": "lora", "lora_r": 4, "lora_target": ["q_proj", "v_proj"]}


@pytest.fixture
def begun(runner, model_dir, data_dir, tmp_path):
    """The model of a short SFT stage that trained an adapter."""
    keys = runner.keys_of("sft", model_dir("qwen3"), data_dir, max_steps=2, **LORA)
    runner.run_stage("sft", tmp_path / "sft", keys)
    (tmp_path / "sft/config.yaml").write_text(resolved_yaml(keys))
    return tmp_path / "sft/model"


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_a_stage_that_trains_an_adapter_on_starts_at_its_reference(kind, begun, runner, data_dir, tmp_path):
    options = {"max_steps": 2, "adapter_start": "continue", **LORA} | ({"beta": 0.1} if kind == "grpo" else {})
    runner.run_stage(kind, tmp_path / kind, runner.keys_of(kind, begun, data_dir, **options))
    first = runner.rows(tmp_path / kind)[0]
    if kind == "dpo":
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert runner.rows(tmp_path / kind)[1]["loss"] < math.log(2)
    else:
        assert first["kl"] == pytest.approx(0, abs=1e-6)


def test_a_stage_that_trains_an_adapter_on_resumes_to_the_same_weights(begun, runner, data_dir, tmp_path):
    keys = runner.keys_of("dpo", begun, data_dir, adapter_start="continue", save_steps=1, **LORA)
    runner.run_stage("dpo", tmp_path / "whole", keys)
    assert runner.run_stage("dpo", tmp_path / "parts", keys, stop_after=2) is None
    runner.run_stage("dpo", tmp_path / "parts", keys)
    assert runner.rows(tmp_path / "parts") == runner.rows(tmp_path / "whole")
    whole, parts = runner.weights(tmp_path / "whole"), runner.weights(tmp_path / "parts")
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
