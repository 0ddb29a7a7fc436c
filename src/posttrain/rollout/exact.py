"""Running rows whose log-probs are the trainer's to the bit: the engine's side of `models/exact.py`."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from posttrain.models.exact import FILLER, TiledForward
from posttrain.models.policy import Policy

_GROWTH = 64


@dataclass(eq=False)
class StoredPrompt:
    """The places of a prompt's tokens, in order; they are free again when nobody holds it. Shape: [P]."""

    places: torch.Tensor


class ExactRows:
    """Rows 0..R-1 are alive; a finished row is overwritten by the last one."""

    def __init__(self, policy: Policy, temperature: float) -> None:
        self._forward = TiledForward(policy.model, temperature or 1.0)
        self._device = policy.placement.device
        self._free: list[int] = []
        self.places = FILLER + 1
        """How many tokens there is room for, and the filler."""
        self._prompt_of: list[StoredPrompt] = []
        self._lengths: list[int] = []
        self._written: list[int] = []
        self._past = torch.zeros(0, 0, dtype=torch.long, device=self._device)

    def prefill(self, prompts: Sequence[tuple[int, ...]]) -> list[tuple[StoredPrompt, torch.Tensor]]:
        """Each prompt with the log-probs of what follows it, [V]."""
        return [self._prefill(prompt) for prompt in prompts]

    def _prefill(self, prompt: tuple[int, ...]) -> tuple[StoredPrompt, torch.Tensor]:
        ids_P = torch.tensor(prompt, device=self._device)
        places_P = torch.tensor(self._take_places(len(prompt)), device=self._device)
        positions_P = torch.arange(len(prompt), device=self._device)
        past_PP = places_P.expand(len(prompt), -1).tril()
        logp_NV = ids_P.new_empty(0)
        for tile in torch.arange(len(prompt)).split(self._forward.rows):
            logp_NV = self._forward(ids_P[tile], positions_P[tile], places_P[tile], past_PP[tile])
        stored = StoredPrompt(places_P)
        weakref.finalize(stored, self._free.extend, places_P.tolist())
        return stored, logp_NV[-1].clone()

    def add_row(self, prompt: StoredPrompt) -> None:
        row, length = len(self._lengths), len(prompt.places)
        self._make_room(row + 1, length)
        self._past[row, :length] = prompt.places
        self._prompt_of.append(prompt)
        self._lengths.append(length)

    def drop_row(self, row: int) -> None:
        """Forget a row; the last one takes its place."""
        own = slice(len(self._prompt_of[row].places), self._lengths[row])
        self._free += self._past[row, own].tolist()
        last_prompt, last_length = self._prompt_of.pop(), self._lengths.pop()
        if row < len(self._lengths):
            self._past[row] = self._past[len(self._lengths)]
            self._prompt_of[row], self._lengths[row] = last_prompt, last_length

    def step(self, ids: Sequence[int]) -> torch.Tensor:
        """One more token in each row → log-probs of what follows it, [R, V]."""
        scores_RV = self.run_drafts([(one,) for one in ids])
        self.keep_drafts([1] * len(ids))
        return scores_RV

    def run_drafts(self, ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """More tokens in each row → log-probs of what follows each of all, [N, V]. `keep_drafts` must follow, with how many of each stay."""
        rows = [row for row, own in enumerate(ids) for _ in own]
        positions = [length + n for length, own in zip(self._lengths, ids, strict=True) for n in range(len(own))]
        self._make_room(len(ids), max(positions) + 1)
        ids_N, rows_N, positions_N, places_N = (
            torch.tensor(values, device=self._device)
            for values in ([one for own in ids for one in own], rows, positions, self._take_places(len(rows)))
        )
        self._past[rows_N, positions_N] = places_N
        self._written = [len(own) for own in ids]
        past_NK = self._past[rows_N]
        tiles = torch.arange(len(rows)).split(self._forward.rows)
        return torch.cat([self._forward(ids_N[t], positions_N[t], places_N[t], past_NK[t]) for t in tiles])

    def keep_drafts(self, counts: Sequence[int]) -> None:
        """Of what each row wrote its first tokens stay; the others' places are free again."""
        for row, (kept, written) in enumerate(zip(counts, self._written, strict=True)):
            length = self._lengths[row]
            self._free += self._past[row, length + kept : length + written].tolist() if kept < written else []
            self._lengths[row] = length + kept

    def _take_places(self, count: int) -> list[int]:
        missing = count - len(self._free)
        if missing > 0:
            grown = max(self.places + missing, 2 * self.places)
            self._free += range(self.places, grown)
            self.places = grown
            self._forward.store.make_room(grown)
        taken = self._free[-count:]
        del self._free[-count:]
        return taken

    def _make_room(self, rows: int, columns: int) -> None:
        old_rows, old_columns = self._past.shape
        if rows <= old_rows and columns <= old_columns:
            return
        past = self._past.new_full((max(rows, old_rows), max(columns + _GROWTH, old_columns)), FILLER)
        past[:old_rows, :old_columns] = self._past
        self._past = past
