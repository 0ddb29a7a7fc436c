"""GGUF written tensor by tensor, and read again by the gguf package and transformers' reader of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from posttrain.errors import MissingExtraError, ModelError
from posttrain.forms.export.families import family_of, numbers_of, rope_factors, stored
from posttrain.forms.export.gguf_vocabulary import GgufVocabulary, vocabulary_of
from posttrain.forms.merging.weights import StoredModel

_ONES = ("add_bos_token", "add_eos_token", "add_space_prefix")
_IDS = ("bos_token_id", "eos_token_id", "eot_token_id", "eom_token_id", "padding_token_id", "unknown_token_id")
"""Keys below `tokenizer.ggml.`."""
STOPS = ("eos_token_id", "eot_token_id", "eom_token_id")
Q8_BLOCK = 32


def gguf() -> Any:
    """The gguf package. Raises: MissingExtraError."""
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError("--to gguf needs gguf; install it with: pip install 'posttrain[export]'") from error
    return gguf


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What the file says beside its tensors. `ids` and `flags` by their keys below `tokenizer.ggml.`."""

    vocabulary: GgufVocabulary
    ids: Mapping[str, int]
    flags: Mapping[str, bool]
    chat_template: str | None
    numbers: Mapping[str, tuple[str, Any]]


def header_of(config: Any, tokenizer: Any, stops: Sequence[int], *, add_bos: bool) -> GgufHeader:
    """Raises: ModelError where the file has no place for what the model says."""
    ends = [token for token in (tokenizer.eos_token_id,) if token in stops]
    ends += [token for token in stops if token not in ends]
    if len(ends) > len(STOPS):
        raise ModelError(f"gguf: the model stops at {len(ends)} tokens ({ends}); the form has places for {len(STOPS)}")
    ids: dict[str, int] = dict(zip(STOPS, ends, strict=False))
    for key, token in (
        ("bos_token_id", tokenizer.bos_token_id),
        ("padding_token_id", tokenizer.pad_token_id),
        ("unknown_token_id", tokenizer.unk_token_id),
    ):
        if token is not None:
            ids[key] = token
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    vocabulary = vocabulary_of(tokenizer, config.vocab_size)
    flags = {"add_bos_token": add_bos, "add_eos_token": False, "add_space_prefix": vocabulary.space_prefix}
    return GgufHeader(vocabulary, ids, flags, template, numbers_of(config))


def write_gguf(path: Path, source: Path, config: Any, header: GgufHeader, kind: str) -> None:
    """`kind` is f16 or q8_0; vectors are float32, rows that no block of 32 divides f16."""
    package, family = gguf(), family_of(config)
    writer = package.GGUFWriter(path, family.arch)
    _write_header(writer, header, family.arch, kind)
    names = package.get_tensor_name_map(package.MODEL_ARCH[family.arch.upper()], config.num_hidden_layers)
    model = StoredModel(source)
    plan = list(_planned(model, names, kind))
    factors = rope_factors(config)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", list(factors.shape), np.dtype(np.float32), factors.numel() * 4)
    for _, name, shape, dtype in plan:
        # Blocks are counted in bytes: the writer wants the shape of what lies in the file.
        held = package.quant_shape_to_byte_shape(shape, dtype) if dtype is package.GGMLQuantizationType.Q8_0 else shape
        numpy_dtype = {"F32": np.float32, "F16": np.float16, "Q8_0": np.uint8}[dtype.name]
        size = int(np.prod(held)) * np.dtype(numpy_dtype).itemsize
        writer.add_tensor_info(name, list(held), np.dtype(numpy_dtype), size, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors.float().numpy())
    for own, _, _, dtype in plan:
        tensor = stored(family, config, own, model.tensor(own, torch.float32)).contiguous().numpy()
        writer.write_tensor_data(package.quants.quantize(tensor, dtype))
    writer.close()


def _planned(model: StoredModel, names: Any, kind: str) -> Iterator[tuple[str, str, tuple[int, ...], Any]]:
    """Our name, the form's, the shape, and the type that it is held in."""
    types = gguf().GGMLQuantizationType
    for own in model.names:
        name, shape = names.get_name(own, try_suffixes=(".weight", ".bias")), model.shape(own)
        if name is None:
            raise ModelError(f"gguf: {own} has no name in gguf's map; the form would leave it out")
        if len(shape) == 1:
            yield own, name, shape, types.F32
        else:
            yield own, name, shape, types.Q8_0 if kind == "q8_0" and shape[-1] % Q8_BLOCK == 0 else types.F16


def _write_header(writer: Any, header: GgufHeader, arch: str, kind: str) -> None:
    package = gguf()
    writer.add_type("model")
    writer.add_name("model")
    writer.add_file_type(package.LlamaFileType.MOSTLY_F16 if kind == "f16" else package.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(package.GGML_QUANT_VERSION)
    for key, (what, value) in header.numbers.items():
        getattr(writer, f"add_{what}")(f"{arch}.{key}", value)
    vocabulary = header.vocabulary
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.kinds))
    if vocabulary.model == "gpt2":
        writer.add_token_merges(list(vocabulary.merges))
    else:
        writer.add_token_scores(list(vocabulary.scores))
    for key, value in header.ids.items():
        writer.add_uint32(f"tokenizer.ggml.{key}", value)
    for key, flag in header.flags.items():
        writer.add_bool(f"tokenizer.ggml.{key}", flag)
    if header.chat_template:
        writer.add_chat_template(header.chat_template)


def read_header(path: Path) -> GgufHeader:
    """What the file says, read by the gguf package."""
    fields = gguf().GGUFReader(path).fields
    said = {key: field.contents() for key, field in fields.items() if key.startswith(("tokenizer.", "general."))}
    prefix = "tokenizer.ggml."
    vocabulary = GgufVocabulary(
        said[f"{prefix}model"], said[f"{prefix}pre"], said[f"{prefix}tokens"], said[f"{prefix}token_type"],
        said.get(f"{prefix}merges", ()), said.get(f"{prefix}scores", ()), bool(said.get(f"{prefix}add_space_prefix", True)),
    )  # fmt: skip
    ids = {key: int(said[prefix + key]) for key in _IDS if prefix + key in said}
    flags = {key: bool(said[prefix + key]) for key in _ONES if prefix + key in said}
    arch = said["general.architecture"] + "."
    numbers = {key.removeprefix(arch): ("", field.contents()) for key, field in fields.items() if key.startswith(arch)}
    return GgufHeader(vocabulary, ids, flags, said.get("tokenizer.chat_template"), numbers)


def read_tensors(path: Path, config: Any) -> Mapping[str, torch.Tensor]:
    """The tensors in float32 under our names, dequantised and turned back by transformers' reader of GGUF."""
    read: Any = AutoModelForCausalLM
    model = read.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    found: dict[str, torch.Tensor] = model.state_dict()
    return {
        name: tensor for name, tensor in found.items() if not (name == "lm_head.weight" and config.tie_word_embeddings)
    }


def bound_of(tensor: torch.Tensor, kind: str) -> torch.Tensor:
    """The most that each entry may be off: half a step of f16, or of its block of 32 with a scale in f16."""
    if tensor.dim() == 1:
        return torch.full_like(tensor, 1e-6)
    if kind == "f16" or tensor.shape[-1] % Q8_BLOCK:
        return tensor.abs() * 2**-11 + 2**-25
    blocks = tensor.abs().reshape(-1, Q8_BLOCK)
    largest = blocks.amax(1, keepdim=True)
    # The scale is largest/127 rounded to f16 (2^-11), so the largest is off by that much of itself, and all by half a step.
    return (largest * (0.5 / 127 + 2**-11) * 1.001 + 127 * 2**-25).expand_as(blocks).reshape(tensor.shape)
