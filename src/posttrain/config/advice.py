"""Settled rules about rates, adapters and batches, each with its source: said before a run, never refused.

A rule looks at the keys and at sizes; where it needs a size that is not known, it is silent. `advice_off` in the YAML silences it by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from posttrain.config.kinds import stage_kind
from posttrain.config.preference import DPOKeys
from posttrain.config.stages import SFTKeys, TrainKeys

_ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "query_key_value", "c_attn", "out_proj", "Wqkv", "qkv", "dense"})  # fmt: skip
_LARGE = 300_000_000
"""Parameters from which on published rates are of such models; far smaller ones take higher rates."""
_LORA_TIMES, _LORA_LEAST, _LORA_MOST_ROWS = 10, 3, 256
_BITS_PER_PARAM, _BYTES_PER_TOKEN, _BITS_PER_TOKEN = 2.0, 4.0, 1.0
_BETAS = {"sigmoid": (0.01, 0.5), "robust": (0.01, 0.5), "sigmoid_norm": (1.0, 15.0)}
_DPO_MOST_FULL = 1e-5
_WITHOUT_REGRET = "Schulman et al., LoRA Without Regret, 2025"


@dataclass(frozen=True, slots=True)
class Advised:
    """What is looked at: a stage's keys, and sizes where they are known."""

    kind: str
    keys: TrainKeys
    num_params: int | None = None
    trained_params: int | None = None
    data_bytes: int | None = None

    @property
    def has_adapter(self) -> bool:
        return self.keys.adapter != "none"

    @property
    def is_large(self) -> bool:
        return self.num_params is not None and self.num_params >= _LARGE


@dataclass(frozen=True, slots=True)
class AdviceRule:
    """`check` gives what was seen and what to do, or nothing."""

    name: str
    check: Callable[[Advised], str | None]
    source: str


@dataclass(frozen=True, slots=True)
class Advice:
    name: str
    text: str
    source: str

    def line(self) -> str:
        return f"{self.name}: {self.text} ({self.source}); advice_off: [{self.name}] silences it"


def _lora_rate(given: Advised) -> str | None:
    full = float(type(given.keys).model_fields["learning_rate"].default)
    if not given.has_adapter or not given.is_large or given.keys.learning_rate >= _LORA_LEAST * full:
        return None
    return f"learning_rate {given.keys.learning_rate:g} is one for all weights; an adapter learns best at about {_LORA_TIMES} times that: {_LORA_TIMES * full:g} or so"


def _lora_layers(given: Advised) -> str | None:
    target = given.keys.lora_target
    if not given.has_adapter or isinstance(target, str) or not {name.split(".")[-1] for name in target} <= _ATTENTION:
        return None
    return f"lora_target {', '.join(target)} leaves out the MLP's layers, where most of what is learned goes; set lora_target: all-linear"


def _lora_rank(given: Advised) -> str | None:
    if not given.has_adapter or not isinstance(given.keys, SFTKeys) or not given.trained_params or not given.data_bytes:
        return None
    bits = given.data_bytes / _BYTES_PER_TOKEN * _BITS_PER_TOKEN
    room = _BITS_PER_PARAM * given.trained_params
    if bits <= room:
        return None
    return f"lora_r {given.keys.lora_r}: the adapter's {given.trained_params / 1e6:.1f}M parameters hold about {room / 1e6:.0f} Mbit, the data about {bits / 1e6:.0f}; raise lora_r to {_rank(given, bits / room)}, or train all weights"


def _rank(given: Advised, times: float) -> int:
    """The next power of two that holds so many times as much."""
    rank = given.keys.lora_r
    while rank < given.keys.lora_r * times:
        rank *= 2
    return rank


def _lora_batch(given: Advised) -> str | None:
    keys = given.keys
    rows = keys.per_device_train_batch_size * keys.gradient_accumulation_steps * (keys.num_processes or 1)
    if not given.has_adapter or stage_kind(given.kind).samples or rows <= _LORA_MOST_ROWS:
        return None
    return f"{rows} rows a step: an adapter loses more than all weights do at large batches, whatever its rank; take fewer, {_LORA_MOST_ROWS} or less"


def _dpo_beta(given: Advised) -> str | None:
    if not isinstance(given.keys, DPOKeys):
        return None
    for loss in given.keys.losses:
        low, high = _BETAS.get(loss, (0.0, math.inf))
        if not low <= given.keys.beta <= high:
            return f"beta {given.keys.beta:g} is outside of {low:g} to {high:g}, where {loss} was found to work; below it the policy drifts from the reference, above it nothing moves"
    return None


def _dpo_rate(given: Advised) -> str | None:
    most = _DPO_MOST_FULL * (_LORA_TIMES if given.has_adapter else 1)
    if not isinstance(given.keys, DPOKeys) or not given.is_large or given.keys.learning_rate <= most:
        return None
    usual = "5e-6 to 5e-5 with an adapter" if given.has_adapter else "5e-7 to 5e-6"
    return f"learning_rate {given.keys.learning_rate:g} is above {most:g}: preferences want a far lower rate than SFT, {usual}, or both answers lose probability"


ADVICE: tuple[AdviceRule, ...] = (
    AdviceRule("lora_rate", _lora_rate, _WITHOUT_REGRET),
    AdviceRule("lora_layers", _lora_layers, f"{_WITHOUT_REGRET}; QLoRA, arXiv 2305.14314 §4"),
    AdviceRule(
        "lora_rank", _lora_rank, f"{_WITHOUT_REGRET}: about 1 bit a token; arXiv 2404.05405: about 2 bits a parameter"
    ),
    AdviceRule("lora_batch", _lora_batch, f"{_WITHOUT_REGRET}; the line at {_LORA_MOST_ROWS} is ours"),
    AdviceRule(
        "dpo_beta", _dpo_beta, "DPO, arXiv 2305.18290 app. B: 0.1 to 0.5; Tülu 3, arXiv 2411.15124: 5 with sigmoid_norm"
    ),
    AdviceRule(
        "dpo_rate", _dpo_rate, "DPO, arXiv 2305.18290 app. B: 1e-6; Zephyr, arXiv 2310.16944 and Tülu 3, arXiv 2411.15124: 5e-7"
    ),
)  # fmt: skip


def advise(given: Advised) -> Iterator[Advice]:
    """What rings for this stage, without the rules that its keys silence."""
    for rule in ADVICE:
        if rule.name not in given.keys.advice_off and (text := rule.check(given)):
            yield Advice(rule.name, text, rule.source)
