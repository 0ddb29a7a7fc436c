import pytest

from posttrain.config.explain import all_keys, explain, groups
from posttrain.config.schema import ForeignName, keys_of
from posttrain.errors import ConfigError


def test_a_key_with_a_default_of_its_own_per_stage():
    explanation = explain("learning_rate")
    assert explanation.meaning == "Peak learning rate."
    assert explanation.type == "a number (> 0)"
    assert explanation.defaults == {
        "sft": "2e-5",
        "dpo": "1e-6",
        "reward_model": "1e-5",
        "process_reward_model": "1e-5",
        "grpo": "1e-6",
        "ppo": "1e-6",
        "online_dpo": "1e-6",
        "distill": "2e-5",
        "ebft": "1e-6",
    }
    assert explanation.stages == (
        "sft",
        "dpo",
        "reward_model",
        "process_reward_model",
        "grpo",
        "ppo",
        "online_dpo",
        "distill",
        "ebft",
    )
    assert ForeignName("lr") in explanation.also


def test_another_tools_name_leads_to_ours():
    explanation = explain("cutoff_len")
    assert (explanation.key, explanation.asked) == ("sequence_len", "cutoff_len")
    assert ForeignName("cutoff_len", ("LLaMA-Factory",)) in explanation.also


def test_a_name_with_two_meanings_has_two_uses():
    assert {use.places for use in explain("path").uses} == {("datasets",), ("evals",)}
    assert {use.places for use in explain("loss_type").uses} == {
        ("sft",),
        ("dpo", "online_dpo"),
        ("grpo",),
        ("distill",),
        ("ebft",),
    }


@pytest.mark.parametrize(
    ("key", "places"), [("gate.alpha", ("gate",)), ("gate.guards.margin", ("gate.guards",)), ("evals.path", ("evals",))]
)
def test_a_place_narrows_it_down(key, places):
    assert [use.places for use in explain(key).uses] == [places]


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("lerning_rate", "lerning_rate: no such key; did you mean learning_rate?"),
        ("zzz", "zzz: no such key; `posttrain explain` without a key lists them all"),
        ("gate.lora_r", "gate.lora_r: no such key"),
        ("relora", "relora: a key of Axolotl without a counterpart here; ReLoRA merges the adapter while it trains"),
    ],
)
def test_an_unknown_key_names_the_nearest(key, expected):
    with pytest.raises(ConfigError) as caught:
        explain(key)
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize("place", groups())
def test_every_key_of_every_place_is_explained(place):
    assert all_keys()[place] == tuple(keys_of(groups()[place]))
    for name in all_keys()[place]:
        explanation = explain(f"{place}.{name}")
        assert explanation.meaning
        assert place in explanation.defaults
