"""A run in Weights & Biases, online or offline as WANDB_MODE says. Its variables (WANDB_PROJECT, WANDB_ENTITY, WANDB_API_KEY …) hold."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb
from wandb.proto.wandb_internal_pb2 import Record

from posttrain.files import digest_json
from posttrain.tracking.trackers.table import (
    REPORT_NAME,
    SAMPLES_NAME,
    MetricRow,
    Samples,
    TrackedRun,
    as_table,
    numbers,
    report_name,
)

_STEP = "step"
_ID_CHARS = 16
_INIT_S = 30
_BLOCK, _HEAD = 32768, 7
_WHOLE, _LAST = 1, 4


class WandbRun:
    """W&B drops a step that is smaller than its last, so ours is a metric of its own which all others are drawn over.

    Neither code, command line, git state, packages, the machine's name nor its statistics are sent.
    """

    def __init__(self, run: TrackedRun) -> None:
        self._id = digest_json(run.key).removeprefix("sha256:")[:_ID_CHARS]
        self._report_name = report_name(run)
        self._folder = Path(os.environ.get("WANDB_DIR", run.folder))
        settings = wandb.Settings(
            silent=True, console="off", disable_git=True, save_code=False, x_disable_stats=True, x_disable_meta=True,
            x_save_requirements=False, host="", init_timeout=_INIT_S,
        )  # fmt: skip
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", run.project), id=self._id, name=run.name, resume="allow",
            config=dict(run.params), dir=str(self._folder), settings=settings,
        )  # fmt: skip
        self._run.define_metric(_STEP)
        self._run.define_metric("*", step_metric=_STEP)

    def recorded(self) -> int:
        """Offline: from the folders that `wandb sync` sends."""
        if self._run.offline:
            files = self._folder.glob(f"wandb/offline-run-*-{self._id}/run-{self._id}.wandb")
            return max((step for file in files for step in _steps(file)), default=-1)
        return int(self._run.summary.get(_STEP, -1))

    def rows(self, rows: Sequence[MetricRow], samples: Samples) -> None:
        for row in rows:
            said = {SAMPLES_NAME: _table(one)} if (one := samples.get(row["step"])) else {}
            self._run.log({**numbers(row), **said, _STEP: row["step"]})

    def note(self, name: str, step: int, text: str) -> None:
        self._run.summary[name] = text

    def report(self, html: str) -> None:
        """The same content is the same version there."""
        page = wandb.Artifact(self._report_name, "report")
        with page.new_file(REPORT_NAME, encoding="utf-8") as handle:
            handle.write(html)
        self._run.log_artifact(page)

    def close(self) -> None:
        self._run.finish()


def _table(samples: Sequence[Mapping[str, Any]]) -> wandb.Table:
    columns, data = as_table(samples)
    return wandb.Table(columns=columns, data=data, allow_mixed_types=True)


def _steps(file: Path) -> Iterator[int]:
    """Our steps in a transaction log of W&B's; what is torn at its end is left out."""
    for data in _log_records(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            for item in record.history.item:
                if (item.key or "/".join(item.nested_key)) == _STEP:
                    yield int(json.loads(item.value_json))


def _log_records(data: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log: blocks of 32 KiB, each record in one fragment or in several."""
    at, parts = _HEAD, b""
    while at + _HEAD <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _HEAD:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        at += _HEAD
        if not kind or at + length > len(data):
            return
        parts += data[at : at + length]
        at += length
        if kind in (_WHOLE, _LAST):
            yield parts
            parts = b""
