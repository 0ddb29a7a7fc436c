"""A small server that speaks OpenEnv's protocol, with the environments of `openenv_server.py` and one that echoes: `openenv_protocol.py KIND SESSIONS`."""
# pyright: reportMissingImports=false

import asyncio
import os
import socket
import sys

import uvicorn
from fastapi import FastAPI, WebSocket, WebSocketDisconnect

FIELDS = {
    "guess": {"message": "string"},
    "echo": {"message": "string"},
    "walk": {"dx": "integer", "dy": "integer"},
    "desk": {"type": "string", "tool_name": "string", "arguments": "object"},
}
REQUIRED = {"guess": ["message"], "echo": ["message"], "walk": ["dx"], "desk": ["tool_name"]}
ADD = {"a": {"type": "integer"}, "b": {"type": "integer"}}
app = FastAPI()
kind, sessions = sys.argv[1], int(sys.argv[2])
live = set()


class RejectedError(Exception):
    """A field of the action, and what is wrong with it."""


@app.get("/schema")
def schema():
    properties = {name: {"type": form} for name, form in FIELDS[kind].items()} | {"metadata": {"type": "object"}}
    return {"action": {"properties": properties, "required": REQUIRED[kind]}, "observation": {}, "state": {}}


def guess(state, action):
    if len(action["message"]) > 20:
        raise RejectedError("message", "String should have at most 20 characters")
    if action["message"] == "die":
        os._exit(3)
    if action["message"] == "flood":
        return {"text": "x" * 2_000_000}, 0.0, False
    said, wanted = int(action["message"]), state["seed"] % 10
    if said == wanted:
        return {"text": "yes"}, 1.0, True
    return {"text": "more" if said < wanted else "less"}, -0.25, False


def echo(state, action):
    state["turns"] = state.get("turns", 0) + 1
    return {"text": f"{state['seed']}: {action['message'][:2]}"}, len(action["message"]) % 3 / 3, state["turns"] == 3


def walk(state, action):
    if not isinstance(action["dx"], int):
        raise RejectedError("dx", "Input should be a valid integer")
    state["x"], state["y"] = state["x"] + action["dx"], state["y"] + action.get("dy", 0)
    return {"x": state["x"], "y": state["y"]}, float(action["dx"]), state["x"] > 1


def desk(state, action):
    if action["type"] == "list_tools":
        parameters = {"type": "object", "properties": ADD, "required": ["a", "b"]}
        return {"tools": [{"name": "add", "description": "Add.", "input_schema": parameters}]}, None, False
    given = action["arguments"]
    error = None if {"a", "b"} <= set(given) else {"error_type": "invalid_args", "message": "a and b are wanted"}
    result = None if error else {"content": [{"type": "text", "text": str(given["a"] + given["b"])}]}
    return {"tool_name": action["tool_name"], "result": result, "error": error}, None, False


STEPS = {"guess": guess, "echo": echo, "walk": walk, "desk": desk}
SHOWN = {"guess": {"text": "Guess a digit."}, "echo": {"text": "Talk."}, "walk": {"x": 0, "y": 0}, "desk": {}}


def react(state, message):
    if message["type"] == "reset":
        state |= {"x": 0, "y": 0, **message["data"]}
        observation, reward, done = SHOWN[kind], None, False
    else:
        observation, reward, done = STEPS[kind](state, message["data"])
    return {"type": "observation", "data": {"observation": observation, "reward": reward, "done": done}}


@app.websocket("/ws")
async def session(socket: WebSocket):
    await socket.accept()
    if len(live) >= sessions:
        await socket.send_json({"type": "error", "data": {"message": "full", "code": "CAPACITY_REACHED"}})
        return await socket.close()
    live.add(socket)
    state = {}
    try:
        while True:
            message = await socket.receive_json()
            if message["data"].get("message") == "hang":
                await asyncio.sleep(60)
            try:
                answer = react(state, message)
            except RejectedError as error:
                wrong = [{"loc": [error.args[0]], "msg": error.args[1]}]
                answer = {"type": "error", "data": {"message": "Invalid", "code": "VALIDATION_ERROR", "errors": wrong}}
            except ValueError as error:
                answer = {"type": "error", "data": {"message": str(error), "code": "EXECUTION_ERROR"}}
            await socket.send_json(answer)
    except WebSocketDisconnect:
        live.discard(socket)


if __name__ == "__main__":
    listening = socket.create_server(("127.0.0.1", 0))
    print(listening.getsockname()[1], flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run([listening])
