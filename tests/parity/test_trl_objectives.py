"""Our objectives against TRL's own loss methods on the same log-probs: value, gradient and logged metrics.

TRL's methods are called unbound on the attributes they read, so no model, data or trainer is involved. One micro-batch
is the whole step, where both normalise alike; docs/algorithms.md says where they differ otherwise.
"""

from collections import defaultdict
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from posttrain.objectives.advantages import AdvantageSpec, as_rewards, compute_advantages, soft_overlong_penalty
from posttrain.objectives.pair_scores import summed, wpo_weights
from posttrain.objectives.policy import PolicyInputs, PolicySpec, policy_loss
from posttrain.objectives.preference import (
    PREFERENCE_LOSSES,
    PairInputs,
    Pairs,
    PreferenceSpec,
    partners_over,
    preference_loss,
)
from posttrain.objectives.reduce import Normalizer
from posttrain.objectives.token_masks import entropy_threshold, is_uncertain

pytestmark = pytest.mark.slow

LENGTHS = [5, 2, 4, 3]
T = max(LENGTHS)
MASK = torch.tensor([[1.0] * n + [0.0] * (T - n) for n in LENGTHS])
ADVANTAGE = torch.tensor([1.2, -0.8, -0.5, 0.3])


def _logps(seed, base=None, width=2.0):
    noise = width * torch.rand(4, T, generator=torch.Generator().manual_seed(seed)) - width
    return noise if base is None else base + noise + width / 2


NEW = _logps(0)
OLD, REF = _logps(1, NEW, 1.0), _logps(2, NEW, 1.0)
SAMPLER = _logps(3, OLD, 1.0)
ENTROPY = -_logps(4)


def _trl_policy_loss(spec, weights, on_policy, trainer_type=None, share=1.0):
    from trl.trainer.grpo_trainer import GRPOTrainer

    new, entropy = NEW.clone().requires_grad_(), ENTROPY.clone().requires_grad_()
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (new, entropy, None),
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            num_processes=1,
            sync_gradients=True,
            gather=lambda x: x,
            reduce=lambda x, reduction: x,
            pad_across_processes=lambda x, dim, pad_index: x,
        ),
        args=SimpleNamespace(
            use_bias_correction_kl=spec.use_bias_correction_kl,
            delta=spec.delta,
            sapo_temperature_pos=spec.sapo_temperature_pos,
            sapo_temperature_neg=spec.sapo_temperature_neg,
            steps_per_generation=1,
        ),
        loss_type=spec.loss_type,
        importance_sampling_level=spec.importance_sampling_level,
        epsilon_low=spec.epsilon,
        epsilon_high=spec.high,
        beta=spec.beta,
        entropy_coef=spec.entropy_coef,
        max_completion_length=8,
        current_gradient_accumulation_steps=1,
        top_entropy_quantile=share,
        off_policy_mask_threshold=spec.off_policy_mask_threshold,
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        aux_loss_enabled=False,
        use_adaptive_entropy=False,
        use_vllm=weights is not None,
        vllm_importance_sampling_correction=True,
        _entropy_bonus_enabled=spec.entropy_coef != 0,
        _metrics={"train": defaultdict(list)},
    )
    ids = torch.zeros(4, T, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids,
        "prompt_mask": torch.ones_like(ids),
        "completion_ids": ids,
        "completion_mask": MASK,
        "advantages": ADVANTAGE,
        "ref_per_token_logps": REF,
        "num_items_in_batch": MASK.sum(),
        "importance_sampling_ratio": weights,
    }
    if not on_policy:
        inputs["old_per_token_logps"] = OLD
    if spec.off_policy_mask_threshold is not None:
        inputs |= {"sampling_per_token_logps": SAMPLER, "advantages": ADVANTAGE.unsqueeze(1)}
    trainer.get_high_entropy_mask = partial(GRPOTrainer.get_high_entropy_mask, trainer)
    loss = (trainer_type or GRPOTrainer)._compute_loss(trainer, None, inputs)
    (gradient,) = torch.autograd.grad(loss, new)
    return loss.detach(), gradient[MASK.bool()], {k: v[0] for k, v in trainer._metrics["train"].items()}


