"""Builds the documentation as a site, into build/site or FOLDER/site: `python docs/make_site.py [FOLDER]` (extra `docs`).

The pages are laid out as they lie in the repository; those of the commands, of the Python names and of the notebook are made here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from posttrain.cli.app import VERBS, load_verb

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "docs" / "mkdocs.yml"
SHOWN = ["*.md", "LICENSE", "Dockerfile", "docs/*.md", "docs/*.svg", "examples/*.py", "examples/*/*.md", "examples/*/*.yaml", "examples/*/*.py", "examples/*/*.ipynb"]  # fmt: skip
NOTEBOOK = Path("examples/quickstart/notebook.ipynb")
MODULES = {
    "python": ("From Python", ["posttrain.api.verbs", "posttrain.api.run"]),
    "objectives": ("Objectives", [f"posttrain.objectives.{path.stem}" for path in sorted((ROOT / "src/posttrain/objectives").glob("[!_]*.py"))]),
    "types": ("Types, protocols, errors", ["posttrain.types", "posttrain.evidence", "posttrain.protocols", "posttrain.errors"]),
}  # fmt: skip
"""Page of the reference → its title, and the modules whose docstrings it shows."""


def lay_out(pages: Path) -> None:
    """Write the site's source into `pages`, which is made anew."""
    shutil.rmtree(pages, ignore_errors=True)
    for path in sorted(path for pattern in SHOWN for path in ROOT.glob(pattern)):
        target = pages / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    notebook = json.loads((ROOT / NOTEBOOK).read_text(encoding="utf-8"))
    (pages / NOTEBOOK).with_suffix(".md").write_text(notebook_page(notebook), encoding="utf-8")
    (pages / "reference").mkdir()
    (pages / "reference" / "commands.md").write_text(commands_page(), encoding="utf-8")
    for name, (title, modules) in MODULES.items():
        shown = "\n".join(f"## {module}\n\n::: {module}\n" for module in modules)
        (pages / "reference" / f"{name}.md").write_text(f"# {title}\n\n{shown}", encoding="utf-8")


def notebook_page(notebook: dict[str, Any]) -> str:
    """The cells one after the other, code as code."""
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    return "\n\n".join(text if kind == "markdown" else f"```python\n{text}\n```" for kind, text in cells) + "\n"


def commands_page() -> str:
    """Every verb with its arguments and options, as `--help` says them."""
    lines = ["# Commands", "", "What `posttrain VERB --help` says, verb by verb."]
    for verb in VERBS:
        for name, command in _with_own(f"posttrain {verb}", load_verb(verb)):
            lines += ["", f"## {name}", "", " ".join((command.help or "").split())]
            rows = [_row(parameter) for parameter in command.params if not getattr(parameter, "hidden", False)]
            lines += ["", "| | | default |", "|---|---|---|", *rows] if rows else []
    return "\n".join(lines) + "\n"


def _with_own(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """A command, and those below it."""
    yield name, command
    for below, own in getattr(command, "commands", {}).items():
        yield from _with_own(f"{name} {below}", own)


def _row(parameter: Any) -> str:
    is_option = parameter.opts[0].startswith("-")
    names = [*parameter.opts, *parameter.secondary_opts] if is_option else [parameter.metavar or parameter.name.upper()]
    value = f" {parameter.metavar}" if is_option and parameter.metavar else ""
    default = "required" if parameter.required else _default(parameter.default)
    cells = (", ".join(f"`{name}`" for name in names) + value, " ".join((parameter.help or "").split()), default)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(value: Any) -> str:
    return "" if value in (None, False, "", [], ()) or callable(value) else f"`{value}`"


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    """Make `folder`/site of `folder`/pages; a link or an anchor that leads nowhere is an error."""
    config = folder / "mkdocs.yml"
    config.write_text(CONFIG.read_text(encoding="utf-8").replace("paths: [../src]", f"paths: [{ROOT / 'src'}]"))
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(config)],
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def main() -> int:
    folder = Path(sys.argv[1]) if sys.argv[1:] else ROOT / "build"
    lay_out(folder / "pages")
    built = build(folder)
    print(built.stderr if built.returncode else folder / "site" / "index.html", file=sys.stderr if built.returncode else None)  # fmt: skip
    return built.returncode


if __name__ == "__main__":
    sys.exit(main())
