"""A generation batch: groups of samples, and how they are kept in a checkpoint.

On disk what is shared is stored once: the ids that the samples of a group begin with, and a stream that is constant along
a sample. A stream that no sample has is not stored. For GRPO with a reference that is 12 bytes a completion token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from posttrain.types import STREAMS, Sample

Group = tuple[Sample, ...]
Bounds = tuple[tuple[float, float] | None, ...]
"""Lowest and highest value of each reward function; None while it has scored nothing."""
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Experience:
    """The groups of one generation batch, of all ranks in the order of their prompts; where the prompts go on from.

    `reward_bounds` are those of the run so far.
    """

    generation: int
    next_prompt: int
    groups: tuple[Group, ...]
    metrics: dict[str, float]
    reward_bounds: Bounds

    def part(self, index: int, num_parts: int) -> list[Group]:
        """The groups of one of `steps_per_generation` optimizer steps; parts differ by one group at most."""
        size, longer = divmod(len(self.groups), num_parts)
        start = index * size + min(index, longer)
        return list(self.groups[start : start + size + (index < longer)])

    def header(self) -> dict[str, Any]:
        """What is not in `to_arrays`."""
        names = ("generation", "next_prompt", "metrics", "reward_bounds")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def of(cls, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Experience:
        bounds = tuple(None if pair is None else (pair[0], pair[1]) for pair in header["reward_bounds"])
        return cls(header["generation"], header["next_prompt"], from_arrays(arrays), dict(header["metrics"]), bounds)


def to_arrays(groups: Sequence[Group]) -> Arrays:
    """`groups` as flat arrays. Shapes: P groups, S samples in all, T ids after the shared ones, M trained tokens."""
    samples = [sample for group in groups for sample in group]
    shared = [_shared(group) for group in groups]
    tails = [sample.ids[length:] for group, length in zip(groups, shared, strict=True) for sample in group]
    masks = [sample.loss_mask[length:] for group, length in zip(groups, shared, strict=True) for sample in group]
    arrays: Arrays = {
        "group_sizes_P": np.array([len(group) for group in groups], np.int32),
        "shared_lengths_P": np.array(shared, np.int32),
        "shared_ids": _joined([group[0].ids[:length] for group, length in zip(groups, shared, strict=True)], np.int32),
        "lengths_S": np.array([len(tail) for tail in tails], np.int32),
        "ids_T": _joined(tails, np.int32),
        "mask_bits_T": np.packbits(_joined(masks, np.bool_)),
    }
    for name, dtype in STREAMS.items():
        arrays |= _stream_arrays(name, dtype, samples)
    return arrays


def from_arrays(arrays: Mapping[str, np.ndarray]) -> tuple[Group, ...]:
    """What `to_arrays` was given."""
    lengths = arrays["lengths_S"].tolist()
    tails = _split(arrays["ids_T"], lengths)
    mask = np.unpackbits(arrays["mask_bits_T"], count=sum(lengths)).astype(np.bool_)
    masks = _split(mask, lengths)
    prefixes = _split(arrays["shared_ids"], arrays["shared_lengths_P"].tolist())
    counts = [int(part.sum()) for part in masks]
    streams: dict[str, list[Any]] = {
        name: _stream(name, arrays, counts) for name in STREAMS if f"{name}.kept" in arrays
    }
    groups: list[Group] = []
    at = 0
    for prefix, size in zip(prefixes, arrays["group_sizes_P"].tolist(), strict=True):
        members = range(at, at + size)
        untrained = np.zeros(len(prefix), np.bool_)
        groups.append(tuple(
            Sample(
                np.concatenate([prefix, tails[place]]), np.concatenate([untrained, masks[place]]),
                **{name: values[place] for name, values in streams.items()},
            )
            for place in members
        ))  # fmt: skip
        at += size
    return tuple(groups)


def _shared(group: Group) -> int:
    """Ids that all samples of a group begin with and none is trained on."""
    length = min(_first_trained(sample) for sample in group)
    first = group[0].ids[:length]
    for sample in group[1:]:
        differs = np.flatnonzero(sample.ids[:length] != first[:length])
        length = int(differs[0]) if len(differs) else length
    return length


def _first_trained(sample: Sample) -> int:
    trained = np.flatnonzero(sample.loss_mask)
    return int(trained[0]) if len(trained) else len(sample.ids)


def _stream_arrays(name: str, dtype: type[np.generic] | None, samples: Sequence[Sample]) -> Arrays:
    """`kept`: per sample 0 absent, 1 constant (one value), 2 whole; `values`: what is stored, end to end."""
    streams = [getattr(sample, name) for sample in samples]
    if all(values is None for values in streams):
        return {}
    kept = [0 if values is None else 1 if _is_constant(values) else 2 for values in streams]
    stored = [values[:1] if how == 1 else values for values, how in zip(streams, kept, strict=True) if how]
    return {f"{name}.kept": np.array(kept, np.uint8), f"{name}.values": _joined(stored, dtype)}


def _is_constant(values: np.ndarray) -> bool:
    return len(values) > 0 and (values.strides == (0,) or bool((values == values[0]).all()))


def _stream(name: str, arrays: Mapping[str, np.ndarray], counts: Sequence[int]) -> list[np.ndarray | None]:
    kept, values = arrays[f"{name}.kept"].tolist(), arrays[f"{name}.values"]
    found: list[np.ndarray | None] = []
    at = 0
    for how, count in zip(kept, counts, strict=True):
        size = (0, 1, count)[how]
        part = values[at : at + size]
        found.append(None if how == 0 else np.broadcast_to(part, (count, *part.shape[1:])) if how == 1 else part)
        at += size
    return found


def _joined(parts: Sequence[np.ndarray], dtype: type[np.generic] | None) -> np.ndarray:
    """`dtype` None is that of the parts."""
    return np.concatenate(parts).astype(dtype or parts[0].dtype, copy=False) if parts else np.zeros(0, dtype)


def _split(values: np.ndarray, lengths: Sequence[int]) -> list[np.ndarray]:
    return np.split(values, np.cumsum(lengths)[:-1]) if lengths else []
