from dataclasses import dataclass, fields

import pytest
import torch

from posttrain.config.preference import DPOKeys
from posttrain.config.rl import GRPOKeys
from posttrain.objectives.advantages import AdvantageSpec
from posttrain.objectives.preference import PreferenceSpec
from posttrain.objectives.spec import PolicySpec
from posttrain.objectives.terms import as_ratios, spec_from
from posttrain.types import Ratio


def test_ratios_are_plain_detached_numbers():
    x = torch.tensor([1.5, 2.5], requires_grad=True)
    ratios = as_ratios({"a": (x.sum(), 2.0), "b": (torch.tensor(3), torch.tensor(4))})
    assert ratios == {"a": Ratio(4.0, 2.0), "b": Ratio(3.0, 4.0)}
    assert as_ratios({}) == {}


@dataclass
class _Spec:
    beta: float = 0.0
    epsilon: float = 0.2


def test_spec_reads_its_fields_from_any_configuration():
    @dataclass
    class Keys:
        epsilon: float = 0.1
        beta: float = 0.04
        learning_rate: float = 1e-6

    assert spec_from(_Spec, Keys()) == _Spec(0.04, 0.1)


def test_spec_from_refuses_a_missing_or_renamed_key():
    @dataclass
    class Renamed:
        beta: float = 0.04
        clip_range: float = 0.1

    with pytest.raises(AssertionError, match="Renamed has no epsilon, which _Spec is made from"):
        spec_from(_Spec, Renamed())


@pytest.mark.parametrize(
    ("spec", "keys"), [(PolicySpec, GRPOKeys), (AdvantageSpec, GRPOKeys), (PreferenceSpec, DPOKeys)]
)
def test_every_field_of_a_spec_is_a_key_of_its_stage(spec, keys):
    assert {field.name for field in fields(spec)} <= set(keys.model_fields)
