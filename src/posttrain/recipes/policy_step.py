"""One optimizer step of a policy on groups of samples: its loss, what that is divided by, its micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch

from posttrain.config.rl import PolicyGradientKeys, SamplingKeys
from posttrain.models.batch import pack
from posttrain.models.policy import Policy
from posttrain.models.trie import TrieNode, shared_segments
from posttrain.objectives.policy import POLICY_LOSSES, PolicyInputs, policy_loss
from posttrain.objectives.ratios import bounded_exp
from posttrain.objectives.reduce import Normalizer
from posttrain.objectives.spec import PolicySpec
from posttrain.objectives.terms import LossTerms
from posttrain.objectives.token_masks import TOKEN_SELECTIONS, StepTokens, entropy_threshold, is_uncertain
from posttrain.protocols import Ranks
from posttrain.recipes.balance import deal, tree_cost
from posttrain.recipes.batches import MicroBatch, fill_with_groups, split_groups
from posttrain.recipes.credit import known
from posttrain.recipes.scorers import PolicyScorer
from posttrain.rollout.experience import Group
from posttrain.types import Ratio, Sample


def loss(
    policy: Policy,
    groups: Sequence[Group],
    spec: PolicySpec,
    norm: Normalizer,
    keys: PolicyGradientKeys,
    *,
    on_policy: bool,
) -> LossTerms:
    """This micro-batch's share of the step's loss. The completions of a group attend to one copy of their prompt."""
    # Where the old log-probs are the sampler's own, comparing the two says nothing.
    compared = on_policy or keys.importance_sampling_correction != "off"
    spec = replace(spec, beta=0.0) if keys.kl_in_reward else spec
    return sampled_loss(policy, groups, spec, norm, keys.temperature, on_policy=on_policy, compared=compared)


def sampled_loss(
    policy: Policy, groups: Sequence[Group], spec: PolicySpec, norm: Normalizer, temperature: float, *, on_policy: bool, compared: bool
) -> LossTerms:  # fmt: skip
    """`loss` by plain values; `compared` says whether the sampler's log-probs are held against the trainer's."""
    batch = pack(groups)
    samples = [sample for group in groups for sample in group]
    scores = policy.score(batch, temperature=temperature, entropy=True)
    device = scores.logp_M.device
    entropy_M = scores.entropy_M if spec.entropy_coef else _detached(scores.entropy_M)
    old = "behavior_logp" if samples[0].old_logp is None else "old_logp"
    old_logp_M = None if on_policy else stream(samples, old, device)
    inputs = PolicyInputs(
        policy_logp_M=scores.logp_M,
        advantage_M=stream(samples, "advantage", device),
        seq_M=batch.seq_M.to(device),
        num_sequences=batch.num_sequences,
        old_logp_M=old_logp_M,
        ref_logp_M=None if samples[0].ref_logp is None else stream(samples, "ref_logp", device),
        behavior_logp_M=stream(samples, "behavior_logp", device) if compared else None,
        entropy_M=entropy_M,
        penalty_M=None if samples[0].penalty is None else stream(samples, "penalty", device),
        prompt_tokens_S=torch.tensor([sample.prompt_tokens for sample in samples], device=device),
    )
    terms = policy_loss(inputs, spec, norm)
    terms.metrics.update(_largest_ratio(scores.logp_M, old_logp_M))
    return policy.with_aux_loss(terms, scores.aux_loss, share=batch.num_sequences / norm.sequences)


def _largest_ratio(logp_M: torch.Tensor, old_logp_M: torch.Tensor | None) -> dict[str, Ratio]:
    """How many times as likely a token became within its generation batch, at most."""
    if old_logp_M is None or not len(logp_M):
        return {}
    return {"importance_ratio/max": Ratio(float(bounded_exp((logp_M.detach() - old_logp_M).max())), 1.0)}


def micro_batches_of(
    groups: Sequence[Group], teaches: Callable[[Group], bool], at_once: int, ranks: Ranks
) -> list[MicroBatch[Group]]:
    """At most `at_once` completions at a time, as many micro-batches on every rank.

    A larger group is split: each part holds a copy of the prompt, and the normaliser is the step's. What goes on together
    after the prompt stays together. Groups that teach nothing are left out; they still count in the normaliser. None at
    all where no group teaches anything.
    """
    groups = [_counted(group) for group in groups]
    useful = [_by_branches(group) for group in groups if teaches(group)]
    parts = split_groups(useful, at_once)
    each = math.ceil(sum(map(len, parts)) / (at_once * ranks.world_size)) * at_once
    share = deal([_group_cost(part) for part in parts], ranks.world_size, each, [len(part) for part in parts])[
        ranks.rank
    ]
    micros = [MicroBatch(rows) for rows in fill_with_groups([parts[place] for place in share], at_once)]
    most = max(ranks.gather(len(micros)))
    return micros + [MicroBatch(split_groups(groups[:1], at_once)[:1], idle=True)] * (most - len(micros))


def _counted(group: Group) -> Group:
    """The samples with how many tokens of their prompt are trained: a group may be split, and this is of all of it."""
    total = num_tokens([group])
    return tuple(replace(sample, prompt_tokens=total) for sample in group)


def _by_branches(group: Group) -> Group:
    """The samples as their tree has them: in their order where it has two levels."""
    return tuple(group[node.row] for node in _segments(group) if node.is_leaf)


def _group_cost(group: Group) -> float:
    return tree_cost([(node.end - node.begin, node.begin) for node in _segments(group)])


def _segments(group: Group) -> list[TrieNode]:
    return shared_segments([[sample.ids for sample in group]])


def select_tokens(
    policy: Policy,
    groups: Sequence[Group],
    objective: PolicySpec,
    keys: PolicyGradientKeys,
    ranks: Ranks,
    step: int,
    *,
    on_policy: bool,
) -> tuple[Sequence[Group], dict[str, float]]:
    """The step's groups, those of all ranks, with what the objective does to tokens that it chooses over all of them, and what is logged of it."""
    selection = POLICY_LOSSES[objective.loss_type].selection
    # Weights that are where they sampled are no way from themselves, and a penalty on the way has no gradient.
    idle = selection is None or (selection == "kl_cov" and on_policy)
    if (keys.top_entropy_quantile == 1 and idle) or not num_tokens(groups):
        return groups, {}
    policy.model.eval()
    scorer = PolicyScorer(policy, keys.temperature, keys.per_device_train_batch_size, ranks)
    if selection is None:
        return _uncertain(groups, _over_ranks(scorer.entropy, groups, ranks), keys.top_entropy_quantile)
    logps = _over_ranks(scorer.logp, groups, ranks)
    samples = [sample for group in groups for sample in group]
    olds = logps if on_policy else [s.behavior_logp if s.old_logp is None else s.old_logp for s in samples]
    tokens = StepTokens(*map(_flat, (logps, olds, [sample.advantage for sample in samples])))
    chosen_M = TOKEN_SELECTIONS[selection](tokens, objective, np.random.default_rng((keys.seed, step)))
    metrics = {f"{selection}/share": float(chosen_M.mean()), "covariance/mean": float(tokens.covariance_M.mean())}
    if selection == "clip_cov":
        return _changed(groups, chosen_M, lambda sample, chosen: _masked(sample, ~chosen)), metrics
    coef = np.float32(objective.ppo_kl_coef)
    return _changed(groups, chosen_M, lambda sample, chosen: replace(sample, penalty=chosen * coef)), metrics


