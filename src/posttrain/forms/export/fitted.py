"""Linear layers in 4 bits with a scale for each group of a row, fitted to the answers on given texts (AWQ, GPTQ).

llm-compressor fits them, in an environment of its own (its pins exclude ours): a job file in, a folder out. What it wrote is
read again here, and held to what each method promises.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn.functional import linear

from posttrain.config.datasets import DatasetKeys
from posttrain.config.stages import ModelKeys
from posttrain.data.load import read_nouns
from posttrain.data.render import draft_example, tokenize
from posttrain.errors import MissingExtraError, ModelError
from posttrain.files import digest_file, digest_json, read_json, write_json
from posttrain.forms.export.compressed import is_compressed
from posttrain.forms.export.form_gate import FormCheck
from posttrain.forms.merging.shards import ShardWriter
from posttrain.forms.merging.weights import StoredModel
from posttrain.models.read import read_model

PYTHON = "POSTTRAIN_EXPORT_PYTHON"
"""Names the python of the environment, where it is not beside ours."""
NUM_ROWS, LONGEST = 512, 2048
"""What is read of the texts: rows, and tokens of each."""
_CHECKED_ROWS = 128
_SCALED = 1e-4
"""How far logits of a scaled model may be off in float32, of the largest."""
_PROCESS = Path(__file__).with_name("fit_process.py")
_STEPS = 7.5
"""The largest number of a group is so many steps; what is stored goes from -8 to 7."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Texts that a form is fitted to, as ids of the model's tokenizer; `scratch` is where the process that fits works."""

    file: Path
    num_rows: int
    rows: Sequence[Sequence[int]]
    scratch: Path

    @property
    def lineage(self) -> Mapping[str, Any]:
        return {
            "file": self.file.name, "digest": digest_file(self.file), "rows": len(self.rows), "rows_in_file": self.num_rows,
            "tokens": sum(map(len, self.rows)), "ids_digest": digest_json([list(row) for row in self.rows]),
        }  # fmt: skip


def read_calibration(file: Path, tokenizer: Any, scratch: Path) -> Calibration:
    """The first rows of a data file in any format of examples. Raises: DataError."""
    nouns: list[Any] = read_nouns([DatasetKeys(path=str(file))], "examples")
    drafts = [draft for noun in nouns[:NUM_ROWS] for draft in draft_example(tokenizer, noun, "all")]
    return Calibration(file, len(nouns), [seq.ids[:LONGEST] for seq in tokenize(tokenizer, drafts).seqs], scratch)


def export_python() -> Path:
    """Of the environment that `make setup-export` makes. Raises: MissingExtraError."""
    named = os.environ.get(PYTHON, "")
    found = Path(named) if named else Path(sys.prefix).parent / ".venv-export" / "bin" / "python"
    if not found.is_file():
        raise MissingExtraError(
            f"awq and gptq are fitted by llm-compressor in an environment of its own, and there is none at {found}: make it with "
            f"`make setup-export` in posttrain's folder, or name its python in {PYTHON}"
        )
    return found


def group_size(type_: str) -> int:
    """`w4g128`: weights in 4 bits, in groups of 128."""
    return int(type_.removeprefix("w4g"))


