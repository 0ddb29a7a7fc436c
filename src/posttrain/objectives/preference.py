"""Preference objectives: one table of per-pair functions, plus KTO for unpaired rows. A new loss is a function and a row.

For a pair (chosen w, rejected l):  a = log π(w) − log π_ref(w),  b = log π(l) − log π_ref(l),  d = a − b.
Rows without a reference see π_ref = 1, so a and b are the policy's own log-probs. Rows with `length_mean` see log-probs
divided by the number of trained tokens. logσ is log sigmoid; every row is finite for |d| up to at least 500/beta.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from posttrain.errors import ConfigError
from posttrain.objectives.reduce import Normalizer, sequence_sum_mean, token_mean
from posttrain.objectives.terms import LossTerms, as_ratios
from posttrain.types import Ratio


@dataclass(frozen=True, slots=True)
class PreferenceSpec:
    """Knobs under their configuration names. Raises: ConfigError for values the row is not defined for."""

    loss_type: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5
    cpo_alpha: float = 1.0
    rpo_alpha: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        row = PREFERENCE_LOSSES[self.loss_type]
        if self.loss_type == "exo_pair" and not self.label_smoothing:
            raise ConfigError(
                "loss_type: exo_pair needs label_smoothing > 0 (its target probabilities are 1 − ε and ε); set it to 1e-3"
            )
        if row.divides_by_beta and not self.beta:
            raise ConfigError(f"loss_type: {self.loss_type} divides by beta, and beta is 0; set beta > 0")
        if self.rpo_alpha and row.unpaired:
            raise ConfigError(
                f"rpo_alpha={self.rpo_alpha} adds an SFT term on chosen answers; loss_type: {self.loss_type} has no pairs, drop it"
            )


@dataclass(frozen=True, slots=True)
class Partners:
    """What each pair is compared with by a loss on distributions: the value of its rank on the other side of the step.

    `of_better` belongs to what is to dominate, `of_worse` to what is to be dominated. Constants. Shapes: [P].
    """

    of_better: Tensor
    of_worse: Tensor


@dataclass(frozen=True, slots=True)
class Pairs:
    """What a row sees. Shapes: all [P]."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    partners: Partners | None = None

    @property
    def a(self) -> Tensor:
        return self.chosen - self.ref_chosen

    @property
    def b(self) -> Tensor:
        return self.rejected - self.ref_rejected

    @property
    def d(self) -> Tensor:
        return (self.chosen - self.rejected) - (self.ref_chosen - self.ref_rejected)


def _smoothed(z: Tensor, epsilon: float) -> Tensor:
    """−(1−ε)·logσ(z) − ε·logσ(−z): the label is flipped with probability ε. Source: cDPO, Mitchell 2023."""
    return -(1 - epsilon) * logsigmoid(z) - epsilon * logsigmoid(-z)


def sigmoid(pairs: Pairs, spec: PreferenceSpec) -> Tensor:
    """−logσ(βd). Source: DPO, arXiv 2305.18290 eq. 7; with label_smoothing cDPO. Also sigmoid_norm and CPO's pair term."""
    return _smoothed(spec.beta * pairs.d, spec.label_smoothing)


def ipo(pairs: Pairs, spec: PreferenceSpec) -> Tensor:
    """(d − 1/(2β))² on length means. Source: IPO, arXiv 2310.12036 eq. 17; length mean as its authors and TRL."""
    return (pairs.d - 1 / (2 * spec.beta)) ** 2


def hinge(pairs: Pairs, spec: PreferenceSpec) -> Tensor:
    """max(0, 1 − βd). Source: SLiC-HF, arXiv 2305.10425 sec. 2, on DPO's margin (RSO, arXiv 2309.06657)."""
    return torch.relu(1 - spec.beta * pairs.d)


def robust(pairs: Pairs, spec: PreferenceSpec) -> Tensor:
    """[−(1−ε)·logσ(βd) + ε·logσ(−βd)] / (1−2ε): unbiased if a share ε is flipped. Source: arXiv 2403.00409 sec. 3.1."""
    z, epsilon = spec.beta * pairs.d, spec.label_smoothing
    return (-(1 - epsilon) * logsigmoid(z) + epsilon * logsigmoid(-z)) / (1 - 2 * epsilon)


def exo_pair(pairs: Pairs, spec: PreferenceSpec) -> Tensor:
    """KL((σ(βd), σ(−βd)) ‖ (1−ε, ε)). Source: EXO, arXiv 2402.00856 eq. 16."""
    z, target = spec.beta * pairs.d, torch.tensor(spec.label_smoothing, dtype=pairs.d.dtype, device=pairs.d.device)
    chosen = torch.sigmoid(z) * (logsigmoid(z) - torch.log1p(-target))
    return chosen + torch.sigmoid(-z) * (logsigmoid(-z) - torch.log(target))


