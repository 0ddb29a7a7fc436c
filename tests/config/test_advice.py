"""Each rule of advice rings where it should, is silent where the keys follow it, and can be switched off by its name."""

import re
from pathlib import Path
from typing import get_args

import pytest

from posttrain.config import load_pipeline, load_stage
from posttrain.config.advice import ADVICE, Advised, advise
from posttrain.config.stages import TrainKeys

EXAMPLES = Path(__file__).parents[2] / "examples"
README = (EXAMPLES.parent / "README.md").read_text()
LARGE = {"num_params": 8_000_000_000, "trained_params": 40_000_000, "data_bytes": 1_000_000}
LORA = "adapter: lora\nlearning_rate: 2e-4\n"


def _rung(write, kind, lines, **sizes):
    path = write(f"base_model: ./base\ndatasets: [{{path: sft_data.jsonl}}]\n{lines}\n")
    return [one.name for one in advise(Advised(kind, load_stage(kind, path).keys, **(LARGE | sizes)))]


CASES = [
    ("lora_rate", "sft", "adapter: lora", "adapter: lora\nlearning_rate: 1e-4", {}),
    ("lora_rate", "dpo", "adapter: qlora\nlearning_rate: 2e-6", "adapter: qlora\nlearning_rate: 5e-6", {}),
    ("lora_layers", "sft", f"{LORA}lora_target: [q_proj, v_proj]", f"{LORA}lora_target: [q_proj, up_proj]", {}),
    ("lora_rank", "sft", f"{LORA}lora_r: 16", f"{LORA}lora_r: 16", {"data_bytes": 400_000_000}),
    ("lora_batch", "sft", f"{LORA}per_device_train_batch_size: 64\ngradient_accumulation_steps: 5", f"{LORA}per_device_train_batch_size: 64\ngradient_accumulation_steps: 4", {}),
    ("dpo_beta", "dpo", "beta: 0.001", "beta: 0.1", {}),
    ("dpo_beta", "dpo", "loss_type: sigmoid_norm", "loss_type: sigmoid_norm\nbeta: 5", {}),
    ("dpo_beta", "dpo", "loss_type: [sigmoid, sft]\nbeta: 0.7", "loss_type: [sigmoid, sft]\nbeta: 0.3", {}),
    ("dpo_rate", "dpo", "learning_rate: 2e-5", "learning_rate: 5e-7", {}),
    ("dpo_rate", "dpo", "adapter: lora\nlearning_rate: 2e-4", "adapter: lora\nlearning_rate: 5e-5", {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind", "rings", "silent", "sizes"), CASES)
def test_a_rule_rings_is_silent_and_is_switched_off(write, name, kind, rings, silent, sizes):
    assert _rung(write, kind, rings, **sizes) == [name]
    assert _rung(write, kind, silent) == []
    assert _rung(write, kind, f"{rings}\nadvice_off: [{name}]", **sizes) == []


def test_every_rule_has_a_case_a_source_and_a_name_that_the_key_takes():
    names = [rule.name for rule in ADVICE]
    assert set(names) == {case[0] for case in CASES}
    (taken,) = get_args(TrainKeys.model_fields["advice_off"].annotation)
    assert list(get_args(taken)) == names
    assert all(rule.source for rule in ADVICE)


def test_the_rank_that_is_proposed_holds_the_data(write):
    """400 MB are 100 M tokens of a bit each; 40 M parameters of 2 bits hold 80 Mbit at rank 16, and 160 at rank 32."""
    keys = load_stage("sft", write(f"base_model: ./base\ndatasets: [{{path: sft_data.jsonl}}]\n{LORA}")).keys
    (one,) = advise(Advised("sft", keys, **(LARGE | {"data_bytes": 400_000_000})))
    assert "80 Mbit, the data about 100; raise lora_r to 32" in one.text


def test_rates_of_tiny_models_and_sizes_that_are_not_known_are_no_matter(write):
    assert _rung(write, "sft", "adapter: lora", num_params=1_000_000) == []
    assert _rung(write, "dpo", "learning_rate: 1e-3", num_params=None) == []
    assert _rung(write, "sft", LORA, data_bytes=None) == []
    assert _rung(write, "sft", LORA, trained_params=None, data_bytes=10**12) == []


@pytest.mark.parametrize("name", ["own-model/sft.yaml", "scale/one-gpu-qlora.yaml", "scale/one-node-full-sft.yaml"])
def test_the_examples_of_one_stage_follow_the_advice(name, tmp_path):
    for data in ("train.jsonl", "data/sft.jsonl"):
        (tmp_path / data).parent.mkdir(exist_ok=True)
        (tmp_path / data).write_text("{}")
    path = tmp_path / "sft.yaml"
    path.write_text((EXAMPLES / name).read_text())
    assert list(advise(Advised("sft", load_stage("sft", path).keys, **LARGE))) == []


def test_the_readmes_stage_follows_the_advice(write):
    (text,) = [
        text for text in re.findall(r"^```yaml\n(.*?)^```", README, re.MULTILINE | re.DOTALL) if "stages:" not in text
    ]
    path = write(text)
    (path.parent / "sft_data.jsonl").touch()
    assert list(advise(Advised("sft", load_stage("sft", path).keys, **LARGE))) == []


def test_the_pipelines_of_the_examples_follow_the_advice_at_their_models_size():
    for name, sizes in (("own-model", LARGE), ("quickstart", {"num_params": 900_000, "trained_params": 900_000})):
        for stage in load_pipeline(EXAMPLES / name / "pipeline.yaml").keys.stages:
            assert list(advise(Advised(stage.kind, stage.keys, **sizes))) == []
