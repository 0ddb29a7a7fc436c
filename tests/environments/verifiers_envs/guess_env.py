"""An environment of verifiers of several turns, driven by its own `run`; what it is told can break it. Without end."""

import os
import subprocess
import time

import verifiers.v1 as vf


class Data(vf.TaskData):
    number: int


class GuessTask(vf.Task[Data, vf.State, vf.TaskConfig]):
    @vf.reward
    async def found(self, trace) -> float:
        return float(trace.last_reply.strip() == str(self.data.number))

    @vf.metric
    async def tries(self, trace) -> float:
        return float(trace.num_turns)


class GuessTaskset(vf.Taskset[GuessTask, vf.TasksetConfig]):
    INFINITE = True

    def load(self):
        number = 0
        while True:
            yield GuessTask(Data(prompt="Guess a number from 0 to 9.", number=number % 10), self.config.task)
            number += 1


class GuessConfig(vf.EnvConfig):
    player: vf.AgentConfig = vf.AgentConfig()
    hint: bool = True


class GuessEnv(vf.Env[GuessConfig]):
    async def run(self, task, agents):
        async with agents.player.interaction(task) as play:
            segment = await play.turn()
            while not segment.terminated:
                said = segment.last_reply.strip()
                if said == str(task.data.number):
                    break
                segment = await play.turn(self.answer(said, task.data.number))

    def answer(self, said, number):
        match said:
            case "hang":
                subprocess.Popen(["sleep", "4242"], start_new_session=True)
                time.sleep(1000)
            case "crash":
                os._exit(3)
            case "raise":
                raise ValueError("no such guess")
            case "flood":
                return "x" * 2_000_000
        if not said.isdigit() or not self.config.hint:
            return "no"
        return "higher" if int(said) < number else "lower"


__all__ = ["GuessEnv", "GuessTaskset"]
