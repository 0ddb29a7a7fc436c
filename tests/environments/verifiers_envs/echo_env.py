"""An environment of verifiers of a single turn: a taskset alone, with a weighted reward and a measure."""

import verifiers.v1 as vf


class Data(vf.TaskData):
    answer: str


class EchoTask(vf.Task[Data, vf.State, vf.TaskConfig]):
    @vf.reward(weight=2.0)
    async def exact(self, trace) -> float:
        return float(trace.last_reply.strip() == self.data.answer)

    @vf.metric
    async def length(self, trace) -> float:
        return float(len(trace.last_reply))


class EchoConfig(vf.TasksetConfig):
    count: int = 3


class EchoTaskset(vf.Taskset[EchoTask, EchoConfig]):
    def load(self):
        for number in range(self.config.count):
            data = Data(prompt=f"Say {number}", system_prompt="Be short.", answer=str(number))
            yield EchoTask(data, self.config.task)


__all__ = ["EchoTaskset"]
