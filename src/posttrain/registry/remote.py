"""Versions in another folder or object store: pushed and pulled by digest, so both can be killed and done again.

A remote holds `objects/<aa>/<sha256>`, `versions/NAME/V/N.json`, `holds/NAME/V/DIGEST/N.json` and `aliases/NAME/ALIAS/EPOCH.json`.
Records are created, never replaced; an alias moves by creating the record of its next epoch, which only one of two can.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from posttrain.errors import MissingExtraError, RegistryError
from posttrain.evidence import RegistryEntry
from posttrain.files import canonical_json, digest_json
from posttrain.registry.holds import pull_hold, push_hold
from posttrain.registry.promotion import HOLD
from posttrain.registry.registry import Registry
from posttrain.uris import refuse_secret

_CHUNK_BYTES = 1 << 20
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_SEAL = "seal"
_VERDICT = "verdict"
"""Digest of the verdict that a version was registered with; a record without the key names none."""


@dataclass(frozen=True, slots=True)
class Copied:
    """A version at the other end, how many objects were copied there and how many were there already."""

    ref: str
    num_copied: int
    num_present: int


class Remote:
    """A place that fsspec reaches. Credentials come from the environment, as its driver says.

    Raises: ConfigError for a URL with a password; MissingExtraError without the driver; RegistryError for no such kind of place.
    """

    def __init__(self, url: str) -> None:
        # fsspec has no types
        from fsspec.core import url_to_fs  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

        refuse_secret(url)
        self.url = url
        try:
            found = cast("tuple[Any, str]", url_to_fs(url))
        except ImportError as error:
            raise MissingExtraError(f"{url}: {error}") from error
        except ValueError as error:
            raise RegistryError(
                f"{url}: {error}; expected a folder, or a URL of fsspec such as s3://BUCKET/PATH"
            ) from error
        self._fs, self._root = found

    def object_path(self, digest: str) -> str:
        name = digest.removeprefix("sha256:")
        return f"{self._root}/objects/{name[:2]}/{name}"

    def digest(self, path: str) -> str:
        """What is there now; nothing where nothing is."""
        if not self._fs.exists(path):
            return ""
        hasher = hashlib.sha256()
        with self._fs.open(path, "rb") as handle:
            while chunk := handle.read(_CHUNK_BYTES):
                hasher.update(chunk)
        return "sha256:" + hasher.hexdigest()

    def send(self, source: str, path: str) -> None:
        self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        self._fs.put_file(source, path)

    def open(self, path: str) -> Any:
        try:
            return self._fs.open(path, "rb")
        except FileNotFoundError as error:
            raise RegistryError(
                f"{self.url}: {path.rpartition('/')[2]} is missing there; push the version again"
            ) from error

    def record(self, *place: str) -> dict[str, Any] | None:
        """A record as it was created; None where there is none, or one that was cut off while it was written."""
        path = "/".join((self._root, *place))
        if not self._fs.exists(path):
            return None
        try:
            found = json.loads(self._fs.cat_file(path))
            seal = found.pop(_SEAL)
        except (ValueError, KeyError, AttributeError):
            return None
        return found if digest_json(found) == seal else None

    def create(self, record: dict[str, Any], *place: str) -> bool:
        """Whether the record stands there now: created by this call or the same before. Another one is left as it is."""
        path = "/".join((self._root, *place))
        self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        data = canonical_json(record | {_SEAL: digest_json(record)}).encode()
        try:
            self._fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            found = self.record(*place)
            if found is None:  # cut off by a kill: it never stood
                self._fs.pipe_file(path, data, mode="overwrite")
        return self.record(*place) == record

    def history(self, *place: str) -> list[dict[str, Any]]:
        """The records `1.json`, `2.json` … at a place; the last one counts."""
        found: list[dict[str, Any]] = []
        while (record := self.record(*place, f"{len(found) + 1}.json")) is not None:
            found.append(record)
        return found


def push_version(registry: Registry, entry: RegistryEntry, remote: Remote, alias: str = "") -> Copied:
    """Copy a version there, verified here before and there after; then move `alias` there, if one is named.

    Raises: RegistryError if another version has its name and number there, it is on hold, or the alias there was moved by somebody else.
    """
    if alias and alias not in entry.aliases:
        raise RegistryError(
            f"{entry.name}@{entry.version} does not hold {alias} here, so it cannot there: promote it first"
        )
    if alias and (hold := entry.tags.get(HOLD)) is not None:
        raise RegistryError(
            f"{entry.name}@{entry.version} is on hold ({hold}), so it takes no alias there: release it first"
        )
    registry.verify(entry.name, entry.version)
    ref = f"{entry.name}@{entry.version}"
    objects = registry.rows.objects(entry.name, entry.version)
    digests = sorted(_contents(registry, objects))
    copied = 0
    for digest in digests:
        path = remote.object_path(digest)
        if remote.digest(path) == digest:
            continue
        remote.send(str(registry.store.object_path(digest)), path)
        if (got := remote.digest(path)) != digest:
            raise RegistryError(f"{remote.url}: {digest} arrived as {got}; push again")
        copied += 1
    hold = push_hold(registry, entry, remote)  # first: nobody may find the version there without it
    _note_version(remote, entry, objects, registry.rows.verdict(entry.name, entry.version))
    if alias and hold:
        raise RegistryError(
            f"{ref} is on hold at {remote.url} ({hold}): pull it, and release it here, before it takes an alias there"
        )
    if alias:
        _move_alias(registry, entry, remote, alias)
    return Copied(ref, copied, len(digests) - copied)


def _contents(registry: Registry, objects: list[tuple[str, str, str]]) -> set[str]:
    trees = {digest for _, kind, digest in objects if kind == "tree"}
    return {digest for _, _, digest in objects}.union(*(registry.store.tree(digest).values() for digest in trees))


def _note_version(
    remote: Remote, entry: RegistryEntry, objects: list[tuple[str, str, str]], verdict: str | None
) -> None:
    """Create the version's record there; one more where it has evidence by now that the last record lacks."""
    place = ("versions", entry.name, str(entry.version))
    history = remote.history(*place)
    same = {"name": entry.name, "version": entry.version, "digest": entry.digest, "manifest": entry.manifest}
    known: list[list[str]] = history[-1]["objects"] if history else []
    said = history[-1].get(_VERDICT) if history else None
    record = same | {
        "objects": known + [list(row) for row in objects if list(row) not in known],
        _VERDICT: verdict if said is None else said,  # the first one stays, so that two registries do not take turns
    }
    if history and record == history[-1]:
        return
    is_other = bool(history) and any(history[-1][key] != value for key, value in same.items())
    if is_other or not remote.create(record, *place, f"{len(history) + 1}.json"):
        raise RegistryError(
            f"{remote.url} has another {entry.name}@{entry.version}; nothing there was changed: pull that one, or push under "
            "another name"
        )


