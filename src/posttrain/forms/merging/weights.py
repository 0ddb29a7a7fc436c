"""Tensors of a model's folder, read one by one; of an adapter's, those of its base with its updates added.

A model is never in memory whole. Knows no recipe.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import safe_open

from posttrain.errors import ModelError
from posttrain.files import read_json
from posttrain.models.low_rank import WEIGHTS, adapter_config, split

_PREFIX = "base_model.model."
"""What PEFT puts before the names of the base's modules."""


@dataclass(slots=False)
class StoredModel:
    """The safetensors files of a model's folder. Raises: ModelError where there are none, or where they hold quantised weights."""

    folder: Path
    _open: dict[Path, Any] = field(default_factory=dict[Path, Any])

    @cached_property
    def _files(self) -> dict[str, Path]:
        self._refuse_quantised()
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            return {name: self.folder / file for name, file in read_json(index)["weight_map"].items()}
        whole = self.folder / "model.safetensors"
        if not whole.is_file():
            raise ModelError(
                f"{self.folder} has no model.safetensors; expected a model's folder as save_pretrained writes it"
            )
        return dict.fromkeys(self._handle(whole).keys(), whole)

    def _refuse_quantised(self) -> None:
        # Steps and scales are stored as tensors of their own: added up or cast one by one they are another model.
        config = self.folder / "config.json"
        if config.is_file() and (said := read_json(config).get("quantization_config")):
            raise ModelError(
                f"{self.folder} holds its weights quantised ({said.get('quant_method', 'quantization_config')} in config.json), expected "
                "16 or 32 bits: take the model that it was made from"
            )

    def _handle(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        return self._open[path]

    @property
    def names(self) -> Sequence[str]:
        return list(self._files)

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Raises: ModelError where the model has no such tensor."""
        found = self._handle(self._file(name)).get_tensor(name)
        return found if dtype is None or not found.is_floating_point() else found.to(dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Of the first of its tensors that holds numbers with a point."""
        return next(found.dtype for name in self.names if (found := self.tensor(name)).is_floating_point())

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises: ModelError where the model has no such tensor."""
        return tuple(self._handle(self._file(name)).get_slice(name).get_shape())

    def _file(self, name: str) -> Path:
        if name not in self._files:
            raise ModelError(f"{self.folder} has no tensor {name}; expected models of one architecture")
        return self._files[name]


@dataclass(slots=False)
class AdaptedModel:
    """Base plus s·BA: what an adapter stands for in a merge. Raises: ModelError for what is more than updates of linears."""

    folder: Path
    base: StoredModel

    @cached_property
    def config(self) -> Mapping[str, Any]:
        return adapter_config(self.folder)

    @cached_property
    def _factors(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """A and B by the name of the weight, the scale in B."""
        stored = safe_open(self.folder / WEIGHTS, framework="pt")
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        pairs, saved = split(tensors)
        config = self.config
        more = [what for what in ("use_dora", "target_parameters", "modules_to_save", "lora_bias") if config.get(what)]
        if more or saved or any("embedding" in a for a, _ in pairs.values()):
            raise ModelError(
                f"{self.folder} is more than low-rank updates of linear layers ({', '.join(more) or 'embeddings'}): merge it "
                "into its base first (posttrain merge ADAPTER --out DIR) and name that folder"
            )
        found = {}
        for module, (a, b) in pairs.items():
            name = module.removeprefix(_PREFIX)
            alpha, rank = config["lora_alpha"], tensors[a].shape[0]
            if patterns := config.get("alpha_pattern"):
                alpha = patterns.get(get_pattern_key(patterns.keys(), name), alpha)
            scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
            found[f"{name}.weight"] = (tensors[a].double(), tensors[b].double() * scale)
        if unknown := sorted(set(found) - set(self.base.names)):
            raise ModelError(f"{self.folder} adapts {unknown[0]}, which {self.base.folder} has no tensor for")
        return found

    @property
    def names(self) -> Sequence[str]:
        return self.base.names

    @property
    def adapted(self) -> Sequence[str]:
        return list(self._factors)

    def update(self, name: str) -> torch.Tensor:
        """ΔW in float64."""
        a, b = self._factors[name]
        update = b @ a
        return update.T if self.config.get("fan_in_fan_out") else update

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        stored = self.base.tensor(name)
        whole = (
            (stored.double() + self.update(name)).to(stored.dtype if dtype is None else dtype)
            if name in self._factors
            else stored
        )
        return whole if dtype is None or not whole.is_floating_point() else whole.to(dtype)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(name)
