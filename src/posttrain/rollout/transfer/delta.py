"""Weights as differences: of each tensor only the elements that changed since the last push, in the dtype of the engine.

A push is one frame a tensor. A frame is bytes: the SHA-256 of what follows, the length of a JSON header, the header, the
places of the changed elements, their values. It names the frame before it by its digest, so that what is torn, flipped or
out of order is refused; and the digest of the whole tensor that results. How frames travel is not known here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from posttrain.errors import EngineError
from posttrain.types import Moved

_DIGEST = 32
_LENGTH = 4
_SIZE = 8
_PORTION_BYTES = 256 << 20
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_INDEX = {"int32": torch.int32, "int64": torch.int64}
_NARROW = 2**31


@dataclass(frozen=True, slots=True)
class _Header:
    """`after`: digest of the frame before, across pushes too; empty at the start of a push that is sent whole.

    `index`: type of the places; None where the values are the whole tensor. `result`: digest of the tensor that results.
    """

    version: int
    place: int
    after: str
    last: bool
    name: str
    shape: tuple[int, ...]
    dtype: str
    index: Literal["int32", "int64"] | None
    result: str

    def __str__(self) -> str:
        return f"tensor {self.place} ({self.name}) of version {self.version}"


class DeltaSender:
    """The sending end: frames in files of `folder`, each gone when all workers have read it. Its copy takes `Moved.whole_bytes`."""

    def __init__(self, folder: Path, dtype: str, anchor: int) -> None:
        self._folder, self._dtype, self._anchor = folder, getattr(torch, dtype), anchor
        self._encoder = DeltaEncoder(self._dtype, anchor)

    def connect(self, init: Callable[[dict[str, Any]], None]) -> None:
        # Receiving ends that are new hold nothing that a change could be applied to.
        self._encoder = DeltaEncoder(self._dtype, self._anchor)
        init({})

    def send(
        self, tensors: Iterator[tuple[str, torch.Tensor]], version: int, update: Callable[[dict[str, Any]], None]
    ) -> Moved:
        moved = 0
        for number, portion in enumerate(_portions(self._encoder.frames(tensors, version))):
            path = self._folder / f"delta-{version}-{number}"
            try:
                moved += _write(path, portion)
                update({"path": str(path)})
            finally:
                path.unlink(missing_ok=True)
        self._encoder.commit()
        return Moved(moved, self._encoder.whole_bytes)

    def close(self) -> None:
        pass


class DeltaReceiver:
    """The receiving end."""

    def __init__(self) -> None:
        self._decoder = DeltaDecoder()

    def take(self, message: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
        with open(message["path"], "rb") as file:
            while size := file.read(_SIZE):
                yield self._decoder.take(file.read(int.from_bytes(size, "little")))

    def finish(self) -> None:
        self._decoder.finish()

    def close(self) -> None:
        pass


class DeltaEncoder:
    """Keeps a copy of what it sent last; every `anchor`-th push is whole, and one after a push that was not committed."""

    def __init__(self, dtype: torch.dtype, anchor: int) -> None:
        assert anchor >= 1, anchor
        self._dtype, self._anchor = dtype, anchor
        self._held: dict[str, torch.Tensor] = {}
        self._pushes, self._next, self._after = 0, 0, ""

    @property
    def whole_bytes(self) -> int:
        """Of the last push, had it been sent whole; the copy takes as much memory."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._held.values())

    def frames(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> Iterator[bytes]:
        """One push; `commit` when all of it has arrived."""
        self._pushes, pushes = 0, self._pushes
        whole = pushes % self._anchor == 0
        before, after = ({}, "") if whole else (self._held, self._after)
        sent: dict[str, torch.Tensor] = {}
        for place, (name, tensor, last) in enumerate(_with_last(weights)):
            sent[name] = now = self._copy(tensor)
            index, values = _changes(now, before.pop(name, None))
            kind = None if index is None else "int32" if index.dtype == torch.int32 else "int64"
            shape, dtype = tuple(now.shape), str(now.dtype).removeprefix("torch.")
            header = _Header(version, place, after, last, name, shape, dtype, kind, _digest(now))
            frame = _closed(header, index, values)
            after = frame[:_DIGEST].hex()
            yield frame
        self._held, self._after, self._next = sent, after, pushes + 1

    def commit(self) -> None:
        self._pushes = self._next

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        dtype = self._dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.detach().to("cpu", dtype, copy=True).contiguous()


class DeltaDecoder:
    """Keeps the last whole version. After a frame that was refused only a push that is sent whole is taken."""

    def __init__(self) -> None:
        self._held: dict[str, torch.Tensor] = {}
        self._after: str | None = None
        self._complete = False

    def take(self, frame: bytes) -> tuple[str, torch.Tensor]:
        """The name and the whole tensor that results; it is held here and must not be changed.

        Raises: EngineError for a frame that is torn, flipped or out of order.
        """
        after, self._after = self._after, None
        header, index, values = _opened(frame)
        if not header.after:
            self._held = {}
        elif header.after != after or self._complete != (header.place == 0):
            raise EngineError(
                f"{header} came out of order: it follows {header.after[:12]}, and the last that was taken here is "
                f"{'none' if after is None else after[:12]}; push the model whole"
            )
        tensor = _applied(header, index, values, self._held.get(header.name))
        found = _digest(tensor)
        if found != header.result:
            raise EngineError(f"{header} results in {found[:12]}, expected {header.result[:12]}; push the model whole")
        self._held[header.name] = tensor
        self._after, self._complete = frame[:_DIGEST].hex(), header.last
        return header.name, tensor

    def finish(self) -> None:
        """Raises: EngineError unless the last frame of a push has been taken."""
        if self._after is None or not self._complete:
            self._after = None
            raise EngineError(f"a push of weights is torn: {len(self._held)} tensors came, and not the last one")


def _portions(frames: Iterator[bytes]) -> Iterator[list[bytes]]:
    """Lists of 256 MiB or one frame."""
    portion: list[bytes] = []
    for frame in frames:
        portion.append(frame)
        if sum(map(len, portion)) >= _PORTION_BYTES:
            yield portion
            portion = []
    if portion:
        yield portion


def _write(path: Path, frames: list[bytes]) -> int:
    with path.open("wb") as file:
        return sum(file.write(len(frame).to_bytes(_SIZE, "little")) + file.write(frame) for frame in frames)


def _with_last(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor, bool]]:
    items = iter(weights)
    held = next(items, None)
    while held is not None:
        following = next(items, None)
        yield *held, following is None
        held = following


