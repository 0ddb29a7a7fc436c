"""An environment of verifiers with a tool, which verifiers serves by MCP from a process of its own."""

import verifiers.v1 as vf


class Shop(vf.Toolset[vf.ToolsetConfig, vf.State]):
    @vf.tool
    async def price(self, item: str) -> int:
        """The price of an item.

        Args:
            item: its name
        """
        return {"apple": 7, "pear": 12}[item]


class Data(vf.TaskData):
    answer: str


class ShopTaskConfig(vf.TaskConfig):
    shop: vf.ToolsetConfig = vf.ToolsetConfig()


class ShopConfig(vf.TasksetConfig):
    task: ShopTaskConfig = ShopTaskConfig()


class ShopTask(vf.Task[Data, vf.State, ShopTaskConfig]):
    @classmethod
    def toolsets(cls, config):
        return [Shop(config.shop)]

    @vf.reward
    async def exact(self, trace) -> float:
        return float(self.data.answer in trace.last_reply)


class ShopTaskset(vf.Taskset[ShopTask, ShopConfig]):
    def load(self):
        for item, price in (("apple", "7"), ("pear", "12")):
            yield ShopTask(Data(prompt=f"What is the price of one {item}?", answer=price), self.config.task)


__all__ = ["ShopTaskset"]

if __name__ == "__main__":
    Shop.run()
