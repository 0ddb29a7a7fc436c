"""What a teacher says of tokens: as an advantage (its own log-probs are enough), or as a divergence of two distributions.

S is the student, T the teacher, y the token that stands in the sequence. Gradients flow to S alone. Log-probs in nats, at the
temperature that was sampled with. A new one is a function and a row. Knows nothing of models, prompts or how T was asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

from posttrain.objectives.logprobs import head_tile_rows

# --- advantages: rows of teacher_advantage -----------------------------------------------------------------------


def opd(advantage: Tensor, log_ratio_M: Tensor, coef: float, clip: float) -> Tensor:
    """A + c·(log T − log S): of A = 0 the policy gradient of −KL(S‖T) at each token, its future left out (γ = 0).

    Source: On-Policy Distillation, Thinking Machines 2025; MOPD, arXiv 2601.02780.
    """
    return advantage + coef * log_ratio_M


def rlsd(advantage: Tensor, log_ratio_M: Tensor, coef: float, clip: float) -> Tensor:
    """A·((1−λ) + λ·clip(exp(sign(A)·(log T − log S)), 1−ε, 1+ε)): the reward says the sign, the teacher how much of it.

    Source: RLSD, arXiv 2604.03128; written as A·(1 + λ·(w − 1)), so that w = 1 is A to the bit.
    """
    weight_M = torch.exp(torch.sign(advantage) * log_ratio_M).clamp(1 - clip, 1 + clip)
    return advantage * (1 + coef * (weight_M - 1))


TEACHER_ADVANTAGES: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {"opd": opd, "rlsd": rlsd}
"""name → (the completion's advantage, log T − log S per token, coefficient, clip) → advantage per token."""


def coefficient_at(coef: float, step: int, warmup_steps: int, decay_steps: int) -> float:
    """`coef` at a step counted from 0: risen linearly from 0 over the warmup, then fallen linearly to 0 over the decay (0: never)."""
    risen = min(1.0, step / warmup_steps) if warmup_steps else 1.0
    fallen = max(0.0, 1.0 - max(0, step - warmup_steps) / decay_steps) if decay_steps else 1.0
    return coef * risen * fallen


_TENSORS = 8
"""As large as the logits of a tile: what a divergence keeps for its backward, of both models."""

# --- divergences: rows of the distill stage's loss_type ----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DistillSpec:
    """Knobs under their configuration names."""

    loss_type: str = "opd"
    jsd_beta: float = 0.5
    teacher_top_k: int = 0
    temperature: float = 1.0

    @property
    def needs_tokens_alone(self) -> bool:
        """Whether T's log-probs of the tokens that stand there are all that is asked of it."""
        return self.loss_type == "opd" and self.teacher_top_k == 0


def sampled_reverse_kl(logp_M: Tensor, teacher_logp_M: Tensor) -> Tensor:
    """r·sg(log S(y) − log T(y)) with r = S/sg(S) = 1: for y ~ S its mean is KL(S‖T), and its gradient's mean that of the KL."""
    gap_M = (logp_M - teacher_logp_M).detach()
    return torch.exp(logp_M - logp_M.detach()) * gap_M


def top_k_reverse_kl(student_RV: Tensor, teacher_RV: Tensor, target_R: Tensor, spec: DistillSpec) -> Tensor:
    """Σ_{v∈K} S(v)·sg(log S(v) − log T(v)) over T's k likeliest tokens K, and `sampled_reverse_kl` where y is none of them.

    For y ~ S value and gradient are in the mean those of the whole KL(S‖T): Σ_v ∇S(v) = 0, so the +1 of ∇(S log S) may be left
    out of both parts. Source: NeMo-RL's top-k distillation.
    """
    teacher_RK, top_RK = teacher_RV.topk(min(spec.teacher_top_k, teacher_RV.shape[-1]), -1)
    student_RK = student_RV.gather(-1, top_RK)
    exact_R = (student_RK.exp() * (student_RK - teacher_RK).detach()).sum(-1)
    own_R, teacher_own_R = (x_RV.gather(-1, target_R[:, None]).squeeze(-1) for x_RV in (student_RV, teacher_RV))
    is_tail_R = (top_RK != target_R[:, None]).all(-1)
    return exact_R + is_tail_R * sampled_reverse_kl(own_R, teacher_own_R)


def _kl(p_RV: Tensor, q_RV: Tensor) -> Tensor:
    return (p_RV.exp() * (p_RV - q_RV)).sum(-1)


def forward_kl(student_RV: Tensor, teacher_RV: Tensor, target_R: Tensor, spec: DistillSpec) -> Tensor:
    """KL(T‖S), over the whole vocabulary. Source: Hinton et al., arXiv 1503.02531."""
    return _kl(teacher_RV, student_RV)


def reverse_kl(student_RV: Tensor, teacher_RV: Tensor, target_R: Tensor, spec: DistillSpec) -> Tensor:
    """KL(S‖T), over the whole vocabulary. Source: MiniLLM, arXiv 2306.08543, of each token alone."""
    return _kl(student_RV, teacher_RV)


def jsd(student_RV: Tensor, teacher_RV: Tensor, target_R: Tensor, spec: DistillSpec) -> Tensor:
    """β·KL(T‖M) + (1−β)·KL(S‖M), M = β·T + (1−β)·S. Source: GKD, arXiv 2306.13649 eq. 1; at 0 < β < 1 as TRL's."""
    beta = spec.jsd_beta
    mixed_RV = torch.logaddexp(teacher_RV + math.log(beta), student_RV + math.log1p(-beta))
    return beta * _kl(teacher_RV, mixed_RV) + (1 - beta) * _kl(student_RV, mixed_RV)


Divergence = Callable[[Tensor, Tensor, Tensor, DistillSpec], Tensor]
DIVERGENCES: dict[str, Divergence] = {
    "opd": top_k_reverse_kl,
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
}
"""name → (log S, log T over the vocabulary, y, spec) → a term per token; `opd` without top-k is `sampled_reverse_kl`."""


@dataclass(frozen=True, slots=True)
class Head:
    """Logits of M tokens, to be had a few rows at a time: softcap(hidden · weightᵀ + bias), or logits that are there already."""

    hidden_MD: Tensor
    weight_VD: Tensor | None = None
    bias: Tensor | None = None
    softcap: float | None = None

    @property
    def vocab(self) -> int:
        return (self.hidden_MD if self.weight_VD is None else self.weight_VD.t()).shape[-1]

    def at(self, places_M: Tensor) -> Head:
        """The same head at some of the tokens."""
        everywhere = len(places_M) == len(self.hidden_MD)
        return self if everywhere else replace(self, hidden_MD=self.hidden_MD[places_M])

    def logits(self, rows: slice) -> Tensor:
        z_RV = self.hidden_MD[rows]
        if self.weight_VD is not None:
            z_RV = torch.nn.functional.linear(z_RV.to(self.weight_VD.dtype), self.weight_VD, self.bias)
        return z_RV if self.softcap is None else self.softcap * torch.tanh(z_RV / self.softcap)


def divergence(student: Head, teacher: Head, target_M: Tensor, spec: DistillSpec) -> tuple[Tensor, Tensor]:
    """A term per token, and without a gradient log S(y) − log T(y), S's entropy, and whether both find the same token likeliest.

    Two heads of one vocabulary may have different numbers of rows without a token, at their ends: the longer one's are left out.
    More tokens than one tile of logits holds are computed a tile at a time, and again in the backward. Shapes: [M], [3, M].
    """
    vocab = min(student.vocab, teacher.vocab)
    size = max(1, head_tile_rows(vocab, target_M.device.type) // _TENSORS)
    tiles = [slice(at, at + size) for at in range(0, max(1, len(target_M)), size)]
    one: Callable[[slice], tuple[Tensor, Tensor]] = partial(_of_tile, student, teacher, target_M, spec, vocab)
    if len(tiles) > 1 and torch.is_grad_enabled():
        one = partial(cast(Callable[..., tuple[Tensor, Tensor]], checkpoint), one, use_reentrant=False)
    found = [one(rows) for rows in tiles]
    return torch.cat([term for term, _ in found]), torch.cat([said for _, said in found], 1)


def token_scores(head: Head, target_M: Tensor, top_k: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-prob of each target and the mean log-prob over the vocabulary; whether the target is the likeliest, and without a gradient
    the entropy (nats) of the `top_k` likeliest tokens made to sum to 1. A tile at a time. Shapes: [M].
    """
    one: Callable[[slice], tuple[Tensor, ...]] = partial(_token_scores_of_tile, head, target_M, min(top_k, head.vocab))
    logp, mean, top1, entropy = _by_tiles(one, head, target_M)
    return logp, mean, top1, entropy


def aligned_scores(head: Head, target_M: Tensor) -> tuple[Tensor, Tensor]:
    """Log-prob of each target, and without a gradient log Σ_v p_v², which it has in the mean over samples. Shapes: [M], [M]."""
    logp, log_sum_sq = _by_tiles(partial(_aligned_scores_of_tile, head, target_M), head, target_M)
    return logp, log_sum_sq


def _by_tiles(one: Callable[[slice], tuple[Tensor, ...]], head: Head, target_M: Tensor) -> list[Tensor]:
    """`one` of all tokens, a tile at a time; more than one tile is computed again in the backward."""
    size = max(1, head_tile_rows(head.vocab, target_M.device.type) // _TENSORS)
    tiles = [slice(at, at + size) for at in range(0, max(1, len(target_M)), size)]
    if len(tiles) > 1 and torch.is_grad_enabled():
        one = partial(cast(Callable[..., tuple[Tensor, ...]], checkpoint), one, use_reentrant=False)
    return [torch.cat(found) for found in zip(*(one(rows) for rows in tiles), strict=True)]


def _aligned_scores_of_tile(head: Head, target_M: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    logp_RV = _log_softmax(head.logits(rows), 1.0)
    return logp_RV.gather(-1, target_M[rows, None]).squeeze(-1), torch.logsumexp(2 * logp_RV.detach(), -1)


def _token_scores_of_tile(head: Head, target_M: Tensor, top_k: int, rows: slice) -> tuple[Tensor, ...]:
    logp_RV, target_R = _log_softmax(head.logits(rows), 1.0), target_M[rows]
    top_RK = _log_softmax(logp_RV.detach().topk(top_k, -1).values, 1.0)
    entropy_R = -(top_RK.exp() * top_RK).sum(-1)
    return (
        logp_RV.gather(-1, target_R[:, None]).squeeze(-1),
        logp_RV.mean(-1),
        logp_RV.argmax(-1) == target_R,
        entropy_R,
    )


def _of_tile(
    student: Head, teacher: Head, target_M: Tensor, spec: DistillSpec, vocab: int, rows: slice
) -> tuple[Tensor, Tensor]:
    student_RV = _log_softmax(student.logits(rows)[:, :vocab], spec.temperature)
    with torch.no_grad():
        teacher_RV = _log_softmax(teacher.logits(rows)[:, :vocab], spec.temperature)
    term_R = DIVERGENCES[spec.loss_type](student_RV, teacher_RV, target_M[rows], spec)
    with torch.no_grad():
        at = target_M[rows, None]
        gap_R = (student_RV.gather(-1, at) - teacher_RV.gather(-1, at)).squeeze(-1)
        agrees_R = (student_RV.argmax(-1) == teacher_RV.argmax(-1)).to(gap_R.dtype)
        said = torch.stack([gap_R, -(student_RV.exp() * student_RV).sum(-1), agrees_R])
    return term_R, said


def _log_softmax(logits_RV: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32)) / temperature, -1)
