"""The models of clients: what each is made from, its journal, its adapter in memory, and how it comes back.

Making a model, going on after a restart and coming back to memory are one thing: the last save, else how it began. All that
computes is called from one thread.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from posttrain.errors import CheckpointError, ConfigError, ModelError, PosttrainError
from posttrain.files import read_json, write_json
from posttrain.models.provenance import source_digest
from posttrain.names import FREE
from posttrain.recipes.tinker import AdamStep, AdapterHost, AdapterShape, Tenant, Tensors
from posttrain.recipes.tinker_saves import export_stage, exported_tensors, find_state, load_state, save_state
from posttrain.serve.tinker.journal import EXPORT, SAVE, Journal
from posttrain.serve.tinker.messages import PassAsked, write_pass
from posttrain.serve.tinker.options import TinkerOptions
from posttrain.tracking.jsonl import JsonlSink

log = logging.getLogger(__name__)

WEIGHTS_OF_STATE, WEIGHTS_OF_SAMPLER = "weights", "sampler_weights"
"""What stands in the middle of a tinker:// path: a state to go on from, or a stage's folder."""
_SCHEME = "tinker://"
_MODEL_ID = re.compile(r"[A-Za-z0-9_-]{1,80}(:train:\d{1,9})")
_RECORD = "run.json"


@dataclass(frozen=True, slots=True)
class ClientRecord:
    """How a model began; with it and no save, it begins so again. `path`: the saved weights it was begun on."""

    model_id: str
    base: str
    base_digest: str
    rank: int
    attention: bool
    mlp: bool
    head: bool
    seed: int
    begun_s: float
    path: str = ""
    optimizer: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def shape(self) -> AdapterShape:
        return AdapterShape(self.rank, self.attention, self.mlp, self.head)


class LostStepsError(PosttrainError, RuntimeError):
    """Requests of a model that were let in, and whose effect went with the process."""