def _move_alias(registry: Registry, entry: RegistryEntry, remote: Remote, alias: str) -> None:
    """Compare and swap: what holds the alias there must have held it here."""
    history = remote.history("aliases", entry.name, alias)
    holder = history[-1] if history else None
    if holder is not None and holder["digest"] == entry.digest:
        return
    moves = registry.rows.events(entry.name, action="promote")
    held = {move.details["digest"] for move in moves if move.details["alias"] == alias}
    said = f"{remote.url}: {alias} of {entry.name} "
    if holder is not None and holder["digest"] not in held:
        raise RegistryError(
            f"{said}is {holder['digest']} there, which never held it here: pull that version and gate against it"
        )
    record = {"version": entry.version, "digest": entry.digest}
    if not remote.create(record, "aliases", entry.name, alias, f"{len(history) + 1}.json"):
        raise RegistryError(f"{said}was moved there meanwhile; nothing was changed: push again")


def pull_version(
    registry: Registry, ref: str, remote: Remote, actor: str | None = None
) -> tuple[RegistryEntry, Copied]:
    """Copy NAME@VERSION or NAME@ALIAS from there, as the next version here unless it is here already. No alias moves.

    Raises: RegistryError if it is not there, or is not what its digests say.
    """
    name, _, which = ref.rpartition("@")
    if not name:
        raise RegistryError(f"got {ref!r}, expected NAME@VERSION or NAME@ALIAS")
    if not which.isdecimal():
        holders = remote.history("aliases", name, which)
        which = str(holders[-1]["version"]) if holders else which
    records = remote.history("versions", name, which) if which.isdecimal() else []
    if not records:
        raise RegistryError(f"{remote.url} has no {ref}; push it there first")
    record = records[-1]
    objects = [(str(role), str(kind), str(digest)) for role, kind, digest in record["objects"]]
    verdict = record.get(_VERDICT)
    said = [] if verdict is None else [verdict]
    _refuse_strange([record["digest"], record["manifest"], *said, *(digest for _, _, digest in objects)], remote)
    with registry.store.adding():
        count = {True: 0, False: 0}
        for _, kind, digest in objects:
            count[_fetch(registry, remote, digest)] += 1
            files: Mapping[str, str] = registry.store.tree(digest) if kind == "tree" else {}
            _refuse_outside(files, remote)
            _refuse_strange(list(files.values()), remote)
            for content in files.values():
                count[_fetch(registry, remote, content)] += 1
        entry = registry.adopt(name, record["digest"], record["manifest"], objects, verdict, actor)
    entry = pull_hold(registry, entry, remote, which, actor)
    registry.verify(entry.name, entry.version)
    return entry, Copied(f"{entry.name}@{entry.version}", count[True], count[False])


def _fetch(registry: Registry, remote: Remote, digest: str) -> bool:
    """Whether it had to be copied."""
    if registry.store.is_intact(digest):
        return False
    with remote.open(remote.object_path(digest)) as source:
        got = registry.store.put_stream(source)
    if got != digest:
        raise RegistryError(f"{remote.url}: got {got}, expected {digest}: the object is damaged there; push it again")
    return True


def _refuse_strange(digests: list[str], remote: Remote) -> None:
    """A digest becomes a path: nothing else may stand there."""
    for digest in digests:
        if not _DIGEST.fullmatch(digest):
            raise RegistryError(
                f"{remote.url}: got {digest!r}, expected sha256: and 64 digits; the record there was not written by us"
            )


def _refuse_outside(files: Mapping[str, str], remote: Remote) -> None:
    """Names in a tree become paths below a folder: none may lead out of it."""
    for name in files:
        if name.startswith("/") or "\\" in name or not {"", ".", ".."}.isdisjoint(name.split("/")):
            raise RegistryError(
                f"{remote.url}: got a file named {name!r}, expected one below its folder; nothing was registered"
            )
