"""Environments of the package verifiers, in its own Python: `PYTHON posttrain_verifiers.py SOCKET ID --env.KEY VALUE …`.

What lies in this folder imports verifiers and the standard library, and nothing of ours. The environment is loaded once; each connection to the
socket has a fork of it, which plays one episode after the other and is killed with all that it has started when its connection closes.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import random
import select
import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from posttrain_dialogue import Dialogue, Endpoint, Json, LostError
from posttrain_game import Game

_PR_SET_CHILD_SUBREAPER = 36
_MARK = "POSTTRAIN_VERIFIERS_FORK"
_MAX_LINE_BYTES = 1 << 26


class VerifiersEpisodes:
    """Answers what a connection asks: `describe`, `rows`, `reset`, `turn` and `cut`."""

    def __init__(self, game: Game, endpoint: Endpoint) -> None:
        self._game, self._endpoint = game, endpoint
        self._playing: asyncio.Task[Json] | None = None

    async def answer(self, request: Json) -> Json:
        try:
            return await getattr(self, f"_{request['do']}")(request)
        except LostError as error:
            return {"lost": str(error)}
        except Exception as error:  # noqa: BLE001 - the process boundary; an environment may raise anything
            return {"lost": f"{type(error).__name__}: {error}"}

    async def _describe(self, _: Json) -> Json:
        """The tools that are offered with the first request."""
        await self._begin(0, 0)
        return {"tools": self._endpoint.dialogue.tools}

    async def _rows(self, request: Json) -> Json:
        """Prompts as the first request of each task shows them; the environment is asked for them where its tasks do not say them."""
        first = await self._begin(0, 0)
        are_said = self._game.prompt(0) == first
        rows: list[Json] = []
        for number in range(request["limit"]):
            try:
                self._game.task(number)
            except LostError:
                break
            prompt = self._game.prompt(number) if are_said else await self._begin(number, 0)
            rows.append({"prompt": prompt, "task": number})
        return {"rows": rows}

    async def _reset(self, request: Json) -> Json:
        return {"messages": await self._begin(request["task"], request["seed"])}

    async def _turn(self, request: Json) -> Json:
        self._endpoint.dialogue.turns.put_nowait(request)
        return await self._next()

    async def _cut(self, _: Json) -> Json:
        """The budget is spent before the next turn."""
        self._endpoint.dialogue.turns.put_nowait(None)
        return await self._next()

    async def _begin(self, number: int, seed: int) -> list[Json]:
        if self._playing is not None:
            self._playing.cancel()
            await asyncio.wait([self._playing])
        random.seed(seed)
        self._endpoint.dialogue = Dialogue()
        self._playing = asyncio.create_task(self._game.play(number, self._endpoint))
        began = await self._next()
        if "messages" not in began:
            raise LostError("it ended before the policy was asked")
        return began["messages"]

    async def _next(self) -> Json:
        """What the environment says next: new messages, or how the episode ended. Raises what its end raises."""
        assert self._playing is not None
        dialogue = self._endpoint.dialogue
        asked = asyncio.create_task(dialogue.asks.get())
        await asyncio.wait([asked, self._playing], return_when=asyncio.FIRST_COMPLETED)
        if asked.done():
            return {"messages": asked.result()}
        asked.cancel()
        return {"done": True, "was_cut": dialogue.was_cut, **self._playing.result()}


async def _converse(connection: socket.socket, game: Game) -> None:
    reader, writer = await asyncio.open_connection(sock=connection, limit=_MAX_LINE_BYTES)
    endpoint = Endpoint()
    await endpoint.open()
    try:
        async with game.serving():
            player = VerifiersEpisodes(game, endpoint)
            while line := await reader.readline():
                writer.write(json.dumps(await player.answer(json.loads(line))).encode() + b"\n")
                await writer.drain()
            os._exit(0)  # whoever asked is gone, and all that was started is killed with us
    except Exception as error:  # noqa: BLE001 - what the environment shares among its episodes did not start
        writer.write(json.dumps({"lost": f"{type(error).__name__}: {error}"}).encode() + b"\n")
        await writer.drain()


# --- forks ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fork:
    """What plays over a connection; `ended` can be read once it is gone."""

    pid: int
    connection: socket.socket
    ended: int

    def close(self) -> None:
        self.connection.close()
        os.close(self.ended)


def serve_forks(path: str, game: Game) -> NoReturn:
    """A fork for each connection, until we are killed. No thread runs here, and nothing is computed."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{path}.new")
    listener.listen(1024)
    os.rename(f"{path}.new", path)  # who finds it can connect
    watch = select.poll()
    watch.register(listener, select.POLLIN)
    forks: dict[int, Fork] = {}
    while True:
        for descriptor, _ in watch.poll():
            if descriptor == listener.fileno():
                fork = _fork(listener, game, set(forks.values()))
                forks[fork.connection.fileno()] = forks[fork.ended] = fork
                watch.register(fork.connection, select.POLLRDHUP)
                watch.register(fork.ended, select.POLLIN)
            elif descriptor in forks:
                fork = forks[descriptor]
                for one in (fork.connection.fileno(), fork.ended):
                    watch.unregister(one)
                    del forks[one]
                _kill(fork.pid)
                fork.close()


def _fork(listener: socket.socket, game: Game, others: set[Fork]) -> Fork:
    connection, _ = listener.accept()
    pid = os.fork()
    if pid:
        return Fork(pid, connection, os.pidfd_open(pid))
    listener.close()
    for other in others:  # held here, a connection would not close with its own fork
        other.close()
    os.environ[_MARK] = str(os.getpid())
    try:
        asyncio.run(_converse(connection, game))
    finally:
        os._exit(0)


def _kill(pid: int) -> None:
    """With all that it has started, which is ours once it is gone."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    while orphans := list(_orphans(pid)):
        for orphan in orphans:
            with contextlib.suppress(ProcessLookupError):
                os.kill(orphan, signal.SIGKILL)
            os.waitpid(orphan, 0)


def _orphans(pid: int) -> Iterator[int]:
    mark = f"{_MARK}={pid}".encode()
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            parent = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and mark in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0"):
                yield int(entry)


def main(path: str, ident: str, *options: str) -> NoReturn:
    try:
        game = Game(ident, list(options))
    except Exception as error:  # noqa: BLE001 - whatever the environment or verifiers raises becomes the last line
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")
    serve_forks(path, game)


if __name__ == "__main__":
    main(*sys.argv[1:])
