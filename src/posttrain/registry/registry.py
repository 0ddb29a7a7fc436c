"""Versions, aliases and events in SQLite, contents in the store. An alias moves only by compare-and-swap."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import RegistryError
from posttrain.evidence import Decision, GateVerdict, RegistryEntry
from posttrain.files import write_atomic
from posttrain.names import PREVIOUS
from posttrain.registry import looks, promotion
from posttrain.registry.checkouts import READY_TO_LOAD, Checkouts
from posttrain.registry.manifest import ADAPTER_TOTAL, MODEL, Manifest, check_chain
from posttrain.registry.promotion import CHAMPION, DECISION, HOLD
from posttrain.registry.rows import Rows, now
from posttrain.registry.schema import connect, writing
from posttrain.registry.store import ContentStore


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` walked: every manifest of the chain and every stored object."""

    name: str
    version: int
    num_manifests: int
    num_files: int


class Registry:
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

    # --- versions ---

    def register(
        self,
        name: str,
        model_folder: Path,
        chain: Manifest | Sequence[Manifest],
        verdict: GateVerdict | None = None,
        certificates: Iterable[Mapping[str, Any]] = (),
        *,
        evidence: Mapping[str, Path | Mapping[str, Path]] | None = None,
        actor: str | None = None,
    ) -> RegistryEntry:
        """Store a model with its whole lineage (`chain`: first stage to last) as the next version of `name`.

        `evidence` are files, folders and sets of files (by their path in the set) kept with it, by role. The same model with the same lineage is not stored
        twice. Raises: RegistryError if the chain is broken or ends at another model.
        """
        self._refuse(promotion.bad_name("model name", name))
        manifests = (chain,) if isinstance(chain, Manifest) else tuple(chain)
        check_chain(manifests)
        with self.store.adding():
            return self._register(name, model_folder, manifests, verdict, certificates, evidence or {}, actor)

    def _register(
        self,
        name: str,
        model_folder: Path,
        manifests: Sequence[Manifest],
        verdict: GateVerdict | None,
        certificates: Iterable[Mapping[str, Any]],
        evidence: Mapping[str, Path | Mapping[str, Path]],
        actor: str | None,
    ) -> RegistryEntry:
        digest = self.store.put_tree(model_folder)
        if manifests[-1].outputs[MODEL] != digest:
            raise RegistryError(
                f"{model_folder} is {digest}, but its manifest says {manifests[-1].outputs[MODEL]}: "
                "the files changed after the stage that made them"
            )
        if verdict is not None and verdict.candidate_digest != digest:
            raise RegistryError(f"the verdict is about {verdict.candidate_digest}, {model_folder} is {digest}")
        objects = [("model", "tree", digest)]
        objects += [("manifest", "file", self.store.put_json(manifest.to_json())) for manifest in manifests]
        objects += [("certificate", "file", self.store.put_json(dict(record))) for record in certificates]
        if verdict is not None:
            objects.append(("verdict", "file", self.store.put_json(verdict.to_json())))
        objects += [(role, *self._put(what)) for role, what in evidence.items()]
        for role, kind, content in objects:
            if role in READY_TO_LOAD and kind == "tree":
                self.checkouts.ready(content, role)
        version = self._insert(name, digest, manifests[-1], verdict, objects, actor)
        return self.show(name, version)

    def _put(self, what: Path | Mapping[str, Path]) -> tuple[str, str]:
        """Kind and digest of what was stored."""
        if isinstance(what, Mapping):
            return "tree", self.store.put_files(what)
        return ("tree", self.store.put_tree(what)) if what.is_dir() else ("file", self.store.put_file(what))

    def _insert(
        self,
        name: str,
        digest: str,
        manifest: Manifest,
        verdict: GateVerdict | None,
        objects: Sequence[tuple[str, str, str]],
        actor: str | None,
    ) -> int:
        keys = (name, digest, manifest.digest)
        with writing(self._db) as db:
            row = db.execute("SELECT version FROM versions WHERE (name, digest, manifest) = (?, ?, ?)", keys).fetchone()
            if row is None:
                version = self.rows.last_version(name) + 1
                db.execute("INSERT INTO versions VALUES (?, ?, ?, ?, NULL, ?)", (name, version, *keys[1:], now()))
                self.rows.event("register", name, version, {"digest": digest, "manifest": manifest.digest}, actor)
            else:
                version = int(row["version"])
            if verdict is not None:
                db.execute(
                    "UPDATE versions SET verdict = ? WHERE (name, version) = (?, ?)", (verdict.digest, name, version)
                )
            rows = [(name, version, *entry) for entry in objects]
            added = db.executemany("INSERT OR IGNORE INTO objects VALUES (?, ?, ?, ?, ?)", rows).rowcount
            if row is not None and added:
                self.rows.event("add", name, version, {"roles": sorted({role for role, _, _ in objects})}, actor)
        return version

    def adopt(
        self, name: str, digest: str, manifest: str, objects: Sequence[tuple[str, str, str]], actor: str | None = None
    ) -> RegistryEntry:
        """A version whose objects are in the store already becomes the next of `name`. Raises: RegistryError as `register` does."""
        self._refuse(promotion.bad_name("model name", name))
        stored = {
            found: Manifest.from_json(self.store.get_json(found)) for role, _, found in objects if role == "manifest"
        }
        chain: list[Manifest] = []
        wanted: str | None = manifest
        while wanted is not None:
            self._refuse("" if wanted in stored else f"its lineage lacks the manifest {wanted}", name)
            chain.insert(0, stored[wanted])
            wanted = chain[0].parent
        check_chain(chain)
        made = chain[-1].outputs[MODEL]
        self._refuse("" if made == digest else f"its manifest made {made}, it is recorded as {digest}", name)
        self._refuse("" if (MODEL, "tree", digest) in objects else f"its model {digest} is not among its objects", name)
        return self.show(name, self._insert(name, digest, chain[-1], None, objects, actor))

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
        row = self._db.execute(
            "SELECT verdict FROM versions WHERE (name, version) = (?, ?)", (name, version)
        ).fetchone()
        return None if row is None or row["verdict"] is None else self.store.get_json(row["verdict"])

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

    # --- aliases ---

    def promote(
        self,
        name: str,
        version: int,
        alias: str,
        verdict: GateVerdict,
        expected_epoch: int | None = None,
        *,
        decision: Decision | None = None,
        actor: str | None = None,
    ) -> RegistryEntry:
        """Give the alias to a version, if the verdict is a PASS for it against the present holder.

        A `decision` that accepts an INCONCLUSIVE verdict stands for the PASS, and is kept with the version. Doing it again
        with the same verdict changes nothing. Raises: RegistryError with the reason it is refused.
        """
        self._refuse(promotion.bad_name("alias", alias))
        entry = self.show(name, version)
        where = f"{name}@{version} cannot take {alias}"
        self._refuse(promotion.against_verdict(verdict, entry.digest, decision), where)
        self.verify(name, version)
        chain = self.chain(name, version)
        self._refuse(promotion.against_rewards(chain, self.store.has, self.store.get_json), where)
        with self.store.adding(), writing(self._db):
            self.store.put_json(verdict.to_json())
            if decision is not None:
                self._keep_decision(name, version, decision)
            row = self.rows.alias_row(name, alias)
            if row is None or (row["version"], row["verdict"]) != (version, verdict.digest):
                by = actor if decision is None else decision.by
                self._swap(entry, alias, row, verdict, chain, expected_epoch, by)
        return self.show(name, version)

    def _keep_decision(self, name: str, version: int, decision: Decision) -> None:
        accepted = self.store.put_json(decision.to_json())
        if self.rows.keep(name, version, DECISION, accepted):
            self.rows.event("decide", name, version, decision.to_json(), decision.by)

    def _swap(
        self,
        entry: RegistryEntry,
        alias: str,
        row: sqlite3.Row | None,
        verdict: GateVerdict,
        chain: Sequence[Manifest],
        expected_epoch: int | None,
        actor: str | None,
    ) -> None:
        """The compare and the swap, inside a transaction: nothing it compares with can move meanwhile."""
        name, version = entry.name, entry.version
        where = f"{name}@{version} cannot take {alias}"
        hold = self.rows.tags(name, version).get(HOLD)
        self._refuse(f"it is on hold: {hold}" if hold is not None else "", where)
        epoch = 0 if row is None else int(row["epoch"])
        if expected_epoch is not None and expected_epoch != epoch:
            self._refuse(f"the alias has moved (epoch {epoch}, expected {expected_epoch}): gate again", where)
        holder = None if row is None else self.show(name, int(row["version"]))
        held = None if holder is None else (holder.version, holder.digest)
        self._refuse(promotion.against_baseline(verdict, held, chain, alias), where)
        before = None if holder is None else holder.version
        self.rows.set_alias(name, alias, version, before, epoch + 1, verdict.digest)
        self.rows.keep(name, version, "verdict", verdict.digest)
        details = {
            "alias": alias,
            "from": before,
            "epoch": epoch + 1,
            "verdict": verdict.digest,
            "digest": entry.digest,
        }
        self.rows.event("promote", name, version, details, actor)

    def rollback(
        self, name: str, alias: str, reason: str, *, expected_version: int | None = None, actor: str | None = None
    ) -> RegistryEntry:
        """Give the alias back to the holder before, and put the present one on hold.

        Raises: RegistryError if there is none before, its files are damaged, or the alias is not at `expected_version`.
        """
        if not reason.strip():
            raise RegistryError("a rollback needs a reason: it becomes the hold on the version that is taken down")
        row = self.rows.alias_row(name, alias)
        if row is None or row["previous"] is None:
            raise RegistryError(f"{name}: {alias} has no version to go back to")
        bad, target = int(row["version"]), int(row["previous"])
        if expected_version is not None and expected_version != bad:
            raise RegistryError(
                f"{name}: {alias} is at version {bad}, expected {expected_version}; nothing was changed"
            )
        self._refuse_held(name, target)
        self.verify(name, target)
        with writing(self._db):
            latest = self.rows.alias_row(name, alias)
            if latest is None or latest["epoch"] != row["epoch"]:
                raise RegistryError(
                    f"{name}: {alias} moved while its previous version was checked; nothing was changed"
                )
            self._refuse_held(name, target)  # a hold may have come while the bytes were read
            before = self.rows.holder_before(name, alias, target)
            self.rows.set_alias(name, alias, target, before, int(row["epoch"]) + 1, None)
            self.rows.set_tag(name, bad, HOLD, reason)
            details = {"alias": alias, "from": bad, "epoch": int(row["epoch"]) + 1, "reason": reason}
            self.rows.event("rollback", name, target, details, actor)
        return self.show(name, target)

    def _refuse_held(self, name: str, target: int) -> None:
        hold = self.rows.tags(name, target).get(HOLD)
        if hold is not None:
            raise RegistryError(f"{name}@{target} is on hold ({hold}): release it before rolling back to it")

    def tag(self, name: str, version: int, key: str, value: str, *, actor: str | None = None) -> None:
        """Label a version. The tag `hold` keeps it from being promoted."""
        self.show(name, version)
        with writing(self._db):
            self.rows.set_tag(name, version, key, value)
            self.rows.event("tag", name, version, {"key": key, "value": value}, actor)

    def untag(self, name: str, version: int, key: str, *, actor: str | None = None) -> None:
        with writing(self._db) as db:
            db.execute("DELETE FROM tags WHERE (name, version, key) = (?, ?, ?)", (name, version, key))
            self.rows.event("untag", name, version, {"key": key}, actor)

    # --- looks ---

    def record_look(self, suite_digests: Iterable[str], candidate: str, baseline: str) -> int:
        """Note that a verdict is made on these items; returns the number of the look, from 1."""
        return looks.record_look(self._db, suite_digests, candidate, baseline)

    def count_looks(self, suite_digest: str) -> int:
        return looks.count_looks(self._db, suite_digest)

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
