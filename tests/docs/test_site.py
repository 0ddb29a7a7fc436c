"""The site: every page is in its navigation, every command in its reference; built strictly, so that no link or anchor is broken."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.cli.app import VERBS

ROOT = Path(__file__).parents[2]
NAV = re.findall(r"^      - (\S+)$", (ROOT / "docs" / "mkdocs.yml").read_text().partition("\nnav:")[2], re.M)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_site", ROOT / "docs" / "make_site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_is_in_the_navigation_once(script, tmp_path):
    script.lay_out(tmp_path / "pages")
    made = sorted(str(path.relative_to(tmp_path / "pages")) for path in (tmp_path / "pages").rglob("*.md"))
    assert sorted(NAV) == made


def test_every_command_stands_in_the_reference_with_its_options(script):
    page = script.commands_page()
    for verb in VERBS:
        assert f"\n## posttrain {verb}" in page, verb
    assert "## posttrain registry promote" in page and "| `--on-change` |" in page and "`refuse`" in page


def test_the_notebook_is_a_page(script):
    page = script.notebook_page({"cells": [{"cell_type": "markdown", "source": ["# It\n"]}, {"cell_type": "code", "source": ["1 + ", "1"]}]})  # fmt: skip
    assert page == "# It\n\n\n```python\n1 + 1\n```\n"


@pytest.mark.skipif(
    importlib.util.find_spec("mkdocstrings") is None, reason="the site needs posttrain[docs]: make docs"
)
def test_the_site_builds_and_a_broken_link_stops_it(script, tmp_path, monkeypatch):
    build = [sys.executable, str(ROOT / "docs" / "make_site.py"), str(tmp_path)]
    built = subprocess.run(build, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    pages = tmp_path / "site"
    reference = (pages / "reference" / "objectives.html").read_text()
    assert "gae" in reference or "group" in reference
    assert "posttrain.objectives.preference" in reference
    outside = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="?https?://[^>]+>', (pages / "index.html").read_text())
    assert outside == [], "the pages load nothing from elsewhere"
    with (tmp_path / "pages" / "docs" / "gate.md").open("a") as page:
        page.write("\n[gone](architecture.md#no-such-heading)\n")
    assert "no-such-heading" in script.build(tmp_path).stderr
