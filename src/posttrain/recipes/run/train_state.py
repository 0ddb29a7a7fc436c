"""What a loop carries from step to step, and how it goes to disk and comes back.

A checkpoint holds `weights.safetensors` (what is trained) and `optimizer.safetensors`, of each a part per rank where there
are several (`weights-00001-of-00002.safetensors`), in RL `experience.safetensors` (the
samples of the generation batch in hand), and `state.json` (the rest). A critic has files of its own: `critic_weights…`, `critic_optimizer…`.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays

from posttrain.checkpoint.parts import TensorParts, collect_part, part_name, write_part
from posttrain.checkpoint.store import CheckpointStore, disk_errors
from posttrain.errors import CheckpointError
from posttrain.files import read_json, write_json
from posttrain.models.policy import Policy
from posttrain.protocols import Ranks, Sharding, Share
from posttrain.recipes.experience.prompts import Solved
from posttrain.recipes.run.guard import TrainingGuard
from posttrain.recipes.run.run_folder import RunFolder
from posttrain.rollout.drafts import Speculation, speculation_metrics
from posttrain.rollout.experience import Arrays, Experience, to_arrays
from posttrain.types import CheckpointRef

log = logging.getLogger(__name__)

FORMAT = 5
"""Raised when a checkpoint of before could not be gone on with."""
_EXPERIENCE = "experience.safetensors"
_LAST_PARTS_S = 30.0
"""How long the end of a stage that failed waits for parts of other ranks, which may be gone."""


@dataclass(frozen=True, slots=True)
class Learner:
    """A model in training, and what moves it."""

    policy: Policy
    optimizer: torch.optim.Optimizer


@dataclass
class TrainState:
    """All of it is in a checkpoint. `step` counts finished steps, `empty_steps` those of them that had nothing to learn from;
    `tokens` those that went through the model."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    guard: TrainingGuard
    world_size: int
    rows_per_step: int
    """The global batch; a run goes on with it or not at all."""
    step: int = 0
    empty_steps: int = 0
    tokens: int = 0
    wall_s: float = 0.0
    validated: dict[str, float] = field(default_factory=dict[str, float])
    """The newest validation, which a run resumed at its end reports."""
    experience: Experience | None = None
    """The generation batch in hand; of all ranks, however many there are when it is read again."""
    solved: Solved = field(default_factory=dict[int, tuple[float, bool]])
    stream: dict[str, Any] | None = None
    """Where streamed rows go on."""
    best: tuple[int, float] | None = None
    """Step and score of the best checkpoint at the time of this one."""
    critic: Learner | None = None
    """What is trained beside the policy, where something is."""
    speculation: Speculation | None = None
    """What this rank's engine drafts from, where it does."""

    def learners(self) -> dict[str, Learner]:
        """What is trained, by how the names of its files begin."""
        beside = {} if self.critic is None else {"critic_": self.critic}
        return {"": Learner(self.policy, self.optimizer), **beside}

    def speculated(self, ranks: Ranks) -> dict[str, float]:
        """How well the engines of all ranks drafted since the last call."""
        return {} if self.speculation is None else speculation_metrics(ranks.sum(self.speculation.take_counts()))

    def to_json(self) -> dict[str, Any]:
        """What is not a tensor."""
        return {
            "format": FORMAT, "world_size": self.world_size, "rows_per_step": self.rows_per_step, "step": self.step, "empty_steps": self.empty_steps, "tokens": self.tokens,
            "wall_s": self.wall_s, "stream": self.stream,
            "validated": dict(self.validated), "best": self.best, "guard": self.guard.to_json(),
            "experience": None if self.experience is None else self.experience.header(),
            "solved": {str(row): list(seen) for row, seen in sorted(self.solved.items())},
        }  # fmt: skip

    def restore(self, record: Mapping[str, Any], experience: Mapping[str, np.ndarray]) -> None:
        self.step, self.empty_steps = record["step"], record["empty_steps"]
        self.tokens, self.wall_s = record["tokens"], record["wall_s"]
        self.validated, self.best = dict(record["validated"]), record["best"] and tuple(record["best"])
        self.guard.restore(record["guard"])
        self.stream = record.get("stream")  # checkpoints of before had none
        header = record["experience"]
        self.experience = None if header is None else Experience.of(header, experience)
        self.solved = {int(row): (float(rate), bool(equal)) for row, (rate, equal) in record["solved"].items()}


