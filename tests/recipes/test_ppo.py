"""PPO end to end on a tiny model: what its critic learns and leaves, and what must not change its numbers."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from posttrain.errors import TrainingError
from posttrain.recipes import ppo

ATOL = 1e-6


def close(a, b, atol=ATOL):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() <= atol, name


def test_the_policy_is_exported_alone_and_the_critic_beside_it_begins_another_stage(train, runner):
    first = train("ppo", beta=0.05)
    rows = runner.rows(first)
    assert rows[0]["critic/values/mean"] == 0.0
    assert rows[-1]["critic/vf_loss"] < rows[0]["critic/vf_loss"] / 2
    AutoModelForCausalLM.from_pretrained(first / "model")
    critic = AutoModelForSequenceClassification.from_pretrained(first / "critic")
    assert critic.config.num_labels == 1
    assert not any("score" in name for name in load_file(first / "model/model.safetensors"))
    second = runner.rows(train("ppo", value_model=str(first / "critic"), max_steps=1))[0]
    assert second["critic/values/mean"] > 0.1
    assert second["critic/vf_loss"] < rows[0]["critic/vf_loss"] / 2


@pytest.mark.parametrize("options", [{}, {"adapter": "lora", "lora_r": 4}], ids=["whole", "lora"])
def test_a_warm_up_leaves_the_policy_s_bytes(options, train, model_dir):
    folder = train("ppo", critic_warmup_steps=2, max_steps=2, **options)
    before, after = load_file(model_dir("qwen3") / "model.safetensors"), load_file(folder / "model/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    critic = load_file(folder / "critic/model.safetensors")
    assert any(not torch.equal(critic[name], tensor) for name, tensor in before.items() if name in critic)


def test_a_warm_up_chooses_no_tokens_for_a_policy_that_it_does_not_train(train, runner):
    rows = runner.rows(train("ppo", critic_warmup_steps=2, max_steps=3, top_entropy_quantile=0.3))
    assert ["entropy_threshold" in row for row in rows] == [False, False, True]


def test_after_a_warm_up_the_policy_moves(train, runner):
    rows = runner.rows(train("ppo", critic_warmup_steps=2, max_steps=3))
    assert ["update_norm" in row for row in rows] == [False, False, True]
    assert rows[-1]["importance_ratio/mean"] == 1.0


def test_an_adapter_is_trained_under_a_whole_critic(train, runner):
    folder = train("ppo", adapter="lora", lora_r=4, beta=0.05, num_iterations=2)
    assert (folder / "adapter/adapter_model.safetensors").exists()
    assert (folder / "critic/model.safetensors").exists()
    assert not (folder / "critic/adapter_config.json").exists()
    assert runner.rows(folder)[-1]["importance_ratio/mean"] != 1.0


@pytest.mark.parametrize(
    "options", [{"beta": 0.1}, {"num_iterations": 2, "steps_per_generation": 2}], ids=["kl", "twice"]
)
def test_ppo_does_not_depend_on_its_micro_batches(options, train, runner):  # fmt: skip
    options = {"learning_rate": 1e-4, "critic_learning_rate": 1e-4, "max_steps": 3, **options}
    whole, *split = (train("ppo", name=str(n), per_device_train_batch_size=n, **options) for n in (8, 3, 1))
    for folder in split:
        assert runner.losses(folder) == pytest.approx(runner.losses(whole), abs=ATOL)
        close(runner.weights(folder), runner.weights(whole), atol=5e-6)


def test_a_batch_is_trained_on_in_as_many_minibatches_and_epochs_as_asked(train, runner):
    rows = runner.rows(train("ppo", num_iterations=2, steps_per_generation=2, max_steps=8))
    assert ["reward" in row for row in rows] == [True, False, False, False] * 2
    assert [row["importance_ratio/mean"] == 1.0 for row in rows[:2]] == [True, False]


def test_a_step_whose_value_loss_is_no_number_moves_neither(train, monkeypatch):
    value, policy, before = ppo.critic_loss, ppo.loss, []

    def kept(model):
        return model, {name: p.detach().clone() for name, p in model.trainable()}

    def broken(critic, *args):
        terms = value(critic, *args)
        before.append(kept(critic))
        return type(terms)(terms.loss * (float("nan") if len(before) == 3 else 1.0), terms.metrics)

    def seen(model, *args, **options):
        before.append(kept(model))
        return policy(model, *args, **options)

    monkeypatch.setattr(ppo, "critic_loss", broken)
    monkeypatch.setattr(ppo, "loss", seen)
    with pytest.raises(TrainingError, match="not a number"):
        train("ppo", name="broken", max_steps=4, num_prompts_per_step=2, health_rollbacks=0)
    assert len(before) == 4
    for (_, first), (model, last) in zip(before[:2], before[2:], strict=True):
        assert any(not torch.equal(first[name], tensor) for name, tensor in last.items()), "a sound step moves it"
        assert all(torch.equal(last[name], p) for name, p in model.trainable())


def test_a_critic_that_explains_nothing_rings(train):
    """At a rate of nearly 0 it goes on saying 0, which explains nothing."""
    folder = train(
        "ppo", name="deaf", critic_learning_rate=1e-12, learning_rate=1e-6, max_steps=10, max_completion_length=3
    )
    events = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    found = [event for event in events if event.get("rule") == "critic_explains_nothing" and event["kind"] == "finding"]
    assert [event["step"] for event in found] == [10]


def test_episodes_are_valued_at_the_tokens_that_the_policy_sampled(train, runner, tmp_path):
    (tmp_path / "env.py").write_text("class Env:\n    def step(self, answer):\n        return 'on'\n")
    rows = runner.rows(
        train(
            "ppo",
            env=f"{tmp_path / 'env.py'}:Env",
            max_turns=2,
            num_prompts_per_step=8,
            max_completion_length=60,
            max_steps=2,
            stop=list("abcdefghijklmnopqrstuvwxyz "),
        )
    )
    assert max(row["env/turns"] for row in rows) > 1
    assert rows[-1]["critic/vf_loss"] < rows[0]["critic/vf_loss"]
