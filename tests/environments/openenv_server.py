"""Environments of OpenEnv, served by openenv-core on a free port, which is written as the first line: `openenv_server.py KIND`."""
# pyright: reportMissingImports=false

import os
import socket
import sys
import time

import uvicorn
from fastmcp import FastMCP
from openenv.core.env_server.http_server import create_fastapi_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.mcp_environment import MCPEnvironment
from openenv.core.env_server.mcp_types import CallToolAction, CallToolObservation
from openenv.core.env_server.types import Action, Observation, State
from pydantic import Field


class Said(Action):
    message: str = Field(description="What is said", max_length=20)


class Heard(Observation):
    text: str = ""


class Guess(Environment):
    """Wants the seed's digit; says whether it is more, or less."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self):
        super().__init__()
        self.wanted, self.turns = 0, 0

    @property
    def state(self):
        return State(step_count=self.turns)

    def reset(self, seed=0, **columns):
        self.wanted, self.turns = seed % 10, 0
        return Heard(text="Guess a digit.")

    def step(self, action):
        self.turns += 1
        if action.message == "die":
            os._exit(3)
        if action.message == "hang":
            time.sleep(60)
        if action.message == "flood":
            return Heard(text="x" * 2_000_000, reward=0.0)
        guess = int(action.message)
        if guess == self.wanted:
            return Heard(text="yes", reward=1.0, done=True)
        return Heard(text="more" if guess < self.wanted else "less", reward=-0.25)


class Move(Action):
    """Go somewhere."""

    dx: int
    dy: int = 0


class Place(Observation):
    x: int = 0
    y: int = 0


class Walk(Guess):
    def reset(self, seed=0):
        self.x = self.y = 0
        return Place()

    def step(self, action):
        self.x, self.y = self.x + action.dx, self.y + action.dy
        return Place(x=self.x, y=self.y, reward=float(action.dx), done=self.x > 1)


class Desk(MCPEnvironment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self):
        server = FastMCP("desk")

        @server.tool()
        def add(a: int, b: int) -> int:
            """Add two numbers."""
            return a + b

        super().__init__(server)

    @property
    def state(self):
        return State()

    def reset(self, seed=0):
        return Observation()

    def _step_impl(self, action, **_):
        raise ValueError("no such action")


KINDS = {
    "guess": (Guess, Said, Heard),
    "walk": (Walk, Move, Place),
    "desk": (Desk, CallToolAction, CallToolObservation),
}

if __name__ == "__main__":
    made, action, observation = KINDS[sys.argv[1]]
    app = create_fastapi_app(made, action, observation, max_concurrent_envs=int(sys.argv[2]))
    listening = socket.create_server(("127.0.0.1", 0))
    print(listening.getsockname()[1], flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run([listening])
