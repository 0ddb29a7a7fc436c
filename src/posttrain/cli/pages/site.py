"""What all pages share: the folder, its records, how text becomes HTML, and whether acts are allowed."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from starlette.responses import HTMLResponse

from posttrain.cli.agent_folder import ServedFolder
from posttrain.cli.agent_tools import ReadTools
from posttrain.cli.pages.act_log import ActLog
from posttrain.cli.pages.door import form_token
from posttrain.cli.pages.run_index import RunIndex
from posttrain.cli.terminal import printable
from posttrain.report import words
from posttrain.report.series import SeriesCache
from posttrain.uris import clean_text

_REGISTRIES = ("registry.sqlite", "*/registry.sqlite", "*/*/registry.sqlite")

_REORDERS = re.compile("[\u202a-\u202e\u2066-\u2069]")
"""Written out: a name with one of them turns what stands beside it around, a command that is shown too."""


class Site:
    """One folder as pages. `chat_models` are the names that may be talked to."""

    def __init__(
        self, place: ServedFolder, token: str, *, registry: str, allow_acts: bool, chat_models: Sequence[str] = ()
    ) -> None:
        self.place, self.registry, self.allow_acts, self.chat_models = place, registry, allow_acts, tuple(chat_models)
        self.reading = ReadTools(place)
        self.runs = RunIndex(place)
        self.series = SeriesCache()
        self.acts = ActLog(place)
        self.form_token = form_token(token)
        self._templates = _environment()

    def page(self, template: str, title: str, status: int = 200, **context: Any) -> HTMLResponse:
        html = self._templates.get_template(f"{template}.html.j2").render(
            site=self, title=title, words=words, **context
        )
        return HTMLResponse(html, status)

    def registries(self) -> list[str]:
        """Folders of registries near the top, the one that was named at the start first."""
        found = [path.parent for pattern in _REGISTRIES for path in sorted(self.place.root.glob(pattern))]
        return list(dict.fromkeys([self.registry, *(self.place.shown(path) for path in found)]))


def _environment() -> Environment:
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("posttrain.cli.pages"), PackageLoader("posttrain", "report")]),
        autoescape=True,  # names, completions and configs are text of strangers
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_shown,
    )  # fmt: skip
    environment.filters |= {"when": _when, "urlencode": _urlencode, "kind": _kind_of_status}
    return environment


def _shown(value: Any) -> Any:
    return _clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value


@lru_cache(maxsize=1 << 14)
def _clean(text: str) -> str:
    return clean_text(_REORDERS.sub(lambda found: f"\\u{ord(found[0]):04x}", printable(text)))


def _urlencode(text: Any) -> str:
    """Of any text, also of a folder's name that is no UTF-8."""
    return quote(str(text), safe="/", errors="backslashreplace")


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _kind_of_status(status: Any) -> str:
    """The colour of a status, as the report's style names it."""
    first = str(status).split(":")[0].split(" ")[0]
    kinds = {"passed": "PASS", "registered": "PASS", "done": "PASS", "error": "FAIL", "failed": "FAIL", "unreadable": "FAIL", "pending": "INCONCLUSIVE"}  # fmt: skip
    return kinds.get(first, first if first.isalnum() else "")


def as_list(value: Any) -> list[Mapping[str, Any]]:
    """The objects of a list in a record; empty where something else stands there."""
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []


def static_file(name: str) -> tuple[bytes, str]:
    """A file of ours that pages load, and its type."""
    import posttrain.report

    here = Path(__file__).parent
    path = {
        "report.css": Path(posttrain.report.__file__).parent / "page.css", "ui.css": here / "ui.css", "curves.js": here / "curves.js",
        "ui.js": here / "ui.js", "icon.svg": here / "icon.svg",
    }[name]  # fmt: skip
    kind = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}[path.suffix]
    return path.read_bytes(), f"{kind}; charset=utf-8"
