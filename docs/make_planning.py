"""Writes docs/planning.md, with every published run beside its prediction: `python docs/make_planning.py`; `--fit` prints the constants."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from posttrain.planner.parts import DEVICES, LINKS, PUBLISHED, Device, Rates
from posttrain.planner.shape import ModelShape
from posttrain.planner.steptime import Traffic, Work, logp_s, rollout_s, steady_rollout_s, sync_s, train_s

HERE = Path(__file__).parent
TARGET = HERE / "planning.md"
DATA: dict[str, Any] = json.loads((HERE / "planning" / "published.json").read_text(encoding="utf-8"))
SHAPES = {name: ModelShape.from_config(config) for name, config in DATA["models"].items()}
PROMPT = 150
"""Tokens of a prompt of mathematics, where only the length of both together is published."""
SEQUENCES = 256
"""Most that an engine decodes at once: vLLM's default."""
_FAST = 1e15
Row = Mapping[str, Any]


def predicted(row: Row, device: Device) -> float:
    return {"train": _train, "step": _step, "phase": _phase, "sync": _sync}[row["kind"]](row, device)


def _train(row: Row, device: Device) -> float:
    """Two micro-batches a device, each one sequence, with full recomputation."""
    work = Work(2 * row["sequence"] * row["devices"], row["sequence"], True, row["adapter"], micro_batches=2)
    return train_s(SHAPES[row["model"]], device, work, row["devices"], _FAST)


def _step(row: Row, device: Device) -> float:
    """On policy: all phases on all devices. Off policy: half of the devices for each side, as the published recipes do."""
    shape, stale, split = SHAPES[row["model"]], row["staleness"], row["split"]
    traffic = Traffic(row["completions"], 1, PROMPT, row["length"] - PROMPT, row["longest"] - PROMPT)
    side = row["devices"] // 2 if stale else row["devices"]
    work = Work(traffic.trained_tokens, traffic.sequence, recompute=True)
    learning = train_s(shape, device, work, side, _FAST) + logp_s(shape, device, work.tokens, side, 2, work.sequence)
    if stale > 1:
        waiting = min(SEQUENCES, traffic.num_completions * (stale + 1) / (side / split))
        sampling = steady_rollout_s(shape, device, traffic, side, waiting, split)
    else:
        sampling = rollout_s(shape, device, traffic, side, SEQUENCES, split)
    return (max(sampling, learning) if stale else sampling + learning) + sync_s(shape, device, split)


def _phase(row: Row, device: Device) -> float:
    shape, devices = SHAPES[row["model"]], row["devices"]
    traffic = _answers(row, device)
    update = train_s(shape, device, Work(traffic.trained_tokens, traffic.sequence, True), devices, _FAST)
    phases = {
        "rollout": lambda: rollout_s(shape, device, traffic, devices, SEQUENCES),
        "log-probs": lambda: logp_s(shape, device, traffic.trained_tokens, devices, 1, traffic.sequence),
        "update": lambda: update,
        "step": lambda: (
            max(update, steady_rollout_s(shape, device, traffic, devices, SEQUENCES)) + sync_s(shape, device)
        ),
    }
    return phases[row["phase"]]()


def _answers(row: Row, device: Device) -> Traffic:
    """As long on average as makes the one excluded update of these runs take the time it took."""
    known = next(
        r for r in DATA["rows"] if r["system"] == row["system"] and r.get("why", "").startswith("the mean length")
    )
    low, high = 100.0, float(known["longest"])
    for _ in range(40):
        mean = (low + high) / 2
        traffic = Traffic(known["completions"], 1, PROMPT, mean, known["longest"])
        work = Work(traffic.trained_tokens, traffic.sequence, recompute=True)
        took = train_s(SHAPES[known["model"]], device, work, known["devices"], _FAST)
        low, high = (mean, high) if took < known["seconds"] else (low, mean)
    return Traffic(row["completions"], 1, PROMPT, low, row["longest"])


def _sync(row: Row, device: Device) -> float:
    return sync_s(SHAPES[row["model"]], device, row["split"])


def error(row: Row) -> float:
    """Of a prediction, as a share of what was published."""
    return predicted(row, DEVICES[row["card"]]) / row["seconds"] - 1


def rows(use: str) -> list[Row]:
    return [row for row in DATA["rows"] if row["use"] == use]


def median_error(some: list[Row]) -> float:
    return statistics.median(abs(error(row)) for row in some)


# --- the constants -------------------------------------------------------------------------------------------------


