"""`posttrain doctor [RUN_OR_YAML]`: what of this machine and its packages works, by trying it. Exit code 1 if a must is broken."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from posttrain.cli.doctor_run import check_target, durable
from posttrain.cli.doctor_surface import surface
from posttrain.cli.findings import Diagnosis, plain_name
from posttrain.cli.json_output import AsJson, echo_json
from posttrain.errors import ModelError
from posttrain.numerics import installed_version

_LOW_DISK_BYTES = 2 << 30

FOUR_BITS = """
import torch, bitsandbytes as bnb
torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
layer = bnb.nn.Linear4bit(64, 32, bias=False, quant_type="nf4", compute_dtype=torch.float32)
layer.support_avx512bf16_for_cpu = False
layer = layer.to(device)
x = torch.randn(3, 64, device=device, requires_grad=True)
def grad():
    return torch.autograd.grad(layer(x).square().sum(), x)[0]
before = grad()
with torch.no_grad():
    layer.eval()(x)
after = grad()
assert torch.equal(before, after), "gradients change once the layer was used without gradient"
error = (bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state) @ x.detach().T - layer(x.detach()).T).abs().max()
assert error < 1e-3, f"the layer computes something else than its weights say ({error:.1e})"
"""
"""Run in a process of its own: a broken native library ends the process, not the doctor."""


def doctor(
    target: Annotated[
        Path | None,
        typer.Argument(metavar="[RUN_OR_YAML]", help="A run's folder, or a YAML, to hold against this machine."),
    ] = None,
    project: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the project lies by now, if it was moved.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine and its packages, and whether RUN_OR_YAML can run or go on here. Exit code 1 if something is broken."""
    findings = [finding for check in CHECKS for finding in _tried(check)]
    if target is not None:
        findings += _tried(lambda: check_target(target, project))
    broken = [finding.name for finding in findings if finding.status == "broken"]
    if as_json:
        echo_json([asdict(finding) for finding in findings])
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            typer.echo(f"{finding.status:<6}  {finding.name:<{width}}  {finding.text}")
        typer.echo(f"broken: {', '.join(broken)}" if broken else "nothing is broken")
    raise typer.Exit(1 if broken else 0)


def _tried(check: Callable[[], Iterator[Diagnosis]]) -> list[Diagnosis]:
    """The findings of one check, up to where it breaks itself."""
    found: list[Diagnosis] = []
    try:
        found.extend(check())
    except Exception as error:  # noqa: BLE001 - a library that is half installed may raise anything, and that is the finding
        found.append(Diagnosis(_name_of(check), "broken", f"{type(error).__name__}: {error}"))
    return found


def _name_of(check: Callable[[], Iterator[Diagnosis]]) -> str:
    name = getattr(check, "__name__", "")
    return "run" if name == "<lambda>" else name.replace("_", " ")


# --- this machine --------------------------------------------------------------------------------------------------


def python() -> Iterator[Diagnosis]:
    from packaging.specifiers import SpecifierSet

    needed = metadata.metadata("posttrain")["Requires-Python"]
    have = ".".join(map(str, sys.version_info[:3]))
    fits = SpecifierSet(needed).contains(have)
    text = "" if fits else "; make a virtual environment with a newer Python"
    yield Diagnosis("python", "ok" if fits else "broken", f"{have} (needs {needed}){text}")


def packages() -> Iterator[Diagnosis]:
    """Every requirement against what is installed, extras too; then where it differs from what was tested together."""
    from packaging.requirements import Requirement

    tested, fitting, absent, apart = _tested(), 0, [], []
    for text in metadata.requires("posttrain") or ():
        requirement = Requirement(text)
        if requirement.name == "posttrain":
            continue
        optional = requirement.marker is not None and "extra" in str(requirement.marker)
        have = installed_version(requirement.name)
        if have is None:
            if not optional:
                yield Diagnosis(
                    requirement.name, "broken", f"not installed (needs {requirement.specifier}); {_mend(requirement)}"
                )
            absent += [requirement.name] if optional else []
        elif not requirement.specifier.contains(have, prereleases=True):
            text = f"{have} (needs {requirement.specifier}); {_mend(requirement)}"
            yield Diagnosis(requirement.name, "note" if optional else "broken", text)
        else:
            fitting += 1
            pinned = tested.get(plain_name(requirement.name))
            apart += [f"{requirement.name} {have} (tested {pinned})"] if pinned and pinned != have.split("+")[0] else []
    yield Diagnosis(
        "packages", "ok", f"{fitting} installed and in range; optional and absent: {', '.join(absent) or 'none'}"
    )
    if apart:
        yield Diagnosis("versions", "note", "in range, other than in constraints.txt: " + ", ".join(apart))


