"""Presets: what a recipe writes where the configuration says nothing, and that a key which is written stands."""

import pytest

from posttrain.config import load_stage, resolved_yaml
from posttrain.config.load_pipeline import load_pipeline
from posttrain.config.rl import PRESETS, GRPOKeys
from posttrain.config.schema import keys_of
from posttrain.errors import ConfigError

GRPO = "base_model: ./base\ndatasets: [{path: sft_data.jsonl}]\nreward_funcs: [rewards.py:correct]\n"


def test_scalerl_is_the_recipe_of_its_paper(write):
    loaded = load_stage("grpo", write(GRPO + "preset: scalerl\n"))
    keys = loaded.keys
    assert isinstance(keys, GRPOKeys)
    assert (keys.loss_type, keys.loss_reduction, keys.scale_rewards) == ("cispo", "prompt_mean_of_token_mean", "batch")
    assert keys.zero_variance_filtering and keys.cast_lm_head_to_fp32 and keys.no_resampling_pass_rate == 0.9
    assert keys.rollout.max_staleness == 8 and keys.rollout.engine == "embedded"
    assert (keys.importance_sampling_correction, keys.allow_uncorrected, keys.beta) == ("off", True, 0.0)
    came = {key for key, origin in loaded.provenance.items() if origin == "preset scalerl"}
    assert came == (PRESETS["scalerl"].keys() - {"rollout"}) | {"rollout.max_staleness"}
    assert loaded.notes == ()


def test_what_is_written_stands(write):
    text = GRPO + "preset: scalerl\nscale_rewards: none\nrollout: {exact: false}\n"
    loaded = load_stage("grpo", write(text), ["no_resampling_pass_rate=0.5", "rollout.max_staleness=0"])
    keys = loaded.keys
    assert isinstance(keys, GRPOKeys)
    assert (keys.scale_rewards, keys.no_resampling_pass_rate, keys.rollout.max_staleness) == ("none", 0.5, 0)
    assert keys.loss_type == "cispo"
    origins = loaded.provenance
    assert "preset scalerl" not in {
        origins["scale_rewards"],
        origins["no_resampling_pass_rate"],
        origins["rollout.max_staleness"],
    }


def test_the_resolved_yaml_says_all_of_it_and_loads_to_the_same(write, folder):
    loaded = load_stage("grpo", write(GRPO + "preset: scalerl\nloss_reduction: token_mean\n"))
    path = folder / "resolved.yaml"
    path.write_text(resolved_yaml(loaded.keys))
    assert load_stage("grpo", path).keys == loaded.keys


def test_a_stage_of_a_pipeline_has_it_too(write):
    body = "    datasets: [{path: sft_data.jsonl}]\n    reward_funcs: [rewards.py:correct]\n    preset: scalerl\n"
    loaded = load_pipeline(write(f"name: one\nbase_model: ./base\nstages:\n- grpo:\n{body}"))
    (stage,) = loaded.keys.stages
    assert isinstance(stage.keys, GRPOKeys) and stage.keys.loss_type == "cispo"
    assert loaded.provenance["stages.1.loss_type"] == "preset scalerl"


def test_a_preset_that_there_is_not_is_refused(write):
    with pytest.raises(ConfigError, match="preset: got 'scalelr', expected"):
        load_stage("grpo", write(GRPO + "preset: scalelr\n"))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_names_keys(name):
    assert PRESETS[name].keys() <= keys_of(GRPOKeys).keys()
