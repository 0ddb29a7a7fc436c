"""Models with different tokenizers: the tokenizer of the result, and for each model which of its rows is which token."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from posttrain.config.stages import ModelKeys
from posttrain.errors import ConfigError
from posttrain.models.export import save_tokenizer
from posttrain.models.load import load_tokenizer

IS_OF_TOKENS = re.compile(r"(?:embed_tokens|lm_head|wte|embed_in|embed_out|word_embeddings)\.(?:weight|bias)$")
"""Tensors with a row for each token."""


def tokenizer_at(folder: Path) -> Any:
    return load_tokenizer(ModelKeys(base_model=str(folder)))


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """`rows[model]` has, for each row of the result, the model's own row of that token, −1 where it lacks the token."""

    tokenizer: Any
    rows: Mapping[str, torch.Tensor]
    size: int

    def aligned(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Each model's rows in the order of the result. A token that a model lacks gets the mean over those that have it.

        Rows beyond the tokenizer (`pad_to_multiple_of`) get the mean of all. Source: mergekit's union.
        """
        has = {model: self.rows[model] >= 0 for model in tensors}
        placed = {model: tensor[self.rows[model].clamp(min=0)] for model, tensor in tensors.items()}
        ends = [1] * (next(iter(placed.values())).dim() - 1)
        masks = {model: mask.reshape(-1, *ends).to(placed[model].dtype) for model, mask in has.items()}
        count = sum(masks.values(), torch.zeros(()))
        total = sum((placed[model] * masks[model] for model in placed), torch.zeros(()))
        mean = total / count.clamp(min=1)
        done: dict[str, torch.Tensor] = {}
        for model, tensor in placed.items():
            rows = torch.where(masks[model].bool(), tensor, mean)
            more = rows.mean(0, keepdim=True).expand(self.size - len(rows), *rows.shape[1:])
            done[model] = torch.cat([rows, more]) if len(more) else rows
        return done


def vocabulary(
    source: str | None, multiple: int, folders: Mapping[str, Path], rows: Mapping[str, int], base: str
) -> Vocabulary | None:
    """None where no tokenizer_source is named and all models have one vocabulary. Raises: ConfigError where they do not."""
    tokenizers = {model: tokenizer_at(folder) for model, folder in folders.items()}
    known = {model: _within(tokenizer.get_vocab(), rows[model]) for model, tokenizer in tokenizers.items()}
    if source is None:
        other = next((model for model in folders if known[model] != known[base] or rows[model] != rows[base]), None)
        if other is not None:
            raise ConfigError(
                f"tokenizer_source: {other} has other tokens than {base} ({len(known[other])} and {len(known[base])}, with "
                f"{rows[other]} and {rows[base]} rows): expected union, base or a model, which says whose rows go together"
            )
        return None
    if source in ("base", "union"):
        tokenizer = tokenizers[base] if source == "base" else _union(base, tokenizers, known)
    elif source in tokenizers:
        tokenizer = tokenizers[source]
    else:
        raise ConfigError(f"tokenizer_source: got {source}; expected union, base, or one of the models")
    made = tokenizer.get_vocab()
    count = 1 + max(made.values())
    places = {model: torch.full((count,), -1) for model in folders}
    for model, own in known.items():
        for token, place in made.items():
            places[model][place] = own.get(token, -1)
    return Vocabulary(tokenizer, places, -(-count // multiple) * multiple)


def _within(vocab: Mapping[str, int], rows: int) -> dict[str, int]:
    return {token: number for token, number in vocab.items() if number < rows}


def _union(base: str, tokenizers: Mapping[str, Any], known: Mapping[str, Mapping[str, int]]) -> Any:
    """The base's tokenizer with the tokens of the others added, their special ones last."""
    with tempfile.TemporaryDirectory() as folder:  # a copy: the base's own stays as it is
        save_tokenizer(tokenizers[base], Path(folder))
        made = tokenizer_at(Path(folder))
    order: Sequence[str] = [base, *(model for model in tokenizers if model != base)]
    added = {model: tokenizers[model].added_tokens_decoder for model in order}
    special = {
        info.content: info for model in order for number, info in added[model].items() if info.content in known[model]
    }
    plain = dict.fromkeys(token for model in order for token in known[model] if token not in special)
    made.add_tokens([token for token in plain if token not in known[base]])
    made.add_tokens(list(special.values()))
    return made
