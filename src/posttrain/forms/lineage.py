"""A merged model in the registry: one manifest that starts from the base and names every parent, and by which it is merged again."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from posttrain.errors import ModelError
from posttrain.evidence import RegistryEntry
from posttrain.files import digest_bytes, read_json, reading
from posttrain.forms.found import FoundModel
from posttrain.forms.merging.merge import MergeOptions, MergeReport, merge_models
from posttrain.forms.merging.recipe import MergeRecipe, read_recipe
from posttrain.models.provenance import PROVENANCE, model_digest, source_digest
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


def merge_again(book: Registry, manifest: Manifest, scratch: Path, project: Path) -> str:
    """The digest of what the recorded recipe gives of the same parents: those that the registry keeps, else as the recipe names them
    in `project`.

    Raises: ModelError naming each parent that is in neither.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    path = scratch / "recipe.yaml"
    path.write_text(manifest.details["recipe"], encoding="utf-8")
    recipe = read_recipe(path)
    # What is not in the recipe is the base that an adapter names.
    digests = {name: manifest.inputs[f"parent.{place}"] for place, name in enumerate(recipe.models)}
    found = {name: _folder_of(book, name, digest, project) for name, digest in digests.items()}
    if lost := [f"{name} ({digests[name]})" for name, folder in found.items() if folder is None]:
        raise ModelError(
            f"{', '.join(lost)}: of no version that this registry keeps, nor in {project}; pull it, or name its place by --project DIR"
        )
    made = book.checkouts.ready(manifest.outputs[MODEL], MODEL)
    with ExitStack() as read:

        def resolve(name: str) -> Path:
            folder = found.get(name) or _folder_of(book, name, manifest.inputs[MODEL], project)
            if folder is None:
                raise ModelError(f"{name}: the base that an adapter names is not kept, nor in {project}")
            read.enter_context(reading(folder))
            return folder

        options = MergeOptions(
            read_json(made / PROVENANCE)["seed"], max(map(_num_tensor_bytes, made.glob("*.safetensors")))
        )
        merge_models(recipe, scratch / "model", resolve, options)
    return model_digest(scratch / "model")


def _folder_of(book: Registry, name: str, digest: str, project: Path) -> Path | None:
    if book.store.has(digest) and not book.store.missing(digest):
        return book.checkouts.ready(digest, MODEL)
    place = project / name
    return place if place.is_dir() and source_digest(str(place)) == digest else None


def _num_tensor_bytes(path: Path) -> int:
    """Without the header: as a limit, the largest of the files cuts as the limit did that they were written with."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
