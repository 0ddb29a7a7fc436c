"""A model whose layers cannot be held between ranks is refused by name before it is loaded; one that can is not."""

import pytest

from posttrain.config.sharding import ShardingKeys
from posttrain.config.stages import ModelKeys
from posttrain.errors import ModelError
from posttrain.models.load import load_config
from posttrain.models.tensor_parallel import refuse_unless_parallel, refuse_unless_shared


def _config(model_dir, architecture, **changes):
    return load_config(ModelKeys(base_model=str(model_dir(architecture, **changes))))


@pytest.mark.parametrize(
    ("architecture", "changes", "size", "says"),
    [
        ("llama", {}, 4, "it has 2 heads of keys and values; expected a number that divides them"),
        ("qwen3_moe", {"num_key_value_heads": 4, "num_experts": 2}, 4, "it has 2 experts; expected a number"),
        ("gpt2", {}, 2, "transformers has no tensor-parallel plan for gpt2"),
        ("olmoe", {}, 2, "its plan has styles that are not proven here"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
            2,
            "its rotary embeddings depend on",
        ),
    ],
)
def test_a_model_that_cannot_be_held_so_is_refused_before_it_is_loaded(architecture, changes, size, says, model_dir):
    config = _config(model_dir, architecture, **changes)
    with pytest.raises(ModelError, match=f"sharding.tensor_parallel_size: {size} with m: {says}"):
        refuse_unless_parallel("m", config, size)
    with pytest.raises(ModelError, match=f"sharding.tensor_parallel_size: {size} with m: {says}"):
        refuse_unless_shared("m", config, ShardingKeys(tensor_parallel_size=size))


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2", "qwen3_moe"])
def test_a_model_that_can_be_held_so_is_not_refused(architecture, model_dir):
    refuse_unless_shared("m", _config(model_dir, architecture), ShardingKeys(tensor_parallel_size=2))
