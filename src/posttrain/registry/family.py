"""Which version came from which, told by the manifests alone: a stage, a later run and a merge name what they took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from posttrain.evidence import RegistryEntry
from posttrain.registry.manifest import MODEL, Manifest
from posttrain.registry.reader import RegistryReader


@dataclass(frozen=True, slots=True)
class Relative:
    """A version in a family. `base` is what its lineage started from, `stages` what was done since its parents (a merge has several)."""

    entry: RegistryEntry
    base: str
    stages: tuple[str, ...]
    parents: tuple[str, ...]

    @property
    def ref(self) -> str:
        return f"{self.entry.name}@{self.entry.version}"


def family_of_versions(registry: RegistryReader, name: str) -> list[Relative]:
    """The versions of a model, those that they came from and those that came from them, parents before children."""
    entries = {f"{entry.name}@{entry.version}": entry for entry in registry.entries()}
    kept = {f"{model}@{version}": digests for (model, version), digests in registry.rows.manifests().items()}
    digests = {digest for found in kept.values() for digest in found}
    manifests = {digest: Manifest.from_json(registry.store.get_json(digest, "manifest")) for digest in digests}
    taken = _taken(entries, kept, manifests)
    above = {ref: _reached(ref, taken) for ref in entries}
    own = {ref for ref, entry in entries.items() if entry.name == name}
    wanted = own | {up for ref in own for up in above[ref]} | {ref for ref in entries if above[ref] & own}
    found: list[Relative] = []
    for ref in sorted(wanted, key=lambda ref: (len(above[ref]), entries[ref].name, entries[ref].version)):
        parents = sorted(up for up in taken[ref] if not any(up in above[other] for other in taken[ref]))
        before = {digest for up in parents for digest in kept[up]}
        since = tuple(manifests[digest].stage for digest in kept[ref] if digest not in before)
        found.append(Relative(entries[ref], _base(manifests[kept[ref][0]]), since, tuple(parents)))
    return found


def _taken(
    entries: Mapping[str, RegistryEntry], kept: Mapping[str, Sequence[str]], manifests: Mapping[str, Manifest]
) -> dict[str, set[str]]:
    """Version → the versions whose manifest or model a stage of its lineage took."""
    makers: dict[str, set[str]] = {}
    for ref, entry in entries.items():
        for made in (entry.digest, entry.manifest):
            makers.setdefault(made, set()).add(ref)
    found: dict[str, set[str]] = {}
    for ref, entry in entries.items():
        stages = [manifests[digest] for digest in kept[ref]]
        inputs = {value for stage in stages for value in (*stage.inputs.values(), stage.parent or "")}
        makers_of = {maker for value in inputs for maker in makers.get(value, ())}
        found[ref] = {maker for maker in makers_of if entries[maker].digest != entry.digest}
    return found


def _reached(ref: str, taken: Mapping[str, set[str]]) -> set[str]:
    """Every version above this one."""
    found: set[str] = set()
    waiting = list(taken[ref])
    while waiting:
        up = waiting.pop()
        if up not in found:
            found.add(up)
            waiting.extend(taken[up])
    return found


def _base(first: Manifest) -> str:
    """The base's name where the first stage said it, else its digest: another registry's NAME@VERSION is another model here."""
    said = None if "parent_version" in first.details else first.details.get("base_model")
    return str(said or first.inputs[MODEL])
