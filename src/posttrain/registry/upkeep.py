"""What becomes of what nobody needs: locks on versions in use, and the collection of objects that no version names."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.errors import RegistryError, RunLockedError
from posttrain.evidence import RegistryEntry
from posttrain.files import nobody_reading
from posttrain.registry.checkouts import READY_TO_LOAD
from posttrain.registry.store import ContentStore

if TYPE_CHECKING:
    from posttrain.registry.registry import Registry


@dataclass(frozen=True, slots=True)
class Garbage:
    """What was deleted (would be, in a dry run), and what stays for the versions that are there and for who reads a folder."""

    num_deleted: int
    deleted_bytes: int
    folders: tuple[str, ...]
    num_kept: int
    kept_bytes: int
    read: tuple[str, ...] = ()
    """Folders that no version names and that stay, each with the process that reads it."""


@contextmanager
def version_lock(folder: Path, name: str, version: int, *, alone: bool) -> Generator[None]:
    """Held by each process that needs the version, or `alone` by the one that removes it; the kernel ends it with its holder.

    Raises: RegistryError if others hold it.
    """
    path = folder / "uses" / f"{name}@{version}"
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as handle:
        try:
            fcntl.flock(handle, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            why = "a running pipeline or reproduction takes it" if alone else "it is being removed"
            raise RegistryError(f"{name}@{version}: {why}; try again once that has ended") from error
        yield


@contextmanager
def using(registry: Registry, name: str, version: int) -> Generator[None]:
    """While this lasts the version cannot be removed. Raises: RegistryError if it is being removed, or is gone."""
    if not registry.store.writable:
        yield  # who cannot leave a lock here shares the folder with nobody who could remove
        return
    with version_lock(registry.folder, name, version, alone=False):
        registry.show(name, version)
        yield


def remove_version(
    registry: Registry, name: str, version: int, reason: str, *, dry_run: bool = False, actor: str | None = None
) -> RegistryEntry:
    """Take a version out; what it alone needs stays in the store until `collect`. Its number is not given again.

    Raises: RegistryError naming the alias, the lineage or the process that needs it.
    """
    entry, rows = registry.show(name, version), registry.rows
    if not reason.strip():
        raise RegistryError("a removal needs a reason: it stays in the log")
    with ExitStack() as held:
        held.enter_context(version_lock(registry.folder, name, version, alone=True))
        if dry_run:
            held.close()  # whether it could be, and nobody waits for the answer
        else:
            held.enter_context(rows.writing())
        if why := _needed_by(registry, entry):
            raise RegistryError(f"{name}@{version} is kept: {why}")
        if not dry_run:
            rows.delete(name, version)
            details = {"digest": entry.digest, "manifest": entry.manifest, "reason": reason}
            rows.event("remove", name, version, details, actor)
    return entry


def _needed_by(registry: Registry, entry: RegistryEntry) -> str:
    if aliases := registry.rows.all_aliases(entry.name).get((entry.name, entry.version)):
        return f"it has the alias {', '.join(aliases)}"
    made = (entry.digest, entry.manifest)
    if children := registry.rows.that_take(made, registry.store, but=(entry.name, entry.version)):
        return f"the lineage of {', '.join(children)} starts from it"
    return ""


def collect(registry: Registry, *, dry_run: bool = False) -> Garbage:
    """Delete what no version needs: first folders ready to load, then objects, one by one.

    A kill half-way leaves what was not reached for the next time. Raises: RegistryError while something is being added, and if
    a list of files is damaged.
    """
    store = registry.store
    with ExitStack() as held, ExitStack() as unread:
        if not held.enter_context(store.nobody_adding()):
            raise RegistryError(f"{store.folder}: a process adds to it; nothing was deleted, try again once it is done")
        if dry_run:
            held.close()  # others may begin: what is said is of this moment
        rows = registry.rows.all_objects()
        needed = {digest.removeprefix("sha256:") for digest in _reachable(store, rows)}
        ready = {registry.checkouts.place(digest, role) for role, _, digest in rows if role in READY_TO_LOAD}
        folders = [path for kind in READY_TO_LOAD.values() for path in sorted((store.folder / kind).glob("[!.]*"))]
        spare, read = _without_readers([path for path in folders if path not in ready], unread)
        if dry_run:
            unread.close()
        objects = [(path, path.stat().st_size) for path in sorted((store.folder / "objects").glob("??/*"))]
        unneeded = [(path, size) for path, size in objects if path.name not in needed]
        if not dry_run:
            _delete(spare, [path for path, _ in unneeded])
    freed = sum(size for _, size in unneeded)
    names = tuple(path.relative_to(store.folder).as_posix() for path in spare)
    return Garbage(
        len(unneeded), freed, names, len(objects) - len(unneeded), sum(size for _, size in objects) - freed, read
    )


def _without_readers(folders: Iterable[Path], unread: ExitStack) -> tuple[list[Path], tuple[str, ...]]:
    """Those that nobody reads, nor begins to while `unread` lasts; and what is said of the others."""
    free: list[Path] = []
    said: list[str] = []
    for folder in folders:
        try:
            unread.enter_context(nobody_reading(folder))
        except RunLockedError as error:
            said.append(str(error))
        else:
            free.append(folder)
    return free, tuple(said)


def _delete(folders: Iterable[Path], objects: Iterable[Path]) -> None:
    for path in folders:
        hidden = path.with_name(f".{path.name}.gone")  # half a folder must not look ready to load
        if hidden.exists():
            shutil.rmtree(hidden)
        path.replace(hidden)
        shutil.rmtree(hidden)
    for path in objects:
        path.unlink()


def _reachable(store: ContentStore, kept: Iterable[tuple[str, str, str]]) -> set[str]:
    """Every digest that must stay. Raises: RegistryError if a list of files is damaged: then nobody knows what it names."""
    found: set[str] = set()
    for _, kind, digest in kept:
        found.add(digest)
        if kind == "tree":
            found.update(store.tree(digest).values())
    return found
