"""Rows of the GPU's check and bench: written to a file as each ends, and to docs/performance.md at the end."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from collections.abc import Callable, Mapping
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


def parse(text: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses it with tiny shapes")
    parser.add_argument("--out", default=str(OUT), help="folder of the rows")
    parser.add_argument("--doc", action="store_true", help="write the table into docs/performance.md")
    parser.add_argument("--row", action="append", help="only rows whose name begins so; may be repeated")
    return parser.parse_args()


def device_of(arguments: argparse.Namespace) -> torch.device:
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device here; --device cpu rehearses the rows with tiny shapes")
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
    """Rows as they end: a run that is cut off leaves those it had."""

    def __init__(self, path: Path, facts: Mapping[str, str]) -> None:
        self._path, self._facts, self._rows = path, facts, list[dict[str, Any]]()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(facts) + "\n", encoding="utf-8")
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


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