def _uncertain(
    groups: Sequence[Group], entropies: Sequence[np.ndarray], share: float
) -> tuple[Sequence[Group], dict[str, float]]:
    """An advantage of 0 at tokens below the threshold."""
    entropy_M = np.concatenate(entropies)
    threshold = entropy_threshold(entropy_M, share)
    return _changed(groups, is_uncertain(entropy_M, threshold), _masked), {"entropy_threshold": threshold}


def _changed(
    groups: Sequence[Group], chosen_M: np.ndarray, change: Callable[[Sample, np.ndarray], Sample]
) -> list[Group]:
    ends = np.cumsum([sample.num_loss_tokens for group in groups for sample in group])
    of_sample = iter(np.split(chosen_M, ends[:-1]))
    return [tuple(change(sample, next(of_sample)) for sample in group) for group in groups]


def _flat(streams: Sequence[np.ndarray | None]) -> np.ndarray:
    return np.concatenate([known(one) for one in streams]).astype(np.float64)


def _masked(sample: Sample, keep: np.ndarray) -> Sample:
    return replace(sample, advantage=np.where(keep, known(sample.advantage), np.float32(0)))


def _over_ranks(
    score: Callable[[Sequence[Group]], list[np.ndarray]], groups: Sequence[Group], ranks: Ranks
) -> list[np.ndarray]:
    """What each rank finds of its share of the groups, a stream a sample, in the order of `groups`."""
    found: list[list[np.ndarray]] = [[]] * len(groups)
    places = ranks.share(range(len(groups)))
    scored = iter(score([groups[place] for place in places]))
    mine = {place: [next(scored) for _ in groups[place]] for place in places}
    for part in ranks.gather(mine):
        for place, streams in part.items():
            found[place] = streams
    return [stream for streams in found for stream in streams]


def normalizer(groups: Sequence[Group], keys: SamplingKeys) -> Normalizer:
    """Counted over the whole step, before it is dealt to the ranks."""
    sequences = float(sum(len(group) for group in groups))
    return Normalizer(
        float(num_tokens(groups)), sequences, float(keys.max_completion_length), prompts=float(len(groups))
    )


def num_tokens(groups: Iterable[Group]) -> int:
    return sum(sample.num_loss_tokens for group in groups for sample in group)


def stream(samples: Sequence[Sample], name: str, device: torch.device) -> torch.Tensor:
    """One stream of all samples, end to end. Shape: [M]."""
    values = [getattr(sample, name) for sample in samples]
    return torch.from_numpy(np.concatenate(values)).to(device)


def _detached(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach()
