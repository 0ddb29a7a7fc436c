"""What the front pages show is true: their YAML loads, their links lead somewhere, their commands are there."""

import ast
import re
from pathlib import Path

import pytest

from posttrain.cli.app import VERBS, available_verbs
from posttrain.config.load import detect_kind, load_stage
from posttrain.config.load_pipeline import load_pipeline

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/README.md")]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("text", blocks("yaml"), ids=["pipeline", "stage"])
def test_the_yaml_loads_as_it_stands(text, tmp_path):
    path = tmp_path / "it.yaml"
    path.write_text(text)
    for folder in ("base", "data", "evals"):
        (tmp_path / folder).mkdir()
    for name in ("sft_data", "data/sft", "data/pairs", "data/prompts", "evals/heldout", "evals/format"):
        (tmp_path / f"{name}.jsonl").touch()
    (tmp_path / "rewards.py").write_text("def correct(): ...\n")
    kind = detect_kind(path)
    loaded = load_pipeline(path) if kind == "pipeline" else load_stage(kind, path)
    assert loaded.notes == ()


def test_the_python_parses_and_imports_what_is_there():
    for text in blocks("python"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                module = __import__(node.module, fromlist=[alias.name for alias in node.names])
                assert all(hasattr(module, alias.name) for alias in node.names), node.module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", page.read_text()) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_commands_are_there():
    named = set(re.findall(r"^(?:\$ )?posttrain (\w+)|`posttrain (\w+)", README, re.MULTILINE))
    verbs = {a or b for a, b in named}
    assert verbs <= set(VERBS)
    assert {"run", "data", "plan", "eval", "gate", "registry", "chat", "doctor", "explain"} <= verbs & set(
        available_verbs()
    )
