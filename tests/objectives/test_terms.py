from dataclasses import dataclass

import torch

from posttrain.objectives.policy import PolicySpec
from posttrain.objectives.terms import as_ratios, spec_from
from posttrain.types import Ratio


def test_ratios_are_plain_detached_numbers():
    x = torch.tensor([1.5, 2.5], requires_grad=True)
    ratios = as_ratios({"a": (x.sum(), 2.0), "b": (torch.tensor(3), torch.tensor(4))})
    assert ratios == {"a": Ratio(4.0, 2.0), "b": Ratio(3.0, 4.0)}
    assert as_ratios({}) == {}


def test_spec_reads_its_fields_from_any_configuration():
    @dataclass
    class Keys:
        loss_type: str = "grpo"
        beta: float = 0.04
        learning_rate: float = 1e-6

    spec = spec_from(PolicySpec, Keys())
    assert (spec.loss_type, spec.beta, spec.epsilon) == ("grpo", 0.04, 0.2)
