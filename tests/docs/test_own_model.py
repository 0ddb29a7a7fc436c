"""The example that people copy: its files load as they stand, and its reward pays for right answers only."""

import importlib.util
import shutil
from pathlib import Path

import pytest

from posttrain.cli.app import main
from posttrain.config.load import load_stage
from posttrain.config.load_pipeline import load_pipeline

FOLDER = Path(__file__).parents[2] / "examples" / "own-model"


@pytest.fixture
def score():
    spec = importlib.util.spec_from_file_location("own_model_rewards", FOLDER / "rewards.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda text: module.correct(["p"], [[{"role": "assistant", "content": text}]], answer=["7"])[0]


def test_the_flat_form_means_what_it_says():
    keys = load_stage("sft", FOLDER / "sft.yaml").keys
    assert (keys.adapter, keys.load_in_4bit, keys.lora_r, keys.lora_alpha, keys.sequence_len) == (
        "qlora",
        True,
        16,
        32,
        4096,
    )
    assert (keys.gradient_checkpointing, keys.bf16) == (True, True)
    assert keys.datasets[0].path == str(FOLDER / "data" / "sft.jsonl")


def test_the_pipeline_hands_the_adapter_down():
    stages = load_pipeline(FOLDER / "pipeline.yaml").keys.stages
    assert [(stage.kind, stage.keys.adapter, stage.keys.lora_target) for stage in stages] == [
        ("sft", "qlora", "all-linear"),
        ("grpo", "qlora", "all-linear"),
    ]


@pytest.mark.parametrize("text", ["Answer: 7", "12 - 5 = 7.\nAnswer: 7.", "Answer: 7\n\n"])
def test_right_answers_score(score, text):
    assert score(text) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "Answer: 8",
        "7",
        "",
        "Answer: 7\nAnswer: 8",
        "Answer: 8\nAnswer: 7",
        "Answer: 7\nNo, it is 8.",
        "```\nAnswer: 7\n```",
    ],
)
def test_wrong_answers_and_second_guesses_do_not(score, text):
    assert score(text) == 0.0


@pytest.mark.slow
def test_the_pipeline_runs_on_another_model(model_dir, tmp_path, capsys):
    """Everything but the size of the model is as it stands in the file; the reward passes its check on the way."""
    folder = shutil.copytree(FOLDER, tmp_path / "own-model")
    changes = (
        f"base_model={model_dir('qwen3')}",
        "bf16=false",
        "sft.max_steps=1",
        "grpo.max_steps=1",
        "grpo.max_completion_length=8",
    )
    with pytest.raises(SystemExit) as ended:
        main(["run", str(folder / "pipeline.yaml"), *(f"--set={change}" for change in changes)])
    assert ended.value.code == 0, capsys.readouterr().err
    assert (folder / "runs/own-model/stages/02-grpo/model/model.safetensors").exists()
    assert (folder / "runs/own-model/stages/02-grpo/adapter/adapter_config.json").exists()
