"""Folders ready to load, by digest: `models/<sha256>/` and `adapters/<sha256>/`, hard-linked to the store."""

from __future__ import annotations

from pathlib import Path

from posttrain.errors import RegistryError
from posttrain.files import digest_file
from posttrain.registry.manifest import ADAPTER_TOTAL
from posttrain.registry.store import ContentStore

READY_TO_LOAD = {"model": "models", ADAPTER_TOTAL: "adapters"}
"""Role of a stored tree → the folder in which it lies ready to load, by digest."""


class Checkouts:
    def __init__(self, store: ContentStore) -> None:
        self._store = store

    def place(self, digest: str, role: str) -> Path:
        return self._store.folder / READY_TO_LOAD[role] / digest.removeprefix("sha256:")

    def ready(self, digest: str, role: str) -> Path:
        """The folder, written anew where it is not there."""
        path = self.place(digest, role)
        return path if path.exists() else self._store.materialize(digest, path)

    def verify(self, tree: str, role: str) -> None:
        """The folder that is loaded must hold what the store holds; a hard link to it does. Raises: RegistryError."""
        folder = self.place(tree, role)
        if not folder.exists():
            return
        files = self._store.tree(tree)
        for name, digest in files.items():
            path = folder / name
            same = path.exists() and (path.samefile(self._store.object_path(digest)) or digest_file(path) == digest)
            if not same:
                raise RegistryError(f"{path}: is not the registered {digest}; delete {folder}, it will be written anew")
        extra = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        if extra != sorted(files):
            added = ", ".join(sorted(set(extra) - set(files)))
            raise RegistryError(f"{folder}: has files that were not registered: {added}; delete them")
