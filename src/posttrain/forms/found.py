"""The model that a user means: a folder, or a version of a registry with the lineage that made it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from posttrain.config.kinds import STAGE_KINDS
from posttrain.errors import ModelError
from posttrain.evidence import RegistryEntry
from posttrain.files import read_json
from posttrain.models.low_rank import CONFIG
from posttrain.models.provenance import recorded_bits, source_digest
from posttrain.registry.manifest import CERTIFICATE, MODEL, Manifest
from posttrain.registry.promotion import CHAMPION
from posttrain.registry.registry import Registry

_HUB = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")
_REF = re.compile(r"(?P<name>[A-Za-z][\w.-]*)(@[\w.-]+)?|alias:[\w.-]+")
_RESULT, _CERTIFICATE = "result.json", "certificate.json"
_FETCHED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True, slots=True)
class FoundModel:
    """`version` and `manifests` (first stage to last) are those of the registry; empty for a folder.

    `adapter` and `base`: what the version keeps of an adapter that was trained on a base in 4 bits, and that base, where it is there.
    """

    folder: Path
    version: str = ""
    manifests: tuple[Manifest, ...] = ()
    adapter: Path | None = None
    base: Path | None = None

    @property
    def lacks_certificate(self) -> bool:
        """Whether a stage earned rewards that nobody certified; of a folder the stage that left it, and those of its run before."""
        if self.version:
            return any(made.needs_certificate and CERTIFICATE not in made.inputs for made in self.manifests)
        return any(_earned_uncertified(stage) for stage in _stages_of(self.folder))


def find_model(name: str, registry: Path | None, beside: Path = Path()) -> FoundModel:
    """A folder (relative to `beside`), a model of the hub (ORG/NAME@REVISION), else NAME, NAME@VERSION or NAME@ALIAS of the
    registry; NAME is its champion.

    Raises: ModelError where it is neither; RegistryError.
    """
    folder = beside / Path(name).expanduser()
    if folder.is_dir():
        if not any((folder / file).is_file() for file in ("config.json", CONFIG)):
            raise ModelError(
                f"{folder} has no config.json and no {CONFIG}; expected the folder of a model or an adapter"
            )
        return FoundModel(folder)
    if _HUB.fullmatch(name) and not name.startswith("."):
        return FoundModel(_from_hub(name))
    match = _REF.fullmatch(name)
    if match is None or registry is None or not (registry / "registry.sqlite").is_file():
        where = f", and there is no registry at {registry}" if registry is not None and match else ""
        raise ModelError(
            f"{name}: no such folder{f' in {beside.resolve()}' if str(beside) != '.' else ''}{where}; expected a folder with "
            "config.json, or NAME@VERSION of a registry (--registry DIR)"
        )
    book = Registry(registry)
    try:
        entry = book.resolve(f"{name}@{CHAMPION}" if match["name"] == name else name)
        book.verify(entry.name, entry.version)
        chain, adapter = tuple(book.chain(entry.name, entry.version)), book.adapter(entry.name, entry.version)
        found = FoundModel(Path(entry.path), f"{entry.name}@{entry.version}", chain)
        if adapter is None or not recorded_bits(adapter):
            return found
        return replace(found, adapter=adapter, base=_given_base(book, entry, chain[0].inputs[MODEL]))
    finally:
        book.close()


def _stages_of(folder: Path) -> list[Path]:
    """The folder of the stage that left a model or an adapter there, and those of its run before it; none of a folder of another kind."""
    last = folder.resolve().parent
    if last.parent.name != "stages":
        return [last] if (last / _RESULT).is_file() else []
    return sorted(path.parent for path in last.parent.glob(f"*/{_RESULT}") if path.parent.name <= last.name)


def _earned_uncertified(stage: Path) -> bool:
    kind = STAGE_KINDS.get(read_json(stage / _RESULT)["kind"])
    if kind is None or not kind.rewarded:
        return False
    certificate = stage / _CERTIFICATE
    return not certificate.is_file() or read_json(certificate)["verdict"] != "pass"


def _given_base(book: Registry, entry: RegistryEntry, digest: str) -> Path | None:
    """The base that a version's lineage started from: another version, or where its configuration says, if it is still that."""
    if book.store.has(digest) and not book.store.missing(digest):
        return book.checkouts.ready(digest, MODEL)
    kind, config = book.evidence(entry.name, entry.version).get("config", ("", ""))
    if kind != "file":
        return None
    said = yaml.safe_load(book.store.object_path(config).read_text(encoding="utf-8"))
    place = book.folder.resolve().parent / str(said["base_model"])
    return place if place.is_dir() and source_digest(str(place)) == digest else None


def _from_hub(name: str) -> Path:
    """Fetched once, into the hub client's cache. Raises: ModelError, in one line."""
    from huggingface_hub import snapshot_download

    from posttrain.config import hub

    reason = hub.prepare()
    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=_FETCHED))
    except (OSError, ValueError) as error:
        why = (
            f"the hub cannot be reached ({reason}), and its client has no copy"
            if reason
            else str(error).strip().splitlines()[0]
        )
        raise ModelError(f"{name}: no such folder here, and from the hub: {why}") from error
