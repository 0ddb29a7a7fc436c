"""The keys that say which parameters are stepped, and by which optimizer."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Literal

from pydantic import field_validator, model_validator

from posttrain.config.knob import Keys, knob
from posttrain.errors import ModelError

# fmt: off

TAKE_SHARES = ("adamw", "sgd")
"""Values of `optim` that step parameters of which each process holds a share. Kernels of bitsandbytes do not, and others look at whole matrices."""


def only_layers(lora_target: str | list[str]) -> bool:
    """Whether an adapter there leaves embedding and head alone, as far as names say: a pattern may reach them."""
    names = [lora_target] if isinstance(lora_target, str) else lora_target
    return all(name == "all-linear" or re.fullmatch(r"\w+_proj", name) for name in names)


class OptimizerKeys(Keys):
    """Optimizer and what it steps."""

    optim: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lion", "lion_8bit", "paged_lion_8bit", "adafactor", "muon", "sgd"] = knob("adamw", "Optimizer: states in float32 or 8 bits; `muon` takes the matrices inside the layers, and AdamW the rest; `paged` lets a GPU put them into the machine's memory while others need the room (on a CPU it is the same as without).", also="optimizer (Axolotl)")
    muon_adjust_lr: Literal["match_rms_adamw", "spectral_norm"] = knob("match_rms_adamw", "How large a step of `muon` is: as AdamW's, 0.2 · sqrt(max(rows, columns)) (arXiv 2502.16982 eq. 4), or sqrt(rows / columns), which keeps the change of a layer's output the same whatever its width (arXiv 2310.17813).")
    adam_beta1: float = knob(0.9, "First beta of AdamW or Lion.", ge=0, lt=1)
    adam_beta2: float = knob(0.999, "Second beta of AdamW or Lion.", ge=0, lt=1)
    adam_epsilon: float = knob(1e-8, "AdamW's epsilon.", gt=0)
    embedding_lr_scale: float = knob(1.0, "Learning rate of embedding and head over that of all else, where they are trained; not 1, and they have no weight decay.", gt=0, also="embedding_lr (Axolotl)", example=0.1)
    weight_decay: float = knob(0.0, "Decoupled weight decay, on matrices only.", ge=0)
    max_grad_norm: float = knob(1.0, "Clip the global gradient norm; 0 turns it off.", ge=0, also="clip_grad_norm (torchtune)")
    unfrozen_parameters: list[str] = knob([], "Train only the parameters whose names match one of these regular expressions from their start; empty trains all. An adapter is trained whole.", example=["model.layers.2[0-9].", "lm_head.weight"])
    unfrozen_layers: int = knob(0, "Train only so many of the last layers, or below 0 of the first, beside what unfrozen_parameters names; 0 chooses no layers.", also="freeze_trainable_layers (LLaMA-Factory)", example=8)
    unfrozen_layers_spread: bool = knob(False, "Of unfrozen_layers: spread them evenly, the last of each block, where layers were put in between (LLaMA Pro, arXiv 2401.02415).", also="use_llama_pro (LLaMA-Factory)")
    unfrozen_layer_modules: list[str] = knob([], "Of unfrozen_layers: train only these modules of a layer; empty trains all.", also="freeze_trainable_modules (LLaMA-Factory)", example=["mlp"])

    @property
    def freezes(self) -> bool:
        """Whether a part of a whole model stays as it is."""
        return bool(self.unfrozen_parameters or self.unfrozen_layers)

    @model_validator(mode="after")
    def _spreads_a_number_of_layers(self) -> OptimizerKeys:
        if self.unfrozen_layers_spread and self.unfrozen_layers < 1:
            raise ValueError(f"unfrozen_layers_spread: true with unfrozen_layers: {self.unfrozen_layers}; set how many layers are trained")
        return self

    @field_validator("unfrozen_parameters")
    @classmethod
    def _patterns_compile(cls, patterns: list[str]) -> list[str]:
        check_patterns(patterns)
        return patterns


def check_patterns(patterns: Iterable[str]) -> None:
    """Raises: ValueError for one that is no regular expression."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern} is no regular expression: {error}; expected names of modules or a pattern of their paths") from error


def unfrozen_layers(keys: OptimizerKeys, num_layers: int) -> range:
    """The numbers of the layers that are trained. Raises: ModelError where the model has too few, or they cannot be spread evenly."""
    count = abs(keys.unfrozen_layers)
    if count > num_layers:
        raise ModelError(
            f"unfrozen_layers: {keys.unfrozen_layers}: the model has {num_layers} layers; set at most {num_layers}"
        )
    if keys.unfrozen_layers_spread:
        if num_layers % count:
            fitting = ", ".join(str(number) for number in range(1, num_layers + 1) if num_layers % number == 0)
            raise ModelError(
                f"unfrozen_layers: {count} with unfrozen_layers_spread: true: {num_layers} layers are no multiple of it; set one of {fitting}"
            )
        return range(num_layers // count - 1, num_layers, num_layers // count)
    return range(num_layers - count, num_layers) if keys.unfrozen_layers > 0 else range(count)


def step_interval(steps: int | float, total_steps: int) -> int:
    """`eval_steps` or `save_steps` in steps of a run of so many; 0 is never. A share is rounded up, as in transformers."""
    return math.ceil(steps * total_steps) if 0 < steps < 1 else int(steps)
