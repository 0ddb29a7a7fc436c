"""Mamba's mixers: their states, and the values that a backward pass keeps, against the models that transformers makes."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from posttrain.planner import ModelShape
from posttrain.planner.state_space import state_space_of

MODELS = {
    "mamba": {"state_size": 16, "use_mambapy": False},
    "falcon_mamba": {"state_size": 32, "use_mambapy": False},
    "mamba2": {"state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 32},
}


def kept_of_a_token(model, length):
    """Bytes in storages that the graph of a forward holds, without the weights, for each token and layer."""
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = model.backbone(torch.arange(length)[None] % 50, use_cache=False)[0]  # noqa: F841 - it holds the graph
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    return sum(size for place, size in kept.items() if place not in weights) / length / 2


@pytest.mark.parametrize("model_type", MODELS)
def test_what_a_backward_pass_keeps_is_about_what_a_forward_leaves(model_type):
    config = AutoConfig.for_model(model_type, vocab_size=50, hidden_size=64, num_hidden_layers=2, **MODELS[model_type])
    mixer = state_space_of(config.to_dict())
    assert mixer is not None
    norm = 3 * 64
    assert 4 * (mixer.kept_values + norm) == pytest.approx(
        kept_of_a_token(AutoModelForCausalLM.from_config(config).train(), 64), rel=0.15
    )


def test_a_sequence_leaves_as_much_however_long_it_is():
    shape = ModelShape.from_config(
        {"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 50, "state_size": 16}
    )
    # Two layers of 128 channels: 16 states, and 4 inputs of the convolution.
    assert shape.cache_bytes(10) == shape.cache_bytes(1000) == 2 * 128 * (16 + 4) * 2
    assert shape.kv_bytes_per_token() == 0
