"""What several processes are refused before any of them trains."""

import pytest
from tests.pipeline.conftest import stages

from posttrain.config.load_pipeline import load_pipeline
from posttrain.distributed.ranks import SingleProcess
from posttrain.errors import ConfigError
from posttrain.pipeline.run import run_pipeline

SFT = {"datasets": [{"path": "sft.jsonl"}], "max_steps": 1}
GRPO = {"datasets": [{"path": "prompts.jsonl"}], "reward_funcs": ["rewards.py:spread"], "max_steps": 1}


class Two(SingleProcess):
    world_size = 2


@pytest.mark.parametrize(
    ("rollout", "said"),
    [
        ({"max_staleness": 1}, "rollout.max_staleness: 1 .* set max_staleness: 0"),
        ({"exact": True}, "rollout.exact: true .* set exact: false"),
        ({"engine": "vllm"}, "rollout.engine: vllm is .* set engine: embedded"),
    ],
)
def test_a_late_stage_that_only_one_process_can_sample_for_is_refused_before_the_first_is_trained(
    project, rollout, said
):
    made = project(stages(("sft", SFT), ("grpo", {**GRPO, "rollout": rollout})))
    with pytest.raises(ConfigError, match=rf"stages.2.grpo: {said}"):
        run_pipeline(load_pipeline(made.path).keys, Two())
    assert not made.out.exists()


def test_a_late_stage_whose_layers_only_one_process_can_offload_is_refused_before_the_first_is_trained(project):
    offloading = {**GRPO, "adapter": "lora", "gradient_checkpointing": True, "layer_offloading": True}
    made = project(stages(("sft", SFT), ("grpo", offloading)))
    with pytest.raises(ConfigError, match=r"stages.2.grpo: layer_offloading: true .* set it to false"):
        run_pipeline(load_pipeline(made.path).keys, Two())
    assert not made.out.exists()
