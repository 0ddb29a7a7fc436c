"""The loss of a reward model: how likely the preferences are under Bradley and Terry, with margins and centring."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from posttrain.objectives.reduce import Normalizer, sequence_sum_mean
from posttrain.objectives.terms import LossTerms, as_ratios


def reward_model_loss(
    chosen_P: Tensor, rejected_P: Tensor, margin_P: Tensor, center_rewards_coefficient: float, norm: Normalizer
) -> LossTerms:
    """−logσ(r_w − r_l − m) + c·(r_w + r_l)², mean over the step's pairs; `norm.sequences` counts pairs.

    Source: Llama 2, arXiv 2307.09288 eq. 2 (margin); arXiv 2312.09244 eq. 2 (centring); as TRL's RewardTrainer.
    """
    difference_P = chosen_P - rejected_P
    term_P = -logsigmoid(difference_P - margin_P)
    if center_rewards_coefficient:
        term_P = term_P + center_rewards_coefficient * (chosen_P + rejected_P).square()
    count = float(chosen_P.numel())
    metrics: dict[str, tuple[Tensor, Tensor | float]] = {
        "rewards/chosen": (chosen_P.sum(), count),
        "rewards/rejected": (rejected_P.sum(), count),
        "rewards/accuracies": ((difference_P > 0).sum(), count),
        "rewards/margins": (difference_P.sum(), count),
    }
    return LossTerms(sequence_sum_mean(term_P, norm), as_ratios(metrics))
