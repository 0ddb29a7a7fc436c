import pytest

from posttrain.config import apply_changes, load_pipeline, load_stage, resolved_yaml
from posttrain.config.preference import DPOKeys
from posttrain.config.rl import GRPOKeys
from posttrain.config.stages import SFTKeys

MINIMAL = "base_model: ./base\ndatasets: [{path: sft_data.jsonl}]\n"
GRPO = MINIMAL + "reward_funcs: [rewards.py:correct]\n"


@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
def test_the_resolved_yaml_loads_to_an_equal_object(write, folder, kind):
    text = GRPO if kind == "grpo" else MINIMAL
    loaded = load_stage(kind, write(text + "adapter: qlora\nlora_target: all\nepochs: 2\nchat_template: chat.jinja\n"))
    (folder / "elsewhere").mkdir()
    again = folder / "elsewhere" / "resolved.yaml"
    again.write_text(resolved_yaml(loaded.keys))
    reloaded = load_stage(kind, again)
    assert reloaded.keys == loaded.keys
    assert set(reloaded.provenance.values()) - {"default"}
    assert resolved_yaml(reloaded.keys) == resolved_yaml(loaded.keys)


@pytest.mark.parametrize("model", [SFTKeys, DPOKeys, GRPOKeys])
def test_null_can_stand_for_unset_because_no_default_differs_from_it(model):
    nullable = [f for f in model.model_fields.values() if type(None) in getattr(f.annotation, "__args__", ())]
    assert nullable
    assert all(field.default is None for field in nullable)


def test_the_resolved_yaml_of_a_pipeline_loads_to_an_equal_object(folder, write, pipeline_text):
    text = pipeline_text + "adapter: qlora\nlearning_rate: 1e-4\n"
    keys = load_pipeline(write(text), ["evals.heldout.num_samples=3", "grpo.importance_sampling_correction=off"]).keys
    (folder / "elsewhere").mkdir()
    again = folder / "elsewhere" / "resolved.yaml"
    again.write_text(resolved_yaml(keys))
    assert load_pipeline(again).keys == keys


def test_a_changed_adapter_forgets_the_4_bits_it_implied(write, pipeline_text):
    stage = load_pipeline(write(pipeline_text + "adapter: qlora\n")).keys.stages[0].keys
    assert stage.load_in_4bit
    assert apply_changes(stage, {"adapter": "none"}).load_in_4bit is False
