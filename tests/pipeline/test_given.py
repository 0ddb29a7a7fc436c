"""What a pipeline is given beside a model's folder: a tokenizer of another one, or weights by seed. Later stages start from what the first made."""

import json
import shutil

import pytest
import yaml

from posttrain.errors import ChangedInputsError, ConfigError

SFT = {"datasets": [{"path": "sft.jsonl"}], "max_steps": 1, "per_device_train_batch_size": 4}
DPO = {"datasets": [{"path": "pairs.jsonl"}], "max_steps": 1, "per_device_train_batch_size": 4}


def test_the_named_tokenizer_goes_through_all_stages_and_evals_and_is_pinned(project, model_dir):
    run = project([{"sft": SFT}, {"dpo": DPO}], tokenizer_name_or_path="./tokenizer")
    base = shutil.copytree(model_dir("qwen3"), run.folder / "base")
    tokenizer = run.folder / "tokenizer"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.move(base / name, tokenizer / name)
    run.values["base_model"] = "./base"
    assert run.run("max_steps=1").verdict is None
    assert (run.out / run.state.stages[-1].folder / "model" / "tokenizer.json").exists()
    (tokenizer / "tokenizer.json").write_text((tokenizer / "tokenizer.json").read_text() + "\n")
    with pytest.raises(ChangedInputsError, match="tokenizer"):
        run.run()


def test_weights_are_drawn_for_the_first_stage_and_for_the_score_of_the_base(project, model_dir):
    gate = {"baseline": "stage:base", "primary": [{"suite": "yes", "min_delta": 0.35}]}
    run = project([{"sft": SFT | {"init_seed": 3}}, {"dpo": DPO}], gate=gate, allow_raw_base=True)
    base = run.folder / "base"
    base.mkdir()
    for file in model_dir("qwen3").iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, base / file.name)
    run.values["base_model"] = "./base"
    assert run.run().verdict is not None, "the base was scored as well, and has no file of weights"
    first, second = (run.out / stage.folder for stage in run.state.stages)
    assert json.loads((first / "model" / "posttrain.json").read_text())["drawn"]["seed"] == 3
    assert "drawn" not in json.loads((second / "model" / "posttrain.json").read_text())
    assert yaml.safe_load((second / "config.yaml").read_text())["init_seed"] is None


def test_stages_that_name_different_tokenizers_are_refused(project, model_dir):
    run = project([{"sft": SFT}, {"dpo": DPO | {"tokenizer_name_or_path": str(model_dir("llama"))}}])
    with pytest.raises(ConfigError, match=r"stages.2.dpo.tokenizer_name_or_path: .*llama, and stage 1 has None"):
        run.run()
