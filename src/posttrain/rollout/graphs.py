"""A step recorded once per number of rows and replayed: what CUDA graphs are, with the recorder of any device behind it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from posttrain.errors import EngineError

Replay = Callable[[], torch.Tensor]
Recorder = Callable[[Replay], Replay]
"""Of work on fixed addresses: how to do it again. What it returns lies where it lay the first time."""


def bucket_of(rows: int) -> int:
    """The next power of two: that many rows are computed."""
    return 1 << (rows - 1).bit_length()


class Graphs:
    """Steps by bucket. They read weights where those are, so an update in place needs no new ones.

    Raises: EngineError from `run` where the recorder cannot record.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._recorded: dict[int, Replay] = {}

    def run(self, bucket: int, work: Replay) -> torch.Tensor:
        if bucket not in self._recorded:
            self._recorded[bucket] = self._record(bucket, work)
        return self._recorded[bucket]()

    def forget(self) -> None:
        """Something that they read has moved."""
        self._recorded.clear()

    def _record(self, bucket: int, work: Replay) -> Replay:
        try:
            return self._recorder(work)
        except RuntimeError as error:
            # The end of a capture that broke off raises an error of its own, over the one that says why.
            cause = _first(error)
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            why = (str(cause).strip().splitlines() or [""])[0]
            raise EngineError(
                f"a decoding step of {bucket} rows could not be captured as a CUDA graph ({type(cause).__name__}: {why}); "
                "set enforce_eager: true in rollout (in eval_rollout where an eval failed) to decode without graphs"
            ) from error


def _first(error: BaseException) -> BaseException:
    while error.__context__ is not None:
        error = error.__context__
    return error


def recorder_of(device: torch.device) -> Recorder:
    return cuda_graph if device.type == "cuda" else lambda work: work


def cuda_graph(work: Replay) -> Replay:
    """Source: torch.cuda.graph's documentation: a warm-up on another stream, then the capture. Never run: no GPU was at hand."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = work()

    def replay() -> torch.Tensor:
        graph.replay()
        return out

    return replay
