"""What goes into a model and what must not be missing there."""

import pytest
import torch
from torch import nn

from posttrain.distributed.whole import Whole
from posttrain.errors import ModelError


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.middle, self.head = nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


def state_of(model):
    return {name: tensor.clone() + 1 for name, tensor in model.state_dict().items()}


def test_weights_arrive_and_a_tied_name_may_be_left_out():
    model = Tied()
    state = state_of(model)
    del state["head.weight"]
    Whole().load_state(model, state)
    assert torch.equal(model.head.weight, state["embedding.weight"])
    assert torch.equal(model.middle.bias, state["middle.bias"])


def test_missing_and_unexpected_names_are_refused_by_name_and_nothing_is_loaded():
    model = Tied()
    state = state_of(model)
    before = model.embedding.weight.clone()
    del state["middle.bias"]
    state["module.middle.bias"] = torch.zeros(3)
    with pytest.raises(
        ModelError, match=r"1 of the model's 4 are missing \(middle.bias\), 1 are not .* \(module.middle.bias\)"
    ):
        Whole().load_state(model, state)
    assert torch.equal(model.embedding.weight, before)
    del state["module.middle.bias"]
    Whole().load_state(model, state, optional=["middle.bias"])
    assert torch.equal(model.embedding.weight, state["embedding.weight"])


def test_an_empty_state_is_refused():
    with pytest.raises(ModelError, match="4 of the model's 4 are missing"):
        Whole().load_state(Tied(), {})
