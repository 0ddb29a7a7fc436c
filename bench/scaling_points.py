"""The points of scaling.py: four kinds of work at a given size, the seconds they take, and the arithmetic they need.

Lengths are exact: texts are made of words that are one token each.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import workload
from side_posttrain import charge_reference_pass

SIZES = {"64": 4, "128": 4, "192": 6, "256": 6, "384": 8, "512": 8}
"""Hidden size → layers; the name of a model is its hidden size."""
workload.SHAPES |= {
    name: ("qwen3", int(name), 3 * int(name), layers, int(name) // 32, int(name) // 64, workload.VOCAB)
    for name, layers in SIZES.items()
}
PROMPT = 64
"""Tokens of a prompt of RL."""
SEED = 1


@dataclass(frozen=True)
class Size:
    """`length`: tokens of a sequence (SFT, DPO) or of a completion (RL). `batch`: rows, pairs or prompts."""

    length: int = 128
    batch: int = 4
    group: int = 8
    model: str = "256"


@dataclass(frozen=True)
class Family:
    """Sequences with a common prompt, as they are computed: the prompt once, `branches` answers."""

    prompt: int
    answer: int
    branches: int

    @property
    def tokens(self) -> int:
        return self.prompt + self.branches * self.answer

    @property
    def scored(self) -> int:
        return self.branches * self.answer

    @property
    def attended(self) -> int:
        """Pairs of a query and a key it may see."""
        p, a = self.prompt, self.answer
        return p * (p + 1) // 2 + self.branches * (a * p + a * (a + 1) // 2)


@dataclass(frozen=True)
class Work:
    """`passes`: forward passes' worth of arithmetic (a backward is two). `family` of a size; `seconds` of its steps."""

    title: str
    passes: int
    family: Callable[[Size], Family]
    seconds: Callable[[Size, int], list[float]]


def forward_flops(size: Size, family: Family) -> float:
    """2 per weight and token, head at scored tokens only, and 4 per attended pair, head and channel."""
    shape = shape_of(size.model)
    attention = 4.0 * shape.num_layers * shape.num_heads * shape.head_dim * family.attended
    head = 2.0 * shape.vocab * shape.hidden * family.scored
    return size.batch * (2.0 * shape.linear_params * family.tokens + head + attention)


def decode_bytes(size: Size) -> float:
    """Weights once a step; keys and values of every row's whole context, prompt included, once a step. float32."""
    shape = shape_of(size.model)
    weights = 4.0 * (shape.linear_params + shape.vocab * shape.hidden)
    contexts = size.batch * size.group * sum(PROMPT + step for step in range(size.length))
    return size.length * weights + contexts * shape.kv_bytes_per_token(4)


@lru_cache(maxsize=16)
def shape_of(model: str) -> Any:
    from posttrain.planner.shape import ModelShape

    return ModelShape.from_config(json.loads((workload.model_dir(model) / "config.json").read_text()))


def linears_of(model: str) -> dict[tuple[int, int], int]:
    """(inputs, outputs) → how many, the head included."""
    shape = shape_of(model)
    found: dict[tuple[int, int], int] = {(shape.hidden, shape.vocab): 1}
    for inputs, outputs, count in shape.linear_shapes.values():
        found[inputs, outputs] = found.get((inputs, outputs), 0) + count
    return found


# --- texts ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def one_token_words() -> list[str]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(workload.tokenizer_dir())
    return [word for word in workload.words()[0] if len(tokenizer(" " + word)["input_ids"]) == 1]


def text(rng: random.Random, num_tokens: int) -> str:
    return "".join(" " + word for word in rng.choices(one_token_words(), k=num_tokens))


