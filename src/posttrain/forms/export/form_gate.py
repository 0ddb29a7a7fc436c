"""The form gate: whether what was written is still the model it was made from. Each check is a function and says what it saw."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from posttrain.files import read_json
from posttrain.forms.export.target import Talk, TextForm
from posttrain.forms.merging.adapters import bits_of, trained_on
from posttrain.forms.merging.weights import AdaptedModel, StoredModel
from posttrain.models.continued import ADAPTER
from posttrain.models.low_rank import CONFIG
from posttrain.models.provenance import PROVENANCE

NUM_CONVERSATIONS = 1000
_GREEDY_TOKENS, _GREEDY_PROMPTS = 24, 16
_LINES = ("hello world", "What is 7 plus 3?", " leading", "größer 東京 🙂\n\n1234")


@dataclass(frozen=True, slots=True)
class FormCheck:
    """`seen` says what was found, in words."""

    name: str
    passed: bool
    seen: str


def check_template(source: TextForm, target: TextForm, talks: Sequence[Talk], note: str = "") -> FormCheck:
    """The ids of every conversation are those of the source. `note` says what the conversations are not."""
    name = "chat template"
    if source.has_template != target.has_template:
        return FormCheck(name, False, f"{'the source' if source.has_template else 'the form'} alone has one")
    refused = 0
    for number, messages in enumerate(talks if source.has_template else ()):
        expected, found = source.chat_ids(messages), target.chat_ids(messages)
        refused += expected is None
        if expected != found:
            return FormCheck(
                name, False, f"conversation {number} is {_where(expected, found)}: {list(messages)!r:.200}"
            )
    if source.has_template and refused == len(talks):
        return FormCheck(name, False, f"the source's template refuses all {refused} conversations")
    said = f"{len(talks)} conversations give the same ids{note}" if source.has_template else "neither has one"
    return FormCheck(name, True, said + (f" ({refused} are refused by both)" if refused else ""))


def check_text(source: TextForm, target: TextForm) -> FormCheck:
    """Plain text gives the same ids: with BOS where the source begins so, and once."""
    for line in _LINES:
        expected, found = source.text_ids(line), target.text_ids(line)
        if expected != found:
            return FormCheck("plain text", False, f"{line!r} is {_where(expected, found)}")
    return FormCheck("plain text", True, f"{len(_LINES)} texts give the same ids")


def _where(expected: Sequence[int] | None, found: Sequence[int] | None) -> str:
    if expected is None or found is None:
        return f"refused by the {'source' if expected is None else 'form'} alone"
    place = next(
        (n for n, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), min(len(expected), len(found))
    )
    return f"{list(expected[: place + 3])[-6:]} … in the source and {list(found[: place + 3])[-6:]} … in the form, from token {place}"


def check_special_ids(source: TextForm, target: TextForm) -> FormCheck:
    """BOS, EOS and all ids that end an answer."""
    ours, theirs = source.special, target.special
    wrong = [
        f"{key}: {getattr(ours, key)} in the source, {getattr(theirs, key)} in the form"
        for key in ("bos", "eos", "stops")
        if getattr(ours, key) != getattr(theirs, key)
    ]
    return FormCheck(
        "special ids", not wrong, "; ".join(wrong) or f"BOS {ours.bos}, EOS {ours.eos}, stops at {list(ours.stops)}"
    )


def check_tensors(
    source: StoredModel, tensors: Mapping[str, torch.Tensor], bound: Callable[[str, torch.Tensor], torch.Tensor]
) -> FormCheck:
    """Every dequantised entry lies within what the form rounds to."""
    if set(tensors) != set(source.names):
        other = sorted(set(tensors) ^ set(source.names))
        return FormCheck("tensors", False, f"{other[0]} and {len(other) - 1} more are in one of the two only")
    shares: dict[str, float] = {}
    for name in source.names:
        expected = source.tensor(name, torch.float32)
        if tensors[name].shape != expected.shape:
            return FormCheck(
                "tensors", False, f"{name}: shape {list(tensors[name].shape)}, expected {list(expected.shape)}"
            )
        shares[name] = float(((tensors[name].float() - expected).abs() / bound(name, expected).clamp(min=1e-12)).max())
    # What is no number is the worst of all, and compares with nothing.
    worst = max(shares, key=lambda name: math.inf if math.isnan(shares[name]) else shares[name])
    said = f"the worst entry is off by {shares[worst]:.2f} of what the form may ({worst})"
    return FormCheck("tensors", all(share <= 1 for share in shares.values()), said)


def check_numbers(expected: Mapping[str, Any], found: Mapping[str, Any]) -> FormCheck:
    """The numbers of the architecture, as the file's reader reads them."""
    wrong = [
        f"{key}: {found.get(key)}, expected {value}"
        for key, value in expected.items()
        if not (found.get(key) == value or (isinstance(value, float) and found.get(key) == torch.tensor(value).item()))
    ]
    return FormCheck(
        "numbers", not wrong, "; ".join(wrong) or f"{len(expected)} numbers of the architecture are the source's"
    )


