"""The registry as a run meets it at its start: the version to start from, whether its alias can be won, the looks that are left."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from posttrain.config.pipeline import ConfiguredStage, PipelineKeys, RegisterKeys
from posttrain.errors import ConfigError, GateError
from posttrain.evals.run import decoding_of, prompt_digest
from posttrain.evidence import RegistryEntry
from posttrain.gate.spec import GateSpec
from posttrain.models.provenance import source_digest
from posttrain.pipeline.before_data import gates_of
from posttrain.pipeline.selection import Suites
from posttrain.pipeline.state import DONE, Parent, RunState
from posttrain.registry.looks import JudgedSuite
from posttrain.registry.registry import Registry
from posttrain.registry.upkeep import version_lock

_REF = re.compile(r"alias:[\w.-]+|[A-Za-z][\w.-]*@[\w.-]+")


def from_version(keys: PipelineKeys, state: RunState | None) -> tuple[PipelineKeys, Parent | None]:
    """The keys with `base_model: NAME@ALIAS` (NAME@3, alias:champion) read as the folder of that version.

    A run that has started stays with the version it started from, wherever the alias is by now.
    Raises: ConfigError without `register`; RegistryError if the reference names nothing, or its files are damaged.
    """
    ref = keys.base_model
    if not _REF.fullmatch(ref):
        return keys, None
    if keys.register_ is None:
        raise ConfigError(f"base_model: {ref} needs `register:` to say in which registry to look")
    known = state.parent if state is not None else None
    with _opened(keys.register_) as registry:
        wanted = known.version if known is not None and known.ref == ref else ref
        name = keys.register_.name if wanted.startswith("alias:") else None
        entry = registry.resolve(wanted, name)
        if source_digest(str(entry.path)) != entry.digest:
            registry.verify(entry.name, entry.version)
        manifest = registry.chain(entry.name, entry.version)[-1].digest
    parent = Parent(ref, f"{entry.name}@{entry.version}", manifest)
    return _started_from(keys, str(entry.path)), parent


def hold_parent(keys: PipelineKeys, parent: Parent | None, held: ExitStack) -> None:
    """Keep the version that the run starts from, as long as `held` lasts."""
    if parent is not None:
        assert keys.register_ is not None, "a parent is looked up in a registry"
        name, _, version = parent.version.rpartition("@")
        held.enter_context(version_lock(Path(keys.register_.registry), name, int(version), alone=False))
        with _opened(keys.register_) as registry:  # once locked: it may have been removed before
            registry.show(name, int(version))


def _started_from(keys: PipelineKeys, model: str) -> PipelineKeys:
    stages = [ConfiguredStage(kind=s.kind, keys=s.keys.model_copy(update={"base_model": model})) for s in keys.stages]
    return keys.model_copy(update={"base_model": model, "stages": stages})


def check_can_be_promoted(keys: PipelineKeys, state: RunState | None) -> None:
    """Refuse what would be trained, judged, and then never given its alias.

    Raises: ConfigError if the gate's baseline is not what the alias's verdict must be against; RegistryError if the holder's
    files are damaged.
    """
    target, gate = keys.register_, keys.gate or keys.stages[-1].keys.gate
    if target is None or gate is None:
        return
    base = source_digest(keys.base_model)
    with _opened(target) as registry:
        holder = registry.holder(target.name, target.alias)
        if state is not None and _is_own(state, holder):
            return
        replaced = base if holder is None else holder.digest
        kind, _, name = gate.baseline.partition(":")
        if gate.baseline == "stage:base":
            compared = base
        elif kind == "stage":
            # What that stage will make may be the holder (made again), never the base.
            compared = replaced if holder is not None else f"what stage {name} makes"
        elif kind == "alias":
            entry = registry.holder(target.name, name)
            compared = base if entry is None else entry.digest
            if entry is not None and source_digest(str(entry.path)) != entry.digest:
                registry.verify(entry.name, entry.version)
        else:
            compared = source_digest(gate.baseline)
    if compared != replaced:
        who = (
            "the base model, since nothing holds it yet"
            if holder is None
            else f"its holder {holder.name}@{holder.version}"
        )
        raise ConfigError(
            f"gate.baseline: {gate.baseline} can never give {target.alias}: that takes a verdict against {who}; "
            f"set baseline: alias:{target.alias}, or another register.alias"
        )


def check_looks_left(keys: PipelineKeys, state: RunState | None, suites: Suites) -> None:
    """Refuse to train what could not be judged: the looks that a gate allows at its items are all taken.

    Once a stage is finished the verdict decides: the look may be this run's own. Raises: GateError.
    """
    begun = state is not None and any(entry.status == DONE for entry in state.stages)
    budgets = [gate for gate in gates_of(keys) if gate.looks]
    if keys.register_ is None or begun or not budgets:
        return
    with _opened(keys.register_) as registry:
        for gate in budgets:
            for name in GateSpec.from_keys(gate).suites:
                suite, how = suites[name]
                items = frozenset(map(prompt_digest, suite.on(gate.split)))
                taken = registry.count_looks(JudgedSuite(name, suite.digest(gate.split, decoding_of(how)), items))
                if taken >= gate.looks:
                    raise GateError(
                        f"gate.looks: {taken} of {gate.looks} looks at suite {name} are taken, so a new model could not be judged; "
                        "make a gate split of new items (they have a budget of their own), or raise looks before anyone looks again"
                    )


def _is_own(state: RunState, holder: RegistryEntry | None) -> bool:
    """Whether this run has given the alias before, or its holder is a model of this run."""
    given = state.registered is not None and state.registered["alias"] is not None
    return given or (holder is not None and holder.digest in {entry.output_digest for entry in state.stages})


@contextmanager
def _opened(target: RegisterKeys) -> Iterator[Registry]:
    registry = Registry(Path(target.registry))
    try:
        yield registry
    finally:
        registry.close()
