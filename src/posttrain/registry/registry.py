"""Versions, aliases and events in SQLite, contents in the store. An alias moves only by compare-and-swap."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.errors import RegistryError
from posttrain.evidence import Decision, GateVerdict, RegistryEntry
from posttrain.registry import looks, promotion
from posttrain.registry.checkouts import READY_TO_LOAD
from posttrain.registry.looks import JudgedSuite
from posttrain.registry.manifest import MODEL, Manifest, check_chain
from posttrain.registry.promotion import DECISION, HOLD
from posttrain.registry.reader import RegistryReader
from posttrain.registry.rows import now
from posttrain.registry.schema import writing


class Registry(RegistryReader):
    """What changes a registry, entered into its log."""

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
                self.rows.set_verdict(name, version, verdict.digest)
            rows = [(name, version, *entry) for entry in objects]
            added = db.executemany("INSERT OR IGNORE INTO objects VALUES (?, ?, ?, ?, ?)", rows).rowcount
            if row is not None and added:
                self.rows.event("add", name, version, {"roles": sorted({role for role, _, _ in objects})}, actor)
        return version

    def adopt(
        self,
        name: str,
        digest: str,
        manifest: str,
        objects: Sequence[tuple[str, str, str]],
        verdict: str | None = None,
        actor: str | None = None,
    ) -> RegistryEntry:
        """A version whose objects are in the store already becomes the next of `name`.

        `verdict`: digest of the one that it was judged by, unless it has one here. Raises: RegistryError as `register` does.
        """
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
        if verdict is not None:
            kept = ("verdict", "file", verdict) in objects
            self._refuse("" if kept else f"its verdict {verdict} is not among its objects", name)
            about = self.store.get_json(verdict, "verdict")["candidate_digest"]
            self._refuse("" if about == digest else f"its verdict is about {about}, it is {digest}", name)
        version = self._insert(name, digest, chain[-1], None, objects, actor)
        if verdict is not None and self.rows.verdict(name, version) is None:
            with writing(self._db):
                self.rows.set_verdict(name, version, verdict)
        return self.show(name, version)

    # --- aliases ---

    def promote(
        self,
        name: str,
        version: int,
        alias: str,
        verdict: GateVerdict,
        expected_epoch: int | None = None,
        *,
        decisions: Sequence[Decision] = (),
        actor: str | None = None,
    ) -> RegistryEntry:
        """Give the alias to a version, if the verdict is a PASS for it against the present holder.

        `decisions` that accept the verdict are kept with the version; one stands for the PASS of an INCONCLUSIVE verdict. Doing it
        again with the same verdict changes nothing. Raises: RegistryError with the reason it is refused.
        """
        self._refuse(promotion.bad_name("alias", alias))
        entry = self.show(name, version)
        where = f"{name}@{version} cannot take {alias}"
        self._refuse(promotion.against_verdict(verdict, entry.digest, decisions), where)
        self.verify(name, version)
        chain = self.chain(name, version)
        self._refuse(promotion.against_approvals(chain, verdict, decisions), where)
        self._refuse(promotion.against_rewards(chain, self.store.has, self.store.get_json), where)
        with self.store.adding(), writing(self._db):
            self.store.put_json(verdict.to_json())
            for decision in decisions:
                self._keep_decision(name, version, decision)
            row = self.rows.alias_row(name, alias)
            if row is None or (row["version"], row["verdict"]) != (version, verdict.digest):
                by = decisions[-1].by if decisions else actor
                self._swap(entry, alias, row, verdict, chain, expected_epoch, by)
        return self.show(name, version)

    def _keep_decision(self, name: str, version: int, decision: Decision) -> None:
        self.rows.keep(name, version, DECISION, self.store.put_json(decision.to_json()))
        # Of a version that was pulled it is kept already, and yet new to this log.
        if decision.to_json() not in [
            event.details for event in self.rows.events(name, version=version, action="decide")
        ]:
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
        """Label a version. The tag `hold` keeps it from being promoted. Raises: RegistryError for a hold without a reason."""
        self.show(name, version)
        if key == HOLD and not value.strip():
            raise RegistryError("a hold needs a reason: it is what is said wherever the version is refused")
        with writing(self._db):
            self.rows.set_tag(name, version, key, value)
            self.rows.event("tag", name, version, {"key": key, "value": value}, actor)

    def untag(self, name: str, version: int, key: str, *, actor: str | None = None) -> None:
        """Raises: RegistryError if there is no such label: the log holds what was done."""
        with writing(self._db) as db:
            row = db.execute("DELETE FROM tags WHERE (name, version, key) = (?, ?, ?)", (name, version, key))
            if not row.rowcount:
                raise RegistryError(f"{name}@{version} has no {key}, expected one to take off; nothing was changed")
            self.rows.event("untag", name, version, {"key": key}, actor)

    # --- looks ---

    def record_look(self, suites: Iterable[JudgedSuite], candidate: str, baseline: str) -> int:
        """Note that a verdict is made on these items; returns the number of the look, from 1."""
        return looks.record_look(self._db, suites, candidate, baseline)

    def renewals(self, suites: Iterable[JudgedSuite]) -> list[str]:
        """A line for each of these suites that renews the one of its name before."""
        return looks.renewals(self._db, suites)

    def count_looks(self, suite: JudgedSuite) -> int:
        return looks.count_looks(self._db, suite)
