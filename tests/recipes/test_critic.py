"""What a critic makes of rewards that are written down by hand, and how it is loaded."""

from functools import partial

import numpy as np
import pytest
import torch

from posttrain.data.load import load_prompts
from posttrain.distributed.ranks import SingleProcess
from posttrain.errors import ConfigError, ModelError
from posttrain.health.controls import Controls
from posttrain.models.batch import pack
from posttrain.models.load import freeze_reference, load_policy, load_tokenizer
from posttrain.models.text import decoder
from posttrain.recipes.critic import CriticCredit, load_critic, ppo_objective
from posttrain.recipes.experience.alternating import Alternating
from posttrain.recipes.experience.collector import Collector
from posttrain.recipes.experience.engines import EngineSource, make_engine
from posttrain.recipes.experience.prompts import PromptStream
from posttrain.recipes.scorers import PolicyScorer, ReferenceScorer, ValueScorer
from posttrain.rollout.collect import sample_groups
from posttrain.types import RewardBreakdown

REWARDS = [1.0, None, 0.0, 1.0, 0.5, 0.25, None, 2.0]


@pytest.fixture
def collected(runner, model_dir, data_dir):
    """`collected(**keys)`: a generation batch with the rewards `REWARDS`, and the critic that valued it."""

    def make(*, moved=0.0, beta_scale=1.0, **options):
        keys = runner.keys_of("ppo", model_dir("qwen3"), data_dir, **options)
        keys = keys.model_copy(update={"reward_funcs": ["boxed"]})
        tokenizer, ranks = load_tokenizer(keys), SingleProcess()
        policy = load_policy(keys, tokenizer=tokenizer).without_dropout()
        freeze_reference(policy)
        with torch.no_grad():
            for _, parameter in policy.trainable():
                parameter.mul_(1.0 + moved)

        def score(prompts, completions, columns):
            return [RewardBreakdown(r, {"boxed": r}) for r in REWARDS[: len(completions)]]

        critic = load_critic(keys, policy)
        with torch.no_grad():
            critic.policy.base.score.weight.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
        engine = make_engine(EngineSource(keys, policy))
        stream = PromptStream(load_prompts(keys, tokenizer), keys.seed, {})
        sampling = Alternating(keys, partial(sample_groups, engine), decoder(tokenizer), score, stream, ranks)
        scorers = (Scores(policy, keys.temperature, 4, ranks) for Scores in (PolicyScorer, ReferenceScorer))
        collector = Collector(keys, sampling, *scorers, CriticCredit(keys, critic, ranks), ranks)
        batch = collector.collect(0, None, Controls(beta_scale=beta_scale)).experience
        reference = ReferenceScorer(policy, keys.temperature, 4, ranks).logp(batch.groups)
        return batch, ValueScorer(critic.policy, 3, ranks).values(batch.groups), reference, keys

    return make


def worked_out(batch, values, references, keys, beta):
    """Whitened advantages and returns of the trained samples, token by token in numpy."""
    samples = [sample for group in batch.groups for sample in group]
    advantages, returns = [], []
    for sample, value, reference, reward in zip(samples, values, references, REWARDS, strict=True):
        if reward is None:
            continue
        paid = -beta * (sample.behavior_logp.astype(float) - reference.astype(float))
        paid[-1] += reward
        later, after = 0.0, 0.0
        row = np.zeros(len(paid))
        for t in reversed(range(len(paid))):
            later = paid[t] + keys.gamma * after - value[t] + keys.gamma * keys.gae_lambda * later
            row[t], after = later, float(value[t])
        advantages.append(row)
        returns.append(row + value)
    flat = np.concatenate(advantages)
    white = [(row - flat.mean()) / flat.std(ddof=1) for row in advantages]
    return white, returns


@pytest.mark.parametrize(
    "options",
    [{}, {"gamma": 0.9, "gae_lambda": 0.5}, {"gae_lambda": 1.0, "num_generations": 1, "num_prompts_per_step": 8}],
)
def test_the_reward_comes_at_the_last_token_and_the_kl_at_each(options, collected):  # fmt: skip
    batch, values, references, keys = collected(beta=0.2, moved=0.05, beta_scale=2.0, **options)
    trained = [sample for group in batch.groups for sample in group if sample.num_loss_tokens]
    advantages, returns = worked_out(batch, values, references, keys, beta=0.4)
    assert len(trained) == len(advantages) == 6
    for sample, advantage, wanted in zip(trained, advantages, returns, strict=True):
        assert sample.advantage.tolist() == pytest.approx(advantage.tolist(), abs=1e-5)
        assert sample.returns.tolist() == pytest.approx(wanted.tolist(), abs=1e-5)
        assert sample.ref_logp is None, "it is in the reward, so the loss needs it no more"
    assert abs(batch.metrics["kl"]) > 1e-3


