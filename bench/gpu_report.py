"""Rows of the GPU's check and bench: written to a file as each ends, and to docs/performance.md at the end."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import sections
from posttrain.models import varlen
from posttrain.objectives.fused import fused_head

OUT = Path(__file__).resolve().parent / "out" / "gpu"
_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "triton",
    "liger-kernel",
    "bitsandbytes",
    "trl",
    "vllm",
    "flash-attn-3",
    "flash-attn-4",
)


class LeftOut(Exception):
    """Why a row does not apply here."""


def parse(text: str | None, rows: Collection[str]) -> argparse.Namespace:
    """`rows` are those that there are; `row` becomes those that are asked for, None where all are."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses it with tiny shapes")
    parser.add_argument("--out", default=str(OUT), help="folder of the rows")
    parser.add_argument("--doc", action="store_true", help="write the table into docs/performance.md")
    parser.add_argument("--row", action="append", help="only rows whose name begins so; may be repeated")
    arguments = parser.parse_args()
    if arguments.doc and arguments.device == "cpu":
        parser.error(
            "--doc with --device cpu: a rehearsal measures nothing, and the document holds what cards measured"
        )
    for start in arguments.row or ():
        if not any(name.startswith(start) for name in rows):
            parser.error(f"--row {start}: no row begins so; there are:\n  " + "\n  ".join(rows))
    if arguments.row:
        arguments.row = [name for name in rows if name.startswith(tuple(arguments.row))]
    return arguments


def said(error: Exception) -> str:
    """In one line, whatever a kernel, a compiler or another program raised."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0]}"


def device_of(arguments: argparse.Namespace) -> torch.device:
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sees = (
            "sees no CUDA device here"
            if torch.version.cuda
            else "is a build without CUDA (GPU_PYTHON=python: another's)"
        )
        raise SystemExit(
            f"torch {torch.__version__} {sees}; python {sys.argv[0]} --device cpu rehearses the rows with tiny shapes"
        )
    return torch.device(arguments.device, 0) if arguments.device == "cuda" else torch.device("cpu")


def facts(device: torch.device) -> dict[str, str]:
    """Card, driver and versions: numbers without them are worth nothing."""
    versions = {name: _version(name) for name in _PACKAGES}
    packages = ", ".join(f"{name} {found}" for name, found in versions.items() if found)
    missing = ", ".join(name for name, found in versions.items() if not found)
    packages = f"Python {platform.python_version()}, {packages}"
    return {"card": _card(device), "packages": packages, "missing": missing} | paths(device)


def paths(device: torch.device) -> dict[str, str]:
    """Which of several ways this card and these versions take."""
    hidden = torch.empty(1, 8, device=device, dtype=torch.bfloat16)
    varlen.kernel_for(hidden[None])  # activates what is installed
    pages = varlen.reads_pages(device, torch.bfloat16, 128)
    return {
        "attention": f"flash attention {varlen.active_flash() or 'of torch'}",
        "decoding": "pages and graphs" if pages else "the loop of a CPU: this torch's operator or card reads no pages",
        "head": "Liger's" if fused_head(hidden, None, None) else "by chunks",
    }


def _card(device: torch.device) -> str:
    if device.type != "cuda":
        return f"a CPU, {torch.get_num_threads()} threads, with tiny shapes: a rehearsal, no measurement"
    properties = torch.cuda.get_device_properties(device)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, driver {driver}, CUDA {torch.version.cuda}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class Lines:
    """Rows as they end: a run that is cut off leaves those it had.

    Where only some are `asked` for, the file keeps the others that it has of the same card and versions.
    Raises: SystemExit for a folder that cannot be written.
    """

    def __init__(self, path: Path, facts: Mapping[str, str], asked: Collection[str] | None = None) -> None:
        self._path, self._facts = path, facts
        try:
            self._rows = _others(path, facts, asked or ())
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(line) + "\n" for line in (facts, *self._rows)), encoding="utf-8")
        except OSError as error:
            raise SystemExit(
                f"--out {path.parent}: no rows can be written there: {error}; name another folder"
            ) from error
        for name, text in facts.items():
            print(f"{name}: {text}", flush=True)

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print("  ".join(f"{name}={_shown(value)}" for name, value in row.items() if value is not None), flush=True)

    def write_doc(
        self, section: str, table: Callable[[list[dict[str, Any]]], list[str]], path: Path = sections.DOC
    ) -> None:
        done = [row for row in self._rows if "left_out" not in row]
        left_out = [f"Left out: {row['row']} ({row['left_out']})." for row in self._rows if "left_out" in row]
        ways = "; ".join(f"{name} {self._facts[name]}" for name in ("attention", "decoding", "head"))
        head = f"{self._facts['card']}; {self._facts['packages']}; {ways}."
        sections.write(section, "\n".join([head, *left_out, "", *table(done)]), path)


def _others(path: Path, facts: Mapping[str, str], asked: Collection[str]) -> list[dict[str, Any]]:
    """Rows of that file that are not asked for again. A last line without its end was cut off."""
    if not asked or not path.exists():
        return []
    first, *rest = map(json.loads, path.read_text(encoding="utf-8").split("\n")[:-1])
    return [row for row in rest if row["row"] not in asked] if first == facts else []


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
