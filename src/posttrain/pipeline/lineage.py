"""From a run's records to manifests, a registered version and an alias."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.config.pipeline import PipelineKeys
from posttrain.config.rl import RLKeys
from posttrain.data.origin import data_origins
from posttrain.errors import RegistryError
from posttrain.evals.suite import suite_files
from posttrain.evidence import Decision
from posttrain.files import digest_json, read_record, write_atomic
from posttrain.pipeline.escalation import DECISIONS_FILE, decisions_on
from posttrain.pipeline.hub_push import hub_tag, push_to_hub
from posttrain.pipeline.judge import last_verdict
from posttrain.pipeline.selection import gate_after
from posttrain.pipeline.state import RunState, StageEntry
from posttrain.pipeline.stored_data import DATA, stored_files
from posttrain.pipeline.taken_over import adapter_total_of
from posttrain.pipeline.train import Place
from posttrain.registry.card import model_card
from posttrain.registry.manifest import ADAPTER_TOTAL, BESIDE, CERTIFICATE, MODEL, Manifest
from posttrain.registry.registry import Registry


def manifests(place: Place, state: RunState, last: int, decisions: Sequence[Decision] = ()) -> list[Manifest]:
    """One per stage that the model of stage `last` went through, chained; the last says what people decided, and how many had to.

    Inputs are those that each stage had when it began, whatever lies there by now.
    """
    chain: list[Manifest] = []
    suites = {f"suite.{name}": digest for name, digest in state.pins.items() if name.startswith("evals.")}
    for index in range(1, last + 1):
        entry = state.stage(index)
        assert entry is not None, "the stages before the last one ran"
        inputs = {**entry.inputs, "config": entry.input_digest, "environment": entry.environment, **suites}
        if index == 1 and place.parent is not None:
            inputs["parent"] = place.parent.manifest
        keys = place.keys.stages[index - 1].keys
        rewarded = isinstance(keys, RLKeys)
        if rewarded and keys.reward_check == "require" and (certificate := certificate_of(place.folder / entry.folder)):
            inputs[CERTIFICATE] = digest_json(certificate)
        details = _details(place, state, entry) | ({BESIDE: "the line"} if keys.is_reward_model else {})
        if index == last:
            details |= _people(place.keys, last, decisions)
        adapter = adapter_total_of(entry.files)
        outputs = {MODEL: entry.output_digest, **({ADAPTER_TOTAL: adapter} if adapter else {})}
        manifest = Manifest(entry.kind, inputs, outputs, details=details, rewarded=rewarded)
        chain.append(manifest.after(chain[-1]) if chain else manifest)
    return chain


def _people(keys: PipelineKeys, last: int, decisions: Sequence[Decision]) -> dict[str, Any]:
    gate = gate_after(keys, last)
    asked = {"approve": gate.approve} if gate is not None and gate.approve else {}
    return asked | ({"decisions": [decision.to_json() for decision in decisions]} if decisions else {})


def _details(place: Place, state: RunState, entry: StageEntry) -> dict[str, Any]:
    keys = place.keys.stages[entry.index - 1].keys
    details = {"steps": entry.steps, "tokens": entry.tokens, "wall_s": round(entry.wall_s, 1), "attempt": entry.attempt,
               "learning_rate": keys.learning_rate, "changed": dict(entry.changed)}  # fmt: skip
    details["base_model"] = place.parent.version if place.parent else _public_name(place.keys.base_model)
    details["datasets"] = [_public_name(source.path) for source in keys.datasets]
    if origins := data_origins([source.path for source in keys.datasets]):
        details["data_origins"] = origins
    if place.keys.register_ is not None and (
        licence := place.keys.register_.license or licence_of(place.keys.base_model)
    ):
        details["license"] = licence
    if entry.index == 1 and place.parent is not None:
        details["parent_version"] = place.parent.version
    if entry.accepted:
        details["kept"] = [f"{word.at} {word.by}: {'; '.join(word.changed)}" for word in state.kept]
    return details


def _public_name(path: str) -> str:
    """A hub id, or the last part of a local path: where it lay is nobody's business."""
    return Path(path).name if Path(path).is_absolute() else path


def licence_of(base_model: str) -> str:
    """What the model card of a local base says about its licence, or nothing."""
    card = Path(base_model) / "README.md"
    found = (
        re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
        if card.is_file()
        else None
    )
    stated = re.search(r"^license:\s*(\S+)\s*$", found.group(1), re.MULTILINE) if found else None
    return stated.group(1) if stated else ""


