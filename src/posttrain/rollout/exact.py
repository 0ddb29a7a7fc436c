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
        count = len(self._lengths)
        self._make_room(count, max(self._lengths) + 1)
        ids_R, positions_R, places_R = (
            torch.tensor(values, device=self._device) for values in (ids, self._lengths, self._take_places(count))
        )
        self._past[torch.arange(count), positions_R] = places_R
        self._lengths = [length + 1 for length in self._lengths]
        tiles = torch.arange(count).split(self._forward.rows)
        parts = [self._forward(ids_R[t], positions_R[t], places_R[t], self._past[t]) for t in tiles]
        return torch.cat(parts)

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