@contextmanager
def stage_of(kind: str, size: Size, rows: Sequence[Mapping[str, str]], num_steps: int, sink: Any, **own: Any) -> Iterator[Any]:  # fmt: skip
    """The keys and the stage of a run on these rows."""
    from posttrain.config.datasets import DatasetKeys
    from posttrain.config.kinds import STAGE_KINDS
    from posttrain.distributed.ranks import SingleProcess
    from posttrain.recipes.run.stage import Stage

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        keys = STAGE_KINDS[kind].keys(
            base_model=str(workload.model_dir(size.model)), datasets=[DatasetKeys(path=str(data))], device="cpu", bf16=False, seed=SEED,
            sequence_len=4096, learning_rate=1e-9, lr_scheduler_type="constant", max_steps=num_steps + 1, **own,
        )  # fmt: skip
        stage = Stage(kind, Path(folder) / "run", keys, SingleProcess(), watchers=lambda *_: [sink])
        try:
            yield keys, stage
        finally:
            stage.close()


class Enough(Exception):
    """The last step was timed: what comes after it (checkpoint, export) is not part of a step."""


class Clock:
    """A metric sink that keeps `metric` of each step but the first, and ends the run after `num_steps` of them."""

    def __init__(self, num_steps: int, metric: str = "step_time") -> None:
        self._num_steps, self._metric = num_steps, metric
        self.seconds: list[float] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step > 1:
            self.seconds.append(metrics[self._metric])
        if len(self.seconds) == self._num_steps:
            raise Enough

    def event(self, kind: str, step: int, details: Mapping[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


def run(recipe: Any, kind: str, size: Size, rows: Sequence[Mapping[str, str]], clock: Clock, num_steps: int, **own: Any) -> None:  # fmt: skip
    with stage_of(kind, size, rows, num_steps, clock, **own) as (keys, stage):
        try:
            recipe.run(keys, stage)
        except Enough:
            return
    raise AssertionError("the run ended before its last step was timed")


# --- the four kinds of work ----------------------------------------------------------------------------------------


def sft_seconds(size: Size, num_steps: int) -> list[float]:
    from posttrain.recipes import sft

    rng, family, clock = random.Random(SEED), sft_family(size), Clock(num_steps)
    # The last token of a sequence, here the end token, is a target and never an input.
    rows = [
        {"prompt": text(rng, family.prompt), "completion": text(rng, family.answer)}
        for _ in range(size.batch * (num_steps + 1))
    ]
    run(sft, "sft", size, rows, clock, num_steps, per_device_train_batch_size=size.batch)
    return clock.seconds


def dpo_seconds(size: Size, num_steps: int) -> list[float]:
    from posttrain.recipes import dpo

    rng, family, clock = random.Random(SEED), dpo_family(size), Clock(num_steps)
    rows = [
        {"prompt": text(rng, family.prompt), "chosen": text(rng, family.answer), "rejected": text(rng, family.answer)}
        for _ in range(size.batch * (num_steps + 1))
    ]
    original = dpo.Reference.of
    reference_s = charge_reference_pass(dpo, num_steps + 1)
    try:
        run(dpo, "dpo", size, rows, clock, num_steps, per_device_train_batch_size=size.batch)
    finally:
        dpo.Reference.of = original
    return [seconds + reference_s() for seconds in clock.seconds]


def train_half_seconds(size: Size, num_steps: int) -> list[float]:
    from posttrain.recipes import grpo

    rng, clock = random.Random(SEED), Clock(num_steps, "time/train_s")
    rows = [{"prompt": text(rng, PROMPT)} for _ in range(size.batch)]
    original = grpo.make_engine, grpo.sync_engine
    grpo.make_engine = recorded_engine(size.length)
    # Recorded completions leave a canary nothing to decode.
    grpo.sync_engine = lambda engine, policy, version: {
        "sync/moved_bytes": float(engine.update(policy, version).num_bytes)
    }
    reward = str(Path(__file__).parent / "rewards.py") + ":vowels"
    try:
        run(
            grpo, "grpo", size, rows, clock, num_steps, reward_funcs=[reward], num_prompts_per_step=size.batch,
            num_generations=size.group, max_completion_length=size.length, per_device_train_batch_size=size.batch * size.group,
        )  # fmt: skip
    finally:
        grpo.make_engine, grpo.sync_engine = original
    return clock.seconds


def recorded_engine(length: int) -> Callable[..., Any]:
    """An engine whose completions are random words of exactly `length` tokens, scored once by the starting weights."""
    from posttrain.rollout.embedded import EmbeddedEngine
    from posttrain.types import Completion

    class Recorded(EmbeddedEngine):
        kept: dict[tuple[int, ...], list[Completion]]

        def generate(self, requests: Sequence[Any], params: Any) -> list[Completion]:
            left = {request.prompt_ids: list(self._of(request.prompt_ids, requests)) for request in requests}
            return [left[request.prompt_ids].pop() for request in requests]

        def _of(self, prompt: tuple[int, ...], requests: Sequence[Any]) -> list[Completion]:
            if prompt not in self.kept:
                rng = random.Random(str(prompt))
                group = sum(request.prompt_ids == prompt for request in requests)
                ids = [tuple(self._policy.tokenizer(text(rng, length))["input_ids"]) for _ in range(group)]
                logps = self.score([(prompt + one, len(prompt)) for one in ids])
                self.kept[prompt] = [Completion(i, tuple(p), "length", 0) for i, p in zip(ids, logps, strict=True)]
            return self.kept[prompt]

    def make(source: Any, *rest: Any, **options: Any) -> Any:
        engine = Recorded(source.policy, stop_token_ids=())
        engine.kept = {}
        return engine

    return make


def rollout_seconds(size: Size, num_steps: int) -> list[float]:
    """The engine on the policy's weights; nothing ends before `length`, and all rows decode at once."""
    from posttrain.config.datasets import DatasetKeys
    from posttrain.config.rl import GRPOKeys
    from posttrain.models.load import load_policy, load_tokenizer
    from posttrain.rollout.embedded import EmbeddedEngine
    from posttrain.types import Request, SamplingParams

    keys = GRPOKeys(
        base_model=str(workload.model_dir(size.model)), datasets=[DatasetKeys(path="unused.jsonl")], reward_funcs=["unused"], device="cpu"
    )  # fmt: skip
    tokenizer = load_tokenizer(keys)
    policy = load_policy(keys, tokenizer=tokenizer).without_dropout()
    rows, rng = size.batch * size.group, random.Random(SEED)
    engine = EmbeddedEngine(policy, stop_token_ids=(), batch_size=rows)
    prompts = [tuple(tokenizer(text(rng, PROMPT))["input_ids"]) for _ in range(size.batch)]
    seconds: list[float] = []
    for step in range(num_steps + 1):
        requests = [Request(prompt, step * rows + row * size.group + i) for row, prompt in enumerate(prompts) for i in range(size.group)]  # fmt: skip
        # The first call warms up; a few tokens are enough for that.
        params = SamplingParams(size.length if step else 4, 1.0)
        start = time.perf_counter()
        list(engine.generate(requests, params))
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def sft_family(size: Size) -> Family:
    return Family(size.length // 4, size.length - size.length // 4, 1)


def dpo_family(size: Size) -> Family:
    return Family(size.length // 2, size.length - size.length // 2, 2)


def group_family(size: Size) -> Family:
    return Family(PROMPT, size.length, size.group)


WORKS = {
    "sft": Work("SFT step", 3, sft_family, sft_seconds),
    # A reference pass and a step.
    "dpo": Work("preference step", 4, dpo_family, dpo_seconds),
    "rollouts": Work("GRPO rollouts", 1, group_family, rollout_seconds),
    "grpo": Work("GRPO training half", 3, group_family, train_half_seconds),
}


@dataclass(frozen=True)
class Point:
    """Seconds (median), FLOP/s and, for decoding, bytes/s that were needed."""

    seconds: float
    flops_rate: float
    bytes_rate: float | None


def measure(work: str, size: Size, num_steps: int) -> Point:
    kind = WORKS[work]
    seconds = statistics.median(kind.seconds(size, num_steps))
    flops = kind.passes * forward_flops(size, kind.family(size))
    return Point(seconds, flops / seconds, decode_bytes(size) / seconds if work == "rollouts" else None)


def gemm_rows(work: str, size: Size) -> int:
    """Rows of a product: the live sequences when decoding, the packed tokens of a micro-batch when training."""
    if work == "rollouts":
        return size.batch * size.group
    return size.batch * WORKS[work].family(size).tokens