def fit() -> tuple[Rates, float, float]:
    """(rates, share that Blackwell's software reaches, bytes/s of a sync) from the rows marked `fit` and from nothing else."""
    training = [row for row in rows("fit") if row["kind"] == "train" and row["card"] == "h100"]

    def loss(pointwise: float, vocabulary: float) -> float:
        device = replace(DEVICES["h100"], rates=replace(PUBLISHED, pointwise=pointwise, vocabulary=vocabulary))
        return sum(math.log(_train(row, device) / row["seconds"]) ** 2 for row in training)

    grid = [(p, v) for p in range(250, 501, 5) for v in range(300, 1201, 25)]
    pointwise, vocabulary = min(grid, key=lambda pair: loss(*pair))
    rates = replace(PUBLISHED, pointwise=float(pointwise), vocabulary=float(vocabulary))
    whole = replace(DEVICES["b200"], rates=rates, reached=1.0)
    younger = [row for row in rows("fit") if row["card"] == "b200"]
    reached = statistics.median(_train(row, whole) / row["seconds"] for row in younger)
    sent = [row for row in rows("fit") if row["kind"] == "sync"]
    speed = statistics.geometric_mean(
        SHAPES[row["model"]].num_params * 2 / row["seconds"] / row["split"] ** 0.5 for row in sent
    )
    return rates, reached, speed


# --- the page ------------------------------------------------------------------------------------------------------


def render() -> str:
    judged = rows("judge")
    kinds = {"train": "training step", "step": "whole RL step", "phase": "phase of an RL step", "sync": "weight sync"}
    medians = [
        f"| {kinds[kind]} | {len(some)} | {median_error(some):.0%} | {max(abs(error(row)) for row in some):.0%} |"
        for kind in kinds
        if (some := [row for row in judged if row["kind"] == kind])
    ]
    systems = [
        f"| {system} | {len(some)} | {median_error(some):.0%} | {sum(error(row) < 0 for row in some)} |"
        for system in DATA["sources"]
        if (some := [row for row in judged if row["system"] == system])
    ]
    table = [_line(row) for row in DATA["rows"]]
    head = (HERE / "planning" / "head.md").read_text(encoding="utf-8")
    return head.format(
        median=f"{median_error(judged):.1%}", count=len(judged), fitted=len(rows("fit")), excluded=len(rows("excluded")),
        medians="\n".join(medians), systems="\n".join(systems), table="\n".join(table), sources="\n".join(f"- {k}: {v}." for k, v in DATA["sources"].items()),
        cards="\n".join(_card(device) for device in DEVICES.values()),
        links="\n".join(f"| `{link.name}` | {link.bytes_s / 1e9:g} GB/s | {link.source} |" for link in LINKS.values()),
        rates="\n".join(f"| `{name}` | {getattr(PUBLISHED, name):g} |" for name in Rates.__dataclass_fields__),
    )  # fmt: skip


def _card(device: Device) -> str:
    return (
        f"| `{device.name}` | {device.memory_bytes / 1e9:g} GB | {device.bandwidth / 1e12:g} TB/s | {device.flops / 1e12:g} TFLOP/s "
        f"| {device.link / 1e9:g} GB/s | {device.host_link / 1e9:g} GB/s | {device.reached:g} | {device.source} |"
    )


def _line(row: Row) -> str:
    published = "none" if row["seconds"] is None else f"{row['seconds']:.4g} s"
    if row["use"] == "excluded":
        found, off = "excluded", row["why"]
    else:
        found, off = f"{predicted(row, DEVICES[row['card']]):.4g} s", f"{error(row):+.0%}"
    return f"| {row['system']} | {row['model']} | {row['devices']}x{row['card']} | {_setting(row)} | {row['use']} | {published} | {found} | {off} |"


def _setting(row: Row) -> str:
    shown = [row["phase"]] if "phase" in row else []
    if row["kind"] == "train":
        shown += [
            "SFT" if row.get("sft") else "RL",
            "LoRA 16" if row["adapter"] else "full",
            f"{row['sequence']} tokens",
        ]
    if "length" in row:
        shown += [f"{row['completions']} × {row['length']} of {row['longest']}", f"TP {row['split']}"]
    if "staleness" in row:
        shown += ["on policy" if not row["staleness"] else f"{row['staleness']} off"]
    if row["kind"] == "sync":
        shown += [f"weight sync, TP {row['split']}"]
    return ", ".join([*shown, *([row["note"]] if "note" in row else [])])


if __name__ == "__main__":
    if "--fit" in sys.argv:
        sys.stdout.write("\n".join(map(str, fit())) + "\n")
    else:
        TARGET.write_text(render(), encoding="utf-8")
