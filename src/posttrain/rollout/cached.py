"""Running rows on the K/V cache: a prompt is prefilled once, then every step is one token of every row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from posttrain.models.attention import Prefill
from posttrain.models.batch import Batch, pack
from posttrain.models.decode import DecodeStep, LlamaStep, decode_step, why_not_prepacked
from posttrain.models.device import uploaded
from posttrain.models.native import NativeStep, why_not_native
from posttrain.models.policy import Policy
from posttrain.rollout.kv import Padding, RowCache
from posttrain.rollout.prefixes import PrefixCache
from posttrain.rollout.prompts import PromptKV
from posttrain.types import TokenSeq

_LEAST_ROWS = 2
"""Rows of a call that repay it to lay weights out: a count, with no clock."""


@dataclass(frozen=True)
class Shortcuts:
    """What makes rows faster, with other last bits.

    `pad_prompts`: those of prompts of near length are attended to together. `prepack`: weights are laid out for the products.
    `native_kernels`: what lies between the products is done by kernels that are built here.
    """

    pad_prompts: bool = False
    prepack: bool = False
    native_kernels: bool = False

    def of_call(self, num_rows: int) -> Shortcuts:
        """Those for a call that begins with so many rows."""
        return replace(self, prepack=self.prepack and num_rows >= _LEAST_ROWS)

    def without_effect(self, policy: Policy, *, paged: bool) -> dict[str, str]:
        """Those of them that do nothing for the policy, and why. `paged`: it decodes on a GPU's pages."""
        alone = "" if policy.ragged else f"{policy.source} decodes row by row"
        whys = {
            "pad_prompts": ("pages need no filling up" if paged else alone) if self.pad_prompts else "",
            "prepack": alone or why_not_prepacked(policy) if self.prepack else "",
            "native_kernels": alone or why_not_native(policy) if self.native_kernels else "",
        }
        return {key: why for key, why in whys.items() if why}


NO_SHORTCUTS = Shortcuts()


class CachedRows:
    """Rows on the K/V cache, with their logits."""

    def __init__(self, policy: Policy, shortcuts: Shortcuts = NO_SHORTCUTS) -> None:
        self._policy, self._device = policy, policy.placement.device
        channels = policy.base.config.get_text_config().hidden_size
        self._cache = RowCache(self._device, Padding.of(channels) if shortcuts.pad_prompts else None)
        self._decode = _step(policy, shortcuts)
        self.add_row, self.drop_row = self._cache.add_row, self._cache.drop_row
        self.keep_drafts = self._cache.keep_step

    def prefill(self, prompts: Sequence[tuple[int, ...]]) -> list[tuple[PromptKV, torch.Tensor]]:
        """Each prompt with the logits of what follows it, [V]."""
        # `pack` leaves out a sequence's last token, which predicts nothing in training; here it predicts the answer.
        rows = [[TokenSeq((*prompt, 0), (False,) * (len(prompt) + 1))] for prompt in prompts]
        batch = pack(rows, least_shared=math.inf).to(self._device)
        kept = self._cache.expect([(tree.start, tree.split) for tree in batch.layout.trees])
        last = torch.tensor([tree.split - 1 for tree in batch.layout.trees], device=self._device)
        return list(zip(kept, self._encoded(batch, last), strict=True))

    def _encoded(self, batch: Batch, last: torch.Tensor) -> torch.Tensor:
        """By the model's own modules, whose bits are the trainer's, unless the step has other kernels than these."""
        if isinstance(self._decode, LlamaStep) and self._decode.encodes:
            return self._decode(batch.input_ids_N, batch.position_ids_N, Prefill(batch.layout, self._cache), last)
        output = self._policy.model(
            input_ids=batch.input_ids_N[None], position_ids=batch.position_ids_N[None],
            logits_to_keep=last, use_cache=False, layout=batch.layout, kv_store=self._cache,
        )  # fmt: skip
        return output.logits[0]

    def prefill_from(
        self, prefixes: PrefixCache, adapter: str | None, prompt: tuple[int, ...], assign: Callable[[int], None]
    ) -> tuple[PromptKV, torch.Tensor]:
        """The same of one prompt, of which `prefixes` may know the beginning."""
        keys, values, logits_V = prefixes.encode(adapter, prompt, assign)
        return self._cache.take(keys, values), logits_V

    def step(self, ids: Sequence[int]) -> torch.Tensor:
        """One more token in each row → logits of what follows it, [R, V]."""
        return self.run_drafts([(one,) for one in ids])

    def run_drafts(self, ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """More tokens in each row → logits of what follows each of all, [N, V]. With several in one, `keep_drafts` must follow, with how many of each stay."""
        self._cache.begin_step([len(own) for own in ids])
        ids_N = uploaded([one for own in ids for one in own], self._device)
        positions_N = uploaded(self._cache.positions(), self._device)
        if isinstance(self._decode, NativeStep) and len(ids_N) == len(ids) and not self._cache.shares_much:
            return self._decode.one_each(ids_N, positions_N, self._cache)
        return self._decode(ids_N, positions_N, self._cache)


def _step(policy: Policy, shortcuts: Shortcuts) -> DecodeStep:
    prepack = shortcuts.prepack and not why_not_prepacked(policy)
    if shortcuts.native_kernels and not why_not_native(policy):
        return NativeStep(policy, prepack)
    return decode_step(policy, prepack)
