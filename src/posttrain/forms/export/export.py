"""One export: write the form, read it again by other code than wrote it, ask the form gate, and only then put it in place."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig

import posttrain
from posttrain.config.stages import ModelKeys
from posttrain.errors import ConfigError, ModelError
from posttrain.evidence import GateVerdict, Verdict
from posttrain.files import digest_tree, read_json, reading, write_folder, write_json
from posttrain.forms.export import form_gate
from posttrain.forms.export.compressed import compressed_bound, read_compressed, write_compressed
from posttrain.forms.export.families import family_of, numbers_of
from posttrain.forms.export.fitted import (
    Calibration,
    check_fit,
    check_scales,
    fitted_bound,
    read_calibration,
    unrounded,
    write_fitted,
)
from posttrain.forms.export.form_gate import FormCheck
from posttrain.forms.export.gguf_file import bound_of, header_of, read_header, read_tensors, write_gguf
from posttrain.forms.export.scores import FormScores
from posttrain.forms.export.target import FolderText, GgufText, TextForm, composed, conversations
from posttrain.forms.found import FoundModel
from posttrain.forms.merging.shards import INDEX, ShardWriter
from posttrain.forms.merging.vocabulary import tokenizer_at
from posttrain.forms.merging.weights import StoredModel
from posttrain.models.generation import stored_stop_token_ids
from posttrain.models.low_rank import CONFIG
from posttrain.models.provenance import PROVENANCE, source_digest
from posttrain.models.read import read_model

RECORD = "form.json"
"""Beside the exported files: what it was made from, and every check."""
GGUF_FILE = "model.gguf"
_STORAGE = {"dtype", "torch_dtype", "quantization_config", "transformers_version", "_name_or_path"}
_NOT_COMPOSED = " (of composed characters: the source composes them itself, llama.cpp does not)"


@dataclass(frozen=True, slots=True)
class Original:
    """The model that is exported, as its own engine reads it. `adapter` and `base` are those of a version that was made with them.

    `calibration`: the texts that a form is fitted to, for those that are.
    """

    folder: Path
    config: Any
    tokenizer: Any
    text: FolderText
    adapter: Path | None = None
    base: Path | None = None
    calibration: Calibration | None = None


@dataclass(frozen=True, slots=True)
class FormView:
    """A written form as it is read again: prompts, tensors in float32, what each may be off, numbers expected and said.

    `composes` is False where the source's tokenizer composes characters (NFC) and the form's does not. `rounded`: what the tensors are
    of, where that is not the source itself. `more`: checks of this form's own.
    """

    text: TextForm
    tensors: Mapping[str, torch.Tensor]
    bound: Callable[[str, torch.Tensor], torch.Tensor]
    numbers: tuple[Mapping[str, Any], Mapping[str, Any]]
    composes: bool = True
    rounded: Path | None = None
    more: Sequence[Callable[[], FormCheck]] = ()


@dataclass(frozen=True, slots=True)
class ExportForm:
    """A row of `EXPORT_FORMS`. `types`: how numbers are held → least share of equal greedy tokens; the first is the default."""

    types: Mapping[str, float]
    write: Callable[[Path, Original, str], None]
    read: Callable[[Path, Original, str], FormView]
    fitted: bool = False


@dataclass(frozen=True, slots=True)
class FormReport:
    """`digest` is that of the folder, "" where the form was refused; `verdict` is None where no suite was asked."""

    form: str
    type: str
    source_digest: str
    checks: tuple[FormCheck, ...]
    verdict: GateVerdict | None
    digest: str = ""

    @property
    def exit_code(self) -> int:
        if not all(check.passed for check in self.checks):
            return Verdict.FAIL.exit_code
        return 0 if self.verdict is None else self.verdict.verdict.exit_code


class _RefusedForm(Exception):
    def __init__(self, report: FormReport) -> None:
        self.report = report


def original(folder: Path) -> Original:
    """Raises: ModelError for an adapter."""
    if (folder / CONFIG).is_file() and not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} is an adapter: merge it first (posttrain merge ADAPTER --out DIR) and export that folder"
        )
    config, tokenizer = AutoConfig.from_pretrained(folder), tokenizer_at(folder)
    stops = stored_stop_token_ids(str(folder), None, config, tokenizer)
    return Original(folder, config, tokenizer, FolderText(tokenizer, stops))


def export_model(
    found: FoundModel, out: Path, form: str, type_: str, scores: FormScores | None, texts: Path | None = None
) -> FormReport:
    """Write `found` to `out` in another form, only if the form gate passes; else `out` with `.refused.json` says why.

    `texts`: the data file that a form is fitted to. Raises: ConfigError; ModelError for what the form has no place for;
    GateError where the suites are too small; DataError; MissingExtraError.
    """
    if EXPORT_FORMS[form].fitted != (texts is not None):
        need = "is fitted to texts: name some like those it will answer with --calibration FILE"
        raise ConfigError(f"--to {form} {need if texts is None else 'is fitted to no texts: leave out --calibration'}")
    if scores is not None:
        scores.check_enough()
    with tempfile.TemporaryDirectory(prefix="posttrain-fit-") as scratch:
        made = replace(original(found.folder), adapter=found.adapter, base=found.base)
        if texts is not None:
            made = replace(made, calibration=read_calibration(texts, made.tokenizer, Path(scratch)))
        return _exported(made, found, out, (form, type_), scores)


def _exported(
    made: Original, found: FoundModel, out: Path, named: tuple[str, str], scores: FormScores | None
) -> FormReport:
    (form, type_), lineage = named, _lineage(made, found)
    row, reports = EXPORT_FORMS[form], list[FormReport]()

    def fill(folder: Path) -> None:
        row.write(folder, made, type_)
        report = judged(made, row.read(folder, made, type_), (form, type_), folder, scores)
        if report.exit_code:
            raise _RefusedForm(report)
        write_json(folder / RECORD, _record(report, lineage))
        reports.append(report)

    try:
        with reading(found.folder):
            write_folder(out, fill)
    except _RefusedForm as refused:
        write_json(out.with_name(f"{out.name}.refused.json"), _record(refused.report, lineage))
        return refused.report
    return replace(reports[0], digest=digest_tree(out))


def judged(
    made: Original, view: FormView, named: tuple[str, str], folder: Path, scores: FormScores | None
) -> FormReport:
    """All checks, the cheap ones first; models run only if those pass."""
    form, type_ = named
    talks = conversations(form_gate.NUM_CONVERSATIONS, made.tokenizer.all_special_tokens)
    talks = talks if view.composes else composed(talks)
    checks = [
        form_gate.check_template(made.text, view.text, talks, "" if view.composes else _NOT_COMPOSED),
        form_gate.check_text(made.text, view.text),
        form_gate.check_special_ids(made.text, view.text),
        form_gate.check_numbers(*view.numbers),
        form_gate.check_tensors(StoredModel(view.rounded or made.folder), view.tensors, view.bound),
        form_gate.check_merge(made.folder, made.adapter, made.base),
    ]
    if all(check.passed for check in checks):
        checks += [check() for check in view.more]
    digests = (source_digest(str(made.folder)), digest_tree(folder))
    verdict: GateVerdict | None = None
    if all(check.passed for check in checks):
        with tempfile.TemporaryDirectory(prefix="posttrain-form-") as scratch:
            held = Path(scratch) / "held"
            write_held(held, made.folder, view.tensors)
            source, target = (
                read_model(ModelKeys(base_model=str(path)), torch.float32).eval() for path in (made.folder, held)
            )
            least = EXPORT_FORMS[form].types[type_]
            checks.append(form_gate.check_greedy(source, target, made.text, talks, least))
            del source, target
            if scores is not None and checks[-1].passed:
                verdict = scores.verdict(made.folder, held, digests, Path(scratch))
    return FormReport(form, type_, digests[0], tuple(checks), verdict)


def write_held(folder: Path, source: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """What a form holds, as a float32 model that runs here."""
    folder.mkdir()
    _copy_beside(source, folder)
    writer = ShardWriter(folder)
    for name, tensor in tensors.items():
        writer.add(name, tensor.float().clone())
    writer.close()
    config = read_json(folder / "config.json")
    for key in {"dtype", "torch_dtype"} & set(config):
        config[key] = "float32"
    write_json(folder / "config.json", config)


def _copy_beside(source: Path, folder: Path) -> None:
    """Config, tokenizer, template and generation config; no weights and no record."""
    for path in source.iterdir():
        if path.suffix in (".json", ".jinja", ".txt", ".model") and path.name not in (INDEX, PROVENANCE, RECORD):
            shutil.copy(path, folder)


def _lineage(made: Original, found: FoundModel) -> dict[str, Any]:
    """What the form was made from, beside the digest of the source."""
    manifest = found.manifests[-1].digest if found.manifests else None
    said = {} if made.calibration is None else {"calibration": made.calibration.lineage}
    return {"version": found.version, "manifest": manifest, **said}


def _record(report: FormReport, lineage: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "form": report.form, "type": report.type, "ready": report.exit_code == 0, "source_digest": report.source_digest, **lineage,
        "checks": [asdict(check) for check in report.checks],
        "verdict": None if report.verdict is None else report.verdict.to_json(), "posttrain": posttrain.__version__,
    }  # fmt: skip


def _write_gguf(folder: Path, made: Original, type_: str) -> None:
    family_of(made.config)
    asked = made.text.chat_ids([{"role": "user", "content": "hello"}]) if made.text.has_template else None
    bos = made.text.special.bos
    add_bos = bos is not None and (asked or made.text.text_ids("hello"))[:1] == [bos]
    header = header_of(made.config, made.tokenizer, made.text.special.stops, add_bos=add_bos)
    write_gguf(folder / GGUF_FILE, made.folder, made.config, header, type_)


def _read_gguf(folder: Path, made: Original, type_: str) -> FormView:
    header = read_header(folder / GGUF_FILE)
    expected = {key: value for key, (_, value) in numbers_of(made.config).items()}
    said = {key: value for key, (_, value) in header.numbers.items()}
    tensors = read_tensors(folder / GGUF_FILE, made.config)
    composes = "NFC" not in str(made.tokenizer.backend_tokenizer.normalizer)
    return FormView(GgufText(header), tensors, lambda _, tensor: bound_of(tensor, type_), (expected, said), composes)


def _write_compressed(folder: Path, made: Original, type_: str) -> None:
    _copy_beside(made.folder, folder)
    write_compressed(folder, made.folder, read_json(made.folder / "config.json"), type_)


def _read_compressed(folder: Path, made: Original, type_: str) -> FormView:
    stored = StoredModel(made.folder)
    dtypes = {name: stored.tensor(name).dtype for name in stored.names}
    tensors = read_compressed(folder, made.config.tie_word_embeddings)
    text, numbers = _read_beside(folder, made)
    return FormView(text, tensors, lambda name, tensor: compressed_bound(type_, name, tensor, dtypes[name]), numbers)


def _write_fitted(method: str, folder: Path, made: Original, type_: str) -> None:
    given, config = _texts(made), read_json(made.folder / "config.json")
    _copy_beside(made.folder, folder)
    write_fitted(folder, made.folder, config, (method, type_), given)
    _copy_beside(made.folder, unrounded(given))


def _read_fitted(method: str, folder: Path, made: Original, type_: str) -> FormView:
    given, scaled = _texts(made), unrounded(_texts(made)) if method == "awq" else None
    tensors = read_compressed(folder, made.config.tie_word_embeddings)
    text, numbers = _read_beside(folder, made)
    bound = partial(fitted_bound, (method, type_), stored=StoredModel(made.folder).dtype)
    more = (
        partial(check_fit, made.folder, tensors, type_, given)
        if scaled is None
        else partial(check_scales, made.folder, scaled, given)
    )
    return FormView(text, tensors, bound, numbers, rounded=scaled, more=[more])


def _texts(made: Original) -> Calibration:
    assert made.calibration is not None, "the command asks for them"
    return made.calibration


def _write_safetensors(folder: Path, made: Original, type_: str) -> None:
    _copy_beside(made.folder, folder)
    stored, writer = StoredModel(made.folder), ShardWriter(folder)
    for name in stored.names:
        writer.add(name, stored.tensor(name, getattr(torch, type_)))
    writer.close()
    config = read_json(folder / "config.json")
    for part in (config, config.get("text_config", {})):
        for key in {"dtype", "torch_dtype"} & set(part):
            part[key] = type_
    write_json(folder / "config.json", config)


def _read_safetensors(folder: Path, made: Original, type_: str) -> FormView:
    stored = StoredModel(folder)
    rounding = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8}[type_]
    tensors = {name: stored.tensor(name, torch.float32) for name in stored.names}
    text, numbers = _read_beside(folder, made)
    return FormView(text, tensors, lambda _, tensor: tensor.abs() * rounding + 2**-25, numbers)


def _read_beside(folder: Path, made: Original) -> tuple[FolderText, tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """What stands beside the weights of a written folder: its prompts, and the numbers expected and said."""
    written = original(folder)
    return written.text, (_architecture(made.config.to_dict()), _architecture(written.config.to_dict()))


def _architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """All that a config says but how weights are stored, and who wrote it; parts of it by the path of their keys."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and key not in _STORAGE:
            found |= {f"{key}.{inner}": what for inner, what in _architecture(cast("dict[str, Any]", value)).items()}
        elif key not in _STORAGE:
            found[key] = value
    return found


_IN_GROUPS = {"w4g128": 0.7, "w4g64": 0.7, "w4g32": 0.7}
EXPORT_FORMS: Mapping[str, ExportForm] = {
    "gguf": ExportForm({"q8_0": 0.9, "f16": 0.99}, _write_gguf, _read_gguf),
    "int8": ExportForm({"int8": 0.9}, _write_compressed, _read_compressed),
    "fp8": ExportForm({"fp8": 0.8}, _write_compressed, _read_compressed),
    "awq": ExportForm(_IN_GROUPS, partial(_write_fitted, "awq"), partial(_read_fitted, "awq"), fitted=True),
    "gptq": ExportForm(_IN_GROUPS, partial(_write_fitted, "gptq"), partial(_read_fitted, "gptq"), fitted=True),
    "safetensors": ExportForm(
        {"bfloat16": 0.9, "float16": 0.98, "float32": 1.0}, _write_safetensors, _read_safetensors
    ),
}
"""`--to` → how it is written, read again, and held to its source."""
