"""Students of a teacher: distillation against SFT on its samples, in trained tokens until shares of its accuracy (for learning.py).

`python bench/learning.py --search distill imitate` reads other rates and batches on the dev questions, with a seed of their own; rows of
`learning.WAYS` are read on gate questions.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.files import read_json_lines
from stage_posttrain import QUICKSTART
from staleness import logged

if TYPE_CHECKING:
    from learning import Bench
    from time_to_accuracy import Done

Changes = Callable[["Bench", int], Sequence[str]]
"""Further keys of a way, where they follow from what ran before."""
TEACHER_SEED = 1
SEARCH_SEED = 11
OF_TEACHER = (0.85, 0.9, 0.95)
CURVE_ITEMS = {"dev": 200, "gate": 300}
"""Questions that are answered while a curve is made."""


@dataclass(frozen=True)
class Setting:
    """`prompts` of a step, with so many `answers` each, at `rate`; read every so many steps.

    All are read after equally many answers: who is read more often has more chances that two readings in a row are there.
    """

    loss: str
    prompts: int
    answers: int
    rate: float
    steps: int
    every: int
    schedule: str = "constant"

    def __str__(self) -> str:
        return f"{self.loss}, {self.prompts} prompts with {self.answers} answers a step, {self.rate:g} {self.schedule}"


SEARCHED: Mapping[str, tuple[Setting, ...]] = {
    "distill": (
        Setting("opd", 16, 4, 3e-4, 40, 2),
        Setting("opd", 32, 1, 1e-3, 80, 4),
        Setting("reverse_kl", 32, 1, 3e-4, 80, 4),
        Setting("reverse_kl", 32, 1, 1e-3, 80, 4),
        Setting("jsd", 32, 1, 1e-3, 80, 4),
    ),
    "imitate": (
        Setting("nll", 32, 1, 3e-4, 80, 4),
        Setting("nll", 32, 1, 1e-3, 80, 4),
    ),
}


TAUGHT: Mapping[str, Mapping[str, Setting]] = {
    "grpo": {
        "opd": Setting("opd", 16, 4, 1e-4, 40, 2, "cosine"),
        "distill": Setting("reverse_kl", 16, 4, 3e-4, 24, 2),
        "imitate": Setting("nll", 32, 1, 3e-4, 80, 4),
    },
    "large": {
        "opd": Setting("opd", 16, 4, 1e-4, 40, 2, "cosine"),
        "distill": Setting("reverse_kl", 32, 1, 5e-4, 200, 4, "cosine"),
        "imitate": Setting("nll", 32, 1, 5e-4, 200, 4, "cosine"),
    },
}
"""Teacher → row of `learning.WAYS` → how it learns from that teacher."""


def taught_by(name: str, changes: Callable[[Setting], Changes]) -> Changes:
    """Those of that row, under the teacher that was asked for."""
    return lambda bench, seed: changes(TAUGHT[bench.teacher][name])(bench, seed)


def distilling(setting: Setting) -> Changes:
    return lambda bench, seed: [
        f"teachers=[{{model: {teacher(bench).model}}}]", f"loss_type={setting.loss}",
        f"num_prompts_per_step={setting.prompts}", f"num_generations={setting.answers}", *_run(setting, bench),
    ]  # fmt: skip


def imitating(setting: Setting) -> Changes:
    """SFT on two samples of the teacher for each prompt, right or wrong, without repeats; again from the first where they do not last."""

    def changes(bench: Bench, seed: int) -> list[str]:
        rows = bench.rows(
            f"samples-of-{bench.teacher}", seed, teacher(bench).model, ["num_generations=2", "correct_from=-1"]
        )
        at_once = f"per_device_train_batch_size={setting.prompts}"
        return [f"datasets=[{{path: {rows}, type: chat}}]", at_once, *_run(setting, bench)]

    return changes


def _run(setting: Setting, bench: Bench) -> list[str]:
    split = bench.options.split
    return [
        f"learning_rate={setting.rate}", f"lr_scheduler_type={setting.schedule}", f"max_steps={setting.steps}", f"eval_steps={setting.every}",
        f"eval_suite={curve_suite(bench.options.folder, split)}", f"eval_suite_limit={CURVE_ITEMS[split]}",
    ]  # fmt: skip


def teacher(bench: Bench) -> Done:
    return bench.done(bench.teacher, TEACHER_SEED)


def curve_suite(folder: Path, split: str) -> Path:
    """The first questions of the split, as the dev split that a run reads: nothing is chosen by those of gate."""
    path = folder / f"curve-{split}.jsonl"
    rows = [row for _, row in read_json_lines(QUICKSTART / "evals" / "heldout.jsonl")]
    asked = [row | {"split": "dev"} for row in rows if row["split"] == split][: CURVE_ITEMS[split]]
    path.write_text("".join(json.dumps(row) + "\n" for row in asked))
    return path


def answer_tokens(done: Done) -> list[float]:
    """Trained tokens of each step: those of the answers."""
    lengths = logged(done, "completions/mean_length")
    return logged(done, "loss_tokens") or [done["metrics"]["rows_per_step"] * length for length in lengths]


def curve_of(done: Done) -> list[tuple[float, float]]:
    """Trained tokens so far and the share of the curve's questions that is right, at each measurement."""
    steps = [row for _, row in read_json_lines(done.model.parent / "metrics.jsonl")]
    totals = accumulate(logged(done, "loss_tokens"))
    return [(total, row["eval_score"]) for row, total in zip(steps, totals, strict=True) if "eval_score" in row]


