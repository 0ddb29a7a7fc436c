"""A forward in which a token's log-probs are a function of its own sequence alone, to the last bit.

A kernel may add up in another order when its shapes change, so every call has one shape: tiles of exactly so many tokens,
padded where there are fewer, run by the model's own modules on one thread (elementwise kernels round the ends of a thread's
share otherwise). A token attends to its own past in blocks of one size, in order of position; what is hidden adds exact
zeros. Trainer and engine call the same `TiledForward`. It computes values; gradients are the ordinary forward's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from posttrain.errors import ModelError
from posttrain.models.attention import AttendOptions
from posttrain.models.batch import Batch, pack
from posttrain.models.lengths import length_rule
from posttrain.models.tree_attention import Window
from posttrain.objectives.logprobs import TokenScores
from posttrain.types import TokenSeq

BLOCK = 64
"""Keys that are attended to at once."""
TILE_ROWS: Mapping[str, int] = {
    # A multiple of twice the widest vector of a CPU, so that no kernel treats a tile's last values apart.
    **dict.fromkeys(("gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3"), 32),
    # How many tokens an expert gets depends on the others in the call, so there are none.
    "qwen3_moe": 1,
}
"""Model types that this is tested for, and the tokens of a tile."""
_MULTIPLE = 4
"""Float32 numbers of 16 bytes. Kernels for small products round otherwise where a row does not begin at such an address."""
_PROBE = (BLOCK + 9, 5, 40)
"""Lengths that fill a tile, share one with others, and need a second block."""
_TESTED_ON, _TRIED_ON = "cpu", "cuda"
FILLER = 0
"""The place in a `TokenStore` of the rows that only fill a tile."""


def refuse_unless_exact(model: Any, ragged: bool) -> None:
    """Raises: ModelError saying why this model cannot be run with `rollout.exact: true`."""
    refuse_inexact_layers(model, ragged)
    device = model.device.type
    if device not in (_TESTED_ON, _TRIED_ON):
        raise _inexact(f"the model is on {device}, and it is for CPUs and CUDA's devices")
    if device != _TESTED_ON and not keeps_its_bits(model):
        raise _inexact(f"on this {device} device the log-probs of a token depend on what is computed with it")


def refuse_inexact_layers(model: Any, ragged: bool = True) -> None:
    """What needs no weight to be known. Raises: ModelError."""
    kind = model.config.get_text_config().model_type
    if kind not in TILE_ROWS or not ragged:
        raise _inexact(f"{kind} is not among the architectures it is tested for ({', '.join(sorted(TILE_ROWS))})")
    if length_rule(model.config) is not None:
        raise _inexact(f"the rotary embedding of this {kind} changes with the length of a sequence")
    if uneven := _uneven_inputs(model):
        name, width = uneven
        raise _inexact(
            f"{name} has {width} inputs, no multiple of {_MULTIPLE}, so that its rounding depends on a row's place in memory "
            f"(of a LoRA adapter that is lora_r)"
        )


def _inexact(reason: str) -> ModelError:
    return ModelError(f"rollout.exact: true: {reason}; set rollout.exact: false")


def keeps_its_bits(model: Any) -> bool:
    """Whether a token's log-probs are the same alone, beside others and in another place, as far as a probe can say.

    A card's library chooses among many kernels, so there it is asked of the card itself.
    """
    draw = torch.Generator().manual_seed(0)
    size, device = model.config.get_text_config().vocab_size, model.device
    ids = [torch.randint(size, (length,), generator=draw).tolist() for length in _PROBE]
    rows = [TokenSeq(tuple(row), (False, *(True,) * (len(row) - 1))) for row in ids]

    def log_probs(order: list[int]) -> dict[int, torch.Tensor]:
        batch = pack([[rows[number]] for number in order]).to(device)
        whole_NV = torch.cat([part for _, part in logp_rows(model, batch, 1.0)])
        return dict(zip(order, whole_NV.split([_PROBE[number] - 1 for number in order]), strict=True))

    together, turned = log_probs([0, 1, 2]), log_probs([2, 1, 0])
    return all(
        torch.equal(alone, together[number]) and torch.equal(alone, turned[number])
        for number in range(len(_PROBE))
        for alone in log_probs([number]).values()
    )


def _uneven_inputs(model: Any) -> tuple[str, int] | None:
    """A linear whose rows of inputs do not all begin alike in memory, where a tile has several."""
    if TILE_ROWS[model.config.get_text_config().model_type] == 1:
        return None
    linears = ((name, m.in_features) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear))
    return next(((name, width) for name, width in linears if width % _MULTIPLE), None)


class TokenStore:
    """Keys and values of tokens by place, and the tile that is being computed. A `KVStore`."""

    def __init__(self, places: int) -> None:
        self._places = places
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._hidden: dict[Window | None, torch.Tensor] = {}

    def make_room(self, places: int) -> None:
        if places <= self._places:
            return
        for tensors in (self._keys, self._values):
            for layer, old in enumerate(tensors):
                tensors[layer] = torch.cat([old, old.new_zeros(old.shape[0], places - self._places, old.shape[2])], 1)
        self._places = places

    def begin(self, positions_R: torch.Tensor, places_R: torch.Tensor, past_RK: torch.Tensor) -> None:
        """The tile to come: each token's position, where it is kept, and where its past is, itself included."""
        self._positions_R, self._places_R, self._past_RK = positions_R, places_R, past_RK
        self._hidden.clear()

    def keep(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        raise AssertionError("a tile is decoded, never prefilled")

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: AttendOptions
    ) -> torch.Tensor:
        """Shapes: query [1, Hq, R, D], key and value [1, Hkv, R, D] → [1, Hq, R, D]."""
        out_width = value.shape[-1]
        query, key, value = (_aligned(tensor) for tensor in (query, key, value))
        keys, values = self._write(layer, key, value)
        num_kv, rows, width = key.shape[1:]
        batch = num_kv * rows
        # The query heads of one kv head act as so many query positions: [Hkv × R, G, D].
        query = query[0].view(num_kv, -1, rows, width).transpose(1, 2).reshape(batch, -1, width)
        hidden = self._hidden_from(options.window)[:, None, :].repeat(num_kv, 1, 1)
        blocks = self._past_RK.split(BLOCK, 1)
        scores: list[torch.Tensor] = []
        for place_RB, hidden_B in zip(blocks, hidden.split(BLOCK, 2), strict=True):
            score = query @ keys[:, place_RB].view(batch, BLOCK, width).transpose(1, 2)
            score = score.float() * options.scale
            if options.softcap is not None:
                score = torch.tanh(score / options.softcap) * options.softcap
            scores.append(score.masked_fill(hidden_B, -torch.inf))
        peak = torch.stack([score.amax(-1) for score in scores]).amax(0).unsqueeze(-1)
        total, out = torch.zeros_like(peak), peak.new_zeros(batch, query.shape[1], values.shape[-1])
        for place_RB, score in zip(blocks, scores, strict=True):
            weight = torch.exp(score - peak)
            total += weight.sum(-1, keepdim=True)
            out += weight.to(values.dtype) @ values[:, place_RB].view(batch, BLOCK, -1)
        out = (out / total).to(value.dtype)
        out = out.view(num_kv, rows, -1, out.shape[-1])[..., :out_width]
        return out.transpose(1, 2).reshape(1, -1, rows, out_width)

    def _write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if layer == len(self._keys):
            for tensors, new in ((self._keys, key), (self._values, value)):
                tensors.append(new.new_zeros(new.shape[1], self._places, new.shape[3]))
        keys, values = self._keys[layer], self._values[layer]
        keys[:, self._places_R], values[:, self._places_R] = key[0], value[0]
        return keys, values

    def _hidden_from(self, window: Window | None) -> torch.Tensor:
        """Which of its past each row does not see. Shape: [R, K]."""
        if window not in self._hidden:
            age_RK = self._positions_R[:, None] - torch.arange(self._past_RK.shape[1], device=self._past_RK.device)
            hidden_RK = age_RK < 0
            if window is not None:
                hidden_RK |= age_RK >= window.reach(self._positions_R)[:, None]
            self._hidden[window] = hidden_RK
        return self._hidden[window]


