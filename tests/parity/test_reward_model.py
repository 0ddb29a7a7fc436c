"""Reward models through TRL's RewardTrainer and through our recipe, from one head."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

from posttrain.config.stages import RewardModelKeys

SHARED = {"per_device_train_batch_size": 4, "learning_rate": 1e-3}


@pytest.fixture
def model_dir(model_dir, tmp_path_factory):
    """The tiny model with a head for a reward, which both sides start from."""
    folder = tmp_path_factory.mktemp("headed")
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(model_dir(), num_labels=1, dtype=torch.float32)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_dir()).save_pretrained(folder)
    return lambda: folder


@pytest.mark.parametrize(
    ("options", "margins"),
    [
        ({}, False),
        ({"center_rewards_coefficient": 0.05}, True),
        pytest.param(
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, True, marks=pytest.mark.slow
        ),
    ],
    ids=["plain", "margins and centring", "accumulated"],
)
def test_losses_and_updates(ours, theirs, rows, assert_parity, options, margins):
    data = [{**row, "margin": 0.25 * (n % 5)} if margins else row for n, row in enumerate(rows["dpo"][:40])]
    mine = ours("reward_model", RewardModelKeys, data, **SHARED | options)
    config = {"max_length": 256, "lr_scheduler_type": "linear"} | SHARED | options
    assert_parity(mine, theirs(RewardTrainer, RewardConfig, data, **config))


def test_losses_and_updates_of_an_adapter_and_its_head(ours, theirs, rows, assert_parity):
    options = {**SHARED, "learning_rate": 5e-3, "center_rewards_coefficient": 0.05}
    mine = ours("reward_model", RewardModelKeys, rows["dpo"][:40], adapter="lora", lora_r=4, seed=42, **options)
    config = {"max_length": 256, "lr_scheduler_type": "linear"} | options
    theirs = theirs(RewardTrainer, RewardConfig, rows["dpo"][:40], lora_r=4, **config)
    assert_parity(mine, theirs)
    assert any("score" in name for name in mine.change)
