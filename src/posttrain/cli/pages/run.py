"""The server of the pages from its options to its end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from posttrain.cli.pages.app import make_pages
from posttrain.cli.pages.site import Site
from posttrain.serve.app import make_app
from posttrain.serve.options import ServeOptions
from posttrain.serve.router import Router
from posttrain.serve.run import Serving, open_port, serve_until_stopped
from posttrain.serve.service import Service


class PageService:
    """What ends with the server: answers of a chat under way, and acts, which are told to save."""

    def __init__(self, site: Site, chat: Service | None) -> None:
        self.site, self._chat = site, chat
        site.runs.lines()  # the first page waits for no first reading

    @property
    def num_open(self) -> int:
        return self._chat.num_open if self._chat else 0

    async def drain(self, within_s: float) -> None:
        self.site.acts.stop()
        if self._chat:
            await self._chat.drain(within_s)


def run_pages(
    options: ServeOptions, make_site: Callable[[tuple[str, ...]], Site], make_chat_router: Callable[[], Router] | None,
    ready: Callable[[Serving[PageService]], None],
) -> None:  # fmt: skip
    """Until a signal. Raises: PosttrainError before the first request is taken."""
    options.check()
    asyncio.run(_serve_pages(options, make_site, make_chat_router, ready))


async def _serve_pages(
    options: ServeOptions, make_site: Callable[[tuple[str, ...]], Site], make_chat_router: Callable[[], Router] | None,
    ready: Callable[[Serving[PageService]], None],
) -> None:  # fmt: skip
    with open_port(options) as listening:
        if make_chat_router is None:
            service = PageService(make_site(()), None)
            await serve_until_stopped(options, listening, make_pages(service.site, options), service, ready)
            return
        router = make_chat_router()
        try:
            await router.start()
            chat = Service(options, router)
            service = PageService(make_site(tuple(router.names)), chat)
            pages = make_pages(service.site, options, make_app(chat))
            await serve_until_stopped(options, listening, pages, service, ready)
        finally:
            await router.close()