def _aligned(heads: torch.Tensor) -> torch.Tensor:
    """Heads whose width is a whole number of cache lines, zeros behind: a product's kernel depends on where in memory it begins."""
    return torch.nn.functional.pad(heads, (0, -heads.shape[-1] % 32))


class TiledForward:
    """Log-probs over the whole vocabulary, a tile at a time, of a model in eval mode; it holds the tokens' keys and values."""

    def __init__(self, model: Any, temperature: float, places: int = 1) -> None:
        self.rows = TILE_ROWS[model.config.get_text_config().model_type]
        self.store = TokenStore(places)
        self._model, self._temperature = model, temperature

    @torch.no_grad()
    def __call__(
        self, ids_N: torch.Tensor, positions_N: torch.Tensor, places_N: torch.Tensor, past_NK: torch.Tensor
    ) -> torch.Tensor:
        """At most `rows` tokens, each with the places of its past in order of position, itself included → [N, V]."""
        count, longest = len(ids_N), int(positions_N.max()) + 1
        past_RK = places_N.new_full((self.rows, -(-longest // BLOCK) * BLOCK), FILLER)
        past_RK[:count, :longest] = past_NK[:, :longest]
        ids_R, positions_R, places_R = (
            torch.nn.functional.pad(tensor, (0, self.rows - count), value=FILLER)
            for tensor in (ids_N, positions_N, places_N)
        )
        self.store.begin(positions_R, places_R, past_RK)
        with _one_thread():
            output = self._model(
                input_ids=ids_R[None], position_ids=positions_R[None], use_cache=False, kv_store=self.store
            )
            return torch.log_softmax(output.logits[0].float() / self._temperature, -1)[:count]


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def logp_rows(model: Any, batch: Batch, temperature: float) -> Iterator[tuple[int, torch.Tensor]]:
    """The log-probs that follow each packed token: the number of the first one of a tile, and [N', V]."""
    num_tokens = batch.input_ids_N.numel()
    forward = TiledForward(model, temperature, places=1 + num_tokens)
    segment_N, paths = _paths(batch)
    # A segment is packed behind what it continues, so a tile's past is in earlier tiles or in itself.
    for first in range(0, num_tokens, forward.rows):
        tile = slice(first, first + forward.rows)
        positions_N = batch.position_ids_N[tile]
        place_K = torch.arange(int(positions_N.max()) + 1, device=positions_N.device)[None]
        low, high = int(segment_N[tile][0]), int(segment_N[tile][-1])
        path_SK = pad_sequence(paths[low : high + 1], batch_first=True)[:, : place_K.numel()]
        past_NK = 1 + path_SK[segment_N[tile] - low]
        past_NK = past_NK.masked_fill(place_K > positions_N[:, None], FILLER)
        places_N = 1 + torch.arange(first, first + len(positions_N), device=positions_N.device)
        yield first, forward(batch.input_ids_N[tile], positions_N, places_N, past_NK)


def _paths(batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Of each packed token its segment, by number [N]; of each segment where its sequences' tokens up to its end are packed."""
    device = batch.input_ids_N.device
    paths: list[torch.Tensor] = []
    lengths: list[int] = []
    for tree in batch.layout.trees:
        spans = tree.spans
        for number, (begin, end) in enumerate(spans):
            paths.append(torch.cat([torch.arange(*spans[part], device=device) for part in tree.path(number)]))
            lengths.append(end - begin)
    segment_N = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.long))
    return segment_N.to(device), paths


def score_tiles(model: Any, batch: Batch, temperature: float, entropy: bool) -> TokenScores:
    """The batch's trained tokens, as `Policy.score` gives them, without gradient."""
    options: dict[str, Any] = {"device": batch.input_ids_N.device}
    count = batch.target_M.numel()
    logp_M, entropy_M = torch.empty(count, **options), torch.empty(count, **options)
    top1_M = torch.empty(count, dtype=torch.bool, **options)
    was_training = model.training
    model.eval()
    try:
        for first, logp_NV in logp_rows(model, batch, temperature):
            where = ((batch.source_M >= first) & (batch.source_M < first + len(logp_NV))).nonzero()[:, 0]
            rows = batch.source_M[where] - first
            logp_M[where] = logp_NV[rows, batch.target_M[where]]
            top1_M[where] = logp_M[where] >= logp_NV.amax(-1)[rows]
            if entropy:
                entropy_M[where] = torch.special.entr(logp_NV.exp()).sum(-1)[rows]
    finally:
        model.train(was_training)
    return TokenScores(logp_M, entropy_M if entropy else None, top1_M)


class _ValueOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, grad


def value_of(value: torch.Tensor, slope: Any) -> torch.Tensor:
    """`value`, with the gradient of `slope`, which is the same function computed by other kernels."""
    found: Any = _ValueOf.apply(value, slope)
    return found