class Checkpoints:
    """Saves and loads `TrainState`s; a thread writes while the loop goes on."""

    def __init__(self, store: CheckpointStore, ranks: Ranks, run: RunFolder) -> None:
        self.store, self._ranks, self._run = store, ranks, run
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[tuple[int, dict[str, Any]]] | None = None
        self._is_abandoned = Event()

    def newest(self) -> CheckpointRef | None:
        """The newest valid one; every rank gets the same answer."""
        return self._ranks.main_only(self.store.newest_valid)

    def best(self) -> tuple[int, float] | None:
        """Step and score of the best one; every rank gets the same answer."""
        return self._ranks.broadcast(self.store.best() if self._ranks.is_main else None)

    def load(self, ref: CheckpointRef, state: TrainState) -> None:
        """Fill `state` from a checkpoint. Raises: CheckpointError for one of another format."""
        record = self._load_tensors(ref, state)
        state.restore(record, load_arrays(ref.path / _EXPERIENCE) if record["experience"] is not None else {})
        # Other processes have other shares of the prompts: they begin to draft anew. So do runs that did not draft before.
        if state.speculation is not None and len(of_ranks := record.get("speculation") or ()) == self._ranks.world_size:
            state.speculation.restore(of_ranks[self._ranks.rank])

    def load_best(self, step: int, state: TrainState) -> None:
        """The weights of an earlier step, and what held them; the run's own count of steps stays."""
        state.guard.restore(self._load_tensors(self.store.at(step), state)["guard"])

    def _load_tensors(self, ref: CheckpointRef, state: TrainState) -> dict[str, Any]:
        record = read_json(ref.path / "state.json")
        if record.get("format") != FORMAT:
            raise CheckpointError(
                f"{ref.path} has checkpoint format {record.get('format', 1)}; this posttrain reads format {FORMAT}. Finish the "
                "run with the version that began it, or start it anew in another output_dir"
            )
        if record["rows_per_step"] != state.rows_per_step:
            raise CheckpointError(
                f"{ref.path} is of a run with {record['rows_per_step']} rows per optimizer step, on {record['world_size']} "
                f"process(es); this start makes it {state.rows_per_step}, on {state.world_size}. Set num_processes: "
                f"{record['world_size']} and gradient_accumulation_steps as it was, or start anew in another output_dir"
            )
        for prefix, learner in state.learners().items():
            _load_learner(ref.path, prefix, learner, record[f"{prefix}scalars"])
        return record

    def mark_best(self, step: int, score: float) -> None:
        # Marked first: a mark without its checkpoint is made good when the step is run again, not so the reverse.
        self.flush()
        if self._ranks.is_main:
            self.store.mark_best(step, score)

    def save(self, state: TrainState, *, wait: bool = True) -> None:
        """A checkpoint of everything the loop needs. All ranks call it; each writes what it holds, and rank 0 seals it.

        Without `wait` only a copy of the tensors is made here, and a thread writes it; the next save waits for it.
        Raises: CheckpointError, also for the write that was under way.
        """
        self.flush()
        parts: dict[str, dict[str, Share]] = {}
        scalars: dict[str, Any] = {}
        for prefix, learner in state.learners().items():
            held, scalars[f"{prefix}scalars"] = _held_by(learner)
            parts |= {f"{prefix}{stem}": _on_host(shares, copy=not wait) for stem, shares in held.items()}
        of = state.policy.sharding.num_shards
        speculation = None if state.speculation is None else self._ranks.gather(state.speculation.to_json())
        if self._ranks.is_main:
            state.best = self.store.best()
            record = state.to_json() | scalars | {"speculation": speculation}
            experience = None if state.experience is None else to_arrays(state.experience.groups)
            self._writing = self._writer.submit(self._write, state.step, parts, of, experience, record)
        else:
            self._writing = self._writer.submit(self._write_parts, state.step, parts, of)
        if wait:
            self.flush()

    def flush(self) -> None:
        """Wait until the checkpoint under way is on disk. All ranks call it. Raises: CheckpointError if it could not be written."""
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        failed = None if self._ranks.is_main else writing.exception()
        if any(error is not None for error in self._ranks.gather(failed)):
            self._is_abandoned.set()
        details = self._ranks.main_only(writing.result)
        if failed is not None:
            raise failed
        self._run.event("checkpoint", *details)

    def close(self) -> None:
        """Of a stage that failed, the checkpoint under way is finished if the others write their parts of it; its own failure hides no other."""
        if self._writing is not None:
            wait([self._writing], _LAST_PARTS_S)
            self._is_abandoned.set()
            if (error := self._writing.exception()) is not None:
                log.warning("the checkpoint under way was not written: %s", error)
        self._writer.shutdown()

    def _write(
        self, step: int, parts: Mapping[str, Mapping[str, Share]], of: int, experience: Arrays | None,
        record: Mapping[str, Any],
    ) -> tuple[int, dict[str, Any]]:  # fmt: skip
        """`of` ranks write parts: those of the first copy of the model."""

        def fill(folder: Path) -> None:
            for stem, shares in parts.items():
                write_part(folder / part_name(stem, 0, of), shares)
            if experience is not None:
                save_arrays(experience, folder / _EXPERIENCE)
            write_json(folder / "state.json", record)
            for stem in parts:
                for rank in range(1, of):
                    name = part_name(stem, rank, of)
                    collect_part(self.store.beside(step) / name, folder / name, self._is_abandoned.is_set)

        started = time.monotonic()
        ref = self.store.save(step, fill)
        size = sum(path.stat().st_size for path in ref.path.iterdir())
        return step, {"bytes": size, "seconds": round(time.monotonic() - started, 3)}

    def _write_parts(self, step: int, parts: Mapping[str, Mapping[str, Share]], of: int) -> tuple[int, dict[str, Any]]:
        """Another rank's parts, where rank 0 fetches them from; one of a further copy of the model has none."""
        if not parts:
            return step, {}
        folder = self.store.beside(step)
        with disk_errors(self.store.folder):
            folder.mkdir(parents=True, exist_ok=True)
            for stem, shares in parts.items():
                write_part(folder / part_name(stem, self._ranks.rank, of), shares)
        return step, {}