class ClientModel:
    """One model of a client. `tenant` is None while it is not in memory."""

    def __init__(
        self, beginning: ClientRecord, folder: Path, max_snapshots: int, load: Callable[[ClientModel], None]
    ) -> None:
        """`load` brings it into memory."""
        self.beginning, self.folder, self._max_snapshots, self._load = beginning, folder, max_snapshots, load
        self.journal = Journal(folder / "journal.jsonl")
        self.tenant: Tenant | None = None
        self.host: AdapterHost | None = None
        self.used_s = time.time()
        self.lost = ""
        """Why it cannot go on: requests whose effect is gone, from `first_lost` on."""
        self.first_lost = 0
        self.snapshots: dict[str, Tensors] = {}
        self._metrics = JsonlSink(folder)
        self._finish_save()
        self.leave_memory()

    @property
    def id(self) -> str:
        return self.beginning.model_id

    def _finish_save(self) -> None:
        """A save that was complete on disk when the process ended before it could note so."""
        for entry in [e for e in self.journal.entries.values() if e.kind == SAVE and not e.is_done]:
            try:
                saved = find_state(self.folder / WEIGHTS_OF_STATE / entry.name)
            except CheckpointError:
                continue
            if saved.seq == entry.seq:
                self.journal.finish(entry.seq, {"path": self.path(WEIGHTS_OF_STATE, entry.name), "type": SAVE})

    def leave_memory(self) -> None:
        """What is in no save is lost, and said to be."""
        self.tenant, self.host = None, None
        self.snapshots = {}
        if unsaved := self.journal.unsaved:
            self.first_lost = unsaved[0].seq
            save = self.journal.last_save
            begin = "create_lora_training_client(...), for nothing was saved"
            if save is not None:
                path = self.path(WEIGHTS_OF_STATE, save.name)
                begin = f"create_training_client_from_state_with_optimizer({path!r}), the state of request {save.seq}"
            self.lost = (
                f"the server, or the session, ended with requests of {self.id} in no save, and they are lost: "
                f"{', '.join(map(str, unsaved))}. This model cannot go on; begin from {begin}"
            )

    def path(self, kind: str, name: str) -> str:
        return f"{_SCHEME}{self.id}/{kind}/{name}"

    # --- requests; from `bring` on in the thread that computes ---

    def recorded(self, seq: int) -> Mapping[str, Any] | None:
        """What a request came to that was answered before, if that stands."""
        entry = self.journal.entries.get(seq)
        if entry is None or entry.result is None:
            return None
        is_gone = bool(self.lost) and seq >= self.first_lost
        return None if is_gone and entry.kind != EXPORT else entry.result

    def failure_of(self, seq: int) -> str:
        """What to say of a request whose result is not here."""
        entry = self.journal.entries.get(seq)
        if entry is None:
            return self.lost or f"{self.id} never got a request {seq}"
        if entry.failure:
            return entry.failure
        if self.lost and seq >= self.first_lost:
            return f"request {entry} is lost. {self.lost}"
        if entry.is_done:
            return f"request {entry} of {self.id} was done and is in its state; its output is not kept any more"
        return f"request {entry} of {self.id} is lost: the server ended before it was done, and the model stands without it"

    def bring(self) -> None:
        """Into memory, where it is not."""
        self._ready()

    def run(self, asked: PassAsked) -> bytes:
        host, tenant = self._ready()
        try:
            passed = host.pass_over(tenant, asked.data(), asked.loss_fn, asked.config, backward=asked.backward)
        except BaseException as error:
            if asked.backward:
                tenant.spoiled = f"request {asked.seq} forward_backward failed ({' '.join(str(error).split())[:200]})"
            raise
        return write_pass(passed)

    def step(self, adam: AdamStep) -> Mapping[str, Any]:
        host, tenant = self._ready()
        begun = time.monotonic()
        metrics = host.step(tenant, adam)
        self._metrics.log(
            tenant.step, metrics | {"num_tokens": float(tenant.tokens), "step_time": time.monotonic() - begun}
        )
        return {"metrics": metrics}

    def save(self, seq: int, name: str, *, overwrite: bool) -> Mapping[str, Any]:
        host, tenant = self._ready()
        folder = self.folder / WEIGHTS_OF_STATE / name
        if folder.exists() and not overwrite:
            raise ConfigError(
                f"{self.path(WEIGHTS_OF_STATE, name)} is there already; give another name, or overwrite=True"
            )
        save_state(host, tenant, folder, seq)
        return {"path": self.path(WEIGHTS_OF_STATE, name), "type": SAVE}

    def export(self, name: str) -> Mapping[str, Any]:
        host, tenant = self._ready()
        folder = self.folder / WEIGHTS_OF_SAMPLER / name
        if folder.exists():
            raise ConfigError(f"{self.path(WEIGHTS_OF_SAMPLER, name)} is there already; give another name")
        export_stage(host, tenant, folder, {"loss": tenant.pending.get("loss", 0.0)} if tenant.pending else {})
        return {"path": self.path(WEIGHTS_OF_SAMPLER, name), "type": EXPORT}

    def keep_snapshot(self, sampler_id: str) -> Mapping[str, Any]:
        host, tenant = self._ready()
        self.snapshots[sampler_id] = host.snapshot(tenant)
        while len(self.snapshots) > self._max_snapshots:
            del self.snapshots[next(iter(self.snapshots))]
        return {"sampling_session_id": sampler_id, "type": EXPORT}

    def replace_by(self, folder: Path, *, optimizer: bool) -> None:
        host, _ = self._ready()
        self.tenant = load_state(host, find_state(folder), optimizer=optimizer, gradients=False)

    def _ready(self) -> tuple[AdapterHost, Tenant]:
        """Raises: LostStepsError."""
        if self.lost:
            raise LostStepsError(self.lost)
        self.used_s = time.time()
        if self.tenant is None:
            self._load(self)
        assert self.host is not None and self.tenant is not None, "loading fills both"
        return self.host, self.tenant

    def close(self) -> None:
        self.journal.close()
        self._metrics.close()


