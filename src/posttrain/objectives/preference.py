"""Preference objectives: one table of per-pair functions, to be added up by weight. A new loss is a function and a row.

For a pair (chosen w, rejected l):  a = log π(w) − log π_ref(w),  b = log π(l) − log π_ref(l),  d = a − b.
Rows without a reference see π_ref = 1, so a and b are the policy's own log-probs. Rows with `length_mean` see log-probs
divided by the number of trained tokens. logσ is log sigmoid; every row is finite for |d| up to at least 500/beta.
What is done to all rows alike: `f_divergence_type` puts f'(π/π_ref) in the place of a and b, `ld_alpha` weighs the tokens that
they are summed over, a pair's margin is taken off βd, and its weight multiplies its terms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from posttrain.errors import ConfigError
from posttrain.objectives.pair_scores import F_SCORES
from posttrain.objectives.reduce import Normalizer, sequence_sum_mean, token_mean
from posttrain.objectives.terms import LossTerms, as_ratios


@dataclass(frozen=True, slots=True)
class PreferenceSpec:
    """Knobs under their configuration names. Raises: ConfigError for values the row is not defined for."""

    loss_type: str | Sequence[str] = "sigmoid"
    loss_weights: Sequence[float] | None = None
    beta: float = 0.1
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    ld_alpha: float | None = None
    use_weighting: bool = False
    margin_coef: float = 0.0
    row_weights: bool = False
    dpop_lambda: float = 50.0
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5
    cpo_alpha: float = 1.0
    rpo_alpha: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.loss_weights is not None and len(self.loss_weights) != len(self.losses):
            raise ConfigError(
                f"loss_weights has {len(self.loss_weights)} entries for {len(self.losses)} losses in loss_type; give one each"
            )
        if "exo_pair" in self.losses and not self.label_smoothing:
            raise ConfigError(
                "loss_type: exo_pair needs label_smoothing > 0 (its target probabilities are 1 − ε and ε); set it to 1e-3"
            )
        for name in self.losses:
            refused = self._refused_with(PREFERENCE_LOSSES[name])
            if refused:
                raise ConfigError(f"loss_type: {name} {refused}")
        if len(over := [name for name in self.losses if PREFERENCE_LOSSES[name].partners]) > 1:
            raise ConfigError(f"loss_type: {' and '.join(over)} each sort the step in their own way; keep one of them")

    def _refused_with(self, row: PreferenceRow) -> str | None:
        """What these knobs ask for that the row is not defined for, and what to do."""
        if row.unpaired:
            if len(self.losses) > 1:
                return "reads labelled rows, the other losses pairs; name it alone"
            of_pairs = {
                "rpo_alpha": self.rpo_alpha, "ld_alpha": self.ld_alpha is not None, "use_weighting": self.use_weighting,
                "margin_coef": self.margin_coef, "row_weights": self.row_weights, "loss_weights": self.loss_weights is not None,
            }  # fmt: skip
            if asked := [name for name, wanted in of_pairs.items() if wanted]:
                return f"has no pairs, which {asked[0]} is for; drop it"
        if row.divides_by_beta and not self.beta:
            return "divides by beta, and beta is 0; set beta > 0"
        if self.f_divergence_type != "reverse_kl" and not row.takes_f_divergence:
            able = ", ".join(name for name, other in PREFERENCE_LOSSES.items() if other.takes_f_divergence)
            return (
                f"with f_divergence_type: {self.f_divergence_type}: it is defined on differences between rewards under a "
                f"reference, where the normaliser cancels; set reverse_kl, or one of {able}"
            )
        if self.margin_coef and not row.takes_margin:
            able = ", ".join(name for name, other in PREFERENCE_LOSSES.items() if other.takes_margin)
            return f"has no margin that margin_coef could move; set it to 0, or take one of {able}"
        if row.partners and (self.use_weighting or self.row_weights):
            asked = "use_weighting" if self.use_weighting else "row_weights"
            return f"sorts the step, so that no term is of one pair alone; set {asked}: false"
        return None

    @property
    def losses(self) -> tuple[str, ...]:
        return names_of(self.loss_type)

    @property
    def rows(self) -> list[tuple[PreferenceRow, float]]:
        """Each loss with its weight."""
        weights = self.loss_weights or [1.0] * len(self.losses)
        return [(PREFERENCE_LOSSES[name], weight) for name, weight in zip(self.losses, weights, strict=True)]

    @property
    def needs_reference(self) -> bool:
        return any(row.needs_reference for row, _ in self.rows)

    @property
    def sorted_over_step(self) -> str | None:
        """The loss, if there is one, that compares the pairs of a whole step."""
        return next((name for name in self.losses if PREFERENCE_LOSSES[name].partners), None)


def names_of(loss_type: str | Sequence[str]) -> tuple[str, ...]:
    """One loss, or several that are added up."""
    return (loss_type,) if isinstance(loss_type, str) else tuple(loss_type)


@dataclass(frozen=True, slots=True)
class Partners:
    """What each pair is compared with by a loss on distributions: the value of its rank on the other side of the step.

    `of_better` belongs to what is to dominate, `of_worse` to what is to be dominated. Constants. Shapes: [P].
    """

    of_better: Tensor
    of_worse: Tensor


@dataclass(frozen=True, slots=True)
class Pairs:
    """What a row sees. `margin`: how far above 0 βd is to be. Shapes: all [P]."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    partners: Partners | None = None
    margin: Tensor | None = None

    @property
    def a(self) -> Tensor:
        return self.chosen - self.ref_chosen

    @property
    def b(self) -> Tensor:
        return self.rejected - self.ref_rejected

    @property
    def d(self) -> Tensor:
        return (self.chosen - self.rejected) - (self.ref_chosen - self.ref_rejected)

    def z(self, beta: float) -> Tensor:
        """βd beyond the margin. Source: ODPO, arXiv 2402.10571."""
        return beta * self.d if self.margin is None else beta * self.d - self.margin