def machine() -> Iterator[Diagnosis]:
    from posttrain.planner.machine import available_bytes

    yield Diagnosis(
        "cores", "ok", str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    )
    memory = available_bytes()
    yield Diagnosis(
        "memory", "ok", "unknown on this system" if memory is None else f"{memory / 2**30:.1f} GiB available"
    )
    free = shutil.disk_usage(Path.cwd()).free
    yield Diagnosis("disk", "ok" if free > _LOW_DISK_BYTES else "note", f"{free / 2**30:.1f} GiB free in {Path.cwd()}")
    yield durable(Path.cwd())


def torch() -> Iterator[Diagnosis]:
    import torch as library

    cuda_build = library.version.cuda or "none"
    capability = library.backends.cpu.get_cpu_capability()
    threads = library.get_num_threads()
    yield Diagnosis(
        "torch", "ok", f"{library.__version__}, CUDA build {cuda_build}, CPU {capability}, {threads} threads"
    )
    if library.cuda.is_available():
        for number in range(library.cuda.device_count()):
            device = library.cuda.get_device_properties(number)
            bf16 = "bf16" if library.cuda.is_bf16_supported() else "no bf16"
            yield Diagnosis(f"cuda:{number}", "ok", f"{device.name}, {device.total_memory / 2**30:.0f} GiB, {bf16}")
    elif Path("/dev/nvidia0").exists():
        advice = "install the build for your driver: https://pytorch.org/get-started/locally/"
        yield Diagnosis("cuda", "note", f"there is an NVIDIA device that this torch does not see; {advice}")
    else:
        yield Diagnosis("cuda", "ok", "no device: everything runs on the CPU")


