"""A server for Tinker's clients from its options to its end: bases first, then the port; on SIGTERM what was let in is done."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from posttrain.checkpoint.lock import run_lock
from posttrain.files import reading
from posttrain.serve.run import Serving, open_port, serve_until_stopped
from posttrain.serve.tinker.app import make_tinker_app
from posttrain.serve.tinker.options import TinkerOptions
from posttrain.serve.tinker.service import TinkerService

log = logging.getLogger(__name__)


def run_tinker(options: TinkerOptions, ready: Callable[[Serving[TinkerService]], None]) -> None:
    """Until a signal; `ready` is called before the first request is taken. Raises: PosttrainError before that."""
    options.check()
    asyncio.run(_serve(options, ready))


async def _serve(options: TinkerOptions, ready: Callable[[Serving[TinkerService]], None]) -> None:
    # Two servers would both write a model's journal.
    with open_port(options.serve) as listening, run_lock(options.folder), ExitStack() as bases:
        for source in options.models.values():
            bases.enter_context(reading(Path(source)))  # a merge reads it again
        service = TinkerService(options)
        try:
            service.queue.start()
            await serve_until_stopped(options.serve, listening, make_tinker_app(service), service, ready)
        finally:
            for line in service.unsaved():
                log.warning("%s", line)
            await service.close()
