"""What the keys of `sharding` come to: over how many devices the model is cut, what stays gathered, and what is sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class ShardingPlan:
    """The keys of `sharding` under their own names; `per_node` devices of a machine are closer than others, where it is known."""

    dp_shard_size: int | str | None = None
    sp_size: int = 1
    tensor_parallel_size: int = 1
    reshard_after_forward: bool = True
    sync_each_batch: bool = True
    param_dtype: str = "float32"
    reduce_dtype: str = "float32"
    per_node: int = 0

    @classmethod
    def from_keys(cls, keys: Mapping[str, Any]) -> ShardingPlan:
        return cls(**keys)

    def on(self, per_node: int) -> ShardingPlan:
        """On machines of so many devices."""
        return replace(self, per_node=per_node)

    @property
    def param_bytes(self) -> int:
        """Of a gathered value."""
        return _BYTES[self.param_dtype]

    def num_shards(self, processes: int) -> int:
        """Over how many of these the model is cut."""
        size = self.per_node if self.dp_shard_size == "node" else self.dp_shard_size
        return min(processes, size) if isinstance(size, int) and size else processes

    def sharing(self, processes: int) -> int:
        """How many of these go through a micro-batch together."""
        return max(self.token_parts(processes), self.layer_parts(processes))

    def token_parts(self, processes: int) -> int:
        """Over how many of these a micro-batch's tokens are dealt."""
        return min(self.sp_size, processes)

    def layer_parts(self, processes: int) -> int:
        """How many of these hold a layer between them."""
        return min(self.tensor_parallel_size, processes)

    def sent_s(
        self, params: int, micro_batches: int, processes: int, links: tuple[float, float], *, trained: bool
    ) -> float:
        """Seconds that a device sends of a step. `links` are bytes/s inside of a machine and between machines."""
        inner, outer = links
        parts = self.layer_parts(processes)
        # Of a layer only the part is gathered that a device computes with, from those at its place in the other groups.
        params, shards = params // parts, self.num_shards(processes) // parts
        processes //= parts
        copies, near = processes // shards, inner if 0 < shards * parts <= self.per_node else outer
        gathers = micro_batches * (2 if self.reshard_after_forward else 1) * self.param_bytes
        reduces = (micro_batches if self.sync_each_batch else 1) * _BYTES[self.reduce_dtype] * trained
        seconds = (gathers + reduces) * params * (shards - 1) / shards / near
        return seconds + 2 * reduces * params / shards * (copies - 1) / copies / outer

    def gather_s(self, params: int, processes: int, links: tuple[float, float]) -> float:
        """Seconds in which a device gets all that it does not hold, layer by layer."""
        once = replace(self, reshard_after_forward=False)
        return once.sent_s(params, 1, processes, links, trained=False)

    def lines(self, processes: int) -> list[str]:
        """In words, what differs from cutting the model over all of them."""
        shards, sp = self.num_shards(processes), self.token_parts(processes)
        tp = self.layer_parts(processes)
        said = [
            f"cut over {shards} of {processes} processes, {processes // shards} copies" if shards < processes else "",
            f"micro-batches are shared by {sp} processes: each holds 1/{sp} of their tokens, and in attention 1/{sp} of the heads"
            if sp > 1
            else "",
            f"layers are held by {tp} processes between them: each computes 1/{tp} of their heads and MLP, or experts, for all tokens"
            if tp > 1
            else "",
            "" if self.reshard_after_forward else "gathered layers are kept from their forward to their backward",
            "" if self.sync_each_batch else "gradients are whole on each until they are added up, once a step",
            "" if self.param_dtype == "float32" else f"gathered and run in {self.param_dtype}",
            "" if self.reduce_dtype == "float32" else f"gradients added up in {self.reduce_dtype}",
        ]
        text = "; ".join(part for part in said if part)
        return [f"  shards  {text}"] if text else []


FULLY = ShardingPlan()