def nca_pair(pairs: Pairs, spec: PreferenceSpec) -> Tensor:
    """−logσ(βa) − ½·logσ(−βa) − ½·logσ(−βb). Source: NCA, arXiv 2402.05369 with K = 2."""
    a, b = spec.beta * pairs.a, spec.beta * pairs.b
    return -logsigmoid(a) - 0.5 * logsigmoid(-a) - 0.5 * logsigmoid(-b)


def bco_pair(pairs: Pairs, spec: PreferenceSpec) -> Tensor:
    """−logσ(βa) − logσ(−βb). Source: BCO, arXiv 2404.04656 sec. 4, without its running reward shift, as TRL."""
    return -logsigmoid(spec.beta * pairs.a) - logsigmoid(-spec.beta * pairs.b)


def sppo_hard(pairs: Pairs, spec: PreferenceSpec) -> Tensor:
    """(a − 1/(2β))² + (b + 1/(2β))². Source: SPPO, arXiv 2405.00675 eq. 4.7, with winning probabilities 1 and 0."""
    return (pairs.a - 0.5 / spec.beta) ** 2 + (pairs.b + 0.5 / spec.beta) ** 2


def aot(pairs: Pairs, spec: PreferenceSpec) -> Tensor:
    """−logσ(β·(sort(w − l) − sort(ref w − ref l))): policy margins dominate the reference's as a distribution.

    Source: AOT, arXiv 2406.05882 sec. 3; sorted over the whole step.
    """
    assert pairs.partners is not None, "aot compares over the step: give partners_over"
    return _smoothed(spec.beta * (pairs.chosen - pairs.rejected - pairs.partners.of_better), spec.label_smoothing)


def margins_and_reference(step: Pairs) -> Partners:
    margins, ref_margins = step.chosen - step.rejected, step.ref_chosen - step.ref_rejected
    return Partners(_same_rank(margins, ref_margins), _same_rank(ref_margins, margins))


def aot_unpaired(pairs: Pairs, spec: PreferenceSpec) -> Tensor:
    """−logσ(β·(sort(a) − sort(b))). Source as `aot`.

    A term has its a in one pair and its b in another. Each pair takes half of the value of both its terms, and of both the
    whole gradient in what is its own.
    """
    assert pairs.partners is not None, "aot_unpaired compares over the step: give partners_over"
    by_a = _smoothed(spec.beta * (pairs.a - pairs.partners.of_better), spec.label_smoothing)
    by_b = _smoothed(spec.beta * (pairs.partners.of_worse - pairs.b), spec.label_smoothing)
    return (by_a + by_b) - 0.5 * (by_a + by_b).detach()


def chosen_and_rejected(step: Pairs) -> Partners:
    return Partners(_same_rank(step.a, step.b), _same_rank(step.b, step.a))


def _same_rank(own: Tensor, other: Tensor) -> Tensor:
    """For each of `own` the one of the same rank among `other`; equal values rank in order."""
    rank = own.argsort(stable=True).argsort(stable=True)
    return other.sort(stable=True).values[rank].detach()


def apo_zero(pairs: Pairs, spec: PreferenceSpec) -> Tensor:
    """1 − σ(βa) + σ(βb): for chosen answers better than the model's. Source: APO, arXiv 2408.06266 eq. 7."""
    return torch.sigmoid(-spec.beta * pairs.a) + torch.sigmoid(spec.beta * pairs.b)


def apo_down(pairs: Pairs, spec: PreferenceSpec) -> Tensor:
    """σ(βa) + 1 − σ(βd): for chosen answers worse than the model's. Source: APO, arXiv 2408.06266 eq. 8."""
    return torch.sigmoid(spec.beta * pairs.a) + torch.sigmoid(-spec.beta * pairs.d)


def discopop(pairs: Pairs, spec: PreferenceSpec) -> Tensor:
    """(1−m)·(−logσ(z)) + m·e^(−z), z = βd, m = σ(z/τ). Source: DiscoPOP, arXiv 2406.08414 eq. 5."""
    z = spec.beta * pairs.d
    # m · e^(−z) in one exponent: with m → 0 where e^(−z) → inf, the product of the two would be NaN.
    exponential = torch.exp(logsigmoid(z / spec.discopop_tau) - z)
    return -torch.sigmoid(-z / spec.discopop_tau) * logsigmoid(z) + exponential


def simpo(pairs: Pairs, spec: PreferenceSpec) -> Tensor:
    """−logσ(β·(w − l) − γ) on length means; γ = simpo_gamma as in TRL. Source: SimPO, arXiv 2405.14734 eq. 6."""
    return _smoothed(spec.beta * pairs.d - spec.simpo_gamma, spec.label_smoothing)