def write_fitted(folder: Path, source: Path, config: dict[str, Any], form: tuple[str, str], given: Calibration) -> None:
    """`form`: method and type. Raises: ModelError where groups do not divide a row, or the process fails; MissingExtraError."""
    (method, type_), model, python = form, StoredModel(source), export_python()
    size = group_size(type_)
    for name in model.names:
        if is_compressed(name, shape := model.shape(name)) and shape[1] % size:
            raise ModelError(
                f"{name} has rows of {shape[1]}, and groups of {size} do not divide them: take a smaller group (--type w4g32), "
                "or --to int8"
            )
    job, made, kept = given.scratch / "job.json", given.scratch / "made", unrounded(given)
    kept.mkdir(parents=True)
    write_json(job, {
        "source": str(source.resolve()), "method": method, "group_size": size, "rows": given.rows, "out": str(made),
        "unrounded": str(kept / "model.safetensors") if method == "awq" else None,
    })  # fmt: skip
    _run(python, job)
    dtype, writer = model.dtype, ShardWriter(folder)
    for path in sorted(made.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            writer.add(name, tensor.to(dtype) if tensor.is_floating_point() else tensor)
    writer.close()
    said = read_json(made / "config.json")["quantization_config"]
    write_json(folder / "config.json", {**config, "quantization_config": said})


def unrounded(given: Calibration) -> Path:
    """The folder of the model as AWQ scaled it: the same function, before it was rounded."""
    return given.scratch / "unrounded"


def _run(python: Path, job: Path) -> None:
    log = job.with_suffix(".log")
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("wb") as said:
        done = subprocess.run(
            [str(python), "-I", str(_PROCESS), str(job)], env={**os.environ, **offline}, stdin=subprocess.DEVNULL,
            stdout=said, stderr=said, check=False,
        )  # fmt: skip
    if done.returncode:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        raise ModelError(
            f"llm-compressor ({python}) ended with {done.returncode}: {lines[-1] if lines else 'it said nothing'}"
        )


def fitted_bound(form: tuple[str, str], name: str, tensor: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    """Half a step of a group for AWQ; GPTQ moves an entry for the sake of others, as far as its group goes (`check_fit` says more)."""
    rounding = {torch.float32: 2**-23, torch.float16: 2**-11, torch.bfloat16: 2**-8}[stored]
    if not is_compressed(name, tensor.shape):
        return tensor.abs() * rounding + 1e-6
    method, type_ = form
    largest = _largest(tensor, group_size(type_))
    steps = 0.5 if method == "awq" else 2 * _STEPS + 0.5
    return (largest / _STEPS * steps + largest * rounding * 2) * 1.01 + 1e-8


def _largest(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """Of its group, for each entry."""
    groups = tensor.view(tensor.shape[0], -1, size).abs().amax(-1, keepdim=True)
    return groups.expand(-1, -1, size).reshape(tensor.shape)


def _nearest(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """The same groups with each entry rounded by itself."""
    step = (_largest(tensor, size) / _STEPS).clamp(min=1e-12)
    return (tensor / step).round().clamp(-8, 7) * step


@torch.no_grad()
def check_scales(source: Path, scaled: Path, given: Calibration) -> FormCheck:
    """Before it was rounded, the scaled model scores the texts as its source does."""
    models = [read_model(ModelKeys(base_model=str(path)), torch.float32).eval() for path in (source, scaled)]
    off, sizes = list[torch.Tensor](), list[torch.Tensor]()
    for row in given.rows[:_CHECKED_ROWS]:
        ours, theirs = (model(input_ids=torch.tensor([list(row)]), use_cache=False).logits for model in models)
        off.append((ours - theirs).abs().max())
        sizes.append(ours.abs().max())
    worst, allowed = float(torch.stack(off).max()), float(torch.stack(sizes).max()) * _SCALED
    said = f"scaled and not yet rounded, its logits are off by at most {worst:.1e} ({allowed:.1e} allowed)"
    return FormCheck("scales", worst <= allowed, said)


@torch.no_grad()
def check_fit(source: Path, tensors: Mapping[str, torch.Tensor], type_: str, given: Calibration) -> FormCheck:
    """On the texts, each layer's outputs are nearer to the source's than with every entry rounded by itself."""
    model, size = read_model(ModelKeys(base_model=str(source)), torch.float32).eval(), group_size(type_)
    layers = {f"{name}.weight": module for name, module in model.named_modules()}
    names = [name for name, tensor in tensors.items() if is_compressed(name, tensor.shape)]
    if lost := [name for name in names if name not in layers]:
        return FormCheck(
            "fit", False, f"{lost[0]} and {len(lost) - 1} more are of no layer whose outputs could be compared"
        )
    if not names:
        return FormCheck(
            "fit", False, f"no layer is compressed to {type_}, so there is none whose outputs could be compared"
        )
    errors = {name: _watched(layers[name], tensors[name], size) for name in names}
    for row in given.rows[:_CHECKED_ROWS]:
        model(input_ids=torch.tensor([list(row)]), use_cache=False)
    shares = {name: float(error[0] / error[1].clamp(min=1e-12)) for name, error in errors.items()}
    worst = max(shares, key=shares.__getitem__)
    said = f"{sum(shares.values()) / len(shares):.2f} on average and at most {shares[worst]:.2f} ({worst})"
    return FormCheck(
        "fit", all(share <= 1 for share in shares.values()), f"of nearest rounding's squared error is left {said}"
    )


def _watched(layer: Any, written: torch.Tensor, size: int) -> torch.Tensor:
    """What the squared error of this layer's outputs will add up to: as written, and with nearest rounding."""
    errors, off = torch.zeros(2), (written - layer.weight, _nearest(layer.weight, size) - layer.weight)

    def add(_: Any, inputs: tuple[torch.Tensor, ...], __: Any) -> None:
        errors.add_(torch.stack([linear(inputs[0], change).square().sum() for change in off]))

    layer.register_forward_hook(add)
    return errors
