"""What once went wrong under ranks, through the command: two processes train and export what one does."""

import pytest
from safetensors import safe_open
from tests.distributed.test_other_ranks import same_run

pytestmark = pytest.mark.slow
CASES = {
    "an adapter on 4 bits is exported": ("sft", {"adapter": "qlora", "lora_r": 4}),
    "one forward a sequence, rows that do not divide": (
        "sft",
        {"architecture": "gpt_oss", "per_device_train_batch_size": 3},
    ),
    "groups that are drawn again": (
        "grpo",
        {"dynamic_sampling": True, "reward_funcs": ["rewards.py:last_digit"], "num_prompts_per_step": 3},
    ),
    "a tied head is exported once": ("sft", {"architecture": "qwen3"}),
}


def exported(stage):
    """Names of the tensors of the model that the stage has left."""
    found = set()
    for path in (stage / "model").glob("*.safetensors"):
        with safe_open(path, "pt") as tensors:
            found |= set(tensors.keys())
    return found


@pytest.mark.parametrize("name", CASES)
def test_two_processes_do_what_one_does(name, write_yaml, torchrun, runner, data_dir, tmp_path):
    kind, options = CASES[name]
    if "reward_funcs" in options:
        options = options | {"reward_funcs": [str(data_dir / options["reward_funcs"][0])]}
    one = {"num_processes": 2} if kind == "sft" else {}
    stages = [tmp_path / folder / f"stages/01-{kind}" for folder in ("run", "alone")]
    torchrun(2, kind, write_yaml(kind, **options))
    torchrun(1, kind, write_yaml(kind, name="alone.yaml", output_dir=str(tmp_path / "alone"), **options, **one))
    same_run(runner, *stages)
    assert exported(stages[0]) == exported(stages[1]) != set()


def test_two_processes_that_draft_sample_what_one_without_drafts_does_and_go_on_to_the_bit(
    write_yaml, torchrun, killed, runner, data_dir, tmp_path
):
    stopped, straight, alone = (tmp_path / name / "stages/01-grpo" for name in ("run", "straight", "alone"))
    few = tmp_path / "few.jsonl"
    few.write_text("".join((data_dir / "prompts.jsonl").read_text().splitlines(keepends=True)[:2]))
    keys = {
        "datasets": [{"path": str(few)}], "max_completion_length": 12, "temperature": 0.3, "num_prompts_per_step": 2,
    }  # fmt: skip
    drafts = keys | {"rollout": {"speculation": "suffix"}}
    path = write_yaml("grpo", **drafts)
    killed(2, stopped, 3, "grpo", path)
    torchrun(2, "grpo", path)
    torchrun(2, "grpo", write_yaml("grpo", name="two.yaml", output_dir=str(tmp_path / "straight"), **drafts))
    torchrun(1, "grpo", write_yaml("grpo", name="one.yaml", output_dir=str(tmp_path / "alone"), **keys))
    drafted = [row["speculation/tokens_per_pass"] for row in runner.rows(straight)]
    assert max(drafted) > 1
    assert [row["speculation/tokens_per_pass"] for row in runner.rows(stopped)] == drafted
    assert runner.losses(stopped) == runner.losses(straight)
    assert runner.losses(straight) == pytest.approx(runner.losses(alone), rel=1e-4, abs=1e-5)
    weights = runner.weights(straight)
    assert all((runner.weights(stopped)[name] == tensor).all() for name, tensor in weights.items())
