import pytest

from posttrain.errors import ConfigError
from posttrain.objectives.spec import PolicySpec


def test_upper_range_defaults():
    assert PolicySpec(epsilon=0.3).high == 0.3
    assert PolicySpec(epsilon=0.3, epsilon_high=0.4).high == 0.4
    assert PolicySpec(loss_type="cispo").high == 5.0


def test_cispo_with_a_clip_range_instead_of_a_cap_is_refused():
    with pytest.raises(ConfigError, match=r"epsilon_high=0.28.*caps the ratio itself.*5.0 is usual"):
        PolicySpec(loss_type="cispo", epsilon_high=0.28)


def test_luspo_on_token_ratios_is_refused():
    with pytest.raises(ConfigError, match="importance_sampling_level: sequence"):
        PolicySpec(loss_type="luspo")
    assert PolicySpec(loss_type="luspo", importance_sampling_level="sequence").beta == 0