class ModelShelf:
    """All models of the folder, and the bases in memory."""

    def __init__(self, options: TinkerOptions) -> None:
        self._options = options
        self._models: dict[str, ClientModel] = {}
        self._hosts: dict[tuple[str, AdapterShape], AdapterHost] = {}
        self._digests: dict[str, str] = {}
        options.folder.mkdir(parents=True, exist_ok=True)

    # --- finding; from the thread that answers HTTP ---

    def begin(self, beginning: ClientRecord) -> ClientModel:
        """Note how a model begins; nothing is computed. A repeated request finds what it made."""
        _check_id(beginning.model_id)
        if (known := self.find(beginning.model_id)) is not None:
            return known
        folder = self._folder(beginning.model_id)
        folder.mkdir()
        write_json(folder / _RECORD, asdict(beginning))
        model = self._models[beginning.model_id] = ClientModel(
            beginning, folder, self._options.max_snapshots, self.load
        )
        return model

    def find(self, model_id: str) -> ClientModel | None:
        if (
            model_id not in self._models
            and _MODEL_ID.fullmatch(model_id)
            and (self._folder(model_id) / _RECORD).exists()
        ):
            folder = self._folder(model_id)
            beginning = ClientRecord(**read_json(folder / _RECORD))
            self._models[model_id] = ClientModel(beginning, folder, self._options.max_snapshots, self.load)
        return self._models.get(model_id)

    def present(self, model_id: str) -> ClientModel | None:
        """Where it is in memory."""
        model = self._models.get(model_id)
        return None if model is None or model.tenant is None else model

    def in_memory(self) -> list[ClientModel]:
        return [model for model in self._models.values() if model.tenant is not None]

    def ids(self) -> list[str]:
        """Of all models, the newest first."""
        records = [read_json(path) for path in self._options.folder.glob(f"*/{_RECORD}")]
        return [record["model_id"] for record in sorted(records, key=lambda record: -record["begun_s"])]

    def source(self, base: str) -> str:
        """Raises: ConfigError."""
        if base not in self._options.models:
            raise ConfigError(f"base_model: got {base!r}, this server has {', '.join(self._options.models)}")
        return self._options.models[base]

    def digest(self, base: str) -> str:
        if base not in self._digests:
            self._digests[base] = source_digest(self.source(base))
        return self._digests[base]

    def resolve(self, path: str) -> tuple[ClientModel, str, Path]:
        """The model, kind and folder of a tinker:// path. Raises: ConfigError."""
        parts = path.removeprefix(_SCHEME).split("/")
        model = self.find(parts[0]) if path.startswith(_SCHEME) and len(parts) == 3 else None
        if model is None or parts[1] not in (WEIGHTS_OF_STATE, WEIGHTS_OF_SAMPLER) or FREE.against(parts[2]):
            raise ConfigError(
                f"{path}: no such weights here; expected {_SCHEME}MODEL/{WEIGHTS_OF_STATE}/NAME of this server"
            )
        folder = model.folder / parts[1] / parts[2]
        if not folder.is_dir():
            raise ConfigError(f"{path}: {model.id} has no such save")
        return model, parts[1], folder

    def _folder(self, model_id: str) -> Path:
        return self._options.folder / model_id.replace(":", "-")

    # --- computing; from the one thread that does ---

    def load(self, model: ClientModel) -> None:
        """Bring a model into memory. Raises: PosttrainError."""
        self._make_room()
        begun = model.beginning
        host = self.host(begun.base, begun.shape)
        if (found := self.digest(begun.base)) != begun.base_digest:
            raise ModelError(
                f"{model.id} began on a {begun.base} with digest {begun.base_digest[:19]}…; it is {found[:19]}… now: start the "
                "server with the base it began on"
            )
        save = model.journal.last_save
        if save is not None:
            saved = find_state(model.folder / WEIGHTS_OF_STATE / save.name)
            if saved.seq != save.seq:
                raise CheckpointError(
                    f"{saved.folder} is the state of request {saved.seq}, the journal of {model.id} says that {save.seq} was saved "
                    "there: bring back what was, or begin a new model from it"
                )
            model.tenant = load_state(host, saved, optimizer=True, gradients=True)
        elif begun.path:
            _, kind, folder = self.resolve(begun.path)
            if kind == WEIGHTS_OF_SAMPLER:
                model.tenant = replace(host.fresh(begun.seed), tensors=exported_tensors(host, folder))
            else:
                model.tenant = load_state(host, find_state(folder), optimizer=begun.optimizer, gradients=False)
        else:
            model.tenant = host.fresh(begun.seed)
        model.host = host

    def host(self, base: str, shape: AdapterShape | None = None) -> AdapterHost:
        """A base in memory, with an adapter of this shape, or any. Raises: ModelError."""
        for (name, found), host in self._hosts.items():
            if name == base and shape in (None, found):
                return host
        used = {id(model.host) for model in self._models.values()}
        self._hosts = {key: host for key, host in self._hosts.items() if id(host) in used}
        shape = shape or AdapterShape(rank=1)
        log.info("loading %s", base)
        host = self._hosts[base, shape] = AdapterHost(self.source(base), shape, self._options.micro_batch)
        return host

    def _make_room(self) -> None:
        """Raises: ConfigError where every model in memory would lose something."""
        present = self.in_memory()
        if len(present) < self._options.max_models:
            return
        idle = [model for model in present if not model.journal.unsaved and not model.snapshots]
        if not idle:
            raise ConfigError(
                f"{len(present)} models are in memory, as many as may be, and each has steps in no save, or snapshots: save_state one "
                "without snapshots, finish its session, or start the server with more --max-models"
            )
        min(idle, key=lambda model: model.used_s).leave_memory()

    def close(self) -> None:
        for model in self._models.values():
            model.close()


def _check_id(model_id: str) -> None:
    if not _MODEL_ID.fullmatch(model_id):
        raise ConfigError(
            f"session_id: got {model_id.rpartition(':train:')[0]!r}, expected the id that create_session gave"
        )
