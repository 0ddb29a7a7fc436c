"""A hold beside the version that it is on, wherever that is copied: it is set and taken off there as it was here.

A remote holds `holds/NAME/V/DIGEST/N.json`, the last of which counts: the reason, or nothing where the hold was taken off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from posttrain.errors import RegistryError
from posttrain.evidence import RegistryEntry
from posttrain.registry.promotion import HOLD

if TYPE_CHECKING:
    from posttrain.registry.registry import Registry
    from posttrain.registry.remote import Remote

_PLACE = "holds"


def push_hold(registry: Registry, entry: RegistryEntry, remote: Remote) -> str:
    """The hold that the version has there from now on ("" for none): the one here; one that was set elsewhere stays until it is
    taken off here.

    Raises: RegistryError if somebody else changes it meanwhile.
    """
    here, history = entry.tags.get(HOLD, ""), _history(remote, entry.name, str(entry.version), entry.digest)
    there = history[-1] if history else ""
    if here == there:
        return here
    if not here and there not in _taken_off(registry, entry):
        return there
    place = (_PLACE, entry.name, str(entry.version), entry.digest.removeprefix("sha256:"))
    if not remote.create({"digest": entry.digest, "hold": here}, *place, f"{len(history) + 1}.json"):
        raise RegistryError(
            f"{remote.url}: the hold of {entry.name}@{entry.version} was changed there meanwhile: push again"
        )
    return here


def pull_hold(
    registry: Registry, entry: RegistryEntry, remote: Remote, version: str, actor: str | None = None
) -> RegistryEntry:
    """`entry` as it is here after what stands there of `version`, its number there. A hold that was taken off here stays off."""
    history = _history(remote, entry.name, version, entry.digest)
    there, here = history[-1] if history else "", entry.tags.get(HOLD, "")
    if there and not here and there not in _taken_off(registry, entry):
        registry.tag(entry.name, entry.version, HOLD, there, actor=actor)
    elif here and not there and here in history:
        registry.untag(entry.name, entry.version, HOLD, actor=actor)
    return registry.show(entry.name, entry.version)


def _history(remote: Remote, name: str, version: str, digest: str) -> list[str]:
    """Reasons, oldest first, "" where one was taken off. Another model under this number has a history of its own."""
    records = remote.history(_PLACE, name, version, digest.removeprefix("sha256:"))
    return [str(record["hold"]) for record in records]


def _taken_off(registry: Registry, entry: RegistryEntry) -> set[str]:
    """The reasons of holds that the version had here and has no more."""
    held, reasons = "", set[str]()
    for event in registry.rows.events(entry.name):
        details = event.details
        if event.action == "rollback" and details["from"] == entry.version:
            held = str(details["reason"])
        elif event.version == entry.version and details.get("key") == HOLD:
            reasons.add(held)
            held = str(details["value"]) if event.action == "tag" else ""
    return reasons - {""}
