"""What several processes are refused before any of them trains."""

from contextlib import nullcontext

import pytest
from tests.pipeline.conftest import stages

from posttrain.config.load_pipeline import load_pipeline
from posttrain.distributed.ranks import SingleProcess
from posttrain.errors import ConfigError
from posttrain.pipeline.processes import refuse_without_room
from posttrain.pipeline.run import run_pipeline

SFT = {"datasets": [{"path": "sft.jsonl"}], "max_steps": 1}
GRPO = {"datasets": [{"path": "prompts.jsonl"}], "reward_funcs": ["rewards.py:spread"], "max_steps": 1}


@pytest.mark.parametrize(
    ("rollout", "cards", "said"),
    [
        ({"placement": "split"}, 2, "needs 3 cards, and 2 are seen here"),
        ({"tensor_parallel_size": 4}, 2, "tensor_parallel_size: 4 on a machine of 2 cards"),
        ({"placement": "split"}, 3, ""),
        ({"placement": "split"}, 0, ""),
    ],
)
def test_servers_of_a_late_stage_without_cards_are_refused_before_the_first_is_trained(project, rollout, cards, said):
    made = project(stages(("sft", SFT), ("grpo", {**GRPO, "rollout": {"engine": "vllm_server", **rollout}})))
    keys = load_pipeline(made.path).keys
    with pytest.raises(ConfigError, match=f"stages.2.grpo: .*{said}") if said else nullcontext():
        refuse_without_room(keys, 2, cards)


class Two(SingleProcess):
    world_size = 2


@pytest.mark.parametrize(
    ("rollout", "said"),
    [
        ({"max_staleness": 1}, "rollout.max_staleness: 1 .* set rollout.max_staleness: 0"),
        ({"exact": True}, "rollout.exact: true .* set rollout.exact: false"),
        ({"engine": "vllm"}, "rollout.engine: vllm is .* set rollout.engine: vllm_server"),
    ],
)
def test_a_late_stage_that_only_one_process_can_sample_for_is_refused_before_the_first_is_trained(
    project, rollout, said
):
    made = project(stages(("sft", SFT), ("grpo", {**GRPO, "rollout": rollout})))
    with pytest.raises(ConfigError, match=rf"stages.2.grpo: {said}"):
        run_pipeline(load_pipeline(made.path).keys, Two())
    assert not made.out.exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"adapter": "lora", "gradient_checkpointing": True, "layer_offloading": True},
            "layer_offloading: true .* set layer_offloading: false",
        ),
        ({"torch_compile": True}, "torch_compile: true .* set torch_compile: false"),
        ({"optim": "paged_adamw_8bit"}, "optim: paged_adamw_8bit .* set optim: adamw or sgd"),
    ],
)
def test_a_late_stage_that_only_one_process_can_train_is_refused_before_the_first_is_trained(project, options, said):
    made = project(stages(("sft", SFT), ("grpo", {**GRPO, **options})))
    with pytest.raises(ConfigError, match=rf"stages.2.grpo: {said}"):
        run_pipeline(load_pipeline(made.path).keys, Two())
    assert not made.out.exists()
