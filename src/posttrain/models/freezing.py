"""Which parameters of a model are trained: those that patterns name, those of chosen layers, and those of embedding and head."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from posttrain.config.optimizing import OptimizerKeys, unfrozen_layers
from posttrain.errors import ConfigError, ModelError


def freeze(model: PreTrainedModel, keys: OptimizerKeys) -> None:
    """Train the parameters that the keys leave unfrozen, and no other. Raises: ModelError for a key that names none."""
    if not keys.freezes:
        return
    names = [name for name, _ in model.named_parameters()]
    trained = _matching(names, keys.unfrozen_parameters)
    if keys.unfrozen_layers:
        trained |= _in_layers(model, names, keys)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def trained_ends(model: Any) -> list[nn.Parameter]:
    """What is trained of embedding and head, beside an adapter too. Raises: ConfigError where that is nothing."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    found = {id(p): p for module in modules if module is not None for p in module.parameters() if p.requires_grad}
    if not found:
        raise ConfigError(
            "embedding_lr_scale: neither embedding nor head is trained here; set it to 1, or train them (lora_modules_to_save, unfrozen_parameters)"
        )
    return list(found.values())


def _matching(names: Sequence[str], patterns: Collection[str]) -> set[str]:
    for pattern in patterns:
        if not any(re.match(pattern, name) for name in names):
            raise ModelError(
                f"unfrozen_parameters: {pattern} matches no parameter of the model; expected a regular expression for names "
                f"such as {names[0]} or {names[len(names) // 2]}"
            )
    return {name for name in names if any(re.match(pattern, name) for pattern in patterns)}


def _in_layers(model: PreTrainedModel, names: Sequence[str], keys: OptimizerKeys) -> set[str]:
    """The parameters of the layers that are trained, of all their modules or of those that are named."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [
        name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not lists:
        raise ModelError(
            f"unfrozen_layers: {type(model).__name__} has no list of its {count} layers; set unfrozen_parameters"
        )
    chosen = unfrozen_layers(keys, count)
    inside = {name: name.removeprefix(f"{lists[0]}.").split(".") for name in names if name.startswith(f"{lists[0]}.")}
    known = {parts[1] for parts in inside.values()}
    for module in keys.unfrozen_layer_modules:
        if module not in known:
            raise ModelError(
                f"unfrozen_layer_modules: {module} is no module of a layer; they have {', '.join(sorted(known))}"
            )
    modules = set(keys.unfrozen_layer_modules) or known
    return {name for name, parts in inside.items() if int(parts[0]) in chosen and parts[1] in modules}
