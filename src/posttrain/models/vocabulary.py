"""Tokens that the embedding has no row for: named before training, or given rows (`added_tokens`)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from posttrain.config.stages import ModelKeys
from posttrain.errors import DataError, ModelError
from posttrain.files import digest_json
from posttrain.types import TokenSeq

log = logging.getLogger(__name__)


def vocabulary_digest(tokenizer: Any) -> str:
    """Digest of which id each token has."""
    return digest_json(sorted(tokenizer.get_vocab().items(), key=lambda entry: (entry[1], entry[0])))


def add_tokens(tokenizer: Any, tokens: Iterable[str]) -> None:
    """Make each of `tokens` one token wherever it stands; those that the tokenizer has stay as they are."""
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens if token not in known])


def name_tokens(tokenizer: Any, names: Mapping[Any, str]) -> None:
    """Set the tokenizer's `bos_token`, `eos_token` and `unk_token`. Raises: ModelError for text that is no token of it."""
    known = tokenizer.get_vocab()
    for name, token in names.items():
        if token not in known:
            raise ModelError(
                f"special_tokens.{name}: the tokenizer has no token {token!r}; name one that it has, or add it with "
                f"added_tokens: [{token!r}]"
            )
        setattr(tokenizer, name, token)


def check_ids(keys: ModelKeys, tokenizer: Any, rows: int, sequences: Iterable[TokenSeq]) -> None:
    """Raises: DataError naming the tokens of the data that an embedding of so many `rows` lacks, and where one stands."""
    if keys.added_tokens:
        return  # every token of the tokenizer gets a row
    beyond: dict[int, TokenSeq] = {}
    for sequence in sequences:
        if max(sequence.ids, default=0) >= rows:
            beyond |= {token: beyond.get(token, sequence) for token in sequence.ids if token >= rows}
    if beyond:
        names = [str(tokenizer.convert_ids_to_tokens(token)) for token in sorted(beyond)]
        raise DataError(
            f"{beyond[min(beyond)].origin}: the tokenizer gives {names[0]!r} the id {min(beyond)}, and the embedding has only "
            f"{rows} rows; set added_tokens: {names}, which gives it more, or take the tokenizer that belongs to the model"
        )


def check_fits(keys: ModelKeys, tokenizer: Any, rows: int) -> None:
    """Raises: ModelError for a tokenizer of another model's with tokens that an embedding of so many `rows` lacks."""
    beyond = sorted((token for token in tokenizer.get_vocab().items() if token[1] >= rows), key=lambda token: token[1])
    if beyond and not keys.added_tokens:
        (first, number), last = beyond[0], beyond[-1][1]
        raise ModelError(
            f"tokenizer_name_or_path: {keys.tokenizer_name_or_path} has ids up to {last}, and the embedding of {keys.base_model} has {rows} rows; set "
            f"added_tokens: [{first!r}], which gives id {number} and all after it a row, or name the tokenizer that belongs to the model"
        )


def rows_wanted(tokenizer: PreTrainedTokenizerBase, keys: ModelKeys) -> int:
    """Rows that the embedding has to have at least; 0 without `added_tokens`."""
    return max(tokenizer.get_vocab().values()) + 1 if keys.added_tokens else 0


def grow(model: PreTrainedModel, tokenizer: Any, keys: ModelKeys) -> bool:
    """With `added_tokens`, give every token a row: the mean of the rows there are. Returns whether any was added."""
    embedding: Any = model.get_input_embeddings()
    present = embedding.weight.shape[0]
    rows = rows_wanted(tokenizer, keys)
    if rows <= present:
        return False
    model.resize_token_embeddings(rows, mean_resizing=False)
    ends: list[Any] = [e for e in (model.get_input_embeddings(), model.get_output_embeddings()) if e is not None]
    with torch.no_grad():
        for tensor in (t for end in ends for t in (end.weight, getattr(end, "bias", None)) if t is not None):
            tensor[present:] = tensor[:present].float().mean(0).to(tensor.dtype)
    log.info("embedding: %d rows added to %d, each the mean of those", rows - present, present)
    return True
