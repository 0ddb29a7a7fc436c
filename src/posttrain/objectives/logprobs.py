"""Log-probs of tokens, from logits or straight from hidden states without ever holding all the logits.

z = softcap(h · Wᵀ + b) / temperature;  logp = z[target] − logsumexp(z);  entropy = logsumexp(z) − Σ p·z  (nats).
Statistics are float32 (float64 for float64 inputs) whatever the dtype of the matmul.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from posttrain.objectives.fused import fused_head

_TILE_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
_MIN_TILE_ROWS = 64


class TokenScores(NamedTuple):
    """Per token: log-prob, entropy if asked for, and whether the target is the most likely token, where it is known."""

    logp_M: Tensor
    entropy_M: Tensor | None
    top1_M: Tensor | None


def token_logprobs(logits_MV: Tensor, targets_M: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-prob of each target under `logits / temperature`. Shapes: [..., V], [...] → [...]."""
    z_MV = _statistics(logits_MV) / temperature
    return z_MV.gather(-1, targets_M.unsqueeze(-1)).squeeze(-1) - torch.logsumexp(z_MV, -1)


def token_entropy(logits_MV: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of each token's distribution, in nats. Shapes: [..., V] → [...]."""
    z_MV = _statistics(logits_MV) / temperature
    return torch.logsumexp(z_MV, -1) - (torch.softmax(z_MV, -1) * z_MV).sum(-1)


def head_tile_rows(vocab: int, device_type: str = "cpu") -> int:
    """Tokens whose float32 logits fill one tile. Up to one tile the logits are kept, beyond it they are recomputed."""
    return max(_MIN_TILE_ROWS, _TILE_BYTES.get(device_type, _TILE_BYTES["cuda"]) // (4 * vocab))


def chunked_logprobs(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    targets_M: Tensor,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    chunk: int | None = None,
    with_entropy: bool = False,
    with_top1: bool = True,
) -> TokenScores:
    """Score tokens `chunk` rows at a time; the backward recomputes each tile (4 head matmuls instead of 3).

    `chunk=None` decides by size: a micro-batch that fits one tile keeps its logits and recomputes nothing. Log-probs
    and entropy are differentiable in hidden, weight and bias; a frozen weight costs no gradient matmul. Where a fused
    kernel fits (`fused_head`) it takes the place of the chunks; `with_top1` then costs a product of its own.
    """
    device_type = hidden_MD.device.type
    if torch.is_autocast_enabled(device_type):
        # Cast here, once: inside, autocast would cast the weight again for every tile.
        dtype = torch.get_autocast_dtype(device_type)
        hidden_MD, weight_VD = hidden_MD.to(dtype), weight_VD.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    rows = chunk or head_tile_rows(weight_VD.shape[0], device_type)
    fused = fused_head(hidden_MD, bias, softcap) if chunk is None else None
    with torch.autocast(device_type, enabled=False):
        if fused is not None:
            logp_M, entropy_M = fused(hidden_MD, weight_VD, targets_M, temperature, with_entropy)
            return TokenScores(logp_M, entropy_M, _top1(hidden_MD, weight_VD, targets_M, rows) if with_top1 else None)
        logp_M, entropy_M, top1_M = _score(
            hidden_MD, weight_VD, bias, targets_M, temperature, softcap, rows, with_entropy
        )
    return TokenScores(logp_M, entropy_M if with_entropy else None, top1_M)


@torch.no_grad()
def _top1(hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor, rows: int) -> Tensor:
    best_M = torch.empty_like(targets_M)
    for start in range(0, len(targets_M), rows):
        best_M[start : start + rows] = torch.mm(hidden_MD[start : start + rows], weight_VD.t()).argmax(-1)
    return best_M == targets_M


def _statistics(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _fill_logits(
    z_RV: Tensor, hidden_RD: Tensor, weight_VD: Tensor, bias: Tensor | None, temperature: float, softcap: float | None
) -> None:
    """z ← softcap(hidden · weightᵀ + bias) / temperature, in place: a fresh tile each time costs page faults."""
    if hidden_RD.dtype == z_RV.dtype:
        torch.mm(hidden_RD, weight_VD.t(), out=z_RV)
    else:
        z_RV.copy_(hidden_RD @ weight_VD.t())
    if bias is not None:
        z_RV.add_(bias)
    if softcap is not None:
        z_RV.div_(softcap).tanh_().mul_(softcap)
    if temperature != 1.0:
        z_RV.div_(temperature)


class _ChunkedScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        weight_VD: Tensor,
        bias: Tensor | None,
        targets_M: Tensor,
        temperature: float,
        softcap: float | None,
        rows: int,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_tokens, vocab = hidden_MD.shape[0], weight_VD.shape[0]
        options: Any = {"dtype": torch.promote_types(hidden_MD.dtype, torch.float32), "device": hidden_MD.device}
        logp_M, entropy_M, lse_M, gap_M = torch.zeros(4, num_tokens, **options).unbind(0)
        keep = 0 < num_tokens <= rows and any(ctx.needs_input_grad)
        tile_RV = torch.empty(min(rows, num_tokens), vocab, **options)
        work_RV = torch.empty_like(tile_RV) if keep or with_entropy else tile_RV
        for start in range(0, num_tokens, rows):
            tile = slice(start, start + rows)
            z_RV, p_RV = (buffer[: num_tokens - start] for buffer in (tile_RV, work_RV))
            _fill_logits(z_RV, hidden_MD[tile], weight_VD, bias, temperature, softcap)
            target_R = z_RV.gather(1, targets_M[tile, None]).squeeze(1)
            peak_R = z_RV.amax(1)
            torch.sub(z_RV, peak_R[:, None], out=p_RV).exp_()
            lse_R = p_RV.sum(1).log_().add_(peak_R)
            logp_M[tile], lse_M[tile], gap_M[tile] = target_R - lse_R, lse_R, peak_R - target_R
            if with_entropy:
                entropy_M[tile] = lse_R - p_RV.mul_(z_RV).sum(1) * torch.exp(peak_R - lse_R)
        kept = tile_RV if keep else None
        ctx.save_for_backward(hidden_MD, weight_VD, bias, targets_M, lse_M, entropy_M, kept)
        ctx.temperature, ctx.softcap, ctx.rows, ctx.with_entropy = temperature, softcap, rows, with_entropy
        top1_M = gap_M <= 0
        ctx.mark_non_differentiable(top1_M)
        ctx.set_materialize_grads(False)
        return logp_M.clone(), entropy_M.clone(), top1_M

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        grad_logp_M, grad_entropy_M = grads[0], grads[1] if ctx.with_entropy else None
        hidden_MD, weight_VD, bias, targets_M, lse_M, entropy_M, kept = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        num_tokens, vocab = hidden_MD.shape[0], weight_VD.shape[0]
        tile_RV = lse_M.new_empty(min(ctx.rows, num_tokens), vocab) if kept is None else kept
        # The kept tile may be needed again (retain_graph), and softcap's slope needs z beside the gradient.
        work_RV = tile_RV if kept is None and ctx.softcap is None else torch.empty_like(tile_RV)
        grad_hidden_MD = torch.zeros_like(hidden_MD) if wants_hidden else None
        # float32 accumulators: a sum over tiles in bfloat16 would lose the small ones.
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=lse_M.dtype) if wants_weight else None
        grad_bias_V = lse_M.new_zeros(vocab) if wants_bias else None
        with torch.autocast(hidden_MD.device.type, enabled=False):
            for start in range(0, num_tokens, ctx.rows):
                tile = slice(start, start + ctx.rows)
                z_RV, d_RV = (buffer[: num_tokens - start] for buffer in (tile_RV, work_RV))
                hidden_RD = hidden_MD[tile]
                if kept is None:
                    _fill_logits(z_RV, hidden_RD, weight_VD, bias, ctx.temperature, ctx.softcap)
                grad_logp_R = None if grad_logp_M is None else grad_logp_M[tile]
                torch.sub(z_RV, lse_M[tile, None], out=d_RV)
                if grad_entropy_M is None:
                    _through_logp(d_RV, targets_M[tile], grad_logp_R)
                else:
                    _through_entropy(d_RV, targets_M[tile], grad_logp_R, grad_entropy_M[tile], entropy_M[tile])
                if ctx.softcap is not None:
                    d_RV *= 1 - (z_RV * (ctx.temperature / ctx.softcap)) ** 2
                if ctx.temperature != 1.0:
                    d_RV.div_(ctx.temperature)
                if grad_bias_V is not None:
                    grad_bias_V += d_RV.sum(0)
                d_RV = d_RV.to(hidden_RD.dtype)
                if grad_hidden_MD is not None:
                    grad_hidden_MD[tile] = d_RV @ weight_VD
                if grad_weight_VD is not None:
                    _add_product(grad_weight_VD, d_RV, hidden_RD)
        grad_weight = None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype)
        grad_bias = None if grad_bias_V is None else grad_bias_V.to(bias.dtype)
        return grad_hidden_MD, grad_weight, grad_bias, None, None, None, None, None


_score = cast(Callable[..., tuple[Tensor, Tensor, Tensor]], _ChunkedScores.apply)  # pyright: ignore[reportUnknownMemberType]


def _through_logp(log_p_RV: Tensor, targets_R: Tensor, grad_logp_R: Tensor | None) -> None:
    """log p → ∂loss/∂z in place, from ∂logp/∂z = onehot − p."""
    if grad_logp_R is None:
        log_p_RV.zero_()
        return
    log_p_RV.exp_().mul_(-grad_logp_R[:, None])
    log_p_RV.scatter_add_(1, targets_R[:, None], grad_logp_R[:, None].to(log_p_RV.dtype))


def _through_entropy(
    log_p_RV: Tensor, targets_R: Tensor, grad_logp_R: Tensor | None, grad_entropy_R: Tensor, entropy_R: Tensor
) -> None:
    """As `_through_logp`, plus the entropy's share, from ∂H/∂z = −p·(log p + H)."""
    share_RV = (log_p_RV + entropy_R[:, None]).mul_(log_p_RV.exp()).mul_(-grad_entropy_R[:, None])
    _through_logp(log_p_RV, targets_R, grad_logp_R)
    log_p_RV.add_(share_RV)


def _add_product(total_VD: Tensor, d_RV: Tensor, hidden_RD: Tensor) -> None:
    """total += dᵀ · hidden."""
    if d_RV.dtype == total_VD.dtype:
        total_VD.addmm_(d_RV.t(), hidden_RD)
    else:
        total_VD += d_RV.t() @ hidden_RD
