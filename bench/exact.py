"""What `rollout.exact: true` costs: sampling and the training half of a step, against the ordinary mode in turns.

python bench/exact.py --doc       both models, and writes the table of docs/performance.md
python bench/exact.py --quick     a short form of one: to see that it runs
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import sections
import workload
from scaling_points import PROMPT, SEED, text

ROUNDS = 5


@dataclass(frozen=True)
class Case:
    """`prompts` × `group` completions of `length` tokens, sampled and trained on."""

    model: str
    adapter: str
    prompts: int = 8
    group: int = 8
    length: int = 128


@dataclass(frozen=True)
class Seconds:
    sampling: float
    training: float


class Side:
    """One mode: its policy and its engine. In exact mode the trainer's log-probs must be the engine's."""

    def __init__(self, case: Case, exact: bool) -> None:
        from posttrain.config.datasets import DatasetKeys
        from posttrain.config.rl import GRPOKeys
        from posttrain.models.load import load_policy
        from posttrain.rollout.embedded import EmbeddedEngine

        keys = GRPOKeys(
            base_model=str(workload.model_dir(case.model)), datasets=[DatasetKeys(path="unused.jsonl")], reward_funcs=["unused"],
            device="cpu", bf16=False, adapter=case.adapter,
        )  # fmt: skip
        self._case, self._exact = case, exact
        self._policy = load_policy(keys, exact=exact).without_dropout()
        self._engine = EmbeddedEngine(self._policy, stop_token_ids=(), batch_size=case.prompts * case.group)

    def seconds(self, seed: int) -> Seconds:
        from posttrain.models.batch import pack
        from posttrain.types import Request, SamplingParams, TokenSeq, in_order

        case, rng = self._case, random.Random(SEED)
        prompts = [tuple(self._policy.tokenizer(text(rng, PROMPT))["input_ids"]) for _ in range(case.prompts)]
        requests = [Request(prompt, seed * 1000 + n * case.group + i) for n, prompt in enumerate(prompts) for i in range(case.group)]  # fmt: skip
        started = time.perf_counter()
        completions = in_order(self._engine.generate(requests, SamplingParams(case.length)))
        sampled = time.perf_counter()
        pairs = list(zip(requests, completions, strict=True))
        families = [
            [TokenSeq((*r.prompt_ids, *c.ids), (False,) * PROMPT + (True,) * len(c.ids)) for r, c in pairs[first : first + case.group]]
            for first in range(0, len(pairs), case.group)
        ]  # fmt: skip
        logps: list[float] = []
        for family in families:
            scores = self._policy.score(pack([family]), entropy=True)
            scores.logp_M.sum().backward()
            logps += scores.logp_M.tolist()
        trained = time.perf_counter()
        self._policy.model.zero_grad()
        unequal = sum(a != b for a, b in zip(logps, (p for c in completions for p in c.logp), strict=True))
        if self._exact and unequal:
            raise SystemExit(f"{unequal} of {len(logps)} log-probs of the engine are not the trainer's")
        return Seconds(sampled - started, trained - sampled)


def measure(case: Case, rounds: int) -> tuple[float, float, float]:
    """Median ratios exact over ordinary: sampling, training, both. The sides take turns after a first round to warm up."""
    ordinary, exact = Side(case, False), Side(case, True)
    ratios: list[tuple[float, float, float]] = []
    for number in range(rounds + 1):
        a, b = ordinary.seconds(number), exact.seconds(number)
        whole = (b.sampling + b.training) / (a.sampling + a.training)
        ratios.append((b.sampling / a.sampling, b.training / a.training, whole))
    sampling, training, both = (statistics.median(column) for column in zip(*ratios[1:], strict=True))
    return sampling, training, both


def table(cases: Sequence[Case], rounds: int) -> str:
    import torch

    lines = [
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32; median of {rounds} rounds.", "",
        "| model | trained | rows | tokens of a completion | sampling | training half | both |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for case in cases:
        sampling, training, both = measure(case, rounds)
        _, hidden, _, layers, *_, vocab = workload.SHAPES[case.model]
        lines.append(
            f"| {layers} × {hidden}, vocabulary {vocab} | {'LoRA' if case.adapter == 'lora' else 'full'} | {case.prompts * case.group} "
            f"| {case.length} | {sampling:.1f}× | {training:.1f}× | {both:.1f}× |"
        )
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--doc", action="store_true")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick:
        print(table([Case("128", "lora", prompts=2, group=2, length=8)], rounds=1))
        return
    cases = [Case("nano", "none"), Case("nano", "lora"), Case("small", "none", prompts=4, length=64)]
    text_of_table = table(cases, ROUNDS)
    if args.doc:
        sections.write("exact", text_of_table)


if __name__ == "__main__":
    main()
