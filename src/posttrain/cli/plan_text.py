"""What `posttrain plan` says of a forecast, in lines for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posttrain.files import size_text

_WORTH = 1.1
"""A split is proposed where it is so many times as fast."""


def memory_lines(made: Any, base_model: str, free_bytes: int, where: str) -> list[str]:
    from posttrain.planner import fits, shortfall

    memory = made.memory
    longest = memory.workload.longest(memory.shape)
    parts = ", ".join(
        f"{name} {size_text(size)}" for name, size in sorted(memory.parts.items(), key=lambda part: -part[1])
    )
    share = memory.trained_params / memory.shape.num_params
    each = f" on each of {memory.shards}" if memory.shards > 1 else ""
    verdict = "yes" if fits(memory, free_bytes) else shortfall(memory, free_bytes, base_model, where)
    lines = [
        "",
        f"{made.kind}  trains {memory.trained_params / 1e6:,.1f}M parameters ({share:.1%})",
        f"  memory  {size_text(memory.floor_bytes)}{each} whatever the data, up to {size_text(memory.total_bytes)} with rows of {longest} tokens",
        f"          {parts}",
        f"  fits    {verdict}",
    ]
    if memory.shards > 1:
        lines += memory.workload.sharding.lines(memory.shards)
    lines += [f"  refused {made.refused}"] if made.refused else _offload_lines(memory, made.copy_bytes_s)
    return lines + _engine_lines(memory)


def _engine_lines(memory: Any) -> list[str]:
    """What the engine that samples holds beside the weights in training."""
    rollout = memory.workload.rollout
    if memory.shards > 1 and "replica" in memory.parts:
        return [
            "  engine  every process holds a whole copy to sample with, and samples slowly; rollout.engine: vllm_server is one for all of them, and faster"
        ]
    if memory.workload.samples and rollout.gathers(memory.shards):
        return [
            "  engine  no copy: every layer is gathered for each token that is sampled, which is slow; rollout.engine: vllm_server is one for all processes, and faster"
        ]
    if "replica" in memory.parts:
        return [
            f"  engine  max_staleness {rollout.max_staleness}: samples on a second copy ({size_text(memory.parts['replica'])}) while the first is trained; their memory adds up"
        ]
    return _server_lines(memory) if rollout.starts_servers else []


def _server_lines(memory: Any) -> list[str]:
    """Where the servers that the run starts are, and what they take of a card."""
    rollout, workload = memory.workload.rollout, memory.workload
    many = f"{rollout.replicas} servers of vLLM" if rollout.replicas > 1 else "a server of vLLM"
    over = f" over {rollout.tensor_parallel_size} cards" if rollout.tensor_parallel_size > 1 else ""
    held = sum(size for name, size in memory.parts.items() if name.startswith("vllm_"))
    if workload.on_cpu:
        return (
            [f"  engine  {many}, {size_text(held // rollout.replicas)} each, in this memory"]
            if rollout.replicas > 1
            else []
        )
    if rollout.placement == "split":
        return [
            f"  engine  split: {many}{over}, {rollout.num_cards} cards of their own beside {memory.shards} for training"
        ]
    sleeps = "" if rollout.max_staleness else ", asleep while it trains (counted as awake)"
    ray = "; with --ray each has cards of its own" if rollout.placement == "auto" else ""
    return [f"  engine  colocated: {many}{over} on the cards that train, {size_text(held)} of the fullest{sleeps}{ray}"]


def _offload_lines(memory: Any, copy_bytes_s: float) -> list[str]:
    """What lies in the machine's memory, and how long copies of it take."""
    pinned = {name: size for name, size in memory.host.items() if name != "routed_experts"}
    held = " and ".join(f"{size_text(size)} for {name}" for name, size in pinned.items())
    each = " by each process" if memory.shards > 1 else ""
    lines = [f"  offload {held} in the machine's memory, pinned{each}"] if held else []
    if memory.copied_bytes:
        trained, passed = (
            f"{size_text(size)} ({seconds_text(size / copy_bytes_s)})"
            for size in (memory.copied_to_train_bytes, memory.copied_bytes)
        )
        lines.append(
            f"          copied at {copy_bytes_s / 1e9:.1f} GB/s: {trained} a micro-batch, {passed} a pass without gradients, as each decoded token is"
        )
    if routed := memory.host.get("routed_experts"):
        lines.append(f"  experts {size_text(routed)} of recorded choices in the machine's memory, a batch{each}")
    return lines


