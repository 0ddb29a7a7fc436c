"""Our side: the recipes as `posttrain run` calls them. A metric sink, as any user can add, takes the times."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import workload
from posttrain.files import read_json_lines
from rows import BY_NAME, Row
from turns import Turns

SEED = 42


class TurnSink:
    """Reports every step and waits for the next turn inside `log`."""

    def __init__(self, row: Row, turns: Turns, extra_seconds: Callable[[], float]) -> None:
        self._row, self._turns, self._extra_seconds = row, turns, extra_seconds
        self._tokens = 0.0

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._row.task.startswith("grpo"):
            tokens = round(metrics["completions/mean_length"] * self._row.num_prompts * workload.GROUP)
        else:
            tokens, self._tokens = round(metrics["num_tokens"] - self._tokens), metrics["num_tokens"]
        # A step that no group gives a gradient to has no loss here; TRL logs 0.
        self._turns.step_done(tokens, metrics.get("loss", 0.0), metrics.get("epoch", 0.0), self._extra_seconds())

    def event(self, kind: str, step: int, details: Mapping[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


def keys_of(row: Row, job: Mapping[str, Any]) -> Any:
    from posttrain.config.preference import DPOKeys
    from posttrain.config.rl import GRPOKeys
    from posttrain.config.stages import SFTKeys

    options = {
        "base_model": job["model"], "datasets": [{"path": job["data"]}], "seed": SEED, "device": job["device"], "bf16": row.bf16,
        "sequence_len": row.longest, "adapter": "qlora" if row.four_bits else "lora" if row.lora else "none", "lora_r": 16, "lora_alpha": 32,
        "lr_scheduler_type": "constant", "max_steps": job["max_steps"], "num_train_epochs": job["epochs"],
    }  # fmt: skip
    if row.task == "sft":
        return SFTKeys(**options | {"per_device_train_batch_size": 8, "learning_rate": 1e-4} | row.ours)
    if row.task == "dpo":
        return DPOKeys(**options | {"per_device_train_batch_size": 4, "learning_rate": 1e-5} | row.ours)
    reward = str(Path(__file__).parent / "rewards.py") + ":vowels"
    # A learning rate of nearly 0, so that lengths do not drift away from the end hazard; a rule would stop such a run.
    more = {"reward_funcs": [reward], "learning_rate": 1e-9, "num_prompts_per_step": row.num_prompts}
    more["health"] = {"policy_not_moving": {"enabled": False}}
    return GRPOKeys(**options | more | {"max_completion_length": workload.MAX_COMPLETION} | row.ours)


def train(row: Row, job: Mapping[str, Any], turns: Turns) -> None:
    from posttrain.distributed.ranks import SingleProcess
    from posttrain.recipes import dpo, grpo, sft
    from posttrain.recipes.run.stage import Stage

    extra_seconds = charge_reference_pass(dpo, job["max_steps"]) if row.task == "dpo" else lambda: 0.0
    if row.task == "grpo_train":
        grpo.make_engine = replaying_engine(job)
        # Recorded completions leave a canary nothing to decode.
        grpo.sync_engine = lambda engine, policy, version: {
            "sync/moved_bytes": float(engine.update(policy, version).num_bytes)
        }
    sink = TurnSink(row, turns, extra_seconds)
    recipe = {"sft": sft, "dpo": dpo}.get(row.task, grpo)
    keys = keys_of(row, job)
    with tempfile.TemporaryDirectory() as folder:
        kind = row.task.split("_")[0]
        recipe.run(keys, Stage(kind, Path(folder), keys, SingleProcess(), watchers=lambda *_: [sink]))


def charge_reference_pass(recipe: Any, max_steps: int) -> Callable[[], float]:
    """Log-probs computed before the first step are part of the work: each step is charged its share."""
    original, spent = recipe.Reference.of, [0.0]

    def timed(*args: Any) -> Any:
        start = time.perf_counter()
        try:
            return original(*args)
        finally:
            spent[0] = time.perf_counter() - start

    recipe.Reference.of = timed
    return lambda: spent[0] / max_steps


def replaying_engine(job: Mapping[str, Any]) -> Callable[..., Any]:
    """Recorded completions with the log-probs that sampling would have kept, computed before the first step."""
    from posttrain.rollout.embedded import EmbeddedEngine
    from posttrain.types import Completion

    class Replay(EmbeddedEngine):
        kept: dict[tuple[int, ...], list[Completion]]

        def generate(self, requests: Sequence[Any], params: Any) -> list[Completion]:
            left = {prompt: iter(self.kept[prompt]) for prompt in {request.prompt_ids for request in requests}}
            return [next(left[request.prompt_ids]) for request in requests]

    def make(source: Any, *rest: Any, **options: Any) -> EmbeddedEngine:
        engine = Replay(source.policy, stop_token_ids=())
        engine.kept = {}
        import torch

        for prompt, completions in recorded(job, source.policy.tokenizer):
            with torch.no_grad():
                logps = engine.score([(prompt + ids, len(prompt)) for ids in completions])
            engine.kept[prompt] = [
                Completion(ids, tuple(logp), "stop", 0) for ids, logp in zip(completions, logps, strict=True)
            ]
        return engine

    return make


def recorded(job: Mapping[str, Any], tokenizer: Any) -> list[tuple[tuple[int, ...], list[tuple[int, ...]]]]:
    prompts = [row["prompt"] for _, row in read_json_lines(Path(job["data"]))]
    completions = workload.recorded_completions(len(prompts), tokenizer.eos_token_id)
    return [(tuple(tokenizer(text)["input_ids"]), group) for text, group in zip(prompts, completions, strict=True)]


def roll_out(row: Row, job: Mapping[str, Any], turns: Turns) -> None:
    """The engine of the recipe, given the prompts of one generation batch after the other."""
    from posttrain.data.load import load_prompts
    from posttrain.models.load import load_policy, load_tokenizer
    from posttrain.recipes.experience.engines import EngineSource, make_engine
    from posttrain.rollout.collect import sample_groups
    from posttrain.types import SamplingParams

    keys = keys_of(row, job)
    tokenizer = load_tokenizer(keys)
    policy = load_policy(keys, tokenizer=tokenizer).without_dropout()
    engine = make_engine(EngineSource(keys, policy), keys=keys.rollout, rows=keys.rollout_batch_size)
    prompts = load_prompts(keys, tokenizer).rows
    params = SamplingParams(keys.max_completion_length, keys.temperature)
    for step in range(job["max_steps"]):
        batch = [prompts[(step * row.num_prompts + i) % len(prompts)] for i in range(row.num_prompts)]
        groups = sample_groups(engine, batch, keys.num_generations, params, (SEED, step), range(len(batch)))
        turns.step_done(sum(len(completion.ids) for group in groups for completion in group))


def main() -> None:
    job = json.loads(sys.argv[1])
    row = BY_NAME[job["row"]]
    turns = Turns(job["unit_steps"])
    (roll_out if row.task == "rollout" else train)(row, job, turns)


if __name__ == "__main__":
    main()