def _our_policy_loss(spec, on_policy, share=1.0):
    flat = MASK.bool()
    new, entropy = NEW[flat].requires_grad_(), ENTROPY[flat].numpy()
    keep_M = torch.from_numpy(is_uncertain(entropy, entropy_threshold(entropy, share)))
    inputs = PolicyInputs(
        policy_logp_M=new,
        advantage_M=ADVANTAGE.repeat_interleave(torch.tensor(LENGTHS)) * keep_M,
        seq_M=torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS)),
        num_sequences=4,
        old_logp_M=None if on_policy else OLD[flat],
        ref_logp_M=REF[flat],
        behavior_logp_M=SAMPLER[flat],
        entropy_M=ENTROPY[flat],
    )
    terms = policy_loss(inputs, spec, Normalizer(tokens=sum(LENGTHS), sequences=4, max_tokens=8))
    (gradient,) = torch.autograd.grad(terms.loss, new)
    return terms.loss.detach(), gradient, {name: ratio.value for name, ratio in terms.metrics.items()}


LEVELS = [(name, "token") for name in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")]
LEVELS += [(name, "sequence") for name in ("grpo", "luspo", "dapo", "sapo")]
OPTIONS = {
    "default": {},
    "k3": {"beta": 0.2},
    "k3 plain": {"beta": 0.2, "use_bias_correction_kl": False},
    "delta": {"delta": 1.5},
    "bonus": {"entropy_coef": 0.05},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(("loss_type", "level"), LEVELS)
@pytest.mark.parametrize("on_policy", [False, True], ids=["off-policy", "on-policy"])
def test_policy_loss(loss_type, level, option, on_policy):
    spec = PolicySpec(loss_type=loss_type, importance_sampling_level=level, **OPTIONS[option])
    loss, gradient, metrics = _our_policy_loss(spec, on_policy)
    trl_loss, trl_gradient, trl_metrics = _trl_policy_loss(spec, None, on_policy)
    torch.testing.assert_close(loss, trl_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, trl_gradient, rtol=1e-5, atol=1e-7)
    # TRL alone logs the extremes and the coefficient; its clip shares use the ratio after `delta`, ours before.
    shared = set(metrics) & set(trl_metrics) - ({"clip_ratio/high_mean"} if spec.delta else set())
    assert {"entropy"} <= shared
    for name in shared:
        assert metrics[name] == pytest.approx(trl_metrics[name], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("share", [0.2, 0.5])
@pytest.mark.parametrize(("loss_type", "level"), LEVELS)
def test_top_entropy_quantile(loss_type, level, share):
    spec = PolicySpec(loss_type=loss_type, importance_sampling_level=level, beta=0.1)
    loss, gradient, _ = _our_policy_loss(spec, False, share)
    trl_loss, trl_gradient, _ = _trl_policy_loss(spec, None, False, share=share)
    torch.testing.assert_close(loss, trl_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, trl_gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("threshold", [-0.2, 0.0, 0.3])
def test_off_policy_mask(threshold):
    spec = PolicySpec(beta=0.1, off_policy_mask_threshold=threshold)
    loss, gradient, _ = _our_policy_loss(spec, on_policy=False)
    trl_loss, trl_gradient, _ = _trl_policy_loss(spec, None, on_policy=False)
    torch.testing.assert_close(loss, trl_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, trl_gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("on_policy", [False, True], ids=["off-policy", "on-policy"])
def test_gmpo(on_policy):
    from trl.experimental.gmpo.gmpo_trainer import GMPOTrainer

    spec = PolicySpec(loss_type="gmpo", epsilon=0.2, epsilon_high=0.3)
    loss, gradient, _ = _our_policy_loss(spec, on_policy)
    trl_loss, trl_gradient, _ = _trl_policy_loss(spec, None, on_policy, GMPOTrainer)
    torch.testing.assert_close(loss, trl_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, trl_gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_sampler_correction(mode):
    """TRL computes its weights inside generation, so they are recomputed here from its definition."""
    cap = 1.3
    gap = (OLD - SAMPLER) * MASK
    ratio = torch.exp(gap.sum(-1, keepdim=True) if mode.startswith("sequence") else gap)
    weights = ratio.clamp(max=cap) if mode.endswith("truncate") else ratio.masked_fill(ratio > cap, 0.0)
    spec = PolicySpec(beta=0.1, importance_sampling_correction=mode, importance_sampling_cap=cap)
    loss, gradient, _ = _our_policy_loss(spec, on_policy=False)
    trl_loss, trl_gradient, _ = _trl_policy_loss(spec, weights, on_policy=False)
    torch.testing.assert_close(loss, trl_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, trl_gradient, rtol=1e-5, atol=1e-7)


# Two pairs: TRL has both chosen answers first, ours take turns.
ORDER = [0, 2, 1, 3]
IN_PAIRS = MASK[ORDER].bool()
SEQ = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS)[ORDER])
LOG_SUM_SQ = _logps(5)


def _summed(logps, spec):
    """[4, T] in TRL's order → [4] in TRL's order."""
    return summed(logps[ORDER][IN_PAIRS], SEQ, 4, spec.ld_alpha)[ORDER]


def _trl_preference_loss(spec, loss_types, weights):
    from trl.trainer.dpo_trainer import DPOTrainer

    # One prompt token, so that the unshifted mask counts the same tokens; padding carries log-prob 0.
    mask = torch.cat([torch.zeros(4, 1), MASK], 1).long()
    new = (NEW * MASK).requires_grad_()
    zeros = torch.zeros(4, T)
    outputs = SimpleNamespace(log_probs=new, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    outputs.log_sum_sq_probs = LOG_SUM_SQ
    ref = _summed(REF, spec)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x),
        args=SimpleNamespace(discopop_tau=spec.discopop_tau),
        loss_types=loss_types,
        loss_weights=weights,
        beta=spec.beta,
        label_smoothing=spec.label_smoothing,
        f_divergence_type=spec.f_divergence_type,
        f_alpha_divergence_coef=spec.f_alpha_divergence_coef,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        ld_alpha=spec.ld_alpha,
        use_weighting=spec.use_weighting,
        _total_train_tokens=0,
        _tp_size=1,
        _metrics={"train": defaultdict(list)},
    )
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": ref[:2],
        "ref_rejected_logps": ref[2:],
    }
    loss = DPOTrainer._compute_loss(trainer, lambda **kwargs: outputs, inputs, False)
    (gradient,) = torch.autograd.grad(loss, new)
    return loss.detach(), gradient, {k: v[0] for k, v in trainer._metrics["train"].items() if isinstance(v, list)}


def _our_preference_loss(spec):
    new, lengths = (NEW * MASK).requires_grad_(), torch.tensor(LENGTHS)
    sums, ref = _summed(new, spec), _summed(REF, spec)
    nll = -(new * MASK).sum(1)[:2]
    inputs = PairInputs(sums[:2], sums[2:], lengths[:2], lengths[2:], ref[:2], ref[2:], chosen_nll_P=nll)
    if spec.sorted_over_step:
        step = Pairs(sums[:2], sums[2:], ref[:2], ref[2:])
        inputs = replace(inputs, partners=partners_over(step, spec.sorted_over_step))
    if spec.use_weighting:
        inputs = replace(inputs, weight_P=wpo_weights(new[ORDER][IN_PAIRS], LOG_SUM_SQ[ORDER][IN_PAIRS], SEQ, 4))
    terms = preference_loss(inputs, spec, Normalizer(tokens=sum(LENGTHS[:2]), sequences=2))
    (gradient,) = torch.autograd.grad(terms.loss, new)
    return terms.loss.detach(), gradient, {name: ratio.value for name, ratio in terms.metrics.items()}


SHARED = [name for name in PREFERENCE_LOSSES if name not in ("dpop", "simpo", "cpo", "orpo", "kto")]


@pytest.mark.parametrize("name", SHARED)
def test_preference_loss(name):
    smoothing = 0.1 if name in ("robust", "exo_pair", "aot", "aot_unpaired") else 0.0
    spec = PreferenceSpec(loss_type=name, beta=0.3, label_smoothing=smoothing)
    loss, gradient, metrics = _our_preference_loss(spec)
    trl_loss, trl_gradient, trl_metrics = _trl_preference_loss(spec, [name], [1.0])
    torch.testing.assert_close(loss, trl_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient * MASK, trl_gradient * MASK, rtol=1e-5, atol=1e-7)
    if name != "sft":  # reads no reference with us, so its rewards are the policy's own log-probs
        for key in ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen"):
            assert metrics[key] == pytest.approx(trl_metrics[key], rel=1e-5), key


def test_rpo_is_trls_weighted_sum_with_sft():
    ours = _our_preference_loss(PreferenceSpec(rpo_alpha=0.5))
    theirs = _trl_preference_loss(PreferenceSpec(), ["sigmoid", "sft"], [1.0, 0.5])
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours[1] * MASK, theirs[1] * MASK, rtol=1e-5, atol=1e-7)


VARIANTS = {
    "MPO": {"loss_type": ("sigmoid", "bco_pair", "sft"), "loss_weights": (0.8, 0.2, 1.0)},
    "forward KL": {"f_divergence_type": "forward_kl"},
    "JS on length means": {"loss_type": "ipo", "f_divergence_type": "js_divergence"},
    "alpha": {"loss_type": "hinge", "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    "LD": {"ld_alpha": 0.3},
    "LD, sorted": {"loss_type": "aot", "ld_alpha": 0.3},
    "LD with SFT": {"loss_type": ("ipo", "sft"), "ld_alpha": 0.3},
    "WPO": {"use_weighting": True},
    "WPO, robust and LD": {"loss_type": "robust", "label_smoothing": 0.1, "use_weighting": True, "ld_alpha": 0.5},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_done_to_all_losses(variant):
    spec = PreferenceSpec(beta=0.3, **VARIANTS[variant])
    loss, gradient, metrics = _our_preference_loss(spec)
    weights = spec.loss_weights or [1.0] * len(spec.losses)
    trl_loss, trl_gradient, trl_metrics = _trl_preference_loss(spec, spec.losses, weights)
    torch.testing.assert_close(loss, trl_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient * MASK, trl_gradient * MASK, rtol=1e-5, atol=1e-7)
    for key in ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen"):
        assert metrics[key] == pytest.approx(trl_metrics[key], rel=1e-5), key


@pytest.mark.parametrize(("name", "trl_name"), [("simpo", "simpo"), ("cpo", "sigmoid")])
def test_cpo_family(name, trl_name):
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    lengths, sums = torch.tensor(LENGTHS), (NEW * MASK).sum(1)
    compared = sums / lengths if name == "simpo" else sums
    trainer = SimpleNamespace(
        alpha=0.0,
        beta=2.0,
        simpo_gamma=0.5,
        label_smoothing=0.1,
        loss_type=trl_name,
        accelerator=SimpleNamespace(device="cpu"),
    )
    losses, chosen, _ = CPOTrainer.cpo_loss(trainer, compared[:2], compared[2:])
    spec = PreferenceSpec(loss_type=name, beta=2.0, label_smoothing=0.1, cpo_alpha=0.0)
    loss, _, metrics = _our_preference_loss(spec)
    torch.testing.assert_close(loss, losses.mean(), rtol=1e-5, atol=1e-6)
    assert metrics["rewards/chosen"] == pytest.approx(chosen.mean().item(), rel=1e-5)


def test_orpo_pair_term():
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    lengths, sums = torch.tensor(LENGTHS), (NEW * MASK).sum(1)
    means = sums / lengths
    trainer = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    losses, _, _, ratio, odds = ORPOTrainer.odds_ratio_loss(trainer, means[:2], means[2:])
    loss, _, metrics = _our_preference_loss(PreferenceSpec(loss_type="orpo", beta=0.3))
    assert (loss - metrics["nll_loss"]).item() == pytest.approx(-losses.mean().item(), rel=1e-5)
    assert metrics["log_odds_ratio"] == pytest.approx(ratio.item(), rel=1e-5)
    assert metrics["log_odds_chosen"] == pytest.approx(odds.item(), rel=1e-5)


def test_std_of_what_was_scored():
    from trl.trainer.utils import nanstd

    rewards = torch.tensor([1.0, 0.25, float("nan"), 0.5], dtype=torch.float64)
    trl = (rewards - rewards.nanmean()) / (nanstd(rewards) + 1e-4)
    rows = as_rewards([[None if r.isnan() else r.item()] for r in rewards])
    ours = compute_advantages(rows, torch.zeros(4, dtype=torch.int64), AdvantageSpec()).advantage_B
    torch.testing.assert_close(ours, trl.nan_to_num(0.0), rtol=1e-12, atol=0)


def test_soft_overlong():
    from trl.rewards import get_soft_overlong_punishment

    lengths = [0, 60, 61, 99, 100, 101]
    trl = get_soft_overlong_punishment(100, 40)(completion_ids=[[0] * n for n in lengths])
    assert trl == pytest.approx([soft_overlong_penalty(n, 100, 40) for n in lengths])