def time_lines(made: Any, mean: int) -> list[str]:
    bound = "about" if mean else "at most"
    each = ", ".join(f"{name} {seconds_text(s)}" for name, s in made.phases.items())
    in_all = f"; {made.steps} steps {seconds_text(made.total_s)}" if made.total_s is not None else ""
    if not made.completions:
        detail = f": {each}" if len(made.phases) > 1 else ""
        return [f"  time    {bound} {seconds_text(made.step_s)} a step ({made.tokens:,.0f} tokens){detail}{in_all}"]
    share = made.phases["rollout"] / made.batch_s
    return [
        f"  time    {bound} {seconds_text(made.batch_s)} a generation batch of {made.completions} completions: {each} ({share:.0%} rollout){in_all}",
        *_split_lines(made),
    ]


def _split_lines(made: Any) -> list[str]:
    if made.split is None:
        return []
    split, gain = made.split, made.split_gain
    better = f"{gain:.2f} times as fast as sharing all" if gain > 1 else "slower than sharing all"
    choice = "split" if gain > _WORTH else "colocated"
    longer = ", ".join(f"{s.answer_tokens:.0f} tokens {s.rollout}:{s.train}" for s in made.growth)
    lines = [
        f"  split   best {split.rollout} for rollout and {split.train} for training: {seconds_text(split.times.overlapped_s)}, {better}, "
        f"the trainer idle {split.times.trainer_idle:.0%}; take {choice}",
        f"          as answers grow (rollout:training): {longer}",
    ]
    if made.staleness:
        times = ", ".join(
            f"{n}: {seconds_text(t.step_s)} (trainer idle {t.trainer_idle:.0%})" for n, t in made.staleness.items()
        )
        lines.append(f"  stale   a batch on that split, simulated, if answers may be so many versions old: {times}")
    return lines


def cost_lines(made: Any, num_devices: int, usd_per_gpu_hour: float | None) -> list[str]:
    lines = [f"  disk    {size_text(made.disk_bytes)} for checkpoints and the model"]
    if made.total_s is not None:
        hours = made.total_s * num_devices / 3600
        price = f", {hours * usd_per_gpu_hour:,.2f} USD" if usd_per_gpu_hour is not None else ""
        lines.append(f"  cost    {hours:,.2f} device hours{price}")
    return lines


def start_lines(config: Path, verb: str, cluster: Any, kept: int = 0, placed: int = 0) -> list[str]:
    """Commands that start it on such machines, of whose cards servers have `kept` for themselves, or `placed` where Ray places them."""
    nodes, per_node, posttrain = cluster.nodes, cluster.per_node, f"posttrain {verb} {config}"
    if nodes * per_node == 1:
        return ["", "start", f"  {posttrain}"]
    meet = f" --nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint HOST:29500 --rdzv-id plan" if nodes > 1 else ""
    where, once = (" (on every machine)", " (once; docs/scale.md)") if nodes > 1 else ("", "")
    each, workers = per_node - kept // nodes, nodes * per_node - placed
    if kept and nodes > 1:
        started = ["  torchrun and SLURM start servers on the first machine alone; Ray places them on any"]
    else:
        started = [
            f"  torchrun{where}: torchrun{meet} --nproc-per-node {each} --no-python {posttrain}",
            f"  SLURM: srun --nodes {nodes} --ntasks-per-node {each} --gpus-per-node {per_node} {posttrain}",
        ]
    on_ray = f"  Ray{once}: {posttrain} --ray auto --workers {workers} --worker gpus=1"
    if workers < 1:
        on_ray = f"  Ray gives servers cards of their own, {placed} here, and leaves none to train on"
    return ["", "start", started[0], on_ray, *started[1:]]


def seconds_text(seconds: float) -> str:
    for size, unit in ((86_400, "days"), (3_600, "h"), (60, "min"), (1, "s")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds * 1000:.0f} ms"
