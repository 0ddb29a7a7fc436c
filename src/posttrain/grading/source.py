"""A Python file that a user wrote, a reward or a scorer: what it defines, and the digest of all it is made of. Nothing is executed."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.errors import ConfigError
from posttrain.files import digest_file, digest_json


def split_spec(spec: str) -> tuple[str, str] | None:
    """(path, function) of `file.py:function`; None for a library name."""
    path, colon, function = spec.rpartition(":")
    return (path, function) if colon and path.endswith(".py") else None


def parse_source(file: Path) -> ast.Module:
    try:
        return ast.parse(file.read_bytes(), str(file))
    except (SyntaxError, ValueError) as error:
        line, reason = getattr(error, "lineno", 0) or 0, getattr(error, "msg", error)
        raise ConfigError(f"{file}:{line}: the file is not valid Python: {reason}") from None


def defined_names(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def own_functions(tree: ast.Module) -> list[str]:
    """What stands at the top of the file itself and can be called: no imports, no variables."""
    return [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]


def _local_sources(file: Path) -> dict[Path, ast.Module]:
    """The file and the neighbours it imports, directly or not."""
    trees: dict[Path, ast.Module] = {}
    queue = [file]
    while queue:
        path = queue.pop()
        if path in trees:
            continue
        trees[path] = parse_source(path)
        for name in _imported(trees[path]):
            base = file.parent / Path(*name.split("."))
            queue += [p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()]
    return trees


def _imported(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" if node.module else alias.name for alias in node.names}
    return names - {""}


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()


def dependency_versions(modules: set[str]) -> dict[str, str]:
    """Versions of the installed distributions that provide these top-level modules."""
    found = {name for module in modules for name in _distributions().get(module, [])}
    return {name: importlib.metadata.version(name) for name in sorted(found) if name != "posttrain"}


def source_of(file: Path) -> tuple[dict[str, str], set[str]]:
    """Digests of the file and the neighbours it imports, by name; and the top-level modules they import."""
    trees = _local_sources(file)
    digests = {path.relative_to(file.parent).as_posix(): digest_file(path) for path in trees}
    return digests, {name.split(".")[0] for tree in trees.values() for name in _imported(tree)}


def specs_digest(specs: Sequence[str]) -> str:
    """Digest of what specs name: of `file.py:name` the file with its neighbours and their packages, of others the words themselves."""
    found: list[Any] = []
    for spec in specs:
        own = split_spec(spec)
        if own is None:
            found.append(spec)
        else:
            digests, modules = source_of(Path(own[0]))
            found.append([own[1], digests, dependency_versions(modules)])
    return digest_json(found)