def orpo(pairs: Pairs, spec: PreferenceSpec) -> Tensor:
    """−β·logσ(log odds(w) − log odds(l)), odds = p/(1−p) of the length mean. Source: ORPO, arXiv 2403.07691 eq. 6–7."""
    return -spec.beta * logsigmoid(log_odds(pairs))


def log_odds(pairs: Pairs) -> Tensor:
    """log odds(w) − log odds(l). A mean log-prob within 1e-6 of 0 counts as −1e-6: at p = 1 the odds are infinite."""
    chosen, rejected = pairs.chosen.clamp(max=-1e-6), pairs.rejected.clamp(max=-1e-6)
    return (chosen - rejected) - (torch.log(-torch.expm1(chosen)) - torch.log(-torch.expm1(rejected)))


def no_pair_term(pairs: Pairs, spec: PreferenceSpec) -> Tensor:
    return torch.zeros_like(pairs.chosen)


@dataclass(frozen=True, slots=True)
class PreferenceRow:
    """A loss of the family.

    nll: weight of the token-mean −log π(chosen) that belongs to the loss. smooths: whether label_smoothing means something.
    partners: for a loss on distributions, what the pairs of a whole step are compared with.
    """

    pair: Callable[[Pairs, PreferenceSpec], Tensor]
    needs_reference: bool = True
    length_mean: bool = False
    nll: Callable[[PreferenceSpec], float] = lambda spec: 0.0
    smooths: bool = False
    divides_by_beta: bool = False
    partners: Callable[[Pairs], Partners] | None = None
    unpaired: bool = False


PREFERENCE_LOSSES: dict[str, PreferenceRow] = {
    "sigmoid": PreferenceRow(sigmoid, smooths=True),
    "ipo": PreferenceRow(ipo, length_mean=True, divides_by_beta=True),
    "hinge": PreferenceRow(hinge),
    "robust": PreferenceRow(robust, smooths=True),
    "exo_pair": PreferenceRow(exo_pair, smooths=True),
    "nca_pair": PreferenceRow(nca_pair),
    "bco_pair": PreferenceRow(bco_pair),
    "sppo_hard": PreferenceRow(sppo_hard, divides_by_beta=True),
    "aot": PreferenceRow(aot, smooths=True, partners=margins_and_reference),
    "aot_unpaired": PreferenceRow(aot_unpaired, smooths=True, partners=chosen_and_rejected),
    "apo_zero": PreferenceRow(apo_zero),
    "apo_down": PreferenceRow(apo_down),
    "discopop": PreferenceRow(discopop),
    "sigmoid_norm": PreferenceRow(sigmoid, length_mean=True, smooths=True),
    "sft": PreferenceRow(no_pair_term, needs_reference=False, nll=lambda spec: 1.0),
    "simpo": PreferenceRow(simpo, needs_reference=False, length_mean=True, smooths=True),
    "cpo": PreferenceRow(sigmoid, needs_reference=False, nll=lambda spec: spec.cpo_alpha, smooths=True),
    "orpo": PreferenceRow(orpo, needs_reference=False, length_mean=True, nll=lambda spec: 1.0),
    "kto": PreferenceRow(no_pair_term, unpaired=True),
}


@dataclass(frozen=True, slots=True)
class PairInputs:
    """One micro-batch of P pairs: log-probs summed over the trained tokens, and how many tokens those are.

    `partners` are this micro-batch's of `partners_over` the step, for the losses that have them.
    """

    chosen_logp_P: Tensor
    rejected_logp_P: Tensor
    chosen_tokens_P: Tensor
    rejected_tokens_P: Tensor
    ref_chosen_logp_P: Tensor | None = None
    ref_rejected_logp_P: Tensor | None = None
    partners: Partners | None = None


def partners_over(step: Pairs, loss_type: str) -> Partners:
    """What each pair of a whole optimizer step is compared with by a loss on distributions."""
    over = PREFERENCE_LOSSES[loss_type].partners
    assert over is not None, f"{loss_type} looks at each pair alone"
    return over(step)


