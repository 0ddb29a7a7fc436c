"""What each way to learn after SFT gains on the quickstart's task, all from one SFT model and on the same held-out questions.

    python bench/learning.py ppo grpo --seeds 1      those rows as a table
    python bench/learning.py synth --quick           three steps a stage: to see that it runs

A row of `WAYS` is a stage and its YAML in examples/quickstart. SFT is run once, with the pipeline's seed; `--seeds` are those of what comes after it.
Each stage is a process of its own. Accuracy is that of our evaluator on all 1,000 gate questions. Finished stages are kept under bench/out/
and not run again, also where the checkout was moved, so ways and seeds can be added one at a time.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import workload
from posttrain.files import read_json_lines
from stage_posttrain import QUICKSTART
from staleness import logged
from time_to_accuracy import Done, Options, over_seeds, points, run_job, run_stage, share

if TYPE_CHECKING:
    from posttrain.report.intervals import Interval

SFT_SEED = 42
"""That of the pipeline as it is shipped."""
CURVE_ITEMS = 300
"""Questions that are answered while a curve is made."""
OF_TEACHER = (0.85, 0.9, 0.95)
ANSWERS_PER_STEP = 64
"""Of every stage here that samples."""

Changes = Callable[["Bench", int], Sequence[str]]
"""Further keys of a way, where they follow from what ran before."""


@dataclass(frozen=True)
class Way:
    """A stage that begins after SFT: `config` in examples/quickstart, or the pipeline's own stage of that kind where there is none."""

    title: str
    kind: str
    config: str | None = None
    changes: Changes = lambda bench, seed: ()
    start: str = "sft"


class Bench:
    """What ran so far, made where it is asked for."""

    def __init__(self, options: Options, steps: int) -> None:
        self.options, self.steps = options, steps
        self._made: dict[tuple[str, int], Done] = {}

    def start(self, name: str = "sft") -> Done:
        if (name, SFT_SEED) not in self._made:
            base = ("base", str(QUICKSTART / "base"))
            made = run_stage(SFT_SEED, "ours", "sft", base, self.options) if name == "sft" else self._told_sft()
            self._made[name, SFT_SEED] = made
        return self._made[name, SFT_SEED]

    def done(self, name: str, seed: int) -> Done:
        if (name, seed) not in self._made:
            self._made[name, seed] = self._run(name, seed)
        return self._made[name, seed]

    def _run(self, name: str, seed: int) -> Done:
        way = WAYS[name]
        before = self.start(way.start)
        job = {
            "kind": way.kind, "model": str(before.model), "parent": before["finished"], "seed": seed, "max_steps": self.steps,
            "threads": self.options.threads, "folder": str(self.options.folder / f"seed-{seed}" / name),
            "config": way.config and str(QUICKSTART / way.config), "set": list(way.changes(self, seed)),
        }  # fmt: skip
        return run_job(f"seed {seed} {name}", "stage_posttrain.py", job, self.options)

    def rows(self, name: str, seed: int, model: Path, changes: Sequence[str] = ()) -> Path:
        """What `posttrain data synth` keeps of this model's samples. Started again, it takes over what was sampled."""
        from posttrain.config.load_data import load_data_keys
        from posttrain.config.synth import ROWS, SynthKeys
        from posttrain.synthesis.synth import synthesize

        folder = self.options.folder / f"seed-{seed}" / name
        prompts = [f"datasets=[{{path: {self._short_prompts()}, type: prompt}}]"] if self.options.max_steps else []
        asked = [f"base_model={model}", f"output_dir={folder}", f"seed={seed}", "device=cpu", *prompts, *changes]
        synthesize(load_data_keys(SynthKeys, "synth", QUICKSTART / "synth.yaml", asked))
        return folder / ROWS

    def curve_suite(self) -> Path:
        """The first gate questions as a dev split: nothing is chosen by them."""
        path = self.options.folder / "curve.jsonl"
        rows = [row for _, row in read_json_lines(QUICKSTART / "evals" / "heldout.jsonl")]
        asked = [row | {"split": "dev"} for row in rows if row["split"] == "gate"][:CURVE_ITEMS]
        path.write_text("".join(json.dumps(row) + "\n" for row in asked))
        return path

    def _short_prompts(self) -> Path:
        path = self.options.folder / "prompts.jsonl"
        path.write_text("".join((QUICKSTART / "data" / "prompts.jsonl").read_text().splitlines(keepends=True)[:64]))
        return path

    def _told_sft(self) -> Done:
        """SFT in which every second question ends in what its demonstration answers: a policy that can read a solution it is told."""
        path = self.options.folder / "told.jsonl"
        rows = [row for _, row in read_json_lines(QUICKSTART / "data" / "sft.jsonl")]
        path.write_text("".join(json.dumps(told(row) if place % 2 else row) + "\n" for place, row in enumerate(rows)))
        job = {
            "kind": "sft", "model": str(QUICKSTART / "base"), "parent": "base", "seed": SFT_SEED, "max_steps": self.options.max_steps,
            "threads": self.options.threads, "folder": str(self.options.folder / f"seed-{SFT_SEED}" / "told-sft"),
            "set": [f"sft.datasets=[{{path: {path}, type: chat}}]"],
        }  # fmt: skip
        return run_job("sft, told", "stage_posttrain.py", job, self.options)