def certificate_of(stage_folder: Path) -> dict[str, Any] | None:
    """The reward certificate that a stage was started on. Raises: DamagedFileError."""
    path = stage_folder / "certificate.json"
    return read_record(path, dict, f"put a copy of {path} back") if path.exists() else None


def register_model(place: Place, state: RunState, last: int) -> dict[str, Any]:
    """Register the model of stage `last` and promote it. What is held, or refused, is registered without the alias."""
    keys, folder = place.keys, place.folder
    target, verdict = keys.register_, last_verdict(state, folder)
    assert target is not None and verdict is not None, "only a model with a verdict is registered"
    decided = decisions_on(folder, state.gates[-1])
    chain, final = manifests(place, state, last, decided), state.stage(last)
    assert final is not None, "the last stage ran"
    stages = [state.stage(index) or final for index in range(1, last + 1)]
    certificates = [record for stage in stages if (record := certificate_of(folder / stage.folder))]
    registry = Registry(Path(target.registry))
    try:
        entry = registry.register(
            target.name,
            folder / final.folder / "model",
            chain,
            verdict,
            certificates,
            evidence=_evidence(place, final) | _stored(place, stages),
        )
        held = sorted({rule for stage in stages for rule in stage.held})
        if held:
            registry.tag(entry.name, entry.version, "hold", f"health: {', '.join(held)}")
        record = {"name": entry.name, "version": entry.version, "digest": entry.digest, "alias": None}
        try:
            registry.promote(entry.name, entry.version, target.alias, verdict, decisions=decided)
        except RegistryError as refusal:
            message = f"registered {entry.name}@{entry.version}, not promoted: {refusal}"
            return record | {"refused": str(refusal), "message": message}
        write_atomic(folder / "MODEL_CARD.md", model_card(registry, entry.name, entry.version))
        message = f"registered {entry.name}@{entry.version}, now {target.alias}"
        return record | {"alias": target.alias, "message": message}
    finally:
        registry.close()


def push_registered(keys: PipelineKeys, registered: Mapping[str, Any]) -> str:
    """Where the version was pushed to on the hub; empty where none was asked for, or it is there. Raises: RegistryError."""
    target = keys.register_
    if target is None or target.hub_model_id is None:
        return ""
    registry = Registry(Path(target.registry))
    try:
        entry = registry.show(registered["name"], registered["version"])
        there = entry.tags.get(hub_tag(adapter=False), "").startswith(f"{target.hub_model_id}@")
        return "" if there else push_to_hub(registry, entry, target.hub_model_id)
    finally:
        registry.close()


def is_there(keys: PipelineKeys, state: RunState) -> bool:
    """Whether the registry holds the version that this run says it registered: it may have been moved away since."""
    target, said = keys.register_, state.registered
    assert target is not None and said is not None, "asked once something was registered"
    registry = Registry(Path(target.registry))
    try:
        found = {(entry.version, entry.digest) for entry in registry.entries(said["name"])}
    finally:
        registry.close()
    return (said["version"], said["digest"]) in found


def _stored(place: Place, stages: Sequence[StageEntry]) -> dict[str, Mapping[str, Path]]:
    """The files that the stages read, where they are to be kept."""
    if place.keys.register_ is None or place.keys.register_.data != "store":
        return {}
    return {DATA: stored_files(place.keys, place.project, place.folder, stages)}


def _evidence(place: Place, final: StageEntry) -> dict[str, Path | Mapping[str, Path]]:
    """What is kept with a version beside the model, by role."""
    folder = place.folder
    found: dict[str, Path | Mapping[str, Path]] = {
        "evals": folder / "evals",
        "gates": folder / "gates",
        "config": folder / "config.yaml",
    }
    found["environment"] = folder / "environment.json"
    for name, suite in place.keys.evals.items():
        files = suite_files(Path(suite.path))
        if files:
            found[f"suite.{name}"] = files if len(files) > 1 else Path(suite.path)
    if adapter_total_of(final.files):
        found[ADAPTER_TOTAL] = folder / final.folder / ADAPTER_TOTAL
    if (decided := folder / DECISIONS_FILE).exists():
        found["decisions"] = decided
    return found