def test_a_completion_that_could_not_be_scored_is_not_trained_on(collected):
    batch, *_ = collected()
    samples = [sample for group in batch.groups for sample in group]
    assert [bool(sample.num_loss_tokens) for sample in samples] == [reward is not None for reward in REWARDS]
    assert batch.metrics["frac_unscored"] == 2 / 8


def test_a_completion_that_was_cut_off_ends_there(collected):
    """Its last token is to return its reward alone: nothing that the critic might say of what would have come."""
    batch, *_ = collected(max_completion_length=3)
    assert batch.metrics["completions/clipped_ratio"] == 1.0
    samples = [sample for group in batch.groups for sample in group]
    for sample, reward in zip(samples, REWARDS, strict=True):
        if reward is not None:
            assert float(sample.returns[-1]) == pytest.approx(reward, abs=1e-6)


def test_completions_that_were_cut_off_can_be_left_out(collected):
    batch, *_ = collected(max_completion_length=3, mask_truncated_completions=True, beta=0.2)
    assert not any(sample.num_loss_tokens for group in batch.groups for sample in group)
    assert "critic/vf_explained_var" not in batch.metrics


def test_the_kl_stays_for_the_loss_where_it_is_not_in_the_reward(collected):
    batch, values, references, keys = collected(beta=0.2, kl_in_reward=False, moved=0.05)
    sample = next(s for group in batch.groups for s in group if s.num_loss_tokens)
    assert sample.ref_logp.tolist() == references[0].tolist()
    advantages, _ = worked_out(batch, values, references, keys, beta=0.0)
    assert sample.advantage.tolist() == pytest.approx(advantages[0].tolist(), abs=1e-5)


@pytest.fixture
def policy(runner, model_dir, data_dir):
    keys = runner.keys_of("ppo", model_dir("qwen3"), data_dir)
    return load_policy(keys)


def test_a_new_critic_says_0_and_is_the_policy_s_base_below(policy, runner, model_dir, data_dir):
    for options in ({}, {"adapter": "lora", "lora_r": 4}, {"adapter": "qlora", "lora_r": 4}):
        keys = runner.keys_of("ppo", model_dir("qwen3"), data_dir, **options)
        critic = load_critic(keys, policy).policy
        assert not critic.has_adapter
        ids, mask = np.arange(3, 12, dtype=np.int32), np.arange(9) > 3
        from posttrain.types import Sample

        assert critic.rewards(pack([[Sample(ids, mask)]])).tolist() == [0.0] * 5
        base = dict(policy.base.model.named_parameters())
        for name, parameter in critic.base.base_model.named_parameters():
            assert torch.equal(parameter, base[name]), name
            assert parameter.requires_grad


def test_a_critic_of_another_vocabulary_is_refused(policy, runner, model_dir, data_dir, tmp_path):
    import shutil

    other = shutil.copytree(model_dir("qwen3"), tmp_path / "other")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace("<|im_start|>", "<|start|>"))
    keys = runner.keys_of("ppo", model_dir("qwen3"), data_dir, value_model=str(other))
    with pytest.raises(ModelError, match=r"value_model: .* another vocabulary than the policy"):
        load_critic(keys, policy)


def test_what_a_critic_cannot_judge_is_refused(runner, model_dir, data_dir):
    def keys(**options):
        return runner.keys_of("ppo", model_dir("qwen3"), data_dir, **options)

    with pytest.raises(ValueError, match=r"teachers in ppo: .* use grpo or distill"):
        keys(teachers=[{"model": "start"}])
    with pytest.raises(ValueError, match="dynamic_sampling with num_generations: 1 in ppo"):
        keys(dynamic_sampling=True, num_generations=1)
    with pytest.raises(ConfigError, match=r"delta=1\.1 with epsilon_high=0\.2"):
        ppo_objective(keys(delta=1.1))
