"""Files of other tools with keys dropped, doubled in another form, or of another type: imported or refused, never a crash."""

import json
import random
import re

import pytest
import yaml

from posttrain.config.importers.convert import import_file
from posttrain.errors import ConfigError

AXOLOTL = {
    "base_model": "a/b", "adapter": "qlora", "load_in_4bit": True, "lora_target_modules": ["q_proj"], "lora_target_parameters": ["experts.gate_up_proj"],
    "chat_template": "falcon_h1", "special_tokens": {"pad_token": "<pad>"}, "val_set_size": 0.1, "sequence_len": 64, "batch_size": 8, "micro_batch_size": 2,
    "datasets": [{"path": "c/d", "type": "chat_template", "field_messages": "talk", "message_property_mappings": {"role": "from", "content": "value"},
                  "roles_to_train": ["assistant"], "train_on_eos": "turn", "field_thinking": "thinking", "split": "train[:10%]"}],
    "optimizer": "adamw_torch", "lr_scheduler": "cosine", "learning_rate": 1e-4, "warmup_ratio": 0.1, "evals_per_epoch": 2, "plugins": [], "wandb_project": "x",
}  # fmt: skip
PAIRS = {**AXOLOTL, "rl": "dpo", "dpo_loss_type": ["sigmoid"], "datasets": [{"path": "c/d", "type": "chatml.intel"}]}
OWN = {**PAIRS, "rl": "kto", "datasets": [{"path": "c/d", "type": {"field_prompt": "q", "prompt_format": "{prompt}:", "completion_format": "{completion}!"}}]}  # fmt: skip
LLAMAFACTORY = {
    "model_name_or_path": "a/b", "stage": "sft", "finetuning_type": "lora", "lora_target": "all", "template": "llama3", "default_system": "Be brief.", "dataset": "mine,calls",
    "cutoff_len": 64, "max_samples": 5, "mix_strategy": "concat", "quantization_bit": 4, "enable_thinking": True, "learning_rate": 1e-4, "warmup_ratio": 0.1, "eval_dataset": "mine",
}  # fmt: skip
FILES = {"axolotl": AXOLOTL, "axolotl pairs": PAIRS, "axolotl own": OWN, "llamafactory": LLAMAFACTORY, "llamafactory kto": {**LLAMAFACTORY, "stage": "kto", "dataset": "good"}}  # fmt: skip
INFO = {
    "mine": {"file_name": "mine.json", "columns": {"prompt": "q", "response": "a"}},
    "calls": {"file_name": "mine.json", "formatting": "sharegpt", "columns": {"tools": "tools"}, "tags": {"role_tag": "role"}},
    "good": {"file_name": "mine.json", "columns": {"prompt": "q", "response": "a", "kto_tag": "good"}},
}  # fmt: skip
ODD = [None, True, False, 0, -1, 1.5, float("nan"), "", "abc", "1e400", [], [1], {}, {"a": 1}, [{"path": 3}], [None]]
_NAMED = re.compile(r"^.+: .*(;|, expected|: the file|missing|not a \w+ configuration here:).*$")
"""A key or the file, and what to do; or a line over those of our own loader."""


def damaged(value, chance, is_root=False):
    """`value` with one thing inside it changed; what is no mapping, or an inner one, may become anything."""
    if isinstance(value, dict) and value and (is_root or chance.random() < 0.9):
        key, changed = chance.choice(list(value)), dict(value)
        if chance.random() < 0.3:
            del changed[key]
        else:
            changed[key] = damaged(changed[key], chance)
        return changed
    if isinstance(value, list) and value and chance.random() < 0.8:
        place = chance.randrange(len(value))
        return [*value[:place], damaged(value[place], chance), *value[place + chance.randint(0, 1) :]]
    return chance.choice(ODD)


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_imported_or_refused_by_name(name, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.json").write_text("[]")
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(INFO))
    chance = random.Random(name)
    for _ in range(40):
        broken = FILES[name]
        for _ in range(chance.randint(1, 2)):
            broken = damaged(broken, chance, is_root=True)
        (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(broken))
        try:
            import_file(tmp_path / "theirs.yaml", tmp_path / "ours.yaml", name.split()[0])
        except ConfigError as error:
            assert all(_NAMED.match(line) for line in str(error).splitlines() if not line.startswith("  ")), error
        except Exception as error:
            raise AssertionError(f"{type(error).__name__} for {broken}") from error


def test_two_keys_of_a_wrong_form_are_both_named(tmp_path):
    (tmp_path / "theirs.yaml").write_text(
        yaml.safe_dump({**AXOLOTL, "lora_target_parameters": 3, "special_tokens": [1]})
    )
    with pytest.raises(ConfigError) as caught:
        import_file(tmp_path / "theirs.yaml", None, "axolotl")
    for key in ("lora_target_parameters: 3", "special_tokens: [1]"):
        assert f"{key} has a form that is not known here; write it as the tool's docs do" in str(caught.value)