def _changes(now: torch.Tensor, before: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Places and values of what differs in its bits; no places, and all values, where that is smaller."""
    flat = now.reshape(-1)
    if before is None or before.shape != now.shape or before.dtype != now.dtype:
        return None, flat
    index = (_bits(now) != _bits(before)).nonzero().reshape(-1)
    index = index.to(torch.int32) if now.numel() <= _NARROW else index
    sparse = index.numel() * (index.element_size() + now.element_size())
    return (index, flat[index.long()]) if sparse < now.numel() * now.element_size() or not sparse else (None, flat)


def _applied(
    header: _Header, index: torch.Tensor | None, values: torch.Tensor, before: torch.Tensor | None
) -> torch.Tensor:
    if index is None:
        return values.reshape(header.shape)
    if before is None or before.shape != header.shape or before.dtype != values.dtype:
        raise EngineError(
            f"{header} changes a tensor that is not held here in its shape and dtype; push the model whole"
        )
    before.view(-1)[index.long()] = values
    return before


def _closed(header: _Header, index: torch.Tensor | None, values: torch.Tensor) -> bytes:
    text = json.dumps(asdict(header)).encode()
    parts = [len(text).to_bytes(_LENGTH, "little"), text, b"" if index is None else _raw(index), _raw(values)]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return b"".join([digest.digest(), *parts])


def _opened(frame: bytes) -> tuple[_Header, torch.Tensor | None, torch.Tensor]:
    view = memoryview(frame)
    digest, rest = bytes(view[:_DIGEST]), view[_DIGEST:]
    if hashlib.sha256(rest).digest() != digest:
        raise EngineError(
            f"a frame of weights ({len(view):,} bytes) is torn or has a flipped bit: its digest is not the one that it "
            "names; push the model whole"
        )
    end = _LENGTH + int.from_bytes(rest[:_LENGTH], "little")
    fields = json.loads(bytes(rest[_LENGTH:end]))
    header = _Header(**{**fields, "shape": tuple(fields["shape"])})
    dtype: torch.dtype = getattr(torch, header.dtype)
    if header.index is None:
        return header, None, _tensor(rest[end:], dtype)
    places = _INDEX[header.index]
    count = len(rest[end:]) // (places.itemsize + dtype.itemsize)
    middle = end + count * places.itemsize
    return header, _tensor(rest[end:middle], places), _tensor(rest[middle:], dtype)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(_BITS[tensor.element_size()])


def _raw(tensor: torch.Tensor) -> memoryview:
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _tensor(raw: memoryview, dtype: torch.dtype) -> torch.Tensor:
    tensor = torch.empty(len(raw) // dtype.itemsize, dtype=dtype)
    _raw(tensor)[:] = raw
    return tensor


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(_raw(tensor)).hexdigest()
