"""Every file, module, test and table that a page names is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "posttrain"
PAGES = ["CONTRIBUTING.md", "docs/architecture.md"]
NAMED = re.compile(r"`([\w./-]+\.(?:py|md|jsonl|importlinter)|(?:src|tests|bench|docs|examples)/[\w./-]*|[\w/]+/)`")
TABLE = re.compile(r"`([A-Z][A-Z_]{3,})`")
OF_A_RUN = {"model/", "adapter/", "adapter_total/", "checkpoints/", "events.jsonl", "metrics.jsonl"}
"""What a run leaves."""


def named(page: str) -> set[str]:
    """Paths of the tree that a page names, outside of its code blocks."""
    text = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    return {name for name in NAMED.findall(text) if name not in OF_A_RUN and not name.startswith("stages/")}


def tables(page: str) -> set[str]:
    """Tables of the code that a page names."""
    return set(TABLE.findall(page))


def is_there(name: str) -> bool:
    """Whether a path stands in the tree, as a whole or as the end of one: `batch.py`, `models/batch.py`."""
    if any((base / name).exists() for base in (ROOT, SOURCE)):
        return True
    return any(True for place in ("src", "tests") for _ in (ROOT / place).rglob(name.rstrip("/")))


@pytest.mark.parametrize("page", PAGES)
def test_every_path_that_a_page_names_is_there(page):
    names = named((ROOT / page).read_text(encoding="utf-8"))
    assert len(names) > 10
    assert sorted(name for name in names if not is_there(name)) == []


@pytest.mark.parametrize("page", PAGES)
def test_every_table_that_a_page_names_is_there(page):
    code = "\n".join(path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py"))
    missing = [
        name for name in tables((ROOT / page).read_text(encoding="utf-8")) if not re.search(rf"^{name}\b", code, re.M)
    ]
    assert missing == []


def test_the_rule_sees_what_it_forbids():
    page = "`recipes/experience/engines.py`, `no_such.py`, `tests/nowhere/`; ```\n`gone.py`\n``` `ENGINES` and `NO_SUCH_TABLE`"
    assert sorted(name for name in named(page) if not is_there(name)) == ["no_such.py", "tests/nowhere/"]
    assert tables(page) == {"ENGINES", "NO_SUCH_TABLE"}


def test_the_map_of_layers_names_every_package_and_no_other():
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    block = page.split("```")[1]
    rows = re.findall(r"^  ([\w, /]+?)\s{2,}L\d", block, re.M)
    told = {name.strip().rstrip("/") for row in rows for name in row.split(",")}
    real = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert told == real - {"__init__", "__main__"}
