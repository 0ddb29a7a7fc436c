"""Benches are run by hand and seldom: what they take from the package must still be there."""

import ast
import importlib
from pathlib import Path

import pytest

BENCHES = sorted((Path(__file__).parents[2] / "bench").rglob("*.py"))


@pytest.mark.parametrize("bench", BENCHES, ids=lambda path: path.stem)
def test_what_a_bench_imports_from_the_package_exists(bench):
    imports = [node for node in ast.walk(ast.parse(bench.read_text())) if isinstance(node, ast.ImportFrom)]
    for node in imports:
        if (node.module or "").split(".")[0] != "posttrain":
            continue
        module = importlib.import_module(node.module)
        for alias in node.names:
            if not hasattr(module, alias.name):
                importlib.import_module(f"{node.module}.{alias.name}")
