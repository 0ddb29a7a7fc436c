"""Opening the registry that a verb is about, and the words that such verbs share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from posttrain.errors import RegistryError

if TYPE_CHECKING:
    from posttrain.evidence import RegistryEntry
    from posttrain.registry import Registry

Folder = Annotated[Path, typer.Option("--registry", help="Folder of the registry.")]
Ref = Annotated[str, typer.Argument(metavar="REF", help="NAME@VERSION, NAME@ALIAS or alias:ALIAS.")]
DEFAULT = Path("registry")


@contextmanager
def open_registry(folder: Path, *, for_reading: bool = False) -> Iterator[Registry]:
    """Raises: RegistryError where there is none; and, unless `for_reading`, where it cannot be written."""
    from posttrain.registry import Registry

    if not (folder / "registry.sqlite").exists() and not (folder / "objects").exists():
        raise RegistryError(
            f"{folder}: got no registry here; name its folder with --registry, or register a model first"
        )
    book = Registry(folder, for_reading=for_reading)
    try:
        yield book
    finally:
        book.close()


def entry_line(entry: RegistryEntry) -> str:
    aliases = f"  [{', '.join(entry.aliases)}]" if entry.aliases else ""
    tags = "".join(f"  {key}: {value}" for key, value in entry.tags.items())
    return f"{entry.name}@{entry.version}  {entry.digest}{aliases}{tags}"
