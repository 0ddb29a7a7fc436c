"""Which prompts an RL run asks, in which order, and which of them taught nothing the last time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial

from posttrain.data.dataset import Dataset
from posttrain.protocols import Ranks
from posttrain.rollout.sampling import request_seed
from posttrain.types import PromptRow, RolloutGroup

_KEPT_ONE_IN = 4
_LONGEST_WALK = 16
"""Numbers looked at per prompt that is wanted, before prompts are taken as they come."""


Solved = dict[int, tuple[float, bool]]
"""Row of the data → mean reward of its latest group, and whether all its rewards were equal."""


class PromptStream:
    """The run's endless row of prompts: epoch after epoch, each shuffled by (seed, epoch). Keeps `solved` up to date.

    A row whose mean reward reached `retired_at` is asked no more, as long as others are left.
    Source: no-positive-resampling of ScaleRL, arXiv 2510.13786.
    """

    def __init__(self, data: Dataset[PromptRow], seed: int, solved: Solved, retired_at: float | None = None) -> None:
        self._data, self._seed, self._retired_at = data, seed, retired_at
        self._order = lru_cache(maxsize=2)(partial(data.order, seed))
        self.solved = solved

    def __call__(self, number: int) -> PromptRow:
        return self._data.rows[self.row_of(number)]

    def row_of(self, number: int) -> int:
        epoch, place = divmod(number, len(self._data))
        return self._order(epoch)[place]

    def next(self, cursor: int, count: int, *, resample: bool) -> tuple[list[int], int]:
        """`count` numbers from `cursor` on, and where the next ones start.

        With `resample`, of those whose row taught nothing the last time only one in four is asked again. Where two
        epochs have fewer rows left than are wanted, the last ones are taken as they come.
        """
        walk = max(_LONGEST_WALK * count if resample else 0, 0 if self._retired_at is None else 2 * len(self._data))
        end = cursor + walk
        numbers: list[int] = []
        while len(numbers) < count:
            left = count - len(numbers)
            if cursor + left > end or not (self._is_retired(cursor) or (resample and self._is_passed_over(cursor))):
                numbers.append(cursor)
            cursor += 1
        return numbers, cursor

    def note(self, number: int, group: RolloutGroup) -> tuple[int, float, bool] | None:
        """What a group says of its row: mean reward and whether all are equal; None if nothing was scored."""
        totals = [rollout.reward.total for rollout in group.rollouts if rollout.reward.total is not None]
        if not totals:
            return None
        return self.row_of(number), sum(totals) / len(totals), max(totals) - min(totals) < 1e-9

    def learn_from(self, groups: Sequence[tuple[int, RolloutGroup]], ranks: Ranks) -> None:
        """What this rank's groups say of their rows; of all ranks, so that all go on with the same prompts."""
        seen = [note for number, group in groups if (note := self.note(number, group)) is not None]
        notes = [note for rank in ranks.gather(seen) for note in rank]
        self.solved.update({row: (rate, equal) for row, rate, equal in notes if not self._has_retired(row)})

    def metrics(self) -> dict[str, float]:
        """The share of all rows that is asked no more, where rows retire."""
        if self._retired_at is None:
            return {}
        return {"prompts/retired": sum(map(self._has_retired, self.solved)) / len(self._data)}

    def _is_retired(self, number: int) -> bool:
        return self._retired_at is not None and self._has_retired(self.row_of(number))

    def _has_retired(self, row: int) -> bool:
        return self._retired_at is not None and row in self.solved and self.solved[row][0] >= self._retired_at

    def _is_passed_over(self, number: int) -> bool:
        _, equal = self.solved.get(self.row_of(number), (0.0, False))
        return equal and request_seed("resample", self._seed, number) % _KEPT_ONE_IN != 0
