"""RL with verifiable rewards: GRPO and its family. Read `run` from top to bottom.

A generation batch of P prompts × G completions is sampled and scored, then trained on in `steps_per_generation`
optimizer steps, `num_iterations` times over. Which member of the family it is, is a row of `POLICY_LOSSES`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from posttrain.config.rl import GRPOKeys
from posttrain.data.dataset import Dataset
from posttrain.data.held_out import load_with_held_out
from posttrain.data.load import load_prompts, load_sft
from posttrain.models.batch import pack
from posttrain.models.load import freeze_reference, load_policy, load_tokenizer
from posttrain.models.policy import Policy
from posttrain.models.text import decoder
from posttrain.models.trie import TrieNode, shared_segments
from posttrain.objectives.policy import PolicyInputs, policy_loss
from posttrain.objectives.ratios import bounded_exp
from posttrain.objectives.reduce import Normalizer
from posttrain.objectives.spec import PolicySpec
from posttrain.objectives.terms import LossTerms, spec_from
from posttrain.protocols import Engine, Ranks
from posttrain.recipes.balance import deal, tree_cost
from posttrain.recipes.batches import MicroBatch, fill_with_groups, split_groups
from posttrain.recipes.collector import Collected, Collector, teaches
from posttrain.recipes.engines import EngineSource, greedy, make_engine, sampling_params, sync_engine
from posttrain.recipes.episodes import environment_of, sampler
from posttrain.recipes.learned import reward_pool
from posttrain.recipes.live_checks import LiveChecks
from posttrain.recipes.metrics import StepMetrics
from posttrain.recipes.optim import accumulating, learning_rate, make_optimizer, update
from posttrain.recipes.prompts import PromptStream
from posttrain.recipes.ptx import PtxRows, ptx_loss, ptx_micro_batches, ptx_norm
from posttrain.recipes.replay import ReplayedRewards
from posttrain.recipes.run_folder import StageResult
from posttrain.recipes.scorers import PolicyScorer, ReferenceScorer
from posttrain.recipes.source import ExperienceSource, make_sampling
from posttrain.recipes.stage import Stage
from posttrain.recipes.steering import steered
from posttrain.recipes.teachers import Teachers
from posttrain.recipes.train_state import TrainState
from posttrain.recipes.validate import SuiteScore, Validation
from posttrain.rewards.workers import MAX_UNSCORED
from posttrain.rollout.collect import SampleGroups, ScoreRewards, score_groups
from posttrain.rollout.experience import Group
from posttrain.types import Decode, PromptRow, Ratio, Sample

EMPTY_STEP = "empty_step"
"""Logged in place of a loss where a step had nothing to learn from."""


def run(keys: GRPOKeys, stage: Stage) -> StageResult:
    """Train `keys.base_model` on the prompts in `keys.datasets`; the result is in `stage.folder`."""
    ranks, spec = stage.ranks, spec_from(PolicySpec, keys)
    tokenizer = load_tokenizer(keys)
    environment = stage.until_done(environment_of(keys))
    data, held_out = load_with_held_out(partial(load_prompts, tools=environment.tools), keys, tokenizer)
    ptx = PtxRows(load_sft(keys, tokenizer, sources=keys.ptx_datasets), keys) if keys.ptx_datasets else None
    stage.run.describe_data(decoder(tokenizer, special=True), data, *held_out.values())
    decode = decoder(tokenizer)
    policy = load_policy(keys, tokenizer=tokenizer, sharding=stage.sharding, exact=keys.rollout.exact).without_dropout()
    if keys.holds_reference:
        freeze_reference(policy)
    teachers = Teachers.of(keys.teachers, keys, policy, ranks)
    if keys.teachers:
        teachers.check(data, keys.sequence_len - keys.max_completion_length)
    engine = stage.until_done(make_engine(
        EngineSource(keys, policy), keys=keys.rollout, rows=keys.rollout_batch_size, folder=stage.folder, ranks=stage.processes
    ))  # fmt: skip
    sample, episodes = sampler(environment, engine, tokenizer, stage.processes, keys)
    suite = SuiteScore.of(policy, keys, stage.processes, engine, episodes)
    optimizer = make_optimizer(policy, keys)

    # Of samples of older weights that nobody scored again only the sampler's log-probs are known.
    is_uncorrected = keys.rollout.max_staleness > 0 and keys.importance_sampling_correction == "off"
    total_steps = _total_steps(keys, len(data))
    state = stage.resume(policy, optimizer, total_steps)

    with ExitStack() as open_parts:
        rewards = open_parts.enter_context(reward_pool(keys))
        score = ReplayedRewards(stage, partial(rewards.score, max_unscored=MAX_UNSCORED), state)
        prompts = PromptStream(data, keys.seed, state.solved)
        made = make_sampling(keys, stage, state, engine, decode, rewards, score, prompts, sample)
        sampling = open_parts.enter_context(closing(made))
        how = (keys.temperature, keys.per_device_train_batch_size, ranks)
        trainer, reference = PolicyScorer(policy, *how), ReferenceScorer(policy, *how)
        collector = Collector(keys, sampling, trainer, reference, teachers, ranks)
        watch = partial(_watch, stage, LiveChecks(keys, stage, rewards, sample, tokenizer, data))
        source = ExperienceSource(keys, stage, state, engine, collector, watch, total_steps)
        validate = partial(_validate, engine, sample, decode, score, keys, state)
        validation = Validation(stage, state, held_out, validate, suite)

        for step, experience, position, rollout_s in source:
            fresh = position == 0
            groups = experience.part(position % keys.steps_per_generation, keys.steps_per_generation)
            norm, objective = _normalizer(groups, keys), steered(spec, stage.guard.controls)
            metrics = StepMetrics()
            micros = _micro_batches(groups, objective, keys, ranks)
            supervised = ptx.of_step(step) if ptx else []
            policy.model.train()
            for micro in accumulating(policy, micros, more=bool(supervised)):
                # The first step of a batch is on-policy: the ratio is 1 by definition, not by subtraction.
                terms = loss(policy, micro.rows, objective, norm, keys, on_policy=fresh and not is_uncorrected)
                micro.backward(terms.loss)
                if not micro.idle:
                    metrics.add(terms.metrics)
                    metrics.add_share("loss", float(terms.loss.detach()))
            for micro in accumulating(policy, ptx_micro_batches(supervised, keys, ranks)):
                terms = ptx_loss(policy, micro.rows, ptx_norm(supervised), keys.ptx_coef)
                micro.backward(terms.loss)
                metrics.add({} if micro.idle else terms.metrics)
            values = metrics.reduced(ranks) | (experience.metrics if fresh else {})
            if micros or supervised:
                lr = learning_rate(step, total_steps, keys) * stage.guard.controls.lr_scale
                values |= update(policy, optimizer, stage, lr, values, step + 1)
                state.tokens += _num_tokens(group for group in groups if teaches(group, objective, keys))
            else:
                # Nothing had a difference in reward: nothing moves, not even by AdamW's momentum.
                values[EMPTY_STEP] = 1.0
                state.empty_steps += 1

            state.step = step + 1
            values |= stage.times(rollout_s=rollout_s)
            values |= validation.if_due(state.step, total_steps)
            best = validation.best_score(state.step)
            stage.finish_step(state, values, state.step == total_steps, best)

        validation.restore_best()
    return stage.done(state)


def loss(
    policy: Policy, groups: Sequence[Group], spec: PolicySpec, norm: Normalizer, keys: GRPOKeys, *, on_policy: bool
) -> LossTerms:
    """This micro-batch's share of the step's loss. The completions of a group attend to one copy of their prompt."""
    batch = pack(groups)
    samples = [sample for group in groups for sample in group]
    scores = policy.score(batch, temperature=keys.temperature, entropy=True)
    device = scores.logp_M.device
    entropy_M = scores.entropy_M if spec.entropy_coef else _detached(scores.entropy_M)
    old = "behavior_logp" if samples[0].old_logp is None else "old_logp"
    old_logp_M = None if on_policy else stream(samples, old, device)
    # Where the old log-probs are the sampler's own, comparing the two says nothing.
    compared = on_policy or keys.importance_sampling_correction != "off"
    inputs = PolicyInputs(
        policy_logp_M=scores.logp_M,
        advantage_M=stream(samples, "advantage", device),
        seq_M=batch.seq_M.to(device),
        num_sequences=batch.num_sequences,
        old_logp_M=old_logp_M,
        ref_logp_M=None if samples[0].ref_logp is None else stream(samples, "ref_logp", device),
        behavior_logp_M=stream(samples, "behavior_logp", device) if compared else None,
        entropy_M=entropy_M,
    )
    terms = policy_loss(inputs, _without_kl(spec) if keys.kl_in_reward else spec, norm)
    terms.metrics.update(_largest_ratio(scores.logp_M, old_logp_M))
    return policy.with_aux_loss(terms, scores.aux_loss, share=batch.num_sequences / norm.sequences)


def _largest_ratio(logp_M: torch.Tensor, old_logp_M: torch.Tensor | None) -> dict[str, Ratio]:
    """How many times as likely a token became within its generation batch, at most."""
    if old_logp_M is None or not len(logp_M):
        return {}
    return {"importance_ratio/max": Ratio(float(bounded_exp((logp_M.detach() - old_logp_M).max())), 1.0)}


def _micro_batches(groups: Sequence[Group], spec: PolicySpec, keys: GRPOKeys, ranks: Ranks) -> list[MicroBatch[Group]]:
    """At most `per_device_train_batch_size` completions at a time, as many micro-batches on every rank.

    A larger group is split: each part holds a copy of the prompt, and the normaliser is the step's. What goes on together
    after the prompt stays together. Groups that teach nothing are left out; they still count in the normaliser. None at
    all where no group teaches anything.
    """
    at_once = keys.per_device_train_batch_size
    useful = [_by_branches(group) for group in groups if teaches(group, spec, keys)]
    parts = split_groups(useful, at_once)
    each = math.ceil(sum(map(len, parts)) / (at_once * ranks.world_size)) * at_once
    share = deal([_group_cost(part) for part in parts], ranks.world_size, each, [len(part) for part in parts])[
        ranks.rank
    ]
    micros = [MicroBatch(rows) for rows in fill_with_groups([parts[place] for place in share], at_once)]
    most = max(ranks.gather(len(micros)))
    return micros + [MicroBatch(split_groups(groups[:1], at_once)[:1], idle=True)] * (most - len(micros))


def _by_branches(group: Group) -> Group:
    """The samples as their tree has them: in their order where it has two levels."""
    return tuple(group[node.row] for node in _segments(group) if node.is_leaf)


def _group_cost(group: Group) -> float:
    return tree_cost([(node.end - node.begin, node.begin) for node in _segments(group)])


def _segments(group: Group) -> list[TrieNode]:
    return shared_segments([[sample.ids for sample in group]])


def _normalizer(groups: Sequence[Group], keys: GRPOKeys) -> Normalizer:
    """Counted over the whole step, before it is dealt to the ranks."""
    return Normalizer(
        float(_num_tokens(groups)), float(sum(len(group) for group in groups)), max_tokens=keys.max_completion_length
    )


def _num_tokens(groups: Iterable[Group]) -> int:
    return sum(sample.num_loss_tokens for group in groups for sample in group)


def stream(samples: Sequence[Sample], name: str, device: torch.device) -> torch.Tensor:
    """One stream of all samples, end to end. Shape: [M]."""
    values = [getattr(sample, name) for sample in samples]
    return torch.from_numpy(np.concatenate(values)).to(device)


def _detached(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach()


def _without_kl(spec: PolicySpec) -> PolicySpec:
    return replace(spec, beta=0.0)


def _total_steps(keys: GRPOKeys, num_prompts: int) -> int:
    if keys.max_steps > 0:
        return keys.max_steps
    batches = max(1, round(keys.num_train_epochs * num_prompts / keys.num_prompts_per_step))
    return batches * keys.steps_per_generation * keys.num_iterations


@torch.no_grad()
def _validate(
    engine: Engine,
    sample: SampleGroups,
    decode: Decode,
    score: ScoreRewards,
    keys: GRPOKeys,
    state: TrainState,
    rows: Dataset[PromptRow],
) -> dict[str, float]:
    """Mean reward of greedy answers to the held-out prompts."""
    # Under ranks the engine samples from a copy, which is as old as the last generation batch.
    sync_engine(engine, state.policy, version=state.step)
    completions = sample(rows.rows, 1, greedy(sampling_params(keys)), (keys.seed,), range(len(rows)))
    totals = [r.reward.total for g in score_groups(rows.rows, completions, decode, score) for r in g.rollouts]
    scored = [total for total in totals if total is not None]
    return {"eval_reward": sum(scored) / len(scored)}


def _watch(stage: Stage, live: LiveChecks, step: int, collected: Collected) -> dict[str, float]:
    """Show a sample of a batch; what checks of its rewards say."""
    values = live.if_due(step, collected.groups)
    if collected.groups:
        group = collected.groups[0]
        rollout = group.rollouts[0]
        prompt = (
            group.prompt.prompt if isinstance(group.prompt.prompt, str) else str(group.prompt.prompt[-1]["content"])
        )
        details: dict[str, object] = {"prompt": prompt, "completion": rollout.text, "reward": rollout.reward.total}
        if rollout.completion.episode is not None:
            details["messages"] = list(rollout.completion.episode.messages)
        stage.run.event("sample", step + 1, details)
    return values