def check_merge(source: Path, adapter: Path | None = None, base: Path | None = None) -> FormCheck:
    """A model made with an adapter of a base in 4 bits says which weights that was merged onto, and it is true.

    `adapter` and `base` are those that a version keeps; else the adapter beside the model, and the base that its stage names.
    """
    name, adapter = "base of a merge", adapter or source.resolve().parent / ADAPTER
    path = source / PROVENANCE
    said = read_json(path).get("merged_onto") if path.is_file() else None
    if not ((adapter / CONFIG).is_file() and bits_of(adapter)):
        lost = f"it says it was merged onto the {said} weights of its base; " if said else ""
        return FormCheck(name, True, f"{lost}no adapter of a base in 4 bits is kept with it")
    keys = trained_on(adapter)
    base = base or (None if keys is None else Path(keys.base_model))
    if base is None or not (base / "config.json").is_file():
        return FormCheck(
            name,
            said is not None,
            f"merged onto {said or 'it does not say what'}; its base is no longer there to compare",
        )
    adapted, stored = AdaptedModel(adapter, StoredModel(base)), StoredModel(source)
    off = [
        float((stored.tensor(weight, torch.float32) - adapted.tensor(weight, torch.float32)).abs().max())
        / max(float(adapted.tensor(weight, torch.float32).abs().max()), 1e-12)
        for weight in adapted.adapted
    ]
    onto_original = max(off) < 2**-7
    if onto_original and said != "original":
        return FormCheck(
            name, False, f"trained on a base in 4 bits and merged onto the original weights, and it says {said!r}; merge it with "
            "posttrain merge ADAPTER --onto dequantized, or --onto original, which says so",
        )  # fmt: skip
    if said is None or (said == "original") != onto_original:
        return FormCheck(
            name, False, f"trained on a base in 4 bits; it says it was merged onto {said!r}, and its weights do not"
        )
    return FormCheck(name, True, f"merged onto the {said} weights of a base in 4 bits, as it says")


@torch.no_grad()
def check_greedy(source: Any, target: Any, text: TextForm, talks: Sequence[Talk], least: float) -> FormCheck:
    """Along the source's greedy answers: on how many tokens the form's best token is the same."""
    prompts = [ids for ids in (text.chat_ids(messages) for messages in talks) if ids] if text.has_template else []
    prompts = (prompts or [ids for ids in map(text.text_ids, _LINES) if ids])[:_GREEDY_PROMPTS]
    same = total = 0
    # What its own says beside the ends (penalties, beams, suppressed tokens) would choose others than the likeliest.
    source.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=_GREEDY_TOKENS, eos_token_id=list(text.special.stops) or None, pad_token_id=0
    )
    for prompt in prompts:
        ids = torch.tensor([prompt])
        whole = source.generate(ids, attention_mask=torch.ones_like(ids))
        best = target(input_ids=whole, use_cache=False).logits[0, len(prompt) - 1 : -1].argmax(-1)
        same += int((best == whole[0, len(prompt) :]).sum())
        total += whole.shape[1] - len(prompt)
    share = same / max(total, 1)
    said = f"{same} of {total} tokens of {len(prompts)} greedy answers are the same ({share:.1%}; at least {least:.0%})"
    return FormCheck("greedy answers", total > 0 and share >= least, said)