def until(curve: Sequence[tuple[float, float]], target: float) -> float | None:
    """Trained tokens until the curve is at `target` for two measurements in a row, the first of them counted."""
    return next((reached for (reached, one), (_, two) in pairwise(curve) if min(one, two) >= target), None)


def tokens_to_teacher(title: str, of_teacher: Done, split: str, curves: Sequence[tuple[str, int, Done]]) -> str:
    """Trained tokens until shares of the teacher's accuracy on the curve's questions, a line for each (way, seed, what it did)."""
    items = _on_curve(of_teacher, split)
    reached = statistics.mean(items)
    lines = [
        f"Trained tokens until a share of the teacher's {100 * reached:.1f} % on {len(items)} {split} questions:", "",
        f"| {title} | seed | " + " | ".join(f"{share:.0%}" for share in OF_TEACHER) + " | last reading |", "|---" * (3 + len(OF_TEACHER)) + "|",
    ]  # fmt: skip
    for name, seed, done in curves:
        curve = curve_of(done)
        cells = [_count(until(curve, share * reached), curve) for share in OF_TEACHER]
        lines.append("| " + " | ".join([name, str(seed), *cells, f"{100 * curve[-1][1]:.1f} %"]) + " |")
    return "\n".join(lines)


def against(base: str, of_teacher: Done, split: str, curves: Sequence[tuple[str, int, Done]]) -> str:
    """Each way's tokens as a share of those of the way `base` with the same seed: geometric means over the seeds, t intervals of the logarithms."""
    reached = statistics.mean(_on_curve(of_teacher, split))
    tokens = {
        (name, seed, share): until(curve_of(done), share * reached)
        for name, seed, done in curves for share in OF_TEACHER
    }  # fmt: skip
    lines = [
        f"Tokens as a share of those of {base}, geometric mean over seeds (95 %):", "",
        "| | " + " | ".join(f"{share:.0%}" for share in OF_TEACHER) + " |", "|---" * (1 + len(OF_TEACHER)) + "|",
    ]  # fmt: skip
    seeds = sorted({seed for name, seed, _ in curves if name == base})
    for way in dict.fromkeys(name for name, _, _ in curves if name != base):
        pairs = [[(tokens.get((way, s, share)), tokens[base, s, share]) for s in seeds] for share in OF_TEACHER]
        lines.append("| " + " | ".join([way, *map(_ratio, pairs)]) + " |")
    return "\n".join(lines)


def _ratio(pairs: Sequence[tuple[float | None, float | None]]) -> str:
    from posttrain.report.intervals import t_interval

    both = [math.log(one / other) for one, other in pairs if one is not None and other is not None]
    if len(both) < len(pairs):
        return f"there with both in {len(both)} of {len(pairs)} seeds"
    found = t_interval(both)
    spread = "" if math.isnan(found.low) else f" ({math.exp(found.low):.2f}–{math.exp(found.high):.2f})"
    return f"{math.exp(found.mean):.2f}{spread}"


def _on_curve(of_teacher: Done, split: str) -> list[float]:
    """The teacher's scores on the questions that the curves are made of."""
    return [item.score for item in of_teacher.reports["heldout"].items[: CURVE_ITEMS[split]]]


def _count(tokens: float | None, curve: Sequence[tuple[float, float]]) -> str:
    return f"not in {curve[-1][0]:,.0f}" if tokens is None else f"{tokens:,.0f}"