def preference_loss(inputs: PairInputs, spec: PreferenceSpec, norm: Normalizer) -> LossTerms:
    """Mean over the step's pairs, plus the weighted token-mean NLL of chosen answers where the row or rpo_alpha has one.

    `norm.sequences` counts pairs, `norm.tokens` the trained tokens of chosen answers.
    """
    row = PREFERENCE_LOSSES[spec.loss_type]
    assert not row.unpaired, "kto is defined on labelled rows: use kto_loss"
    sums = _sums(inputs, row)
    pairs = _length_means(sums, inputs) if row.length_mean else sums
    loss = sequence_sum_mean(row.pair(pairs, spec), norm)
    nll_weight = row.nll(spec) + spec.rpo_alpha
    if nll_weight:
        loss = loss + nll_weight * token_mean(-inputs.chosen_logp_P, norm)
    # As TRL logs them: sums for losses with a reference, what the loss itself compares for those without.
    metrics = _pair_metrics(sums if row.needs_reference else pairs, spec.beta)
    if nll_weight:
        metrics["nll_loss"] = (-inputs.chosen_logp_P.sum(), inputs.chosen_tokens_P.sum())
    if spec.loss_type == "orpo":
        odds, count = log_odds(pairs), float(pairs.chosen.numel())
        metrics |= {"log_odds_chosen": (odds.sum(), count), "log_odds_ratio": (logsigmoid(odds).sum(), count)}
    return LossTerms(loss, as_ratios(metrics))


def _sums(inputs: PairInputs, row: PreferenceRow) -> Pairs:
    if not row.needs_reference:
        zeros = torch.zeros_like(inputs.chosen_logp_P)
        return Pairs(inputs.chosen_logp_P, inputs.rejected_logp_P, zeros, zeros)
    assert inputs.ref_chosen_logp_P is not None and inputs.ref_rejected_logp_P is not None, (
        "this loss needs a reference"
    )
    references = (inputs.ref_chosen_logp_P, inputs.ref_rejected_logp_P)
    return Pairs(inputs.chosen_logp_P, inputs.rejected_logp_P, *references, inputs.partners)


def _length_means(sums: Pairs, inputs: PairInputs) -> Pairs:
    chosen_tokens, rejected_tokens = inputs.chosen_tokens_P.clamp(min=1), inputs.rejected_tokens_P.clamp(min=1)
    return Pairs(
        sums.chosen / chosen_tokens,
        sums.rejected / rejected_tokens,
        sums.ref_chosen / chosen_tokens,
        sums.ref_rejected / rejected_tokens,
    )


def _pair_metrics(pairs: Pairs, beta: float) -> dict[str, tuple[Tensor, Tensor | float]]:
    chosen, rejected, count = beta * pairs.a, beta * pairs.b, float(pairs.chosen.numel())
    return {
        "rewards/chosen": (chosen.sum(), count),
        "rewards/rejected": (rejected.sum(), count),
        "rewards/accuracies": ((chosen > rejected).sum(), count),
        "rewards/margins": ((chosen - rejected).sum(), count),
        "logps/chosen": (pairs.chosen.sum(), count),
        "logps/rejected": (pairs.rejected.sum(), count),
    }


@dataclass(frozen=True, slots=True)
class LabelledInputs:
    """One micro-batch of S labelled completions: log-probs summed over the trained tokens. `label_S`: True is desirable."""

    logp_S: Tensor
    ref_logp_S: Tensor
    label_S: Tensor


def kto_reference_point(mean_log_ratio: Ratio) -> float:
    """z: the mean of log π − log π_ref over completions paired with *other* rows' prompts, at least 0, a constant.

    Source: KTO, arXiv 2402.01306 sec. 4. The Ratio adds over micro-batches and ranks.
    """
    return max(mean_log_ratio.value, 0.0) if mean_log_ratio.den else 0.0


def kto_loss(inputs: LabelledInputs, z: float, spec: PreferenceSpec, norm: Normalizer) -> LossTerms:
    """λ_D·(1 − σ(β(a − z))) for desirable rows, λ_U·(1 − σ(β(z − b))) for the others; mean over the step's rows.

    Source: KTO, arXiv 2402.01306 sec. 4, whose λ_y − v is the same up to a constant. rewards/margins is the difference of
    two logged means and so is left to the logger.
    """
    log_ratio_S = inputs.logp_S - inputs.ref_logp_S
    desirable_S = inputs.label_S.bool()
    shortfall_S = spec.beta * torch.where(desirable_S, z - log_ratio_S, log_ratio_S - z)
    ones_S = torch.ones_like(log_ratio_S)
    weight_S = torch.where(desirable_S, spec.desirable_weight * ones_S, spec.undesirable_weight * ones_S)
    loss = sequence_sum_mean(weight_S * torch.sigmoid(shortfall_S), norm)
    count = float(log_ratio_S.numel())
    metrics: dict[str, tuple[Tensor, Tensor | float]] = {"kl": (torch.full_like(log_ratio_S, z).sum(), count)}
    for side, rows_S in (("chosen", desirable_S), ("rejected", ~desirable_S)):
        metrics[f"rewards/{side}"] = ((spec.beta * log_ratio_S * rows_S).sum(), rows_S.sum())
        metrics[f"logps/{side}"] = ((inputs.logp_S * rows_S).sum(), rows_S.sum())
    return LossTerms(loss, as_ratios(metrics))
