"""What each way to learn after SFT gains on the quickstart's task, all from one SFT model and on the same held-out questions.

    python bench/learning.py ppo grpo --seeds 1      those rows as a table
    python bench/learning.py synth --quick           three steps a stage: to see that it runs

A row of `WAYS` is a stage and its YAML in examples/quickstart. SFT is run once, with the pipeline's seed; `--seeds` are those of what comes after it.
Those that learn from a teacher (taught.py) have the GRPO row's model, or one of 4.8 M parameters that the same base script and stages make
(`--teacher large`); their curves are a second table.
Each stage is a process of its own. Accuracy is that of our evaluator on all 1,000 gate questions. Finished stages are kept under bench/out/
and not run again, also where the checkout was moved, so ways and seeds can be added one at a time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import workload
from posttrain.files import read_json_lines
from stage_posttrain import QUICKSTART
from taught import (
    SEARCH_SEED,
    SEARCHED,
    Changes,
    against,
    answer_tokens,
    distilling,
    imitating,
    taught_by,
    teacher,
    tokens_to_teacher,
)
from time_to_accuracy import Done, Options, evaluated, over_seeds, points, run_job, run_stage, share

if TYPE_CHECKING:
    from posttrain.report.intervals import Interval

SFT_SEED = 42
"""That of the pipeline as it is shipped."""
TOLD_EPOCHS = 4
"""After one the model hardly reads what it is told: it copies late."""


@dataclass(frozen=True)
class Way:
    """A stage that begins after SFT: `config` in examples/quickstart, or the pipeline's own stage of that kind where there is none."""

    title: str
    kind: str
    config: str | None = None
    changes: Changes = lambda bench, seed: ()
    start: str = "sft"
    taught: bool = False
    """By the model of `--teacher`."""


class Bench:
    """What ran so far, made where it is asked for."""

    def __init__(self, options: Options, steps: int, teacher: str = "grpo") -> None:
        self.options, self.steps, self.teacher = options, steps, teacher
        self._made: dict[tuple[str, int], Done] = {}

    def start(self, name: str = "sft") -> Done:
        if (name, SFT_SEED) not in self._made:
            self._made[name, SFT_SEED] = STARTS[name](self)
        return self._made[name, SFT_SEED]

    def done(self, name: str, seed: int, way: Way | None = None) -> Done:
        """What `way`, or that row of `WAYS`, came to."""
        if (name, seed) not in self._made:
            self._made[name, seed] = self._run(name, seed, way or WAYS[name])
        return self._made[name, seed]

    def _run(self, name: str, seed: int, way: Way) -> Done:
        before = self.start(way.start)
        job = {
            "kind": way.kind, "model": str(before.model), "parent": before["finished"], "seed": seed, "max_steps": self.steps,
            "threads": self.options.threads, "folder": str(self.options.folder / f"seed-{seed}" / name),
            "config": way.config and str(QUICKSTART / way.config), "set": list(way.changes(self, seed)),
        }  # fmt: skip
        return run_job(f"seed {seed} {name}", "stage_posttrain.py", job, self.options)

    def sft(self, name: str, base: Path, changes: Sequence[str] = ()) -> Done:
        """The pipeline's SFT of another base, or on other rows."""
        job = {
            "kind": "sft", "model": str(base), "parent": base.name, "seed": SFT_SEED, "max_steps": self.options.max_steps,
            "threads": self.options.threads, "folder": str(self.options.folder / f"seed-{SFT_SEED}" / name), "set": list(changes),
        }  # fmt: skip
        return run_job(name, "stage_posttrain.py", job, self.options)

    def large_base(self) -> Path:
        """The quickstart's base with 4.8 M parameters, made by its script."""
        folder = self.options.folder / "large-base"
        if not (folder / "tokenizer_config.json").exists():
            short = ["--steps-share", "0.002"] if self.options.max_steps else []
            made = [sys.executable, str(QUICKSTART / "make_base.py"), "--size", "large", "--to", str(folder), *short]
            subprocess.run(made, check=True, stdout=sys.stderr)
        return folder

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

    def _short_prompts(self) -> Path:
        path = self.options.folder / "prompts.jsonl"
        path.write_text("".join((QUICKSTART / "data" / "prompts.jsonl").read_text().splitlines(keepends=True)[:64]))
        return path


def told(row: Mapping[str, list[dict[str, str]]]) -> dict[str, list[dict[str, str]]]:
    """The same demonstration behind a question that gives its answer away."""
    question, answer = row["messages"]
    return {"messages": [hinted(question, answer["content"].rpartition("\\boxed{")[2].partition("}")[0]), answer]}


def hinted(question: Mapping[str, str], value: str) -> dict[str, str]:
    """The question that ends in its answer, in the words of rlsd.yaml."""
    return {**question, "content": f"{question['content']} ({value})"}


def _told_sft(bench: Bench) -> Done:
    """SFT in which every second question ends in what its demonstration answers: a policy that can read a solution it is told."""
    path = bench.options.folder / "told.jsonl"
    rows = [row for _, row in read_json_lines(QUICKSTART / "data" / "sft.jsonl")]
    path.write_text("".join(json.dumps(told(row) if place % 2 else row) + "\n" for place, row in enumerate(rows)))
    return bench.sft(
        "told-sft",
        QUICKSTART / "base",
        [f"sft.datasets=[{{path: {path}, type: chat}}]", f"sft.num_train_epochs={TOLD_EPOCHS}"],
    )


def _own(bench: Bench, seed: int) -> list[str]:
    return [f"datasets=[{{path: {bench.rows('samples', seed, bench.start().model)}, type: chat}}]"]


