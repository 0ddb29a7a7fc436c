"""Log-probs under the model a stage was given, in the cheapest way there is."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from posttrain.config.preference import DPOKeys
from posttrain.models.batch import Batch, pack
from posttrain.models.load import freeze_reference
from posttrain.models.policy import Policy
from posttrain.objectives.pair_scores import summed
from posttrain.types import TokenSeq

log = logging.getLogger(__name__)

_ROWS_PER_PASS = 16


class Reference:
    """Scores rows under the starting model: adapter off, log-probs kept from one pass, or a frozen copy."""

    def __init__(
        self, policy: Policy, ld_alpha: float | None, kept: dict[int, tuple[float, ...]] | None = None
    ) -> None:
        self._policy, self._ld_alpha = policy, ld_alpha
        self._kept = kept

    @staticmethod
    def is_precomputed(policy: Policy, keys: DPOKeys) -> bool:
        # KTO also scores prompts with other rows' answers, which no pass over the data can know.
        wanted = keys.precompute_ref_log_probs
        if keys.sync_ref_model:
            return False
        return (not policy.has_adapter if wanted == "auto" else wanted) and keys.row_kind == "pairs"

    @classmethod
    def of(cls, policy: Policy, keys: DPOKeys, *rows: Sequence[Any]) -> Reference:
        """Decide, say so, and do what must be done before the first step. `rows` are all that will be asked for."""
        if cls.is_precomputed(policy, keys):
            unique = list({id(row): row for part in rows for row in part}.values())
            passed = _pass(policy, unique, keys.ld_alpha)
            kept = {id(row): logp for row, logp in zip(unique, passed, strict=True)}
            log.info("reference: log-probs of %d rows computed once; no second copy of the model", len(kept))
            return cls(policy, keys.ld_alpha, kept)
        size = freeze_reference(policy)
        adapter = "with the adapter off" if policy.start is None else "with the adapter as it started"
        log.info("reference: %s", f"a frozen copy, {size / 1e6:.0f} MB" if size else f"the same weights {adapter}")
        return cls(policy, keys.ld_alpha)

    def logp(self, rows: Sequence[Any], batch: Batch) -> torch.Tensor:
        """Summed log-probs per sequence of `batch`, which packs `rows`. Shape: [S]."""
        device = self._policy.placement.device
        if self._kept is not None:
            return torch.tensor([value for row in rows for value in self._kept[id(row)]], device=device)
        return summed(self.live_logp_M(batch), batch.seq_M.to(device), batch.num_sequences, self._ld_alpha)

    def live_logp_M(self, batch: Batch) -> torch.Tensor:
        """Per scored token, computed now. Shape: [M]."""
        return self._policy.reference_logp(batch)


@torch.no_grad()
def _pass(policy: Policy, rows: Sequence[Any], ld_alpha: float | None) -> list[tuple[float, ...]]:
    """Summed log-probs of each row's sequences under the present weights."""
    policy.model.eval()
    result: list[tuple[float, ...]] = []
    for start in range(0, len(rows), _ROWS_PER_PASS):
        families = [
            [part for part in row if isinstance(part, TokenSeq)] for row in rows[start : start + _ROWS_PER_PASS]
        ]
        batch = pack(families)
        logp_M = policy.score(batch).logp_M
        sums = iter(summed(logp_M, batch.seq_M.to(logp_M.device), batch.num_sequences, ld_alpha).tolist())
        result += [tuple(next(sums) for _ in family) for family in families]
    return result
