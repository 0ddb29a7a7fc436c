"""Where served names come from: folders that were named, and versions of a registry that others promote and roll back."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from posttrain.errors import ModelError, PosttrainError, RegistryError
from posttrain.evidence import RegistryEntry
from posttrain.models.provenance import check_base
from posttrain.registry import Registry
from posttrain.registry.manifest import ADAPTER_TOTAL, MODEL
from posttrain.registry.promotion import CHAMPION
from posttrain.serve.backends import check_digest, of_folder
from posttrain.serve.pool import ModelVersion
from posttrain.serve.router import LostNames, Names, NameSource


class Folders:
    """Names that mean one folder each, for as long as the server runs."""

    def __init__(self, versions: Sequence[ModelVersion]) -> None:
        self._names = {version.name: version for version in versions}

    def names(self) -> tuple[Names, LostNames]:
        return self._names, {}

    def eager(self) -> frozenset[str]:
        return frozenset(self._names)


class RegistryModels:
    """Whole models by reference: `NAME` is its champion, `NAME@ALIAS` follows that alias, `NAME@VERSION` stays.

    Who serves one reference of a name is asked for it by the name alone, too.
    """

    def __init__(self, registry: Path, refs: Sequence[str]) -> None:
        self._registry, self._refs = registry, refs
        self._book: Registry | None = None

    def names(self) -> tuple[Names, LostNames]:
        self._book = self._book or open_book(self._registry)
        found: dict[str, ModelVersion] = {}
        lost: dict[str, PosttrainError] = {}
        for ref in self._refs:
            try:
                entry = self._book.find(ref if "@" in ref else f"{ref}@{CHAMPION}")
            except RegistryError as error:
                lost |= dict.fromkeys(self._means(ref), error)
                continue
            version = ModelVersion(
                entry.name, entry.digest, entry.path, entry.version, lambda entry=entry: self._check(entry)
            )
            found[f"{entry.name}@{entry.version}"] = version
            found |= dict.fromkeys(self._means(ref), version)
        return found, lost

    def _means(self, ref: str) -> list[str]:
        """The names that move with a reference."""
        name, _, alias = ref.partition("@")
        is_champion = alias in ("", CHAMPION)
        only = sum(other.partition("@")[0] == name for other in self._refs) == 1
        return [ref, *([name] if is_champion or only else []), *([f"{name}@{CHAMPION}"] if is_champion else [])]

    def eager(self) -> frozenset[str]:
        return frozenset(name for ref in self._refs for name in self._means(ref))

    def _check(self, entry: RegistryEntry) -> None:
        """The whole lineage and every byte, and the folder ready to load."""
        with closing(open_book(self._registry)) as book:
            book.resolve(f"{entry.name}@{entry.version}")
            book.verify(entry.name, entry.version)


class RegistryAdapters:
    """Every version of these names as its adapter for one base (`adapter_total`)."""

    def __init__(self, registry: Path, names: Sequence[str], base: ModelVersion) -> None:
        self._registry, self._names, self._base = registry, names, base
        self._book: Registry | None = None
        self._known: dict[tuple[str, int], ModelVersion | None] = {}

    def names(self) -> tuple[Names, LostNames]:
        book = self._book = self._book or open_book(self._registry)
        found: dict[str, ModelVersion] = {}
        lost: dict[str, PosttrainError] = {}
        for name in self._names:
            for entry in book.entries(name):
                if (version := self._version(book, entry)) is not None:
                    found |= {f"{name}@{which}": version for which in (entry.version, *entry.aliases)}
            champion = book.holder(name, CHAMPION)
            if champion is None or f"{name}@{champion.version}" not in found:
                said = "nothing has been promoted" if champion is None else f"{name}@{champion.version} has none"
                why = RegistryError(
                    f"{name}: its champion is to be served as an adapter of {self._base.folder}, but {said}; serve it whole: "
                    "leave --base out"
                )
                lost |= dict.fromkeys((name, f"{name}@{CHAMPION}"), why)
            else:
                found[name] = found[f"{name}@{champion.version}"]
        return found, lost

    def eager(self) -> frozenset[str]:
        return frozenset(alias for name in self._names for alias in (name, f"{name}@{CHAMPION}"))

    def _version(self, book: Registry, entry: RegistryEntry) -> ModelVersion | None:
        """A version never changes, so what it holds is looked up once."""
        key = (entry.name, entry.version)
        if key not in self._known:
            folder = book.adapter(*key)
            of_base = book.chain(*key)[0].inputs[MODEL] == self._base.digest
            self._known[key] = self._adapter(entry, folder) if folder is not None and of_base else None
        return self._known[key]

    def _adapter(self, entry: RegistryEntry, folder: Path) -> ModelVersion:
        digest = f"sha256:{folder.name}"
        return ModelVersion(entry.name, digest, folder, entry.version, lambda: self._check(entry, folder, digest))

    def _check(self, entry: RegistryEntry, folder: Path, digest: str) -> None:
        with closing(open_book(self._registry)) as book:
            made = book.chain(entry.name, entry.version)[-1].outputs.get(ADAPTER_TOTAL)
            if made != digest:
                raise RegistryError(
                    f"{entry.name}@{entry.version}: its manifest made the adapter {made}, it holds {digest}"
                )
            book.store.verify(digest)
        check_digest(folder, digest)


class Together:
    """Several sources as one."""

    def __init__(self, sources: Sequence[NameSource]) -> None:
        self._sources = sources

    def names(self) -> tuple[Names, LostNames]:
        found: dict[str, ModelVersion] = {}
        lost: dict[str, PosttrainError] = {}
        for source in self._sources:
            its_found, its_lost = source.names()
            found |= its_found
            lost |= its_lost
        return found, lost

    def eager(self) -> frozenset[str]:
        return frozenset(name for source in self._sources for name in source.eager())


def adapter_folder(name: str, folder: Path, base: ModelVersion) -> ModelVersion:
    """Raises: ModelError where it is no adapter, or one of another base by its own record."""
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(f"--lora {name}={folder}: no adapter_config.json there; expected the folder of a PEFT adapter")
    check_base(folder, base.folder)
    return of_folder(name, folder)


def open_book(folder: Path) -> Registry:
    """Raises: RegistryError where there is no registry."""
    if not (folder / "registry.sqlite").exists() and not (folder / "objects").exists():
        raise RegistryError(
            f"{folder}: got no registry here; name its folder with --registry, or serve a model's folder"
        )
    return Registry(folder)
