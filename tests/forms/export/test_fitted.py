import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from posttrain.cli.app import main
from posttrain.errors import ConfigError, DataError, MissingExtraError, ModelError
from posttrain.files import digest_file, digest_tree
from posttrain.forms.export import fitted
from posttrain.forms.export.export import EXPORT_FORMS, export_model, judged, original
from posttrain.forms.export.fitted import PYTHON, fitted_bound, read_calibration
from posttrain.forms.found import FoundModel
from posttrain.registry.manifest import Manifest
from posttrain.registry.registry import Registry

TYPE = "w4g32"
NAME = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.1.post_attention_layernorm.weight"


METHODS = pytest.mark.parametrize("method", ["gptq", pytest.param("awq", marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def written(quantiser, learned, texts, tmp_path_factory):
    """`written(method)`: the source, the folder that the process made of it, and what is read of that."""
    done = {}

    def make(method):
        if method not in done:
            scratch, folder = (tmp_path_factory.mktemp(f"{method}-{part}") for part in ("scratch", "folder"))
            source = original(learned)
            made = replace(source, calibration=read_calibration(texts, source.tokenizer, scratch))
            EXPORT_FORMS[method].write(folder, made, TYPE)
            done[method] = (made, folder, EXPORT_FORMS[method].read(folder, made, TYPE))
        return done[method]

    return make


def failed(report):
    return {check.name: check.seen for check in report.checks if not check.passed}


@METHODS
def test_a_fitted_form_is_the_same_model(method, written):
    made, folder, view = written(method)
    report = judged(made, view, (method, TYPE), folder, None)
    assert failed(report) == {} and report.exit_code == 0
    assert [check.name for check in report.checks][-2:] == [{"gptq": "fit", "awq": "scales"}[method], "greedy answers"]
    stored = load_file(folder / "model.safetensors")
    # Eight numbers of 4 bits in each of 32.
    assert stored[f"{NAME}_packed"].dtype == torch.int32 and stored[f"{NAME}_packed"].shape == (128, 64 // 8)
    assert stored[f"{NAME}_scale"].shape == (128, 64 // 32)


def test_a_source_whose_way_of_sampling_contradicts_itself_is_fitted_and_keeps_it(quantiser, learned, texts, tmp_path):
    source = shutil.copytree(learned, tmp_path / "source")
    said = source / "generation_config.json"
    said.write_text(json.dumps(json.loads(said.read_text()) | {"temperature": 0.7}))
    report = export_model(FoundModel(source), tmp_path / "out", "gptq", TYPE, None, texts)
    assert failed(report) == {} and report.exit_code == 0
    assert (tmp_path / "out" / "generation_config.json").read_text() == said.read_text()


def test_gptq_errs_less_than_nearest_rounding_on_the_texts(written):
    made, folder, view = written("gptq")
    (fit,) = [check() for check in view.more]
    assert fit.passed and float(fit.seen.split("is left ")[1].split()[0]) < 0.6
    source = fitted.read_model(fitted.ModelKeys(base_model=str(made.folder)), torch.float32)
    nearest = {
        name: fitted._nearest(source.get_parameter(name).detach(), 32) if f"{name}_packed" in load_file(folder / "model.safetensors") else tensor
        for name, tensor in view.tensors.items()
    }  # fmt: skip
    none = fitted.check_fit(
        made.folder, {"model.norm.weight": view.tensors["model.norm.weight"]}, TYPE, made.calibration
    )
    assert not none.passed and "no layer is compressed" in none.seen
    same = fitted.check_fit(made.folder, nearest, TYPE, made.calibration)
    assert "is left 1.00 on average and at most 1.00" in same.seen


def turned(tensors):
    return {**tensors, NAME: tensors[NAME].roll(1, 0)}


def coarse(tensors):
    """Every second step only, as of 3 bits."""
    step = fitted._largest(tensors[NAME], 32) / 4
    return {**tensors, NAME: (tensors[NAME] / step).round() * step}


def missing(tensors):
    return {name: tensor for name, tensor in tensors.items() if name != NAME}


def blank(tensors):
    return {**tensors, NAME: tensors[NAME] * float("nan")}


FAULTS = {
    turned: {"gptq": "tensors", "awq": "tensors"},
    coarse: {"gptq": "fit", "awq": "tensors"},
    missing: {"gptq": "tensors", "awq": "tensors"},
    blank: {"gptq": "tensors", "awq": "tensors"},
}


@METHODS
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_numbers_fail_by_name(fault, method, written):
    made, folder, view = written(method)
    planted = fault(view.tensors)
    more = [lambda: fitted.check_fit(made.folder, planted, TYPE, made.calibration)] if method == "gptq" else view.more
    report = judged(made, replace(view, tensors=planted, more=more), (method, TYPE), folder, None)
    assert list(failed(report)) == [FAULTS[fault][method]] and report.exit_code == 1


def another_template(folder):
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("assistant", "model"))


def another_stop(folder):
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": 5}))


def another_base(folder):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 0.1}))


@pytest.mark.parametrize(
    ("fault", "check"),
    [(another_template, "chat template"), (another_stop, "special ids"), (another_base, "numbers")],
)
def test_a_planted_fault_beside_the_weights_fails_by_name(fault, check, written, tmp_path):
    made, folder, _ = written("gptq")
    shutil.copytree(folder, tmp_path / "planted")
    fault(tmp_path / "planted")
    view = EXPORT_FORMS["gptq"].read(tmp_path / "planted", made, TYPE)
    assert check in failed(judged(made, view, ("gptq", TYPE), tmp_path / "planted", None))


@pytest.mark.slow
def test_a_scale_that_stands_on_one_side_only_fails(written, tmp_path):
    """One of 64 channels is 5 % off before it is rounded, and what was written agrees with that."""
    made, folder, view = written("awq")
    shutil.copytree(view.rounded, tmp_path / "planted")
    path = tmp_path / "planted" / "model.safetensors"
    scaled = load_file(path)
    scaled[NORM][3] *= 1.05
    save_file(scaled, path, metadata={"format": "pt"})
    more = [lambda: fitted.check_scales(made.folder, tmp_path / "planted", made.calibration)]
    planted = replace(view, tensors={**view.tensors, NORM: scaled[NORM]}, rounded=tmp_path / "planted", more=more)
    assert list(failed(judged(made, planted, ("awq", TYPE), folder, None))) == ["scales"]


@pytest.mark.slow
def test_a_version_that_is_exported_says_which_texts_it_was_fitted_to(quantiser, learned, texts, tmp_path):
    book, out = Registry(tmp_path / "registry"), tmp_path / "out"
    made = Manifest("sft", {"model": "sha256:base"}, {"model": digest_tree(learned)})
    book.register("words", learned, made)
    book.close()
    command = ["export", "words@1", "--to", "gptq", "--type", TYPE, "--calibration", str(texts), "--without-scores"]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--out", str(out), "--registry", str(tmp_path / "registry")])
    assert ended.value.code == 0
    said = json.loads((out / "form.json").read_text())["calibration"]
    assert (said["file"], said["rows"], said["rows_in_file"]) == ("texts.jsonl", 24, 24)
    assert said["digest"] == digest_file(texts) and said["tokens"] > 240 and said["ids_digest"].startswith("sha256:")
    book = Registry(tmp_path / "registry")
    assert dict(book.show("words", 1).tags) == {
        "export.gptq.w4g32": digest_tree(out),
        "export.gptq.w4g32.calibration": digest_file(texts),
    }
    book.close()
    assert not list(out.glob("recipe*"))


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_without_the_environment_one_line_says_how_to_make_it(method, learned, texts, tmp_path, monkeypatch):
    monkeypatch.setenv(PYTHON, str(tmp_path / "bin" / "python"))
    with pytest.raises(MissingExtraError, match="make setup-export"):
        export_model(FoundModel(learned), tmp_path / "out", method, TYPE, None, texts)
    assert not (tmp_path / "out").exists()


def test_a_process_that_fails_is_one_line_with_its_reason(learned, texts, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'RuntimeError: no room' >&2\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setenv(PYTHON, str(python))
    with pytest.raises(ModelError, match=r"llm-compressor \(.*python\) ended with 3: RuntimeError: no room"):
        export_model(FoundModel(learned), tmp_path / "out", "gptq", TYPE, None, texts)
    assert not (tmp_path / "out").exists()


def test_rows_that_the_groups_do_not_divide_are_refused(learned, texts, tmp_path, monkeypatch):
    monkeypatch.setenv(PYTHON, sys.executable)
    with pytest.raises(ModelError, match=r"has rows of 64, and groups of 128 do not divide them: take a smaller group"):
        export_model(FoundModel(learned), tmp_path / "out", "awq", "w4g128", None, texts)


def test_texts_are_asked_for_where_they_are_needed_and_only_there(learned, texts, tmp_path):
    with pytest.raises(ConfigError, match=r"--to gptq is fitted to texts: .*--calibration FILE"):
        export_model(FoundModel(learned), tmp_path / "out", "gptq", TYPE, None)
    with pytest.raises(ConfigError, match="--to int8 is fitted to no texts: leave out --calibration"):
        export_model(FoundModel(learned), tmp_path / "out", "int8", "int8", None, texts)


def test_the_first_rows_of_the_texts_are_read_and_cut(tokenizer, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(fitted, "NUM_ROWS", 5)
    monkeypatch.setattr(fitted, "LONGEST", 7)
    given = read_calibration(texts, tokenizer, tmp_path)
    assert [len(row) for row in given.rows] == [7] * 5 and given.lineage["rows_in_file"] == 24
    first = json.loads(texts.read_text().splitlines()[0])["messages"]
    assert list(given.rows[0]) == tokenizer(tokenizer.apply_chat_template(first, tokenize=False))["input_ids"][:7]
    with pytest.raises(DataError, match=r"none\.jsonl"):
        read_calibration(tmp_path / "none.jsonl", tokenizer, tmp_path)


@pytest.mark.parametrize("size", [32, 128])
def test_a_bound_holds_and_is_what_4_bits_round(size):
    """Numbers of all sizes beside each other, down to those that the form rounds to nothing."""
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(64, 1024, generator=generator) * 10 ** (-6 * torch.rand(64, 1024, generator=generator))
    held = fitted._nearest(tensor, size)
    assert len((held / (fitted._largest(tensor, size) / 7.5)).round().unique()) == 16
    share = (held - tensor).abs() / fitted_bound(("awq", f"w4g{size}"), NAME, tensor, torch.float32)
    assert 0.9 < share.max() <= 1
    assert fitted_bound(("awq", f"w4g{size}"), "model.norm.weight", torch.ones(3), torch.float32).max() < 1e-5
