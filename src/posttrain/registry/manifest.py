"""Manifests: which digests a stage took, which it made, and which manifest came before. A chain ends at a base model."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from posttrain.c_compiler import compiler_version
from posttrain.errors import RegistryError
from posttrain.evidence import Decision
from posttrain.files import digest_json

MODEL = "model"
"""Name of the model among inputs (what the stage started from) and outputs (what it made)."""
ADAPTER_TOTAL = "adapter_total"
"""Name, among outputs and in a version's evidence, of one adapter for the base that the whole lineage started from."""
CERTIFICATE = "certificate"
BESIDE = "beside"
"""Name, among details, that says a stage stands beside the line."""
_ONCE_REWARDED = frozenset({"grpo"})
"""Stages that earned rewards when manifests did not say so themselves."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """One stage. Usual inputs beside `model`: tokenizer, template, data, config, versions, environment, suite, certificate.

    `details` are for people (learning rate, tokens, wall time, command); they are part of the digest too. A model whose
    stage was `rewarded` takes an alias only with a passing reward certificate among the inputs.
    """

    stage: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    parent: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict[str, Any])
    rewarded: bool | None = None

    @property
    def needs_certificate(self) -> bool:
        return self.stage in _ONCE_REWARDED if self.rewarded is None else self.rewarded

    @property
    def is_beside(self) -> bool:
        """Whether it made a model that helps to train, as a reward model does: the next stage starts from where this one did."""
        return bool(self.details.get(BESIDE, False))

    @property
    def num_approvals(self) -> int:
        """People who must approve a verdict on the model that this stage made."""
        return int(self.details.get("approve", 0))

    @property
    def decisions(self) -> list[Decision]:
        """What people decided on the verdict that the model was registered with."""
        said: list[dict[str, Any]] = self.details.get("decisions", [])
        if "decision" in self.details:  # where manifests held one at most
            said = [self.details["decision"]]
        return [Decision(**record) for record in said]

    @property
    def digest(self) -> str:
        return digest_json(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Without what it does not say, so that the digest of an older manifest stays what it was."""
        return {name: value for name, value in asdict(self).items() if name != "rewarded" or value is not None}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Manifest:
        return cls(**record)

    def after(self, parent: Manifest) -> Manifest:
        """The same stage, chained to the one before it."""
        return replace(self, parent=parent.digest)


def check_chain(chain: Sequence[Manifest]) -> None:
    """From first to last, each starts from the model that the one before on the line made. Raises: RegistryError where it breaks."""
    if not chain:
        raise RegistryError("got no manifest, expected one per stage: lineage cannot be recorded afterwards")
    made, by = "", ""
    for place, manifest in enumerate(chain):
        if MODEL not in manifest.inputs or MODEL not in manifest.outputs:
            raise RegistryError(f"manifest of {manifest.stage}: inputs and outputs must both name {MODEL!r}")
        before = chain[place - 1] if place else None
        if manifest.parent != (before.digest if before else None):
            expected = before.digest if before else "no parent (it is the first)"
            raise RegistryError(f"manifest of {manifest.stage}: got parent {manifest.parent}, expected {expected}")
        if before and manifest.inputs[MODEL] != made:
            raise RegistryError(
                f"manifest of {manifest.stage} starts from {manifest.inputs[MODEL]}, but {by} {made}: a stage is missing between them"
            )
        if not manifest.is_beside:
            made, by = manifest.outputs[MODEL], f"{manifest.stage} made"
        elif before is None:
            made, by = manifest.inputs[MODEL], "the line starts from"


def environment_pins(packages: Iterable[str] | None = None) -> dict[str, Any]:
    """What bitwise repetition depends on: Python, platform, CPU, C compiler and package versions (all installed, or those named)."""
    if packages is None:
        versions = {dist.metadata["Name"]: dist.version for dist in metadata.distributions()}
    else:
        versions = {name: metadata.version(name) for name in packages}
    return {
        "python": sys.version.split()[0],
        "implementation": platform.python_implementation(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu": _cpu(),
        "compiler": compiler_version(),
        "packages": dict(sorted(versions.items(), key=lambda item: item[0].lower())),
    }


def _cpu() -> dict[str, Any]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {"model": platform.processor()}
    text = path.read_text()
    fields = {key: re.search(rf"^{key}\s*:\s*(.*)$", text, re.MULTILINE) for key in ("model name", "flags")}
    model, flags = (found.group(1) if found else "" for found in fields.values())
    vector = sorted(flag for flag in flags.split() if flag.startswith(("avx", "sse4", "fma", "amx")))
    return {"model": model or platform.processor(), "instructions": vector}