def _held_by(learner: Learner) -> tuple[dict[str, dict[str, Share]], dict[str, Any]]:
    """This rank's shares of what is saved of it, none on a further copy of the model; and of its optimizer what is no tensor."""
    policy, sharding = learner.policy, learner.policy.sharding
    names = {name for name, _ in policy.trainable()}
    own: dict[str, Any] = policy.model.state_dict()
    tensors, scalars = flatten_optimizer(sharding.optimizer_state(policy.model, learner.optimizer))
    if not sharding.has_first_copy:
        return {}, scalars
    saved = {"weights": {name: own[name] for name in own if name in names}, "optimizer": tensors}
    if (reference := _following(policy)) is not None:
        saved["reference"] = reference
    return {stem: {n: sharding.share_of(held[n]) for n in held} for stem, held in saved.items()}, scalars


def _load_learner(folder: Path, prefix: str, learner: Learner, scalars: Mapping[str, Any]) -> None:
    policy, sharding = learner.policy, learner.policy.sharding
    own: dict[str, Any] = policy.model.state_dict()
    frozen = own.keys() - {name for name, _ in policy.trainable()}
    with TensorParts(folder, f"{prefix}weights") as parts:
        weights = {name: _share(parts, name, own.get(name), sharding) for name in parts.names()}
    sharding.load_state(policy.model, weights, optional=frozen)
    with TensorParts(folder, f"{prefix}optimizer") as parts:
        tensors = {name: _share(parts, name, own.get(name.split("|")[0]), sharding) for name in parts.names()}
    sharding.load_optimizer_state(policy.model, learner.optimizer, unflatten(tensors, scalars))
    _keep_in_pages(learner.optimizer)
    if (reference := _following(policy)) is not None:
        with TensorParts(folder, f"{prefix}reference") as parts, torch.no_grad():
            for name, kept in reference.items():
                sharding.local(kept).copy_(_share(parts, name, kept, sharding))


def _following(policy: Policy) -> dict[str, torch.Tensor] | None:
    """The weights of a reference that moves: a part of the state, where one that stays is made again."""
    if not policy.frozen_follows:
        return None
    assert policy.frozen is not None
    policy.sharding.release(policy.frozen.model)  # a rank writes its share, not what a pass gathered
    return dict(policy.frozen.model.named_parameters())


def _on_host(shares: Mapping[str, Share], *, copy: bool) -> dict[str, Share]:
    """A `copy` is for a loop that goes on while the checkpoint is written. No two share memory: a file cannot say that."""
    found: dict[str, Share] = {}
    seen: set[int] = set()
    for name, share in shares.items():
        place = share.rows.untyped_storage().data_ptr()
        rows = share.rows.to("cpu", copy=copy or place in seen)
        found[name] = share._replace(rows=rows.contiguous())
        seen.add(place)
    return found


def _share(parts: TensorParts, name: str, like: torch.Tensor | None, sharding: Sharding) -> torch.Tensor:
    """This rank's rows of a saved tensor, if the model's tensor `like` has rows; else all of it."""
    if like is None or parts.shape(name) != tuple(like.shape):
        return parts.read(name)
    share = sharding.share_of(like)
    if not share.shape:
        return parts.read(name)
    columns = (share.column, share.column + share.rows.shape[1]) if len(share.shape) > 1 else None
    return parts.read(name, share.start, share.start + len(share.rows), columns)


def _keep_in_pages(optimizer: Any) -> None:
    """bitsandbytes loads a state onto the device; that of a paged optimizer belongs into its pages."""
    if not getattr(optimizer, "is_paged", False):
        return
    for parameter, values in optimizer.state.items():
        for name in values.keys() & {"state1", "state2"}:
            page = optimizer.get_state_buffer(parameter, dtype=values[name].dtype)
            values[name] = page.copy_(values[name])


def flatten_optimizer(state: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Optimizer state as named tensors, and what is not a tensor."""
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, Mapping):
            # 8-bit optimizers keep a second level.
            inner_tensors, inner_scalars = flatten_optimizer(value)
            tensors |= {f"{name}|{key}": tensor for key, tensor in inner_tensors.items()}
            scalars |= {f"{name}|{key}": scalar for key, scalar in inner_scalars.items()}
        elif isinstance(value, torch.Tensor):
            tensors[name] = value
        else:
            scalars[name] = json.loads(json.dumps(value))
    return tensors, scalars


def unflatten(tensors: Mapping[str, torch.Tensor], scalars: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    state: dict[str, dict[str, Any]] = {}
    for flat, value in {**tensors, **scalars}.items():
        *path, key = flat.split("|")
        place: dict[str, Any] = state
        for name in path:
            place = place.setdefault(name, {})
        place[key] = value
    return state
