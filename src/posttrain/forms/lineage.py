"""A merged model in the registry: one manifest that starts from the base and names every parent."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from posttrain.evidence import RegistryEntry
from posttrain.files import digest_bytes
from posttrain.forms.found import FoundModel
from posttrain.forms.merging.merge import MergeReport
from posttrain.forms.merging.recipe import MergeRecipe
from posttrain.models.provenance import model_digest
from posttrain.registry.manifest import MODEL, Manifest
from posttrain.registry.registry import Registry


def merge_manifest(
    folder: Path, recipe: MergeRecipe, report: MergeReport, parents: Mapping[str, FoundModel]
) -> Manifest:
    """Inputs `parent.N` are the digests of the models in the order of the recipe, `parent.N.manifest` what made them.

    A merge of a model whose rewards nobody certified is itself one: it takes no alias without a certificate.
    """
    inputs = {MODEL: report.base_digest, "recipe": digest_bytes(recipe.text.encode())}
    versions: list[str] = []
    for place, (name, digest) in enumerate(report.parents.items()):
        found = parents[name]
        inputs[f"parent.{place}"] = digest
        versions.append(found.version or found.folder.name)
        if found.manifests:
            inputs[f"parent.{place}.manifest"] = found.manifests[-1].digest
    details = {"merge_method": report.method, "parents": versions, "recipe": recipe.text}
    rewarded = any(found.lacks_certificate for found in parents.values()) or None
    return Manifest("merge", inputs, {MODEL: model_digest(folder)}, details=details, rewarded=rewarded)


def register_merge(folder: Path, name: str, registry: Path, manifest: Manifest) -> RegistryEntry:
    """A version without an alias: `posttrain gate` and `registry promote` decide on that, as for any other."""
    book = Registry(registry)
    try:
        return book.register(name, folder, manifest)
    finally:
        book.close()
