"""A decode step whose norms, rotation, attention and SwiGLU are one kernel each, which the machine's C compiler builds.

At few rows a step costs what calling torch's small operations costs, at many a third of it is their passes through memory; products
stay torch's. The kernels (`native.c`) are built in the process that first wants them, in less than a second, and add in another order
than torch: other last bits.
"""

from __future__ import annotations

import ctypes
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from posttrain.c_compiler import find_compiler
from posttrain.errors import ModelError
from posttrain.models.attention import AttendOptions, KVStore
from posttrain.models.decode import LlamaStep, why_not_in_float32
from posttrain.models.policy import Policy

_SOURCE = Path(__file__).with_name("native.c")
_FLAGS = ("-O3", "-std=gnu11", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_FLAGS_OF = {
    "AVX512": ("-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"),
    "AVX2": ("-mavx2", "-mfma"),
}
"""By torch's name of what the CPU can do: that decides the bits, as it decides those of torch's own kernels."""
_LEAST_WORK = 1 << 16
"""Multiplications of a kernel below which other threads cost more to wake than they do."""
_BUILD_SECONDS = 60


@dataclass(frozen=True, slots=True)
class PromptsInMemory:
    """Of each row its prompt's tokens, how many its tensor has room for, and of each layer the addresses of its keys and of its values. Shape: [R] each."""

    lengths_R: np.ndarray
    widths_R: np.ndarray
    addresses: Sequence[tuple[np.ndarray, ...]]


@dataclass(frozen=True, slots=True)
class RowsInMemory:
    """Where one token of each row is about to be written, and what it attends to. Shapes: `own_R` [R], of each layer keys and values [rows, Hkv, K, D].

    A row of 40 tokens of prompt that has written 3: `lengths_R` 40, `own_R` 3, `longest` 44.
    """

    own_R: np.ndarray
    own: Sequence[tuple[torch.Tensor, torch.Tensor]]
    prompts: PromptsInMemory
    longest: int
    """Tokens that a row attends to at most."""


class KVInMemory(Protocol):
    def in_memory(self) -> RowsInMemory:
        """For a step of one token a row."""
        ...


_Rotation = tuple[torch.Tensor, torch.Tensor]
"""Cosine, and sine with the first half negated, [R, D] each."""
_Attend = Callable[[int, Sequence[torch.Tensor], _Rotation], torch.Tensor]
"""A layer's queries, keys and values → its heads, [R, Hq × D]."""


class _Attention(ctypes.Structure):
    """`struct attention` of native.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value")),
        *((name, ctypes.c_int64) for name in ("query_stride", "key_stride", "value_stride")),
        *((name, ctypes.c_void_p) for name in (
            "query_norm", "key_norm", "cosine", "sine", "own_keys", "own_values", "own",
            "prompt_keys", "prompt_values", "prompt_widths", "prompts", "out",
        )),
        *((name, ctypes.c_int64) for name in ("rows", "heads", "kv_heads", "columns", "window", "threads")),
        *((name, ctypes.c_float) for name in ("scale", "norm_epsilon")),
    )  # fmt: skip


def kernels(width: int) -> Any:
    """The library of native.c for heads so wide. Raises: ModelError where it cannot be built."""
    if isinstance(found := built(width), ModelError):
        raise found
    return found


@lru_cache(maxsize=8)
def built(width: int) -> Any:
    """What `kernels` gives, or raises: a compiler that cannot is asked once, not in each call of an engine."""
    try:
        return _build(width)
    except ModelError as error:
        return error


def _build(width: int) -> Any:
    if (compiler := find_compiler()) is None:
        raise ModelError("there is no C compiler (cc, gcc or clang; CC names another)")
    flags = (*_FLAGS, *_FLAGS_OF.get(torch.backends.cpu.get_cpu_capability(), ()), f"-DWIDTH={width}")
    try:
        with tempfile.TemporaryDirectory(prefix="posttrain-kernels-") as folder:
            target = Path(folder) / "native.so"
            command = [*compiler, *flags, "-o", str(target), str(_SOURCE), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_BUILD_SECONDS)
            library = ctypes.CDLL(str(target))
    except (subprocess.SubprocessError, OSError) as error:
        said = str(getattr(error, "stderr", None) or error).strip().splitlines()
        raise ModelError(f"{shlex.join(compiler)} does not build the kernels: {said[0] if said else error}") from error
    library.add_and_norm.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 2 + [ctypes.c_float, ctypes.c_int64]
    library.turn_heads.argtypes = (
        [ctypes.c_void_p, ctypes.c_int64]
        + [ctypes.c_void_p] * 4
        + [ctypes.c_int64] * 2
        + [ctypes.c_float, ctypes.c_int64]
    )
    library.swiglu.argtypes = [ctypes.c_void_p, ctypes.c_int64] * 2 + [ctypes.c_void_p] + [ctypes.c_int64] * 3
    for function in (library.attend, library.turn_heads, library.add_and_norm, library.swiglu):
        function.restype = None
    return library


def why_not_native(policy: Policy) -> str:
    """Why the kernels do nothing for the policy; empty where they decode it."""
    if why := why_not_in_float32(policy):
        return why
    if policy.offloaded is not None:
        return "with layer_offloading a layer's weights are not there until it is its turn"
    try:
        kernels(_head_width(policy))
    except ModelError as error:
        return str(error)
    return ""


class NativeStep(LlamaStep):
    """A `LlamaStep` by the kernels. `one_each` is the step of one token a row, in which they attend too."""

    def __init__(self, policy: Policy, prepack: bool) -> None:
        super().__init__(policy, prepack)
        self.encodes = True
        layers = list(self._model.layers)
        self._norms = [*(layer.input_layernorm for layer in layers), self._model.norm]
        self._width = _head_width(policy)
        self._library = kernels(self._width)
        self._attentions = [
            _attention(layer.self_attn, options) for layer, options in zip(layers, self._options, strict=True)
        ]

    def __call__(
        self, ids_R: torch.Tensor, positions_R: torch.Tensor, cache: KVStore, wanted: torch.Tensor | None = None
    ) -> torch.Tensor:
        def attend(number: int, projected: Sequence[torch.Tensor], rotation: _Rotation) -> torch.Tensor:
            heads = cache.attend(number, *self._turned(number, projected, rotation), self._options[number])
            return heads[0].transpose(0, 1).flatten(1)

        return self._logits(ids_R, positions_R, attend, wanted)

    def one_each(self, ids_R: torch.Tensor, positions_R: torch.Tensor, cache: KVInMemory) -> torch.Tensor:
        """Newest token and position of each row, [R] and [R] → logits [R, V]."""
        rows = cache.in_memory()

        def attend(number: int, projected: Sequence[torch.Tensor], rotation: _Rotation) -> torch.Tensor:
            return self._attend(number, projected, rotation, rows)

        return self._logits(ids_R, positions_R, attend, None)

    def _logits(
        self, ids_R: torch.Tensor, positions_R: torch.Tensor, attend: _Attend, wanted: torch.Tensor | None
    ) -> torch.Tensor:
        x_RE = self._model.embed_tokens(ids_R)
        cos_RD, sin_RD = (part.squeeze(1).contiguous() for part in self._rotation(x_RE, positions_R))
        h_RE = self._add_and_norm(x_RE, None, self._norms[0])
        for number, layer in enumerate(self._model.layers):
            [update_RE] = self._out[number](attend(number, self._qkv[number](h_RE), (cos_RD, sin_RD)))
            h_RE = self._add_and_norm(x_RE, update_RE, layer.post_attention_layernorm)
            [update_RE] = self._down[number](self._swiglu(*self._gate_up[number](h_RE)))
            h_RE = self._add_and_norm(x_RE, update_RE, self._norms[number + 1])
        [logits] = self._head(h_RE if wanted is None else h_RE[wanted])
        return logits

    def _attend(
        self, number: int, projected: Sequence[torch.Tensor], rotation: _Rotation, rows: RowsInMemory
    ) -> torch.Tensor:
        """Keeps keys and values of one token a row, too. Shapes: queries, keys and values [R, heads × D] → [R, Hq × D]."""
        a, prompts = self._attentions[number], rows.prompts
        own_keys, own_values = rows.own[number]
        out = torch.empty(projected[0].shape)
        for name, part in zip(("query", "key", "value"), projected, strict=True):
            setattr(a, name, _address(part))
            setattr(a, f"{name}_stride", part.stride(0))
        a.cosine, a.sine = (_address(part) for part in rotation)
        a.own_keys, a.own_values, a.columns = _address(own_keys), _address(own_values), own_keys.shape[2]
        a.own, a.prompts, a.prompt_widths = (
            one.ctypes.data for one in (rows.own_R, prompts.lengths_R, prompts.widths_R)
        )
        a.prompt_keys, a.prompt_values = (one.ctypes.data for one in prompts.addresses[number])
        a.out, a.rows, a.threads = _address(out), len(out), _threads(out.numel() * rows.longest)
        self._library.attend(ctypes.byref(a))
        return out

    def _turned(
        self, number: int, projected: Sequence[torch.Tensor], rotation: _Rotation
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `_turned` of decode.py: each [1, H, R, D]."""
        a = self._attentions[number]
        query, key, value = projected
        turned = [torch.empty(query.shape), torch.empty(key.shape)]
        for x, norm, out in zip((query, key), (a.query_norm, a.key_norm), turned, strict=True):
            count, width = len(out), out.shape[1] // self._width
            self._library.turn_heads(
                _address(x), x.stride(0), norm, *map(_address, rotation), _address(out), count, width, a.norm_epsilon,
                _threads(out.numel()),
            )  # fmt: skip
        query, key, value = (part.view(len(part), -1, self._width).transpose(0, 1)[None] for part in (*turned, value))
        return query, key, value

    def _add_and_norm(self, x_RE: torch.Tensor, update_RE: torch.Tensor | None, module: Any) -> torch.Tensor:
        """The norm of `x_RE`, to which the update is added in place."""
        out = torch.empty(x_RE.shape)
        update = None if update_RE is None else _address(update_RE.contiguous())
        self._library.add_and_norm(
            _address(x_RE), update, _address(module.weight), _address(out), *x_RE.shape, module.variance_epsilon,
            _threads(x_RE.numel()),
        )  # fmt: skip
        return out

    def _swiglu(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        out = torch.empty(gate.shape)
        self._library.swiglu(
            _address(gate),
            gate.stride(0),
            _address(up),
            up.stride(0),
            _address(out),
            *gate.shape,
            _threads(gate.numel()),
        )
        return out


def _head_width(policy: Policy) -> int:
    model: Any = policy.base.get_decoder()
    return model.layers[0].self_attn.head_dim


def _attention(module: Any, options: AttendOptions) -> _Attention:
    """What is the same in each step of a layer."""
    assert options.window is None or not options.window.chunked, "no family of the step attends in chunks"
    config = module.config
    found = _Attention(
        heads=config.num_attention_heads, kv_heads=config.num_key_value_heads, scale=options.scale,
        window=0 if options.window is None else options.window.size,
    )  # fmt: skip
    if hasattr(module, "q_norm"):
        found.query_norm, found.key_norm = _address(module.q_norm.weight), _address(module.k_norm.weight)
        found.norm_epsilon = module.q_norm.variance_epsilon
    return found


def _address(x: torch.Tensor) -> int:
    """Of float32 values, of which those of a row lie side by side."""
    assert x.dtype == torch.float32 and x.stride(-1) == 1, (x.dtype, x.stride())
    return x.data_ptr()


def _threads(work: int) -> int:
    return torch.get_num_threads() if work >= _LEAST_WORK else 1
