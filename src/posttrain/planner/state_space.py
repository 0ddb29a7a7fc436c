"""Sizes of Mamba's mixers, which a model has in place of attention and MLP.

Source: the modeling files of transformers (`mamba`, `falcon_mamba`, `mamba2`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

STATE_SPACES = ("mamba", "falcon_mamba", "mamba2")
"""Model types whose layers are a norm and a mixer each, and nothing else."""


@dataclass(frozen=True, slots=True)
class StateSpace:
    """Sizes of a mixer. `time_step` is the rank of the steps' projection; 0 is Mamba-2, whose steps have `heads` of their own.

    A Mamba of 8 channels with `inner` 16, `state` 4, `kernel` 4 and `time_step` 1 has projections of 8 → 32, 16 → 9, 1 → 16 and 16 → 8.
    """

    inner: int
    state: int
    kernel: int
    time_step: int
    heads: int = 0
    groups: int = 0
    chunk: int = 0
    biases: bool = False
    kernel_biases: bool = True

    def linear(self, hidden: int) -> dict[str, tuple[int, int]]:
        """Linear modules: name → (inputs, outputs)."""
        if not self.time_step:
            return {"in_proj": (hidden, self.inner + self._mixed + self.heads), "out_proj": (self.inner, hidden)}
        return {
            "in_proj": (hidden, 2 * self.inner),
            "x_proj": (self.inner, self.time_step + 2 * self.state),
            "dt_proj": (self.time_step, self.inner),
            "out_proj": (self.inner, hidden),
        }

    def other_params(self, hidden: int) -> int:
        """Of a mixer beside its matrices: the convolution, decays, skips, steps, biases, and Mamba-2's norm."""
        convolution = self._mixed * (self.kernel + self.kernel_biases)
        biases = (self.linear(hidden)["in_proj"][1] + hidden) * self.biases
        own = 3 * self.heads + self.inner if not self.time_step else self.inner * (self.state + 2)
        return convolution + biases + own

    @property
    def kept_values(self) -> int:
        """Values of a token that the backward pass of a mixer needs, as transformers computes it without kernels of its own.

        Measured with hooks on saved tensors at widths 64 and 128: Mamba keeps three states a token, Mamba-2 the scores within a chunk.
        """
        if self.time_step:
            return self.inner * (3 * self.state + 10)
        return self.inner * (self.state // 2 + 15) + 2 * self.heads * self.chunk

    @property
    def state_values(self) -> int:
        """What is kept of a sequence, however long: its states, and the last inputs of the convolution."""
        return self.inner * self.state + self._mixed * self.kernel

    @property
    def _mixed(self) -> int:
        """Channels that the convolution passes over."""
        return self.inner + 2 * self.groups * self.state


def state_space_of(values: Mapping[str, Any]) -> StateSpace | None:
    """The mixer that a config describes, of those that are nothing but mixers. Raises: TypeError, ValueError."""
    kind = values.get("model_type")
    if kind not in STATE_SPACES:
        return None
    hidden = int(values["hidden_size"])
    inner, state = int((values.get("expand") or 2) * hidden), values.get("state_size")
    kernel = int(values.get("conv_kernel") or 4)
    biases, kernel_biases = bool(values.get("use_bias", False)), bool(values.get("use_conv_bias", True))
    if kind != "mamba2":
        rank = values.get("time_step_rank", "auto")
        steps = math.ceil(hidden / 16) if rank == "auto" else int(rank)
        return StateSpace(inner, int(state or 16), kernel, steps, biases=biases, kernel_biases=kernel_biases)
    numbers = {"num_heads": 128, "n_groups": 8, "chunk_size": 256}
    heads, groups, chunk = (int(values.get(key) or usual) for key, usual in numbers.items())
    return StateSpace(inner, int(state or 128), kernel, 0, heads, groups, chunk, biases, kernel_biases)
