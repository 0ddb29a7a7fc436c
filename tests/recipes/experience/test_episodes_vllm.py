"""Episodes sampled by vLLM: what is trained on is what it sampled."""

from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make setup-vllm"),
]
ENV = Path(__file__).parents[2] / "environments" / "own_env.py"


def test_a_stage_learns_from_episodes_of_vllm(train, runner):
    folder = train(
        "grpo", env=f"{ENV}:Echo", max_completion_length=60, sequence_len=200, max_steps=2, stop=list("abcdefgh "),
        rollout={"engine": "vllm", "memory_gib": 0.2, "max_model_len": 200},
    )  # fmt: skip
    rows = runner.rows(folder)
    assert len(rows) == 2 and any(row["env/turns"] > 1 for row in rows)
    for row in rows:
        assert row["env/failed_ratio"] == 0
        # The trainer scores the sampled ids with what stood between them as vLLM did: another prefix would show here.
        assert row["sampling/sampling_logp_difference/mean"] < 0.01
