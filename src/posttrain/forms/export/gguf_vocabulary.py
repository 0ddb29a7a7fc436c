"""A tokenizer as GGUF says it: tokens, kinds, merges or scores, special ids; and a tokenizer made from that alone again.

The second is what the form gate asks: it knows nothing of the first but what the file says, as llama.cpp does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

from posttrain.errors import ModelError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""gguf's TokenType."""
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS: Mapping[str, str] = {"llama-bpe": _WORDS + "{1,3}" + _REST, "qwen2": _WORDS + _REST}
"""llama.cpp's name → the pattern by which text is cut before merging; `gpt-2` is the byte-level pre-tokenizer's own."""
_WHOLE_WORDS = frozenset({"llama-bpe"})
"""Those whose words are taken whole where they are tokens (`ignore_merges`)."""


@dataclass(frozen=True, slots=True)
class GgufVocabulary:
    """`scores` for a SentencePiece vocabulary (`model` llama), `merges` for a byte-level one (`model` gpt2)."""

    model: str
    pre: str
    tokens: Sequence[str]
    kinds: Sequence[int]
    merges: Sequence[str]
    scores: Sequence[float]
    space_prefix: bool


def vocabulary_of(tokenizer: Any, rows: int) -> GgufVocabulary:
    """Raises: ModelError for a tokenizer that llama.cpp has no name for."""
    said = json.loads(tokenizer.backend_tokenizer.to_str())
    if said["model"]["type"] != "BPE":
        raise ModelError(f"gguf: a tokenizer of type {said['model']['type']} is not written; expected BPE")
    tokens, kinds = _tokens(tokenizer, said, rows)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in said["model"]["merges"]]
    if said["model"].get("byte_fallback"):
        return GgufVocabulary("llama", "default", tokens, kinds, (), _scores(tokens, merges), _prefixes(said))
    return GgufVocabulary("gpt2", _pre(said), tokens, kinds, merges, (), False)


def _tokens(tokenizer: Any, said: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    vocab = tokenizer.get_vocab()
    beyond = sorted(token for token, number in vocab.items() if number >= rows)
    if beyond:
        raise ModelError(
            f"gguf: the tokenizer has tokens without a row of the embedding ({beyond[0]} …); expected a row for each"
        )
    tokens = [f"[PAD{number}]" for number in range(rows)]
    kinds = [UNUSED] * rows
    added = {int(token["id"]): token for token in said["added_tokens"]}
    special = set(tokenizer.all_special_ids)
    byte_fallback = bool(said["model"].get("byte_fallback"))
    for token, number in vocab.items():
        tokens[number] = token
        if number in added:
            kinds[number] = CONTROL if added[number]["special"] or number in special else USER_DEFINED
        elif byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            kinds[number] = BYTE
        else:
            kinds[number] = NORMAL
    if byte_fallback and said["model"].get("unk_token") in vocab:
        kinds[vocab[said["model"]["unk_token"]]] = UNKNOWN
    return tokens, kinds


def _scores(tokens: Sequence[str], merges: Sequence[str]) -> list[float]:
    """Earlier merges are worth more: SentencePiece merges by score as BPE does by rank."""
    made: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        made.setdefault(merge.replace(" ", ""), rank)
    return [-float(made.get(token, 0 if len(token) == 1 else len(merges))) for token in tokens]


def _prefixes(said: Mapping[str, Any]) -> bool:
    """Whether text gets a space before it. Raises: ModelError for a normalizer that SentencePiece in GGUF has no word for."""
    parts = _parts(said["normalizer"], "normalizers")
    kinds = [part["type"] for part in parts]
    cut = [
        part for part in _parts(said["pre_tokenizer"], "pretokenizers") if part["type"] not in ("Metaspace", "Split")
    ]
    if set(kinds) - {"Prepend", "Replace"} or cut:
        raise ModelError(f"gguf: a tokenizer with the normalizers {', '.join(kinds)} is not written")
    spaces = [part for part in _parts(said["pre_tokenizer"], "pretokenizers") if part["type"] == "Metaspace"]
    return "Prepend" in kinds or any(part.get("prepend_scheme", "always") != "never" for part in spaces)


def _parts(part: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    if part is None:
        return []
    return list(part[name]) if part["type"] == "Sequence" else [part]


def _pre(said: Mapping[str, Any]) -> str:
    """llama.cpp's name for how text is cut."""
    normal = [part["type"] for part in _parts(said["normalizer"], "normalizers")]
    parts = _parts(said["pre_tokenizer"], "pretokenizers")
    cuts = [part["pattern"].get("Regex") for part in parts if part["type"] == "Split"]
    bytes_ = [part for part in parts if part["type"] == "ByteLevel"]
    other = [part["type"] for part in parts if part["type"] not in ("Split", "ByteLevel")]
    if len(bytes_) == 1 and not other and not bytes_[0]["add_prefix_space"] and set(normal) <= {"NFC"}:
        if not cuts and bytes_[0].get("use_regex", True) and not normal:
            return "gpt-2"
        name = next((name for name, pattern in SPLITS.items() if cuts == [pattern]), None)
        whole = bool(said["model"].get("ignore_merges"))
        if name is not None and not bytes_[0].get("use_regex", True) and whole == (name in _WHOLE_WORDS):
            return name
    raise ModelError(
        "gguf: the way this tokenizer cuts text is none that is written "
        f"(known: gpt-2, {', '.join(SPLITS)}); llama.cpp would cut it otherwise"
    )


def rebuilt(vocabulary: GgufVocabulary) -> Tokenizer:
    """A tokenizer of what the file says."""
    vocab = {token: number for number, token in enumerate(vocabulary.tokens)}
    if vocabulary.model == "gpt2":
        merges = [(left, right) for left, right in (merge.split(" ") for merge in vocabulary.merges)]
        core = Tokenizer(BPE(vocab, merges, ignore_merges=vocabulary.pre in _WHOLE_WORDS))
        own = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=vocabulary.pre == "gpt-2")
        cut = SPLITS.get(vocabulary.pre)
        core.pre_tokenizer = (
            own if cut is None else pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(cut), "isolated"), own])
        )
    else:
        unknown = next(
            (t for t, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True) if kind == UNKNOWN), None
        )
        merges = _merges(vocabulary)
        core = Tokenizer(BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=BYTE in vocabulary.kinds))
        spaces = normalizers.Replace(" ", "▁")
        core.normalizer = (
            normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if vocabulary.space_prefix else spaces
        )
    for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True):
        if kind in (CONTROL, USER_DEFINED):
            core.add_tokens([AddedToken(token, normalized=False, special=kind == CONTROL)])
    return core


def _merges(vocabulary: GgufVocabulary) -> list[tuple[str, str]]:
    """Every way to make a token of two, the best score first."""
    worth = {
        token: score
        for token, score, kind in zip(vocabulary.tokens, vocabulary.scores, vocabulary.kinds, strict=True)
        if kind == NORMAL
    }
    found = [
        (-score, len(token[:cut]), token[:cut], token[cut:])
        for token, score in worth.items()
        for cut in range(1, len(token))
        if token[:cut] in worth and token[cut:] in worth
    ]
    return [(left, right) for _, _, left, right in sorted(found)]
