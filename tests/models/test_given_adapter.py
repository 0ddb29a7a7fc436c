"""`adapter_name_or_path`: an adapter of PEFT's that a stage trains on, whoever made it."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from posttrain.errors import ModelError
from posttrain.models.adapters import load_adapter
from posttrain.models.continued import base_keys
from posttrain.models.load import load_policy
from posttrain.models.slots import read_factors


@pytest.fixture
def adapter(model_dir, tmp_path):
    """A folder that PEFT wrote, of another form than our defaults."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = AutoModelForCausalLM.from_pretrained(model_dir("qwen3"), dtype=torch.float32)
    get_peft_model(model, config).save_pretrained(tmp_path / "before")
    return tmp_path / "before"


def edit(adapter, **changes):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_training_goes_on_from_the_adapter_and_what_is_exported_has_it(adapter, model_dir, train, runner):
    options = {"adapter": "lora", "lora_r": 16, "adapter_name_or_path": str(adapter), "max_steps": 3, "save_steps": 1}
    still = train("sft", name="still", **options | {"learning_rate": 1e-12})
    saved, before = (
        load_file(still / "adapter" / "adapter_model.safetensors"),
        load_file(adapter / "adapter_model.safetensors"),
    )
    assert saved.keys() == before.keys()
    assert all(torch.allclose(saved[name], before[name], atol=1e-9) for name in before)
    base = AutoModelForCausalLM.from_pretrained(model_dir("qwen3"), dtype=torch.float32)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        wanted = PeftModel.from_pretrained(base, str(adapter))(ids).logits
        found = AutoModelForCausalLM.from_pretrained(still / "model", dtype=torch.float32)(ids).logits
        total = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir("qwen3")), str(still / "adapter_total"))(ids).logits  # fmt: skip
    assert torch.allclose(found, wanted, atol=1e-4) and torch.allclose(total, wanted, atol=1e-4)
    whole = train("sft", name="whole", **options)
    train("sft", name="resumed", stop_after=1, **options)
    assert runner.rows(train("sft", name="resumed", **options))[-1] == runner.rows(whole)[-1]


def test_its_starting_values_are_the_reference(adapter, train, runner):
    rows = runner.rows(train("dpo", adapter="lora", adapter_name_or_path=str(adapter), max_steps=1))
    assert rows[0]["rewards/margins"] == 0


def test_an_adapter_of_a_stage_is_trained_on_over_the_base_it_was_made_for_alone(train, model_dir, keys_of):
    stage = train("sft", adapter="lora", max_steps=1)
    keys = keys_of("qwen3", adapter="lora", adapter_name_or_path=str(stage / "adapter"))
    assert load_policy(keys).has_adapter
    with pytest.raises(ModelError, match="was trained on a base with digest"):
        load_policy(keys.model_copy(update={"base_model": str(model_dir("qwen3", num_hidden_layers=3))}))
    with pytest.raises(ModelError, match="was trained on a base in its own precision; set adapter: lora"):
        load_policy(keys.model_copy(update={"adapter": "qlora", "load_in_4bit": True}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "is an adapter of the kind IA3; expected LORA"),
        ({"init_lora_weights": "pissa"}, "began as pissa, which moves a part of the base into the adapter"),
    ],
)
def test_what_is_no_lora_on_this_base_is_refused(changes, words, adapter, keys_of):
    edit(adapter, **changes)
    with pytest.raises(ModelError, match=words):
        load_policy(keys_of("qwen3", adapter="lora", adapter_name_or_path=str(adapter)))


def test_a_folder_that_is_none_and_weights_that_do_not_fit_are_refused(adapter, keys_of, tmp_path):
    with pytest.raises(ModelError, match=r"has no adapter_config.json with adapter_model.safetensors beside it"):
        load_policy(keys_of("qwen3", adapter="lora", adapter_name_or_path=str(tmp_path)))
    edit(adapter, r=4)
    with pytest.raises(ModelError, match="does not fit its base"):
        load_policy(keys_of("qwen3", adapter="lora", adapter_name_or_path=str(adapter)))


def test_another_name_of_the_base_is_said(adapter, keys_of, caplog):
    edit(adapter, base_model_name_or_path="someone/other-model")
    load_policy(keys_of("qwen3", adapter="lora", adapter_name_or_path=str(adapter)))
    assert "names someone/other-model as its base" in caplog.text


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_damaged_file_is_named_wherever_an_adapter_is_read(file, adapter, model_dir, keys_of):
    (adapter / file).write_bytes((adapter / file).read_bytes()[:-30])
    with pytest.raises(ModelError, match=f"{file} cannot be read"):
        base_keys(keys_of("qwen3", adapter="lora", adapter_name_or_path=str(adapter)))
    with pytest.raises(ModelError, match=f"{file} cannot be read"):
        load_adapter(AutoModelForCausalLM.from_pretrained(model_dir("qwen3")), adapter)
    with pytest.raises(ModelError, match=f"{file} cannot be read"):
        read_factors(adapter)
