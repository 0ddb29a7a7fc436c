"""Weights by seed instead of from a file."""

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from posttrain.config.stages import ModelKeys
from posttrain.models.load import load_policy


def test_drawn_weights_are_those_of_the_familys_own_initialisation_in_every_process_and_leave_no_trace(keys_of):
    keys = keys_of("llama").model_copy(update={"init_seed": 3})
    torch.manual_seed(5)
    before = torch.get_rng_state()
    drawn = load_policy(keys, trainable=False).model.state_dict()
    torch.manual_seed(3)
    wanted = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(keys.base_model), dtype=torch.float32)
    assert all(torch.equal(drawn[name], value) for name, value in wanted.state_dict().items())
    torch.set_rng_state(before)
    again = load_policy(keys).model.state_dict()
    assert all(torch.equal(drawn[name], value) for name, value in again.items())
    other = load_policy(keys.model_copy(update={"init_seed": 4})).model.state_dict()
    assert not torch.equal(other["lm_head.weight"], drawn["lm_head.weight"])


def test_a_folder_without_weights_is_trained_exported_and_resumed(model_dir, train, runner, tmp_path):
    base = tmp_path / "config-only"
    base.mkdir()
    for file in model_dir("qwen3").iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, base / file.name)
    options = {"base_model": str(base), "init_seed": 3, "max_steps": 3, "save_steps": 1}
    whole = train("sft", name="whole", **options)
    record = json.loads((whole / "model" / "posttrain.json").read_text())
    assert record["drawn"]["seed"] == 3 and record["drawn"]["config_digest"].startswith("sha256:")
    train("sft", name="resumed", stop_after=1, **options)
    assert runner.rows(train("sft", name="resumed", **options))[-1] == runner.rows(whole)[-1]


@pytest.mark.parametrize(
    ("options", "words"),
    [({"adapter": "lora"}, "init_seed: 3 with adapter: lora"), ({"load_in_4bit": True}, "init_seed: 3 with load_in_4bit: true")],
)  # fmt: skip
def test_drawn_weights_that_would_stay_frozen_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        ModelKeys.model_validate({"base_model": "x", "init_seed": 3, **options})
