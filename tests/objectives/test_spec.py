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


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "gspo", "rloo"])
@pytest.mark.parametrize(
    "knobs", [{"delta": 1.2}, {"delta": 1.28, "epsilon_high": 0.28}, {"delta": 1.25, "epsilon_high": 0.3}]
)
def test_delta_within_the_clip_range_is_refused(loss_type, knobs):
    with pytest.raises(ConfigError, match=r"must be above 1 \+ epsilon_high = 1\.\d+; raise it"):
        PolicySpec(loss_type=loss_type, **knobs)


def test_delta_above_the_clip_range_or_without_effect_is_taken():
    assert PolicySpec(delta=1.21).delta == 1.21
    assert PolicySpec(loss_type="cispo", delta=4.0).high == 5.0
