"""Parts of docs/performance.md, and of other pages, that a bench writes, each between its own two markers."""

from __future__ import annotations

from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
DOC = DOCS / "performance.md"


def write(name: str, text: str, path: Path = DOC) -> None:
    """Replace what stands between `<!-- NAME: start -->` and `<!-- NAME: end -->`."""
    start, end = f"<!-- {name}: start -->", f"<!-- {name}: end -->"
    before, rest = path.read_text(encoding="utf-8").split(start)
    _, after = rest.split(end)
    path.write_text(f"{before}{start}\n{text}\n{end}{after}", encoding="utf-8")
