import pytest
from typer.testing import CliRunner

from posttrain.cli.app import app

runner = CliRunner()


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (
            "learning_rate",
            [
                "Peak learning rate.",
                "2e-5 (sft), 1e-6 (dpo), 1e-5 (reward_model), 1e-5",
                "(process_reward_model), 1e-6 (grpo)",
                "a number (> 0)",
                "lr",
            ],
        ),
        ("cutoff_len", ["sequence_len", "asked as cutoff_len", "LLaMA-Factory", "2048"]),
        ("gate.alpha", ["0.05", "gate"]),
        ("num_generations", ["Completions per prompt (G).", "grpo", "8"]),
    ],
)
def test_a_key_is_explained(key, expected):
    result = runner.invoke(app, ["explain", key])
    assert result.exit_code == 0
    for text in expected:
        assert text in result.output


def test_without_a_key_all_are_listed():
    output = runner.invoke(app, ["explain"]).output
    assert "num_generations" in output
    assert "gate.on_fail" in output
