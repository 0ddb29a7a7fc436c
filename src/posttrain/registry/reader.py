"""Reading a registry: versions, their lineage and evidence, and which one an alias means. Nothing here changes a row."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import RegistryError
from posttrain.evidence import RegistryEntry
from posttrain.files import write_atomic
from posttrain.names import PREVIOUS
from posttrain.registry.checkouts import READY_TO_LOAD, Checkouts
from posttrain.registry.looks import LookCount, all_looks
from posttrain.registry.manifest import ADAPTER_TOTAL, MODEL, Manifest, check_chain
from posttrain.registry.promotion import CHAMPION
from posttrain.registry.rows import Rows
from posttrain.registry.schema import connect
from posttrain.registry.store import ContentStore


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` walked: every manifest of the chain and every stored object."""

    name: str
    version: int
    num_manifests: int
    num_files: int


class RegistryReader:
    """A folder: `registry.sqlite`, `objects/`, and `models/<sha256>/` and `adapters/<sha256>/`, ready to load."""

    def __init__(self, folder: Path, *, for_reading: bool = False) -> None:
        """A folder that cannot be written is opened only `for_reading`."""
        self.folder = Path(folder)
        self.store = ContentStore(self.folder)
        self.checkouts = Checkouts(self.store)
        writable = self.store.writable or not for_reading
        self._db = connect(self.folder / "registry.sqlite", new=self.store.is_empty, writable=writable)
        self.rows = Rows(self._db)

    def close(self) -> None:
        self._db.close()

    def show(self, name: str, version: int) -> RegistryEntry:
        """Raises: RegistryError if there is no such version."""
        row = self._db.execute("SELECT * FROM versions WHERE (name, version) = (?, ?)", (name, version)).fetchone()
        if row is None:
            raise RegistryError(f"no {name}@{version} in {self.folder}{self.rows.instead_of(name, version)}")
        return self._entry(row)

    def entries(self, name: str | None = None) -> list[RegistryEntry]:
        """All versions, or those of one model, in order."""
        rows = self._db.execute("SELECT * FROM versions WHERE ? IN (name, '') ORDER BY name, version", (name or "",))
        aliases, tags = self.rows.all_aliases(), self.rows.all_tags()
        return [self._entry(row, aliases, tags) for row in rows.fetchall()]

    def resolve(self, ref: str, name: str | None = None) -> RegistryEntry:
        """`find`, with the model's folder ready to load. Raises: RegistryError also if its files are gone."""
        found = self.find(ref, name)
        if missing := self.store.missing(found.digest):
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise RegistryError(
                f"{found.name}@{found.version} cannot be loaded: {missing[0]}{more} is gone from {self.folder / 'objects'}; "
                "restore it from a copy"
            )
        self.checkouts.ready(found.digest, MODEL)
        return found

    def adapter(self, name: str, version: int) -> Path | None:
        """A folder that PEFT loads onto the base that the version's lineage started from; None where it has none."""
        digest = self.evidence(name, version).get(ADAPTER_TOTAL, ("", ""))[1]
        return self.checkouts.ready(digest, ADAPTER_TOTAL) if digest else None

    def find(self, ref: str, name: str | None = None) -> RegistryEntry:
        """`name@3`, `name@champion`, or `alias:champion` (of `name`, or of the only model that has it).

        Raises: RegistryError if it names nothing, or more than one.
        """
        if ref.startswith("alias:"):
            alias = ref.removeprefix("alias:")
            owners = [name] if name else self.rows.names_with(alias)
            if len(owners) > 1:
                raise RegistryError(f"{ref} is ambiguous: {', '.join(owners)} all have it; say NAME@{alias}")
            found = self.holder(owners[0], alias) if owners else None
        else:
            model, _, which = ref.rpartition("@")
            if not model:
                raise RegistryError(f"got {ref!r}, expected NAME@VERSION, NAME@ALIAS or alias:ALIAS")
            found = self.show(model, int(which)) if which.isdecimal() else self.holder(model, which)
        if found is None:
            raise RegistryError(f"{ref} names nothing in {self.folder}: nothing has been promoted to it")
        return found

    def holder(self, name: str, alias: str) -> RegistryEntry | None:
        """The version that holds the alias now, if any; `previous` is the one before the champion."""
        before = alias == PREVIOUS or alias.endswith(f".{PREVIOUS}")
        owner = (alias.removesuffix(PREVIOUS).removesuffix(".") or CHAMPION) if before else alias
        row = self.rows.alias_row(name, owner)
        version = None if row is None else row[PREVIOUS if before else "version"]
        return None if version is None else self.show(name, int(version))

    def alias_epoch(self, name: str, alias: str) -> int:
        """How often the alias has moved; 0 if it never was set."""
        row = self.rows.alias_row(name, alias)
        return 0 if row is None else int(row["epoch"])

    def chain(self, name: str, version: int) -> list[Manifest]:
        """Manifests from the first stage to the one that made this version, each checked against its digest."""
        row = self._db.execute(
            "SELECT manifest FROM versions WHERE (name, version) = (?, ?)", (name, version)
        ).fetchone()
        digest: str | None = None if row is None else row["manifest"]
        found: list[Manifest] = []
        while digest is not None:
            found.append(Manifest.from_json(self.store.get_json(digest, f"{name}@{version} manifest")))
            digest = found[-1].parent
        found.reverse()
        check_chain(found)
        return found

    def records(self, name: str, version: int, role: str) -> list[Any]:
        """The stored JSON records of a version: `verdict`, `certificate` or `manifest`."""
        query = "SELECT digest FROM objects WHERE (name, version, role, kind) = (?, ?, ?, 'file') ORDER BY rowid"
        return [self.store.get_json(row["digest"]) for row in self._db.execute(query, (name, version, role)).fetchall()]

    def evidence(self, name: str, version: int) -> dict[str, tuple[str, str]]:
        """What is kept with a version, the newest of each role: role → (`file` or `tree`, digest)."""
        query = "SELECT role, kind, digest FROM objects WHERE (name, version) = (?, ?) ORDER BY rowid"
        return {
            row["role"]: (row["kind"], row["digest"]) for row in self._db.execute(query, (name, version)).fetchall()
        }

    def export(self, name: str, version: int, role: str, target: Path) -> Path | None:
        """Write the evidence of a role to `target`; None if there is none. Raises: RegistryError if it is damaged."""
        kind, digest = self.evidence(name, version).get(role, (None, ""))
        if kind is None:
            return None
        if kind == "tree":
            return self.store.materialize(digest, target)
        self.store.verify_object(digest, role)
        write_atomic(target, self.store.object_path(digest).read_bytes())
        return target

    def verdict_record(self, name: str, version: int) -> Mapping[str, Any] | None:
        """The verdict that the version was registered with, as JSON."""
        digest = self.rows.verdict(name, version)
        return None if digest is None else self.store.get_json(digest)

    def all_looks(self) -> list[LookCount]:
        """Every state of every suite that a verdict was made on, with the looks that its items have had."""
        return all_looks(self._db)

    def verify(self, name: str, version: int) -> Verification:
        """Walk the manifests and check every stored byte, offline. Raises: RegistryError naming what is damaged."""
        entry = self.show(name, version)
        where = f"{name}@{version}"
        chain = self.chain(name, version)
        if chain[-1].outputs[MODEL] != entry.digest:
            raise RegistryError(
                f"{where}: its manifest made {chain[-1].outputs[MODEL]}, it is recorded as {entry.digest}"
            )
        num_files = 0
        query = "SELECT role, kind, digest FROM objects WHERE (name, version) = (?, ?)"
        for row in self._db.execute(query, (name, version)).fetchall():
            try:
                if row["kind"] == "tree":
                    num_files += self.store.verify(row["digest"])
                    if row["role"] in READY_TO_LOAD:
                        self.checkouts.verify(row["digest"], row["role"])
                else:
                    self.store.verify_object(row["digest"], row["role"])
                    num_files += 1
            except RegistryError as error:
                raise RegistryError(f"{where} {row['role']}: {error}") from error
        return Verification(name, version, len(chain), num_files)

    def _entry(
        self,
        row: sqlite3.Row,
        aliases: Mapping[tuple[str, int], Sequence[str]] | None = None,
        tags: Mapping[tuple[str, int], dict[str, str]] | None = None,
    ) -> RegistryEntry:
        """A row as a version; who reads many hands in the aliases and tags of all."""
        name, version = str(row["name"]), int(row["version"])
        return RegistryEntry(
            name=name,
            version=version,
            digest=row["digest"],
            path=self.checkouts.place(row["digest"], MODEL),
            manifest=row["manifest"],
            aliases=tuple((self.rows.all_aliases(name) if aliases is None else aliases).get((name, version), ())),
            tags=self.rows.tags(name, version) if tags is None else tags.get((name, version), {}),
        )

    @staticmethod
    def _refuse(reason: str, where: str = "refused") -> None:
        if reason:
            raise RegistryError(f"{where}: {reason}")
