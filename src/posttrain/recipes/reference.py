"""Log-probs under the model a stage was given, in the cheapest way there is."""

from __future__ import annotations

import hashlib
import io
import logging
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from posttrain.config.preference import DPOKeys
from posttrain.config.resolved import to_data
from posttrain.data.cache import row_digest
from posttrain.data.dataset import origin, sequences
from posttrain.files import digest_json, write_atomic
from posttrain.models.batch import Batch, pack
from posttrain.models.load import freeze_reference
from posttrain.models.policy import Policy
from posttrain.models.provenance import source_digest
from posttrain.objectives.pair_scores import summed
from posttrain.protocols import Ranks
from posttrain.recipes.batches import for_rank
from posttrain.recipes.run.stage import Stage
from posttrain.recipes.run.stop import StoppedPolitely
from posttrain.types import TokenSeq

log = logging.getLogger(__name__)

KEPT = "reference_logp.npz"
"""In a stage's folder: what a pass gave, and of what."""
_ROWS_PER_PASS = 16
_PASSES_AT_ONCE = 32
_KEEP_EVERY_S = 60.0


@dataclass(frozen=True, slots=True)
class KeptScores:
    """Log-probs of rows under the starting model, one of each sequence. Shape of logp: [rows, 2], float32."""

    logp: np.ndarray
    place: dict[bytes, int]

    def of(self, rows: Sequence[Any]) -> np.ndarray:
        return self.logp[[self.place[_name(row)] for row in rows]]


class Reference:
    """Scores rows under the starting model: adapter off, log-probs kept from one pass, or a frozen copy."""

    def __init__(self, policy: Policy, ld_alpha: float | None, kept: KeptScores | None = None) -> None:
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
    def of(cls, policy: Policy, keys: DPOKeys, stage: Stage, *rows: Sequence[Any]) -> Reference:
        """Decide, say so, and do what must be done before the first step. `rows` are all that will be asked for.

        Raises: StoppedPolitely; the next start goes on with what was scored.
        """
        if cls.is_precomputed(policy, keys):
            kept = _passed(policy, keys, stage, rows)
            return cls(policy, keys.ld_alpha, kept)
        size = freeze_reference(policy)
        adapter = "with the adapter off" if policy.start is None else "with the adapter as it started"
        log.info("reference: %s", f"a frozen copy, {size / 1e6:.0f} MB" if size else f"the same weights {adapter}")
        return cls(policy, keys.ld_alpha)

    def logp(self, rows: Sequence[Any], batch: Batch) -> torch.Tensor:
        """Summed log-probs per sequence of `batch`, which packs `rows`. Shape: [S]."""
        device = self._policy.placement.device
        if self._kept is not None:
            return torch.from_numpy(self._kept.of(rows).ravel()).to(device)
        return summed(self.live_logp_M(batch), batch.seq_M.to(device), batch.num_sequences, self._ld_alpha)

    def live_logp_M(self, batch: Batch) -> torch.Tensor:
        """Per scored token, computed now. Shape: [M]."""
        return self._policy.reference_logp(batch)


def _passed(policy: Policy, keys: DPOKeys, stage: Stage, rows: Sequence[Sequence[Any]]) -> KeptScores:
    """The log-probs of all rows, each scored once: also if the run is stopped on the way, or resumed."""
    ranks, path = stage.ranks, stage.folder / KEPT
    names = [_name(row) for row in chain(*rows)]
    made_of = {
        "model": source_digest(policy.source),
        "keys": to_data(keys),
        "rows": hashlib.sha256(b"".join(names)).hexdigest(),
        "libraries": {name: version(name) for name in ("torch", "transformers")},
    }
    digest = digest_json(made_of)
    logp = ranks.broadcast(_found(path, digest, len(names)) if ranks.is_main else np.empty(0, np.float32))
    known = int(np.isfinite(logp).all(1).sum())
    kept_at = time.monotonic()
    for first, scored in _scores(policy, keys, ranks, chain(*rows), logp):
        logp[first : first + len(scored)] = scored
        is_last, stopping = first + len(scored) == len(logp), stage.is_stopping()
        if ranks.is_main and (is_last or stopping or time.monotonic() - kept_at > _KEEP_EVERY_S):
            write_atomic(path, _packed(logp, digest))
            kept_at = time.monotonic()
        if stopping:
            raise StoppedPolitely(
                f"{stage.kind}: stopped before the first step, within the log-probs of the reference; start again to go on"
            )
    log.info(
        "reference: log-probs of %d rows computed once%s; no second copy of the model",
        len(names), f", {known} of them before" if known else "",
    )  # fmt: skip
    return KeptScores(logp, {name: place for place, name in reversed(list(enumerate(names)))})


def _scores(
    policy: Policy, keys: DPOKeys, ranks: Ranks, rows: Iterator[Any], known: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """Stretches of rows that are not known: where each begins, and its log-probs. The passes are shared out between the ranks."""
    policy.model.eval()
    at_once = _ROWS_PER_PASS * _PASSES_AT_ONCE
    for first in range(0, len(known), at_once):
        stretch = list(islice(rows, at_once))
        if np.isfinite(known[first : first + at_once]).all():
            continue
        passes = [stretch[i : i + _ROWS_PER_PASS] for i in range(0, len(stretch), _ROWS_PER_PASS)]
        mine = [_pass(policy, micro.rows, keys.ld_alpha) for micro in for_rank(passes, ranks)]
        found = ranks.gather(mine)
        in_order = [found[number % ranks.world_size][number // ranks.world_size] for number in range(len(passes))]
        yield first, np.concatenate(in_order)


def _name(row: Any) -> bytes:
    """What a row is known by: its tokens and masks, and where it is from, for it may be there twice."""
    return row_digest(sequences(row), str(origin(row)))


def _found(path: Path, digest: str, num_rows: int) -> np.ndarray:
    """What an earlier start left of these rows; not a number where that is nothing."""
    if path.exists():
        try:
            with np.load(path, allow_pickle=False) as kept:
                if str(kept["of"]) == digest:
                    return kept["logp"]
        except (OSError, ValueError, KeyError, EOFError, NotImplementedError, zipfile.BadZipFile) as error:
            log.warning("%s cannot be read (%s): the reference's log-probs are computed again", path, error)
    return np.full((num_rows, 2), np.nan, np.float32)


def _packed(logp: np.ndarray, digest: str) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, logp=logp, of=np.array(digest))
    return buffer.getvalue()


@torch.no_grad()
def _pass(policy: Policy, rows: Sequence[Any], ld_alpha: float | None) -> np.ndarray:
    """Summed log-probs of each row's two sequences under the present weights."""
    batch = pack([[part for part in row if isinstance(part, TokenSeq)] for row in rows])
    logp_M = policy.score(batch).logp_M
    sums = summed(logp_M, batch.seq_M.to(logp_M.device), batch.num_sequences, ld_alpha)
    return sums.float().cpu().numpy().reshape(len(rows), -1)
