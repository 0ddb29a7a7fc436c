"""What a tenant leaves on disk: its state, to go on from to the bit, and stage folders that eval, gate, serve and merge take."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from posttrain.checkpoint.parts import TensorParts, write_part
from posttrain.checkpoint.store import CheckpointStore, disk_errors
from posttrain.errors import CheckpointError
from posttrain.files import read_json, write_folder, write_json
from posttrain.models.continued import ADAPTER
from posttrain.models.export import save_policy
from posttrain.models.low_rank import WEIGHTS
from posttrain.models.proof import probe_logits
from posttrain.models.provenance import model_digest, source_digest
from posttrain.models.total import write_total
from posttrain.protocols import Share
from posttrain.recipes.run.run_folder import StageResult
from posttrain.recipes.run.train_state import flatten_optimizer, unflatten
from posttrain.recipes.tinker import AdapterHost, Tenant, Tensors

_FORMAT = 1
_STATE = "state.json"


@dataclass(frozen=True, slots=True)
class SavedState:
    """Where a state lies, and the number of the request that saved it."""

    folder: Path
    seq: int


def save_state(host: AdapterHost, tenant: Tenant, folder: Path, seq: int) -> SavedState:
    """Whole and on disk when this returns; a state that was there stays until then. Raises: CheckpointError."""
    names = list(tenant.tensors)
    # By place, as torch numbers parameters: a tenant's optimizer has one group of all of them.
    state = {names[place]: values for place, values in tenant.optimizer.state_dict()["state"].items()}
    moments, scalars = flatten_optimizer(
        {f"{n}|{key}": value for n, values in state.items() for key, value in values.items()}
    )
    parts = {"weights": tenant.tensors, "optimizer": moments, "gradients": tenant.gradients}
    record = {
        "format": _FORMAT, "seq": seq, "step": tenant.step, "tokens": tenant.tokens, "pending": tenant.pending,
        "spoiled": tenant.spoiled, "scalars": scalars, "names": names,
    }  # fmt: skip

    def fill(temporary: Path) -> None:
        for stem, tensors in parts.items():
            if tensors:
                write_part(temporary / f"{stem}.safetensors", {name: _whole(t) for name, t in tensors.items()})
        write_json(temporary / _STATE, record)

    folder.parent.mkdir(parents=True, exist_ok=True)
    return SavedState(CheckpointStore(folder, keep_last=1).save(seq, fill).path, seq)


def _whole(tensor: torch.Tensor) -> Share:
    rows = tensor.detach().cpu().contiguous()
    return Share(rows, 0, tuple(rows.shape))


def find_state(folder: Path) -> SavedState:
    """The state in the folder of a save, every byte of it as written. Raises: CheckpointError."""
    found = CheckpointStore(folder).newest_valid()
    if found is None:
        raise CheckpointError(f"{folder} holds no state that is whole")
    return SavedState(found.path, found.step)


def load_state(host: AdapterHost, saved: SavedState, *, optimizer: bool, gradients: bool) -> Tenant:
    """A tenant as it was saved; without `optimizer` it begins with those weights. Raises: CheckpointError for another adapter."""
    record = read_json(saved.folder / _STATE)
    tenant = host.fresh(0)
    if record["format"] != _FORMAT or record["names"] != list(tenant.tensors):
        raise CheckpointError(
            f"{saved.folder} is the state of another base or adapter, or of another version of posttrain"
        )
    _fill(tenant.tensors, _read(saved.folder, "weights"), saved.folder)
    if optimizer:
        moments = _read(saved.folder, "optimizer") if (saved.folder / "optimizer.safetensors").exists() else {}
        values = unflatten(moments, record["scalars"])
        state = {place: values[name] for place, name in enumerate(tenant.tensors) if name in values}
        whole = tenant.optimizer.state_dict()
        tenant.optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})
        tenant.step, tenant.tokens = record["step"], record["tokens"]
    if gradients:
        if (saved.folder / "gradients.safetensors").exists():
            device = next(iter(tenant.tensors.values())).device
            tenant.gradients = {name: t.to(device) for name, t in _read(saved.folder, "gradients").items()}
        tenant.pending, tenant.spoiled = dict(record["pending"]), record["spoiled"]
    return tenant


def _read(folder: Path, stem: str) -> Tensors:
    with TensorParts(folder, stem) as parts:
        return {name: parts.read(name) for name in parts.names()}


def _fill(own: Tensors, found: Mapping[str, torch.Tensor], where: Path) -> None:
    if own.keys() != found.keys() or any(own[name].shape != found[name].shape for name in own):
        raise CheckpointError(f"{where} is of another base or adapter: names or shapes of its weights differ")
    for name, tensor in found.items():
        own[name].copy_(tensor)


def export_stage(host: AdapterHost, tenant: Tenant, folder: Path, metrics: Mapping[str, float]) -> StageResult:
    """`model/`, `adapter/`, `adapter_total/` and `result.json`, as a stage leaves them, whole or not there.

    Raises: ModelError if what is written is not the trained model; CheckpointError.
    """
    begun = time.monotonic()

    def fill(temporary: Path) -> None:
        with host.holding(tenant):
            host.policy.model.eval()
            logits = probe_logits(host.policy.model)
            save_policy(host.policy, temporary / "model", host.keys, trained=logits)
            total = write_total(host.policy, temporary, host.keys, logits, None)
        made = StageResult(
            kind="tinker", folder=temporary, model_dir=temporary / "model", model_digest=model_digest(temporary / "model"),
            parent_digest=source_digest(host.policy.source), steps=tenant.step, tokens=tenant.tokens,
            wall_s=time.monotonic() - begun, metrics=metrics, adapter_total=total,
        )  # fmt: skip
        made.save()

    with disk_errors(folder.parent):
        write_folder(folder, fill)
    return StageResult.load(folder)


def exported_tensors(host: AdapterHost, folder: Path) -> Tensors:
    """The adapter of an exported stage, under the names of the host's parameters. Raises: CheckpointError."""
    from safetensors.torch import load_file

    found: dict[str, Any] = load_file(folder / ADAPTER / WEIGHTS)
    tenant = host.fresh(0)
    _fill(tenant.tensors, {name: found.get(_in_file(name), torch.empty(0)) for name in tenant.tensors}, folder)
    return tenant.tensors


def _in_file(name: str) -> str:
    """A parameter's name as PEFT writes it: without that of the adapter."""
    return name.replace(".default.", ".")
