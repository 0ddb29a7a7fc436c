"""Supervised rows inside RL: a stream of its own beside the rollouts."""

import pytest
import torch

from posttrain.config.datasets import DatasetKeys
from posttrain.data.load import load_sft
from posttrain.distributed.ranks import SingleProcess
from posttrain.models.load import load_policy, load_tokenizer
from posttrain.recipes.batches import in_their_order
from posttrain.recipes.ptx import PtxRows, ptx_loss, ptx_norm


@pytest.fixture
def made(runner, model_dir, data_dir):
    sources = [DatasetKeys(path=str(data_dir / "sft.jsonl"))]
    keys = runner.keys_of("grpo", model_dir("llama"), data_dir, ptx_rows_per_step=5, per_device_train_batch_size=2)
    keys = keys.model_copy(update={"ptx_datasets": sources})
    tokenizer = load_tokenizer(keys)
    policy = load_policy(keys, tokenizer=tokenizer).without_dropout()
    return keys, policy, PtxRows(load_sft(keys, tokenizer, sources=sources), keys)


def gradient(policy, batches, norm, coef):
    policy.model.zero_grad()
    loss = 0.0
    for rows in batches:
        terms = ptx_loss(policy, rows, norm, coef)
        terms.loss.backward()
        loss += float(terms.loss)
    return loss, torch.cat([p.grad.flatten() for _, p in policy.trainable() if p.grad is not None])


def test_a_steps_rows_follow_from_its_number_and_pass_through_the_data(made):
    _, _, ptx = made
    twelve = [row.origin for step in range(12) for row in ptx.of_step(step)]
    assert len(set(twelve)) == 12 and all(twelve.count(row) == 5 for row in twelve)
    assert [row.origin for row in ptx.of_step(7)] == twelve[35:40]


def test_the_loss_is_the_weighted_mean_over_the_steps_own_tokens(made):
    """By hand: transformers' log-probs of the trained tokens, their mean, times the weight."""
    keys, policy, ptx = made
    rows = ptx.of_step(0)
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            logp = policy.model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0].double().log_softmax(-1)
            trained = [t for t in range(1, len(row.ids)) if row.loss_mask[t]]
            total += sum(float(logp[t - 1, row.ids[t]]) for t in trained)
            count += len(trained)
    micros = [micro.rows for micro in in_their_order(rows, keys.per_device_train_batch_size, SingleProcess())]
    assert [len(micro) for micro in micros] == [2, 2, 1]
    loss, whole = gradient(policy, micros, ptx_norm(rows), 0.5)
    assert loss == pytest.approx(-0.5 * total / count, rel=1e-6)
    _, at_once = gradient(policy, [rows], ptx_norm(rows), 0.5)
    assert float((whole - at_once).abs().max()) < 1e-6


def test_the_rollouts_gradient_does_not_move_when_supervised_tokens_are_added(train, runner, data_dir):
    """With a weight of 0 the run is the run without them, whatever rows are read beside."""
    plain = train("grpo", name="plain", max_steps=2)
    beside = {"ptx_datasets": [{"path": str(data_dir / "sft.jsonl")}], "max_steps": 2}
    with_rows = train("grpo", name="with", ptx_coef=0.0, **beside)
    assert all(torch.equal(runner.weights(plain)[name], w) for name, w in runner.weights(with_rows).items())
    pulled = train("grpo", name="pulled", ptx_coef=1.0, **beside)
    assert runner.rows(pulled)[0]["ptx_loss"] == runner.rows(with_rows)[0]["ptx_loss"]
    assert any(not torch.equal(runner.weights(plain)[name], w) for name, w in runner.weights(pulled).items())


def test_a_step_without_spread_still_learns_the_supervised_rows(train, runner, data_dir):
    rows = [{"path": str(data_dir / "sft.jsonl")}]
    folder = train("grpo", reward_funcs=["constant"], ptx_datasets=rows, ptx_coef=1.0, max_steps=2)
    assert all("empty_step" not in row and row["grad_norm"] > 0 for row in runner.rows(folder))