def told(row: Mapping[str, list[dict[str, str]]]) -> dict[str, list[dict[str, str]]]:
    """The same demonstration behind a question that gives its answer away, in the words of rlsd.yaml."""
    question, answer = row["messages"]
    value = answer["content"].rpartition("\\boxed{")[2].partition("}")[0]
    return {"messages": [question | {"content": f"{question['content']} ({value})"}, answer]}


def _curve(bench: Bench, every: int) -> list[str]:
    return [f"eval_suite={bench.curve_suite()}", f"eval_suite_limit={CURVE_ITEMS}", f"eval_steps={every}"]


def _taught(bench: Bench, seed: int, steps: int = 40, every: int = 4) -> list[str]:
    return [
        f"teachers=[{{model: {bench.done('grpo', TEACHER_SEED).model}}}]",
        f"max_steps={steps}",
        *_curve(bench, every),
    ]


def _taught_exactly(bench: Bench, seed: int) -> list[str]:
    """The same divergence summed over the vocabulary: without the sampled token's noise it bears the rate of SFT."""
    return [*_taught(bench, seed, 24, 2), "loss_type=reverse_kl", *_SFT_RATE]


def _of_teacher(bench: Bench, seed: int) -> list[str]:
    """Two samples of the teacher for each prompt, right or wrong, without repeats."""
    teacher = bench.done("grpo", TEACHER_SEED).model
    rows = bench.rows("teacher-samples", seed, teacher, ["num_generations=2", "correct_from=-1"])
    return [f"datasets=[{{path: {rows}, type: chat}}]", "max_steps=80", *_SFT_RATE, *_curve(bench, 4)]


def _own(bench: Bench, seed: int) -> list[str]:
    return [f"datasets=[{{path: {bench.rows('samples', seed, bench.start().model)}, type: chat}}]"]


TEACHER_SEED = 1
_SFT_RATE = ("learning_rate=3e-4", "lr_scheduler_type=constant")
WAYS = {
    "grpo": Way("GRPO", "grpo", None, lambda bench, seed: ["grpo.beta=0"]),
    "ppo": Way("PPO with a critic", "ppo", "ppo.yaml"),
    "online_dpo": Way("online DPO", "online_dpo", "online_dpo.yaml"),
    "opd": Way("OPD from the GRPO row's model", "distill", "distill.yaml", _taught),
    "distill": Way("reverse KL to the GRPO row's model", "distill", "distill.yaml", _taught_exactly),
    "imitate": Way("SFT on that model's samples", "sft", "again.yaml", _of_teacher),
    "synth": Way("SFT on its own right answers", "sft", "again.yaml", _own),
    "rlsd": Way("RLSD, told the answer", "grpo", "rlsd.yaml", start="told"),
    "rlsd-off": Way("GRPO from the same start", "grpo", "rlsd.yaml", lambda bench, seed: ["teacher_coef=0"], "told"),
}


