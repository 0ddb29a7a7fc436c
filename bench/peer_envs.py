"""Environments of other tools: each is made once, below `.venv-peers/`, from its pins in bench/peers/."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from gpu_report import LeftOut

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parent / ".venv-peers"


@dataclass(frozen=True)
class Peer:
    """`without`: packages that it asks for and that do not load beside a torch for CPUs. `stubs`: modules of those that it imports whether it needs them
    or not, and that stand empty instead.
    """

    title: str
    package: str
    without: tuple[str, ...] = ()
    stubs: tuple[str, ...] = ()


PEERS = {
    "llamafactory": Peer("LLaMA-Factory", "llamafactory", ("torchvision", "torchaudio"), ("torchaudio",)),
    "axolotl": Peer("Axolotl", "axolotl"),
}


def pins_of(name: str) -> Path:
    return HERE / "peers" / f"{name}.txt"


def version_of(name: str) -> str:
    pins = dict(line.split("==") for line in pins_of(name).read_text().split() if "==" in line)
    return pins[PEERS[name].package]


def python_of(name: str) -> Path:
    """Its Python, the environment made where there is none of these pins. Raises: LeftOut where it cannot be made here."""
    folder, pins = FOLDER / name, pins_of(name)
    python, stamp = folder / "bin" / "python", folder / "pins.txt"
    if stamp.exists() and stamp.read_text() == pins.read_text():
        return python
    print(f"{PEERS[name].title}: making {folder} (once, some minutes)", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    _run([sys.executable, "-m", "venv", str(folder)])
    _install(python, PEERS[name], pins)
    stamp.write_text(pins.read_text())
    return python


def _install(python: Path, peer: Peer, pins: Path) -> None:
    pip = [str(python), "-m", "pip"]
    install = [*pip, "install", "--quiet", "--no-input", "--constraint", str(pins)]
    _run([*install, "torch"])
    _run([*install, peer.package])
    if peer.without:
        _run([*pip, "uninstall", "--quiet", "--yes", *peer.without])
    packages = Path(_run([str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]).strip())
    for name in peer.stubs:
        (packages / name).mkdir()
        (packages / name / "__init__.py").write_text("__version__ = '0'\n")


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise LeftOut(f"cannot be installed here: {errors[0] if errors else f'status {done.returncode}'}")
    return done.stdout
