"""The keys of the engine that samples in RL."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from posttrain.config.knob import Keys, knob

TRANSFERS_OF = {"embedded": ("shared",), "vllm": ("copy", "file")}
"""The ways in which each engine can take weights, the best first."""

# fmt: off
# One key a line, as in `stages`.


class RolloutKeys(Keys):
    """Which engine samples, and how it is started; all but `engine` and `exact` are for vLLM, under its own names where it has one."""

    engine: Literal["embedded", "vllm"] = knob("embedded", "What samples: our own engine, on the weights in training; or vLLM in this process (pip install 'posttrain[vllm]').", also="use_vllm (TRL)")
    exact: bool = knob(False, "Make the embedded engine's log-probs the trainer's to the last bit: slower, on one thread of a CPU.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = knob("auto", "Dtype that vLLM computes in; `auto` is the trainer's.")
    max_model_len: int | None = knob(None, "Longest prompt and answer together, in tokens; null is as long as model and memory allow.", ge=2, also="vllm_max_model_length (TRL)", example=4096)
    memory_gib: float | None = knob(None, "GiB for vLLM's keys and values; null takes 1 on a CPU, 8 on a GPU.", gt=0, example=4.0)
    tensor_parallel_size: int = knob(1, "Processes that vLLM splits the model over.", ge=1, also="vllm_tensor_parallel_size (TRL)")
    enforce_eager: bool = knob(False, "Let vLLM compile nothing; on a CPU it never does.")

    transfer: Literal["auto", "shared", "copy", "file"] = knob("auto", "How weights get to the engine; `auto` is the first that it can: `embedded` decodes with those in training (`shared`), `vllm` takes a `copy` or a `file`.")

    @property
    def way(self) -> str:
        """`transfer`, with `auto` resolved."""
        return TRANSFERS_OF[self.engine][0] if self.transfer == "auto" else self.transfer

    @model_validator(mode="after")
    def _carries_weights(self) -> RolloutKeys:
        ways = TRANSFERS_OF[self.engine]
        if self.way not in ways:
            raise ValueError(f"rollout.transfer: {self.transfer} with rollout.engine: {self.engine}, which takes its weights by {' or '.join(ways)}")
        return self

    @model_validator(mode="after")
    def _only_ours_is_exact(self) -> RolloutKeys:
        if self.exact and self.engine != "embedded":
            raise ValueError(f"rollout.exact: true with rollout.engine: {self.engine}; only the embedded engine can be; set exact: false")
        return self