def _smoothed(z: Tensor, epsilon: float) -> Tensor:
    """−(1−ε)·logσ(z) − ε·logσ(−z): the label is flipped with probability ε. Source: cDPO, Mitchell 2023."""
    return -(1 - epsilon) * logsigmoid(z) - epsilon * logsigmoid(-z)


def sigmoid(pairs: Pairs, spec: PreferenceSpec) -> Tensor:
    """−logσ(βd). Source: DPO, arXiv 2305.18290 eq. 7; with label_smoothing cDPO. Also sigmoid_norm and CPO's pair term."""
    return _smoothed(pairs.z(spec.beta), spec.label_smoothing)


def ipo(pairs: Pairs, spec: PreferenceSpec) -> Tensor:
    """(d − 1/(2β))² on length means. Source: IPO, arXiv 2310.12036 eq. 17; length mean as its authors and TRL."""
    return (pairs.d - 1 / (2 * spec.beta)) ** 2


def hinge(pairs: Pairs, spec: PreferenceSpec) -> Tensor:
    """max(0, 1 − βd). Source: SLiC-HF, arXiv 2305.10425 sec. 2, on DPO's margin (RSO, arXiv 2309.06657)."""
    return torch.relu(1 - pairs.z(spec.beta))


def robust(pairs: Pairs, spec: PreferenceSpec) -> Tensor:
    """[−(1−ε)·logσ(βd) + ε·logσ(−βd)] / (1−2ε): unbiased if a share ε is flipped. Source: arXiv 2403.00409 sec. 3.1."""
    z, epsilon = pairs.z(spec.beta), spec.label_smoothing
    return (-(1 - epsilon) * logsigmoid(z) + epsilon * logsigmoid(-z)) / (1 - 2 * epsilon)


