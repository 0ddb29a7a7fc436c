"""From a run's records to manifests, a registered version and an alias."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import posttrain
from posttrain.config.pipeline import PipelineKeys
from posttrain.errors import RegistryError
from posttrain.evidence import Decision
from posttrain.files import digest_json, read_json, write_atomic
from posttrain.pipeline.escalation import decision_on
from posttrain.pipeline.judge import last_verdict
from posttrain.pipeline.pins import environment
from posttrain.pipeline.state import RunState
from posttrain.registry.card import model_card
from posttrain.registry.manifest import CERTIFICATE, MODEL, Manifest, code_digest
from posttrain.registry.registry import Registry


def manifests(
    keys: PipelineKeys, state: RunState, folder: Path, last: int, decision: Decision | None = None
) -> list[Manifest]:
    """One per stage that the model of stage `last` went through, chained; the last says what a person decided."""
    chain: list[Manifest] = []
    common = {"code": code_digest(Path(posttrain.__file__).parent), "environment": digest_json(environment())}
    common |= {f"suite.{name}": digest for name, digest in state.pins.items() if name.startswith("evals.")}
    for index in range(1, last + 1):
        entry = state.stage(index)
        assert entry is not None, "the stages before the last one ran"
        prefix = f"stages.{index}.{entry.kind}."
        inputs = {
            MODEL: chain[-1].outputs[MODEL] if chain else state.pins["base_model"],
            "config": entry.input_digest,
            **common,
        }
        inputs |= {name.removeprefix(prefix): digest for name, digest in state.pins.items() if name.startswith(prefix)}
        checked = keys.stages[index - 1].keys.model_dump().get("reward_check") == "require"
        if entry.kind == "grpo" and checked and (certificate := certificate_of(folder / entry.folder)):
            inputs[CERTIFICATE] = digest_json(certificate)
        details = {"steps": entry.steps, "tokens": entry.tokens, "wall_s": round(entry.wall_s, 1), "attempt": entry.attempt,
                   "learning_rate": keys.stages[index - 1].keys.learning_rate, "changed": dict(entry.changed)}  # fmt: skip
        if index == last and decision is not None:
            details["decision"] = decision.to_json()
        manifest = Manifest(entry.kind, inputs, {MODEL: entry.output_digest}, details=details)
        chain.append(manifest.after(chain[-1]) if chain else manifest)
    return chain


def certificate_of(stage_folder: Path) -> dict[str, Any] | None:
    """The reward certificate that a stage was started on."""
    path = stage_folder / "certificate.json"
    return read_json(path) if path.exists() else None


def register(keys: PipelineKeys, state: RunState, folder: Path, last: int) -> dict[str, Any]:
    """Register the model of stage `last` and promote it. What is held, or refused, is registered without the alias."""
    target, verdict = keys.register_, last_verdict(state, folder)
    assert target is not None and verdict is not None, "only a model with a verdict is registered"
    decision = decision_on(folder, state.gates[-1])
    chain, final = manifests(keys, state, folder, last, decision), state.stage(last)
    assert final is not None, "the last stage ran"
    stages = [state.stage(index) or final for index in range(1, last + 1)]
    certificates = [record for stage in stages if (record := certificate_of(folder / stage.folder))]
    registry = Registry(Path(target.registry))
    try:
        evidence = {"evals": folder / "evals", "gates": folder / "gates", "config": folder / "config.yaml"}
        evidence["environment"] = folder / "environment.json"
        evidence |= {f"suite.{name}": Path(suite.path) for name, suite in keys.evals.items()}
        entry = registry.register(
            target.name, folder / final.folder / "model", chain, verdict, certificates, evidence=evidence
        )
        held = sorted({rule for index in range(1, len(chain) + 1) for rule in (state.stage(index) or final).held})
        if held:
            registry.tag(entry.name, entry.version, "hold", f"health: {', '.join(held)}")
        record = {
            "name": entry.name,
            "version": entry.version,
            "digest": entry.digest,
            "alias": None,
            "registry": target.registry,
        }
        try:
            registry.promote(entry.name, entry.version, target.alias, verdict, decision=decision)
        except RegistryError as refusal:
            return record | {
                "refused": str(refusal),
                "message": f"registered {entry.name}@{entry.version}, not promoted: {refusal}",
            }
        write_atomic(folder / "MODEL_CARD.md", model_card(registry, entry.name, entry.version))
        return record | {
            "alias": target.alias,
            "message": f"registered {entry.name}@{entry.version}, now {target.alias}",
        }
    finally:
        registry.close()
