"""JSON lines have one reader."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_nobody_reads_json_lines_by_hand():
    """A function that parses JSON and cuts text at what `str.splitlines` takes for lines breaks on U+2028."""
    found = []
    for path in (path for part in ("src", "bench", "examples", "docs") for path in (ROOT / part).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ListComp | ast.GeneratorExp):
                called = {inner.attr for inner in ast.walk(node) if isinstance(inner, ast.Attribute)}
                if {"loads", "splitlines"} <= called:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == []
