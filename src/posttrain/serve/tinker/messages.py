"""The SDK's protobuf messages, by the schema that it ships: data in, log-probs and samples out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from google.protobuf.message import DecodeError
from tinker.proto import tinker_public_pb2 as pb

from posttrain.errors import DataError
from posttrain.files import digest_bytes
from posttrain.recipes.tinker import Datum, Passed
from posttrain.types import Completion

_NOT_THERE = -99999.0
"""In the schema, the log-prob of an empty cell."""
_NUMPY = {pb.DTYPE_FLOAT32: np.float32, pb.DTYPE_INT64: np.int64}


@dataclass(frozen=True, slots=True)
class PassAsked:
    """A forward_backward request. `digest` is that of its content, however it was written down."""

    model_id: str
    seq: int
    loss_fn: str
    config: Mapping[str, float | str]
    backward: bool
    message: pb.ForwardBackwardRequest

    @property
    def digest(self) -> str:
        return digest_bytes(self.message.SerializeToString(deterministic=True))

    def data(self) -> list[Datum]:
        """Raises: DataError for what is no text, or no dense tensor."""
        if not self.message.data:
            raise DataError("no data; expected at least one datum")
        return [_datum(message, number) for number, message in enumerate(self.message.data)]


def read_pass(body: bytes) -> PassAsked:
    """Raises: DataError for what is no such message."""
    message = pb.ForwardBackwardRequest()
    try:
        message.ParseFromString(body)
    except DecodeError as error:
        raise DataError(f"the body is no ForwardBackwardRequest of tinker's schema: {error}") from error
    config: dict[str, float | str] = dict(message.loss_fn_config)
    for key, value in message.loss_fn_config_v2.items():
        config[key] = value.text if value.WhichOneof("value") == "text" else value.number
    return PassAsked(message.model_id, message.seq_id, message.loss_fn, config, not message.forward_only, message)


def _datum(message: pb.Datum, number: int) -> Datum:
    where = f"datum {number}"
    chunks: list[np.ndarray] = []
    for chunk in message.model_input:
        if chunk.WhichOneof("chunk") != "encoded_text":
            raise DataError(
                f"{where}: model_input has a chunk of {chunk.WhichOneof('chunk')}; only text is trained here"
            )
        chunks.append(np.frombuffer(chunk.encoded_text.tokens, np.int32))
    streams = {name: _array(tensor, f"{where}: {name}") for name, tensor in message.loss_fn_inputs.items()}
    if "target_tokens" not in streams:
        raise DataError(f"{where}: loss_fn_inputs lacks target_tokens")
    if streams["target_tokens"].dtype.kind != "i":
        raise DataError(f"{where}: target_tokens are {streams['target_tokens'].dtype}, expected int64")
    ids = np.concatenate(chunks) if chunks else np.empty(0, np.int32)
    return Datum(ids, streams.pop("target_tokens"), streams)


def _array(tensor: pb.Tensor, where: str) -> np.ndarray:
    """Sparse ones are those of several targets for a position."""
    if tensor.WhichOneof("encoding") != "dense" or tensor.dtype not in _NUMPY or len(tensor.shape) > 1:
        raise DataError(
            f"{where}: a sparse tensor, or one of shape {list(tensor.shape)}; expected a dense one with a value a token"
        )
    kind = np.dtype(_NUMPY[tensor.dtype])
    if len(tensor.dense) % kind.itemsize:
        raise DataError(f"{where}: {len(tensor.dense)} bytes are no whole number of {kind.name}")
    return np.frombuffer(tensor.dense, kind)


def write_pass(passed: Passed) -> bytes:
    """A ForwardBackwardOutput."""
    fields = {"logprobs": _batched(passed.logp), "elementwise_loss": _batched(passed.terms)}
    record = pb.ArrayRecord(type_tag="ArrayRecord", fields=fields, num_datums=len(passed.logp))
    metrics = {"loss:sum": passed.loss}
    return pb.ForwardBackwardOutput(
        loss_fn_output_type="ArrayRecord", loss_fn_outputs=[record], metrics=metrics
    ).SerializeToString()


def _batched(parts: Sequence[np.ndarray]) -> pb.BatchedTensor:
    offsets = np.cumsum([0, *(part.nbytes for part in parts)], dtype=np.int64)
    data = np.concatenate(parts).astype(np.float32).tobytes()
    return pb.BatchedTensor(data=data, offsets=offsets.tobytes(), dtype=pb.DTYPE_FLOAT32)


@dataclass(frozen=True, slots=True)
class ScoredPrompt:
    """Log-probs of a prompt's tokens (NaN: not scored), and the most likely ones at each place where they are asked for."""

    logp: np.ndarray
    top: Sequence[Sequence[tuple[int, float]]] = ()
    num_top: int = 0


def write_samples(completions: Sequence[Completion], prompt: ScoredPrompt | None) -> bytes:
    """A SampleResponse."""
    message = pb.SampleResponse(sequences=[_sequence(completion) for completion in completions])
    if prompt is not None:
        message.prompt_logprobs = prompt.logp.astype(np.float32).tobytes()
        if prompt.num_top:
            message.topk_prompt_logprobs.CopyFrom(_top(prompt))
    return message.SerializeToString()


def _sequence(completion: Completion) -> pb.SampledSequence:
    return pb.SampledSequence(
        stop_reason=pb.STOP_REASON_STOP if completion.finish == "stop" else pb.STOP_REASON_LENGTH,
        tokens=np.asarray(completion.ids, np.int32).tobytes(),
        logprobs=np.asarray(completion.logp, np.float32).tobytes(),
    )


def _top(prompt: ScoredPrompt) -> pb.TopkLogprobs:
    shape = (len(prompt.logp), prompt.num_top)
    ids, logp = np.zeros(shape, np.int32), np.full(shape, _NOT_THERE, np.float32)
    for place, likely in enumerate(prompt.top, len(prompt.logp) - len(prompt.top)):
        ids[place], logp[place] = [token for token, _ in likely], [value for _, value in likely]
    return pb.TopkLogprobs(token_ids=ids.tobytes(), logprobs=logp.tobytes(), length=shape[0], k=shape[1])
