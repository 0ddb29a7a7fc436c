"""The cases: healthy runs in their variants, and one row for each fault, with where it is injected.

A fault is a changed key, another file of rows, another reward, or a patch of the recipe in the process of that one run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import task
import torch

from posttrain.data.dataset import Dataset
from posttrain.health.rules import rules_for
from posttrain.recipes import dpo, grpo, sft
from posttrain.types import TokenSeq

REWARDS = Path(__file__).with_name("rewards.py")
HEALTHY = "healthy"
Patch = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """One row; `what` says it in words."""

    kind: str
    name: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    rows: str | None = None
    reward: str = "correct"
    patch: Patch | None = None
    what: str = ""


# --- patches: they live and die with the process of one run ----------------------------------------------------------


def stale_engine() -> None:
    """The engine samples from a copy of the starting weights that no sync refreshes."""
    make = grpo.make_engine

    def of_a_copy(source: Any, *rest: Any, **options: Any) -> Any:
        stale = copy.copy(source.policy)
        stale.model = copy.deepcopy(source.policy.model)
        return make(replace(source, policy=stale), *rest, **options)

    grpo.make_engine = of_a_copy
    # The canary would end the run at its second sync; here the health rule is what is asked.
    grpo.sync_engine = lambda engine, policy, version: {
        "sync/moved_bytes": float(engine.update(policy, version).num_bytes)
    }


def frozen() -> None:
    """What the optimizer computes never reaches the weights."""
    for recipe in (sft, dpo, grpo):
        make = recipe.make_optimizer

        def idle(policy: Any, keys: Any, make: Any = make) -> torch.optim.Optimizer:
            optimizer = make(policy, keys)
            optimizer.step = lambda *args, **options: None
            return optimizer

        recipe.make_optimizer = idle


def no_gradient() -> None:
    """The log-probs are cut from the graph, as by a stray `no_grad`; the loss keeps a path of weight zero."""
    for recipe in (sft, dpo, grpo):
        load = recipe.load_policy

        def cut(*args: Any, load: Any = load, **options: Any) -> Any:
            policy = load(*args, **options)
            score = policy.score

            def detached(*args: Any, **options: Any) -> Any:
                scores = score(*args, **options)
                return replace(scores, logp_M=scores.logp_M.detach() + 0.0 * scores.logp_M)

            policy.score = detached
            return policy

        recipe.load_policy = cut


def masked_rows() -> None:
    """Nine rows of ten lose their mask after loading, past the loader's own check."""
    load = sft.load_sft

    def masked(keys: Any, tokenizer: Any, sources: Any = None) -> Dataset[TokenSeq]:
        data = load(keys, tokenizer, sources=sources)
        if sources is not None:
            return data
        rows = [r if n % 10 == 0 else TokenSeq(r.ids, (False,) * len(r.ids), r.origin) for n, r in enumerate(data.rows)]
        return replace(data, rows=rows)

    sft.load_sft = masked


# --- tables ---------------------------------------------------------------------------------------------------------

SFT_KEYS = {"max_steps": 40, "learning_rate": 1e-3, "per_device_train_batch_size": 8, "eval_steps": 8}
DPO_KEYS = {"max_steps": 64, "learning_rate": 1e-4, "per_device_train_batch_size": 8, "eval_steps": 16, "beta": 0.1}
GRPO_KEYS = {
    "max_steps": 36, "learning_rate": 3e-4, "per_device_train_batch_size": 32, "eval_steps": 6, "beta": 0.05,
    "num_generations": 8, "num_prompts_per_step": 4, "max_completion_length": 16, "reward_check": "off",
}  # fmt: skip
BASICS = {"sft": SFT_KEYS, "dpo": DPO_KEYS, "grpo": GRPO_KEYS}
ROWS = {"sft": "sft", "dpo": "pairs", "grpo": "prompts"}
LORA = {"adapter": "lora", "lora_r": 8, "lora_alpha": 16}

VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "sft": ({}, {**LORA, "learning_rate": 5e-3}, {"lr_scheduler_type": "constant"}, {"warmup_ratio": 0.2}),
    "dpo": ({}, {**LORA, "learning_rate": 1e-3}, {"learning_rate": 1e-3}, {"rpo_alpha": 1.0}),
    "grpo": (
        {},
        {**LORA, "learning_rate": 2e-3},
        {"beta": 0.2},
        {"loss_type": "dr_grpo", "steps_per_generation": 2, "num_iterations": 2},
    ),
}
"""Healthy runs take turns among these; a fault is injected into the first."""

SHORT = {"max_steps": 16}
"""For faults that act from the first step on: what is not seen by then is not seen by the rules that are meant for it."""
TOO_FAST = {kind: {"learning_rate": 100 * keys["learning_rate"]} for kind, keys in BASICS.items()}

CASES: tuple[Case, ...] = (
    *(Case(kind, HEALTHY) for kind in BASICS),
    Case("grpo", "reward noise", reward="noise", what="the reward is a coin toss"),
    Case("grpo", "hackable: length", reward="pays_for_length", what="the reward pays for long answers"),
    Case("grpo", "hackable: keyword", reward="pays_for_keyword", what="the reward pays for the word `ok`"),
    Case("grpo", "wrong sign", reward="wrong_sign", what="the reward is 1 for wrong answers"),
    Case("grpo", "learning rate × 100", {**TOO_FAST["grpo"], **SHORT}, what="3e-2"),
    Case(
        "grpo",
        "stale weights",
        SHORT,
        patch=stale_engine,
        what="the engine samples from the starting weights throughout",
    ),
    Case("grpo", "beta → 0", {"beta": 1e-6}, what="1e-6"),
    Case("grpo", "zero variance: all wrong", SHORT, rows="prompts-hopeless", what="references that no answer meets"),
    Case("grpo", "zero variance: all right", SHORT, reward="constant", what="a reward that is always 1"),
    Case("grpo", "frozen adapter", {**LORA, **SHORT}, patch=frozen, what="updates that never reach the adapter"),
    Case("grpo", "gradients cut", SHORT, patch=no_gradient, what="the log-probs are detached"),
    Case("sft", "learning rate × 100", TOO_FAST["sft"], what="1e-1"),
    Case("sft", "shuffled labels", rows="sft-shuffled", what="answers of other questions"),
    Case("sft", "masked-out batches", patch=masked_rows, what="nine rows of ten have an empty mask"),
    Case("sft", "overfitting", {"learning_rate": 3e-3}, rows="sft-few", what="16 rows, 20 times"),
    Case("sft", "frozen adapter", {**LORA, **SHORT}, patch=frozen, what="updates that never reach the adapter"),
    Case("sft", "gradients cut", SHORT, patch=no_gradient, what="the log-probs are detached"),
    Case("dpo", "learning rate × 100", TOO_FAST["dpo"], what="1e-2"),
    Case("dpo", "shuffled labels", rows="pairs-shuffled", what="half of the pairs are the wrong way round"),
    Case("dpo", "beta → 0", {"beta": 1e-3, "learning_rate": 1e-3}, what="1e-3, at a learning rate of 1e-3"),
    Case("dpo", "frozen adapter", {**LORA, **SHORT}, patch=frozen, what="updates that never reach the adapter"),
    Case("dpo", "gradients cut", SHORT, patch=no_gradient, what="the log-probs are detached"),
)


def values_of(case: Case, seed: int, model: Path) -> dict[str, Any]:
    """The keys of one run. All actions are `log`, so that it goes to its end."""
    kind, rows = case.kind, case.rows or f"{ROWS[case.kind]}-train"
    healthy = case.name == HEALTHY
    variant = VARIANTS[kind][seed % len(VARIANTS[kind])] if healthy else {}
    values = {
        "base_model": str(model), "seed": seed, "sequence_len": 64,
        "datasets": [{"path": str(task.TASK / f"{rows}.jsonl")}],
        "health": {rule.name: {"action": "log", "severity": "info"} for rule in rules_for(kind)},
    }  # fmt: skip
    if kind == "grpo":
        values |= {"reward_funcs": [f"{REWARDS}:{case.reward}"], "eval_suite": str(task.TASK / "suite.jsonl")}
    else:
        values["eval_datasets"] = [{"path": str(task.TASK / f"{ROWS[kind]}-dev.jsonl")}]
    return values | BASICS[kind] | dict(variant) | dict(case.keys)