def attention() -> Iterator[Diagnosis]:
    """The private corners of torch and transformers that packed sequences and decoding stand on."""
    import torch as library
    from transformers import AutoConfig, AutoModelForCausalLM

    q = library.randn(1, 2, 3, 8)
    out, lse = library.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q, 0.0, True, scale=1.0)
    expected = library.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True, scale=1.0)
    right = library.allclose(out, expected, atol=1e-5) and lse.shape == (1, 2, 3)
    has_backward = hasattr(library.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward")
    good = right and has_backward
    text = "values, log-sum-exp and backward" if good else "not as expected; install the torch of constraints.txt"
    yield Diagnosis("flash kernel", "ok" if good else "broken", text)

    from posttrain.models.attention import register
    from posttrain.models.selfcheck import ragged_is_exact

    register()
    shape = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = AutoConfig.for_model("qwen3", **shape, num_key_value_heads=1, head_dim=16)
    exact = ragged_is_exact(AutoModelForCausalLM.from_config(config))
    differ = "packed documents differ from single ones; install the transformers of constraints.txt"
    text = "packed documents equal single ones" if exact else differ
    yield Diagnosis("packed forward", "ok" if exact else "broken", f"{text} on a tiny model")


def decode_kernels() -> Iterator[Diagnosis]:
    from posttrain.models.native import kernels

    try:
        kernels(64)
    except ModelError as error:
        yield Diagnosis("decode kernels", "note", f"{error}; rollout.native_kernels does nothing without them")
    else:
        yield Diagnosis("decode kernels", "ok", "the C compiler builds those of rollout.native_kernels")


def four_bits() -> Iterator[Diagnosis]:
    from posttrain.registry.manifest import environment_pins

    if "avx512_bf16" in environment_pins([])["cpu"].get("instructions", ()):
        yield Diagnosis("avx512-bf16", "ok", "present; the 4-bit kernel that uses it has no gradient and is kept off")
    if installed_version("bitsandbytes") is None:
        yield Diagnosis("4-bit weights", "note", "no bitsandbytes: pip install 'posttrain[qlora]' for adapter: qlora")
        return
    done = subprocess.run([sys.executable, "-c", FOUR_BITS], capture_output=True, text=True, check=False, timeout=300)
    reason = done.stderr.strip().splitlines()[-1:] or [f"ended with status {done.returncode}"]
    text = (
        "quantised layer and its gradients are right"
        if done.returncode == 0
        else f"self-test: {reason[0]}; do not use adapter: qlora here, or reinstall bitsandbytes"
    )
    yield Diagnosis(
        "4-bit weights",
        "ok" if done.returncode == 0 else "broken",
        f"bitsandbytes {installed_version('bitsandbytes')}, {text}",
    )


def vllm() -> Iterator[Diagnosis]:
    from posttrain.rollout.vllm.options import installed, torchvision_misfit

    misfit = torchvision_misfit()
    if misfit:
        yield Diagnosis("torchvision", "broken", misfit)
    version = installed()
    advice = "not installed: pip install 'posttrain[vllm]', or make setup-vllm, for rollout.engine: vllm or vllm_server"
    ports = f"{version}; the ports that its processes open among themselves have no password: for trusted networks only"
    yield Diagnosis("vllm", "note" if version is None else "ok", advice if version is None else ports)


def ray() -> Iterator[Diagnosis]:
    version = installed_version("ray")
    advice = "not installed: pip install 'posttrain[ray]', or make setup-ray, for --ray"
    ports = (
        f"{version}; its ports, like those of gloo and torch.distributed, have no password, and who reaches them runs code as you: for trusted "
        "networks only"
    )
    yield Diagnosis("ray", "note" if version is None else "ok", advice if version is None else ports)


def sandbox() -> Iterator[Diagnosis]:
    from posttrain.grading.sandbox import call_filter, isolation

    level, filtered = isolation(), bool(call_filter())
    texts = {
        "namespaces": "code rewards run in namespaces of their own: no network, no files of yours",
        "uid": "code rewards run under another uid with limits; network and world-readable files are within their reach",
        "limits": "code rewards run with limits only, as you: do not let untrusted models write code here",
    }
    calls = "; system calls for keys, uncounted memory and other networks are refused"
    missing = "; no system-call filter here, so a hole in the kernel is within reach"
    status = "ok" if level == "namespaces" and filtered else "note"
    yield Diagnosis("sandbox", status, texts[level] + (calls if filtered else missing))


def cache() -> Iterator[Diagnosis]:
    from posttrain.data.cache import cache_root

    folder = cache_root()
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    writable = os.access(place, os.W_OK)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0
    text = f"{folder}, {size / 2**20:.1f} MiB" if writable else f"{folder} cannot be written; set POSTTRAIN_CACHE"
    yield Diagnosis("data cache", "ok" if writable else "broken", text)


CHECKS: tuple[Callable[[], Iterator[Diagnosis]], ...] = (
    python,
    packages,
    machine,
    torch,
    surface,
    attention,
    decode_kernels,
    four_bits,
    vllm,
    ray,
    sandbox,
    cache,
)


_CONSTRAINTS = Path(__file__).parents[3] / "constraints.txt"


def _tested() -> dict[str, str]:
    """`constraints.txt` of a source checkout; empty elsewhere."""
    if not _CONSTRAINTS.exists():
        return {}
    lines = (line.partition("#")[0].strip() for line in _CONSTRAINTS.read_text().splitlines())
    return {plain_name(name): version for name, _, version in (line.partition("==") for line in lines) if version}


def _mend(requirement: Any) -> str:
    tested = "--constraint constraints.txt " if _CONSTRAINTS.exists() else ""
    return f"pip install {tested}'{requirement.name}{requirement.specifier}'"
