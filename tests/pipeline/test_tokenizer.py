"""A base without a tokenizer, and one that the pipeline names: pinned, trained and scored with, and handed on."""

import shutil

import pytest

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


def test_stages_that_name_different_tokenizers_are_refused(project, model_dir):
    run = project([{"sft": SFT}, {"dpo": DPO | {"tokenizer_name_or_path": str(model_dir("llama"))}}])
    with pytest.raises(ConfigError, match=r"stages.2.dpo.tokenizer_name_or_path: .*llama, and stage 1 has None"):
        run.run()
