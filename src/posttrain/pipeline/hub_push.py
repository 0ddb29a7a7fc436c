"""A registered version pushed to the Hugging Face hub: its model, or its adapter for the given base, with the generated card.

The token is read from `HF_TOKEN` and from nowhere else. What was pushed is read back by digest, and stands as a tag of the version.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.config.hub import prepare
from posttrain.config.pipeline import PipelineKeys
from posttrain.errors import ConfigError, RegistryError
from posttrain.evidence import RegistryEntry
from posttrain.names import REPOSITORY
from posttrain.registry.card import model_card
from posttrain.registry.manifest import ADAPTER_TOTAL
from posttrain.registry.registry import Registry
from posttrain.uris import without_secrets

TOKEN = "HF_TOKEN"
_CARD, _ADAPTER_CONFIG = "README.md", "adapter_config.json"
_THEIRS = frozenset({".gitattributes"})
"""Files that the hub itself puts into a repository."""


def push_to_hub(
    registry: Registry, entry: RegistryEntry, repo: str, *, adapter: bool = False, private: bool | None = None
) -> str:
    """The address of the commit. Files that the repository has beside are taken out, so that it holds this version and no other.

    Raises: RegistryError where there is no token or no such adapter, something of the version is damaged, or the hub refuses.
    """
    if reason := against_push(repo):
        raise RegistryError(reason)
    if unreachable := prepare():
        raise RegistryError(f"the hub cannot be reached ({unreachable}); nothing was pushed, push again once it can")
    registry.verify(entry.name, entry.version)
    files = _files(registry, entry, adapter)
    try:
        address, commit = _committed(repo, files, f"{entry.name}@{entry.version} {entry.digest}", private)
    except Exception as error:  # noqa: BLE001 - the hub's client: what it raises is many things, and may quote a header
        said = without_secrets(" ".join(str(error).split())).replace(os.environ[TOKEN].strip(), "…")
        raise RegistryError(f"{repo}: the hub did not take {entry.name}@{entry.version}: {said}") from None
    if registry.store.writable:
        registry.tag(entry.name, entry.version, hub_tag(adapter), f"{repo}@{commit}")
    return address


def check_can_be_pushed(keys: PipelineKeys) -> None:
    """Refuse to train what could not be pushed afterwards as it is asked for. Raises: ConfigError."""
    target = keys.register_
    if target is not None and target.hub_model_id is not None and (reason := against_push(target.hub_model_id)):
        raise ConfigError(f"register.hub_model_id: {reason}, or remove the key")


def hub_tag(adapter: bool) -> str:
    """Name of the tag that says where a version was pushed to."""
    return "hub.adapter" if adapter else "hub"


def against_push(repo: str) -> str:
    """Why nothing could be pushed there, or nothing."""
    if reason := REPOSITORY.against(repo):
        return reason
    if not os.environ.get(TOKEN, "").strip():
        return f"pushing to {repo} needs a token that may write there: set {TOKEN} in the environment (it is kept in no file)"
    return ""


def _files(registry: Registry, entry: RegistryEntry, adapter: bool) -> dict[str, Path | bytes]:
    """Path in the repository → the stored file, or what is written for it."""
    digest = entry.digest
    if adapter:
        digest = registry.evidence(entry.name, entry.version).get(ADAPTER_TOTAL, ("", ""))[1]
        if not digest:
            raise RegistryError(
                f"{entry.name}@{entry.version} has no adapter of its whole lineage: push the model, without --adapter"
            )
    stored = registry.store.tree(digest)
    files: dict[str, Path | bytes] = {name: registry.store.object_path(content) for name, content in stored.items()}
    card = model_card(registry, entry.name, entry.version, hub="adapter" if adapter else "model")
    files[_CARD] = card.encode()
    if adapter:
        files[_ADAPTER_CONFIG] = _with_base(registry, entry, registry.store.object_path(stored[_ADAPTER_CONFIG]))
    return files


def _with_base(registry: Registry, entry: RegistryEntry, config: Path) -> bytes:
    """The adapter's configuration with the base's name on the hub, where the lineage started from one."""
    written: dict[str, Any] = json.loads(config.read_text())
    base = registry.chain(entry.name, entry.version)[0].details.get("base_model")
    written["base_model_name_or_path"] = None if REPOSITORY.against(str(base)) else base
    return (json.dumps(written, indent=2) + "\n").encode()


def _committed(repo: str, files: Mapping[str, Path | bytes], message: str, private: bool | None) -> tuple[str, str]:
    """Address and id of the commit, read back."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=os.environ[TOKEN].strip())
    api.create_repo(repo, private=private, exist_ok=True)
    before = api.model_info(repo)
    spare = {found.rfilename for found in before.siblings or []} - files.keys() - _THEIRS
    added = [CommitOperationAdd(name, str(what) if isinstance(what, Path) else what) for name, what in files.items()]
    removed = [CommitOperationDelete(name) for name in sorted(spare)]
    # Refused if somebody else pushed since: what is taken out was looked up before.
    done = api.create_commit(repo, [*added, *removed], commit_message=message, parent_commit=before.sha)
    there = api.model_info(repo, revision=done.oid, files_metadata=True)
    found = {one.rfilename: one for one in there.siblings or [] if one.rfilename not in _THEIRS}
    wrong = sorted(found.keys() ^ files.keys()) or [name for name in files if not _is(found[name], files[name])]
    if wrong:
        raise RegistryError(f"{', '.join(wrong[:5])} there are not what was pushed")
    return done.commit_url, done.oid


def _is(found: Any, what: Path | bytes) -> bool:
    """Whether a file of the hub has this content: large ones are named by sha256, small ones by git's own digest."""
    data = what.read_bytes() if isinstance(what, Path) and found.lfs is None else what
    if found.lfs is not None:
        return isinstance(what, Path) and found.lfs.sha256 == what.name  # an object is named by its sha256
    assert isinstance(data, bytes)
    return found.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