def exo_pair(pairs: Pairs, spec: PreferenceSpec) -> Tensor:
    """KL((σ(βd), σ(−βd)) ‖ (1−ε, ε)). Source: EXO, arXiv 2402.00856 eq. 16."""
    z, target = pairs.z(spec.beta), torch.tensor(spec.label_smoothing, dtype=pairs.d.dtype, device=pairs.d.device)
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
    z = pairs.z(spec.beta)
    # m · e^(−z) in one exponent: with m → 0 where e^(−z) → inf, the product of the two would be NaN.
    exponential = torch.exp(logsigmoid(z / spec.discopop_tau) - z)
    return -torch.sigmoid(-z / spec.discopop_tau) * logsigmoid(z) + exponential


def dpop(pairs: Pairs, spec: PreferenceSpec) -> Tensor:
    """−logσ(β·(d − λ·max(0, −a))): a chosen answer that became less likely costs. Source: DPOP, arXiv 2402.13228."""
    return _smoothed(pairs.z(spec.beta) - spec.beta * spec.dpop_lambda * torch.relu(-pairs.a), spec.label_smoothing)


def simpo(pairs: Pairs, spec: PreferenceSpec) -> Tensor:
    """−logσ(β·(w − l) − γ) on length means; γ = simpo_gamma as in TRL. Source: SimPO, arXiv 2405.14734 eq. 6."""
    return _smoothed(pairs.z(spec.beta) - spec.simpo_gamma, spec.label_smoothing)


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
    takes_margin: it reads βd, which a margin can be taken off. takes_f_divergence: it reads nothing of a and b but d.
    partners: for a loss on distributions, what the pairs of a whole step are compared with.
    """

    pair: Callable[[Pairs, PreferenceSpec], Tensor]
    needs_reference: bool = True
    length_mean: bool = False
    nll: Callable[[PreferenceSpec], float] = lambda spec: 0.0
    smooths: bool = False
    divides_by_beta: bool = False
    takes_margin: bool = False
    takes_f_divergence: bool = False
    partners: Callable[[Pairs], Partners] | None = None
    unpaired: bool = False


PREFERENCE_LOSSES: dict[str, PreferenceRow] = {
    "sigmoid": PreferenceRow(sigmoid, smooths=True, takes_margin=True, takes_f_divergence=True),
    "ipo": PreferenceRow(ipo, length_mean=True, divides_by_beta=True, takes_f_divergence=True),
    "hinge": PreferenceRow(hinge, takes_margin=True, takes_f_divergence=True),
    "robust": PreferenceRow(robust, smooths=True, takes_margin=True, takes_f_divergence=True),
    "exo_pair": PreferenceRow(exo_pair, smooths=True, takes_margin=True, takes_f_divergence=True),
    "nca_pair": PreferenceRow(nca_pair),
    "bco_pair": PreferenceRow(bco_pair),
    "sppo_hard": PreferenceRow(sppo_hard, divides_by_beta=True),
    "aot": PreferenceRow(aot, smooths=True, partners=margins_and_reference),
    "aot_unpaired": PreferenceRow(aot_unpaired, smooths=True, partners=chosen_and_rejected),
    "apo_zero": PreferenceRow(apo_zero),
    "apo_down": PreferenceRow(apo_down),
    "discopop": PreferenceRow(discopop, takes_margin=True, takes_f_divergence=True),
    "sigmoid_norm": PreferenceRow(sigmoid, length_mean=True, smooths=True, takes_margin=True, takes_f_divergence=True),
    "dpop": PreferenceRow(dpop, smooths=True, takes_margin=True),
    "sft": PreferenceRow(no_pair_term, needs_reference=False, nll=lambda spec: 1.0, takes_f_divergence=True),
    "simpo": PreferenceRow(simpo, needs_reference=False, length_mean=True, smooths=True, takes_margin=True),
    "cpo": PreferenceRow(
        sigmoid, needs_reference=False, nll=lambda spec: spec.cpo_alpha, smooths=True, takes_margin=True
    ),
    "orpo": PreferenceRow(orpo, needs_reference=False, length_mean=True, nll=lambda spec: 1.0),
    "kto": PreferenceRow(no_pair_term, unpaired=True),
}


@dataclass(frozen=True, slots=True)
class PairInputs:
    """One micro-batch of P pairs: log-probs as `summed` gives them, and how many trained tokens those are of.

    chosen_nll_P: −log π of the chosen answers with all tokens in full, where `ld_alpha` does not leave them so.
    margin_P, weight_P: of each pair; constants. `partners` are this micro-batch's of `partners_over` the step, for the losses
    that have them.
    """

    chosen_logp_P: Tensor
    rejected_logp_P: Tensor
    chosen_tokens_P: Tensor
    rejected_tokens_P: Tensor
    ref_chosen_logp_P: Tensor | None = None
    ref_rejected_logp_P: Tensor | None = None
    partners: Partners | None = None
    chosen_nll_P: Tensor | None = None
    margin_P: Tensor | None = None
    weight_P: Tensor | None = None


def partners_over(step: Pairs, loss_type: str) -> Partners:
    """What each pair of a whole optimizer step is compared with by a loss on distributions."""
    over = PREFERENCE_LOSSES[loss_type].partners
    assert over is not None, f"{loss_type} looks at each pair alone"
    return over(step)


def preference_loss(inputs: PairInputs, spec: PreferenceSpec, norm: Normalizer) -> LossTerms:
    """Mean over the step's pairs of the weighted sum of losses, plus the token-mean NLL of chosen answers where one has it.

    `norm.sequences` counts pairs, `norm.tokens` the trained tokens of chosen answers. Source of sums: MPO, arXiv 2411.10442.
    """
    assert not any(row.unpaired for row, _ in spec.rows), "kto is defined on labelled rows: use kto_loss"
    seen = [(row, weight, _seen_by(row, inputs, spec)) for row, weight in spec.rows]
    term_P = torch.stack([weight * row.pair(pairs, spec) for row, weight, pairs in seen]).sum(0)
    loss = sequence_sum_mean(_weighted(term_P, inputs), norm)
    nll_weight = sum(weight * row.nll(spec) for row, weight in spec.rows) + spec.rpo_alpha
    nll_P = -inputs.chosen_logp_P if inputs.chosen_nll_P is None else inputs.chosen_nll_P
    if nll_weight:
        loss = loss + nll_weight * token_mean(_weighted(nll_P, inputs), norm)
    # As TRL logs them: sums for losses with a reference, what the loss itself compares for those without.
    logged = _sums(inputs, referenced=True) if spec.needs_reference else seen[0][2]
    metrics = _pair_metrics(logged, spec.beta)
    if nll_weight:
        metrics["nll_loss"] = (nll_P.sum(), inputs.chosen_tokens_P.sum())
    if "orpo" in spec.losses:
        odds, count = log_odds(seen[spec.losses.index("orpo")][2]), float(nll_P.numel())
        metrics |= {"log_odds_chosen": (odds.sum(), count), "log_odds_ratio": (logsigmoid(odds).sum(), count)}
    if inputs.weight_P is not None:
        metrics["weights/mean"] = (inputs.weight_P.sum(), float(nll_P.numel()))
    return LossTerms(loss, as_ratios(metrics))


def _weighted(term_P: Tensor, inputs: PairInputs) -> Tensor:
    return term_P if inputs.weight_P is None else inputs.weight_P.to(term_P.dtype) * term_P


def _seen_by(row: PreferenceRow, inputs: PairInputs, spec: PreferenceSpec) -> Pairs:
    pairs = _sums(inputs, row.needs_reference)
    if spec.f_divergence_type != "reverse_kl":
        score, nothing = F_SCORES[spec.f_divergence_type], torch.zeros_like(pairs.chosen)
        alpha = spec.f_alpha_divergence_coef
        pairs = Pairs(score(pairs.a, alpha), score(pairs.b, alpha), nothing, nothing)
    pairs = _length_means(pairs, inputs) if row.length_mean else pairs
    if not spec.margin_coef:
        return pairs
    assert inputs.margin_P is not None, "margin_coef needs margin_P"
    return replace(pairs, margin=spec.margin_coef * inputs.margin_P)


def _sums(inputs: PairInputs, referenced: bool) -> Pairs:
    if not referenced:
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