STARTS: Mapping[str, Callable[[Bench], Done]] = {
    "sft": lambda bench: run_stage(SFT_SEED, "ours", "sft", ("base", str(QUICKSTART / "base")), bench.options),
    "told": _told_sft,
    "large-sft": lambda bench: bench.sft("large-sft", bench.large_base()),
}
WAYS = {
    "grpo": Way("GRPO", "grpo", None, lambda bench, seed: ["grpo.beta=0"]),
    "ppo": Way("PPO with a critic", "ppo", "ppo.yaml"),
    "online_dpo": Way("online DPO", "online_dpo", "online_dpo.yaml"),
    "ebft": Way("EBFT on SFT's rows", "ebft", "ebft.yaml"),
    "large": Way("GRPO of the 4.8 M model", "grpo", None, lambda bench, seed: ["grpo.beta=0"], "large-sft"),
    "opd": Way("OPD from a teacher", "distill", "distill.yaml", taught_by("opd", distilling), taught=True),
    "distill": Way(
        "reverse KL to the teacher", "distill", "distill.yaml", taught_by("distill", distilling), taught=True
    ),
    "imitate": Way("SFT on the teacher's samples", "sft", "again.yaml", taught_by("imitate", imitating), taught=True),
    "synth": Way("SFT on its own right answers", "sft", "again.yaml", _own),
    "rlsd": Way("RLSD, told the answer", "grpo", "rlsd.yaml", start="told"),
    "rlsd-off": Way("GRPO from the same start", "grpo", "rlsd.yaml", lambda bench, seed: ["teacher_coef=0"], "told"),
}


def render(bench: Bench, names: Sequence[str], seeds: Sequence[int]) -> str:
    return "\n".join([
        "| after SFT | seeds | before (95 %) | after (95 %) | each seed | gained (95 %) | clean, before | after | training call, median | sampled tokens |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(_line(WAYS[name], bench.start(WAYS[name].start), [bench.done(name, seed) for seed in seeds], seeds) for name in names),
    ])  # fmt: skip


def _line(way: Way, before: Done, each: Sequence[Done], seeds: Sequence[int]) -> str:
    same = [before] * len(each)
    sampled = statistics.median(sum(answer_tokens(done)) for done in each) if way.kind != "sft" else None
    cells = [
        way.title, ", ".join(map(str, seeds)), share(_score(same[:1])), share(_score(each)),
        " ".join(f"{100 * done.reports['heldout'].mean:.1f}" for done in each),
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


def told_and_not(bench: Bench) -> str:
    """What the start of RLSD makes of a question that ends in its answer: what its teacher knows more than the policy."""
    start = bench.start("told")
    path = bench.options.folder / "told-heldout.jsonl"
    rows = [row for _, row in read_json_lines(QUICKSTART / "evals" / "heldout.jsonl")]
    path.write_text(
        "".join(json.dumps(row | {"messages": [hinted(row["messages"][0], row["target"])]}) + "\n" for row in rows)
    )
    reports = evaluated(start.model, start.model.parent / "evals-told", bench.options, {"heldout": path})
    knows = replace(start, reports=reports)
    return f"Of the start of RLSD, told the answer: {share(_score([knows]))}; not told: {share(_score([start]))}."


def rlsd_against_grpo(bench: Bench, seeds: Sequence[int]) -> str:
    with_it, without = ([bench.done(name, seed).reports["heldout"] for seed in seeds] for name in ("rlsd", "rlsd-off"))
    return f"RLSD against GRPO from that start: {points(over_seeds(with_it, without))} points."


def search(bench: Bench, names: Sequence[str]) -> str:
    """Each setting of `SEARCHED` on the dev questions, from one seed."""
    kinds = {"distill": (distilling, "distill", "distill.yaml"), "imitate": (imitating, "sft", "again.yaml")}
    found: list[tuple[str, int, Done]] = []
    for name in names:
        changes, kind, config = kinds[name]
        for place, setting in enumerate(SEARCHED[name]):
            way = Way(str(setting), kind, config, changes(setting), taught=True)
            found.append((way.title, SEARCH_SEED, bench.done(f"search-{name}-{place}", SEARCH_SEED, way)))
    return tokens_to_teacher("searched", teacher(bench), bench.options.split, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("ways", nargs="*", metavar="WAY", choices=[[], *WAYS], default=[], help=", ".join(WAYS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=0, help="of what comes after SFT; 0 leaves it to the YAML")
    parser.add_argument("--teacher", choices=("grpo", "large"), default="grpo", help="the row whose model teaches")
    parser.add_argument("--search", nargs="+", choices=list(SEARCHED), help="settings of these, on the dev questions")
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    ways = asked.ways or list(WAYS)
    seeds, steps = (asked.seeds[:1], 3) if asked.quick else (asked.seeds, asked.steps)
    folder = workload.OUT / ("learning-quick" if asked.quick else "learning")
    folder.mkdir(parents=True, exist_ok=True)
    split = "dev" if asked.quick or asked.search else "gate"
    bench = Bench(Options(tuple(seeds), asked.threads, 3 if asked.quick else 0, split, folder), steps, asked.teacher)
    if asked.search:
        print(search(bench, asked.search))
        return
    print(render(bench, ways, seeds))
    taught = [name for name in ways if WAYS[name].taught]
    if curves := [(WAYS[name].title, seed, bench.done(name, seed)) for name in taught for seed in seeds]:
        print("\n" + tokens_to_teacher("after SFT", teacher(bench), split, curves))
        if "imitate" in taught:
            print("\n" + against(WAYS["imitate"].title, teacher(bench), split, curves))
    if any(WAYS[name].start == "told" for name in ways):
        print("\n" + told_and_not(bench))
    if {"rlsd", "rlsd-off"} <= set(ways):
        print(rlsd_against_grpo(bench, seeds))


if __name__ == "__main__":
    main()
