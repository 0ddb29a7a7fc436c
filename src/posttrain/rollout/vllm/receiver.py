"""What runs inside a worker of vLLM: the receiving end of vLLM's own weight-transfer protocol.

How the tensors come is a row of `TRANSFERS`. Each update is a layerwise reload. A plain `load_weights` fails half-way where layers were packed for the CPU.
Imported by vLLM alone.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from posttrain.rollout.transfer import TRANSFERS, ReceivingEnd, TransferMessage
from posttrain.rollout.vllm.options import BACKEND


@dataclass
class Init(WeightTransferInitInfo):
    """The row of `TRANSFERS`, and what its sending end says first."""

    transfer: str
    details: TransferMessage


@dataclass
class Update(WeightTransferUpdateInfo):
    """A message of the sending end: some of the tensors of one version."""

    message: TransferMessage = field(default_factory=dict[str, Any])


class Receiver(WeightTransferEngine):
    """Loads what it is sent, under the names of a checkpoint's file."""

    init_info_cls = Init
    update_info_cls = Update
    _end: ReceivingEnd

    def init_transfer_engine(self, init_info: Init) -> None:
        self._end = TRANSFERS[init_info.transfer].receiver(init_info.details)

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class waits for an accelerator, which a CPU does not have.
        self.receive_weights(self.parse_update_info(update_info))
        if not current_platform.is_cpu():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: Update) -> None:
        model: Any = self.model
        try:
            model.load_weights(iter(self._end.take(update_info.message)))
        except BaseException:
            # vLLM drops an update that failed. Modules that engines of this process share must not stay half-way.
            finalize_layerwise_reload(self.model, self.model_config)
            raise

    def finish_weight_update(self) -> None:
        try:
            self._end.finish()
        finally:
            finalize_layerwise_reload(self.model, self.model_config)
        if current_platform.is_cpu():
            self._pack_tied_heads()

    def _pack_tied_heads(self) -> None:
        """A head tied to the embedding keeps a packed copy of its own, which the reload does not renew."""
        for module in self.model.modules():
            if isinstance(module, ParallelLMHead):
                dispatch_cpu_unquantized_gemm(module, remove_weight=False)

    def shutdown(self) -> None:
        self._end.close()


class Worker:
    """Mixed into vLLM's worker. That this module is imported there is all that is wanted of it."""


WeightTransferEngineFactory.register_engine(BACKEND, Receiver)
