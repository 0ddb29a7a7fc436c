"""The addresses of `posttrain ui`, and what each calls. HTML for people, `/api` for the script of the pages."""

from __future__ import annotations

import hmac
import logging
from typing import Annotated, Any
from urllib.parse import parse_qsl, quote

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp

import posttrain
from posttrain.cli.pages import views
from posttrain.cli.pages.door import PageDoor
from posttrain.cli.pages.site import Site, static_file
from posttrain.cli.pages.yaml_form import FORM_KINDS, draft_yaml, key_fields, target_path, write_draft
from posttrain.cli.terminal import error_message
from posttrain.errors import PosttrainError
from posttrain.serve.guard import ServeGuard
from posttrain.serve.options import ServeOptions
from posttrain.uris import clean_text

log = logging.getLogger(__name__)
_KEY = "key."
_MOST_FIELDS = 2000
QueryWords = Annotated[list[str], Query()]


def make_pages(site: Site, options: ServeOptions, chat: ASGIApp | None = None) -> ASGIApp:
    """The application behind its door; `chat` is a server of OpenAI's API for the page of that name."""
    app = FastAPI(title="posttrain ui", version=posttrain.__version__, docs_url=None, redoc_url=None, openapi_url=None)
    _add_reading(app, site)
    _add_forms(app, site)
    _add_faults(app, site)
    if chat is not None:
        app.mount("/serve", chat)
    return PageDoor(ServeGuard(app, options), options)


def _add_reading(app: FastAPI, site: Site) -> None:
    @app.get("/")
    def runs(q: str = "", page: int = 1) -> Response:
        return views.runs_page(site, q, page)

    @app.get("/run")
    def run(run: str, stage: str = "", page: int = 1) -> Response:
        return views.run_page(site, run, stage, page)

    @app.get("/api/curves")
    def curves(
        run: str, stage: str, name: QueryWords = [], low: int | None = None, high: int | None = None, points: int = 400  # noqa: B006
    ) -> Response:  # fmt: skip
        return JSONResponse(views.curves_record(site, run, stage, name, low, high, points))

    @app.get("/compare")
    def compare(run: QueryWords = [], stage: str = "") -> Response:  # noqa: B006
        return views.compare_page(site, run, stage)

    @app.get("/data")
    def data(run: str) -> Response:
        return views.data_page(site, run)

    @app.get("/report")
    def report(run: str) -> Response:
        return views.report_page(site, run)

    @app.get("/registry")
    def registry(registry: str = "", name: str = "") -> Response:
        return views.registry_page(site, registry, name)

    @app.get("/version")
    def version(ref: str, registry: str = "") -> Response:
        return views.version_page(site, registry, ref)

    @app.get("/chat")
    def chat() -> Response:
        return site.page("chat", "Chat")

    @app.get("/health")
    def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/static/{name}")
    def static(name: str) -> Response:
        try:
            body, kind = static_file(name)
        except KeyError:
            raise HTTPException(404, "no such file") from None
        return Response(body, media_type=kind, headers={"Cache-Control": "private, max-age=60"})


def _add_forms(app: FastAPI, site: Site) -> None:
    @app.get("/configure")
    def configure(kind: str = FORM_KINDS[0]) -> Response:
        return _form_page(site, kind, {})

    @app.post("/configure")
    async def configured(request: Request) -> Response:
        return await run_in_threadpool(_configured, site, await _fields(request, site))

    @app.get("/start")
    def start(config: str = "") -> Response:
        return site.page("start", "Start", config=config)

    @app.get("/acts")
    def acts() -> Response:
        entries = site.acts.entries()
        return site.page("acts", "Acts", entries=entries, is_live=any(one.act.code is None for one in entries))

    @app.post("/acts/show")
    async def show(request: Request) -> Response:
        fields = await _fields(request, site)
        name = fields.pop("act", "")
        act = await run_in_threadpool(site.acts.show, name, fields)
        return site.page("act", "Confirm", command=act.command, name=name, fields=fields)

    @app.post("/acts/do")
    async def do(request: Request) -> Response:
        fields = await _fields(request, site)
        _need_acts(site)
        name, shown = fields.pop("act", ""), fields.pop("command", "")
        await run_in_threadpool(site.acts.start, name, fields, shown)
        return RedirectResponse("/acts", 303)


def _form_page(site: Site, kind: str, given: dict[str, str], target: str = "", draft: Any = None, written: str = "") -> Response:  # fmt: skip
    usual, rest = key_fields(kind, given)
    return site.page(
        "configure", "Configure", kind=kind, kinds=FORM_KINDS, usual=usual, rest=rest, target=target or f"{kind}.yaml", draft=draft,
        written=written,
    )  # fmt: skip


def _configured(site: Site, fields: dict[str, str]) -> Response:
    kind, target = fields.get("kind", ""), fields.get("target", "")
    given = {name.removeprefix(_KEY): value for name, value in fields.items() if name.startswith(_KEY)}
    draft = draft_yaml(kind, given, site.place, target)
    if fields.get("do") != "write":
        return _form_page(site, kind, given, target, draft)
    _need_acts(site)
    path = target_path(site.place, target)
    write_draft(draft, path)
    return _form_page(site, kind, given, target, draft, site.place.shown(path))


def _need_acts(site: Site) -> None:
    if not site.allow_acts:
        raise HTTPException(403, "this server was started without --allow-acts; type the command in a terminal")


async def _fields(request: Request, site: Site) -> dict[str, str]:
    """A form of one of our own pages. Raises: HTTPException for another's."""
    body = (await request.body()).decode("utf-8", "replace")
    try:
        fields = dict(parse_qsl(body, keep_blank_values=True, max_num_fields=_MOST_FIELDS))
    except ValueError:
        raise HTTPException(413, f"got more than {_MOST_FIELDS:,} fields; expected a form of this server") from None
    if not hmac.compare_digest(fields.pop("form_token", "").encode(), site.form_token.encode()):
        raise HTTPException(403, "the form is not of this server, or of an earlier start of it; load the page again")
    return {name: value.replace("\r\n", "\n") for name, value in fields.items()}


def _add_faults(app: FastAPI, site: Site) -> None:
    def fault(request: Request, status: int, message: str) -> Response:
        message = clean_text(message)
        if request.url.path.startswith("/api/"):
            return JSONResponse({"error": message}, status)
        return site.page("fault", f"Error {status}", status, message=message)

    @app.exception_handler(PosttrainError)
    async def refused(request: Request, error: PosttrainError) -> Response:
        return fault(request, 400, error_message(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        wrong = "; ".join(f"{'.'.join(map(str, one['loc'][1:]))}: {one['msg'].lower()}" for one in error.errors())
        return fault(request, 400, f"error: {wrong}")

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return fault(request, error.status_code, f"{request.url.path}: {error.detail}")

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        log.error("%s failed", request.url.path, exc_info=error)
        return fault(request, 500, f"a defect of posttrain: {type(error).__name__}; the terminal says where")


def page_address(address: str, token: str) -> str:
    """What the terminal prints: the first address, which holds the token."""
    return f"{address}/?token={quote(token, safe='')}"