def render(bench: Bench, names: Sequence[str], seeds: Sequence[int]) -> str:
    return "\n".join([
        "| after SFT | seeds | before (95 %) | after (95 %) | gained (95 %) | clean, before | after | training call, median | sampled tokens |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_line(WAYS[name], bench.start(WAYS[name].start), [bench.done(name, seed) for seed in seeds], seeds) for name in names),
    ])  # fmt: skip


def _line(way: Way, before: Done, each: Sequence[Done], seeds: Sequence[int]) -> str:
    same = [before] * len(each)
    sampled = statistics.median(sum(answer_tokens(done)) for done in each) if way.kind != "sft" else None
    cells = [
        way.title, ", ".join(map(str, seeds)), share(_score(same[:1])), share(_score(each)),
        points(over_seeds([done.reports["heldout"] for done in each], [done.reports["heldout"] for done in same])),
        *(f"{100 * statistics.mean(one.reports['clean'].mean for one in some):.1f} %" for some in (same, each)),
        f"{statistics.median(done['call_s'] for done in each):.0f} s", f"{sampled:,.0f}" if sampled else "–",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _score(each: Sequence[Done]) -> Interval:
    """Wilson's of one run; of several over items, of which each is one cluster."""
    from posttrain.report.intervals import score_interval

    reports = [done.reports["heldout"] for done in each]
    return score_interval(reports[0]) if len(reports) == 1 else over_seeds(reports)


def answer_tokens(done: Done) -> list[float]:
    """Trained tokens of each step: those of the answers."""
    lengths = logged(done, "completions/mean_length")
    return [ANSWERS_PER_STEP * length for length in lengths] if lengths else logged(done, "loss_tokens")


def curve_of(done: Done) -> list[tuple[float, float]]:
    """Trained tokens so far and the share of the curve's questions that is right, at each measurement."""

    steps = [row for _, row in read_json_lines(done.model.parent / "metrics.jsonl")]
    totals = accumulate(answer_tokens(done))
    return [(total, row["eval_score"]) for row, total in zip(steps, totals, strict=True) if "eval_score" in row]


def until(curve: Sequence[tuple[float, float]], target: float) -> float | None:
    """Trained tokens until the curve is at `target` for two measurements in a row, the first of them counted."""
    return next((reached for (reached, one), (_, two) in pairwise(curve) if min(one, two) >= target), None)


def tokens_to_teacher(bench: Bench, names: Sequence[str], seeds: Sequence[int]) -> str:
    """Trained tokens until shares of the teacher's accuracy on the curve's questions."""
    teacher = statistics.mean(item.score for item in bench.done("grpo", TEACHER_SEED).reports["heldout"].items[:CURVE_ITEMS])  # fmt: skip
    lines = [
        f"Trained tokens until a share of the teacher's {100 * teacher:.1f} % on {CURVE_ITEMS} questions:", "",
        "| after SFT | seed | " + " | ".join(f"{share:.0%}" for share in OF_TEACHER) + " |", "|---" * (2 + len(OF_TEACHER)) + "|",
    ]  # fmt: skip
    for name in names:
        for seed in seeds:
            curve = curve_of(bench.done(name, seed))
            cells = [_count(until(curve, share * teacher)) for share in OF_TEACHER]
            lines.append("| " + " | ".join([WAYS[name].title, str(seed), *cells]) + " |")
    return "\n".join(lines)


def _count(tokens: float | None) -> str:
    return "not reached" if tokens is None else f"{tokens:,.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("ways", nargs="*", metavar="WAY", choices=[[], *WAYS], default=list(WAYS), help=", ".join(WAYS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=0, help="of what comes after SFT; 0 leaves it to the YAML")
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    seeds, steps = (asked.seeds[:1], 3) if asked.quick else (asked.seeds, asked.steps)
    folder = workload.OUT / ("learning-quick" if asked.quick else "learning")
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(
        Options(tuple(seeds), asked.threads, 3 if asked.quick else 0, "dev" if asked.quick else "gate", folder), steps
    )
    print(render(bench, asked.ways, seeds))
    if taught := [name for name in asked.ways if name in ("opd", "distill", "imitate")]:
        print("\n" + tokens_to_teacher(bench, taught, seeds))


if __name__ == "__main__":
    main()
