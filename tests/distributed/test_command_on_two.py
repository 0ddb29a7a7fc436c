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
