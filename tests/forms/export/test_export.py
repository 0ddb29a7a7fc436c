import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from posttrain.config.pipeline import SuiteKeys
from posttrain.errors import GateError, ModelError
from posttrain.evals.suite import load_suite
from posttrain.forms.export.export import EXPORT_FORMS, GGUF_FILE, export_model, judged, original
from posttrain.forms.export.gguf_file import header_of, write_gguf
from posttrain.forms.export.scores import FormScores
from posttrain.forms.found import FoundModel

FAMILIES = {
    "qwen3": {},
    "qwen2": {"use_sliding_window": False},
    "llama": {},
    "mistral": {"sliding_window": None},
    "gemma2": {},
    "gemma3_text": {"num_hidden_layers": 6},
}


def failed(report):
    return {check.name: check.seen for check in report.checks if not check.passed}


def test_greedy_answers_are_the_likeliest_whatever_the_sources_way_of_sampling(model_dir, tmp_path):
    source = tmp_path / "qwen3"
    shutil.copytree(model_dir("qwen3"), source)
    said = json.loads((source / "generation_config.json").read_text())
    ways = {"repetition_penalty": 1.8, "no_repeat_ngram_size": 2, "num_beams": 2, "min_new_tokens": 4}
    (source / "generation_config.json").write_text(json.dumps(said | ways))
    report = export_model(FoundModel(source), tmp_path / "out", "safetensors", "float32", None)
    assert failed(report) == {} and report.exit_code == 0
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == said | ways


EACH = [(family, type_) for family in FAMILIES for type_ in ("f16", "q8_0")]
FAST = {("qwen3", "f16"), ("qwen3", "q8_0"), ("llama", "q8_0"), ("gemma2", "q8_0")}


@pytest.mark.parametrize(
    ("family", "type_"), [pytest.param(*pair, marks=() if pair in FAST else pytest.mark.slow) for pair in EACH]
)
def test_a_gguf_is_the_same_model(family, type_, model_dir, tmp_path):
    source = model_dir(family, **FAMILIES[family])
    report = export_model(FoundModel(source), tmp_path / "out", "gguf", type_, None)
    assert failed(report) == {} and report.exit_code == 0 and len(report.checks) == 7
    record = json.loads((tmp_path / "out" / "form.json").read_text())
    assert record["ready"] and record["source_digest"].startswith("sha256:") and record["verdict"] is None
    # Another reader's word for the numbers of the architecture.
    found, config = (
        AutoConfig.from_pretrained(tmp_path / "out", gguf_file=GGUF_FILE),
        AutoConfig.from_pretrained(source),
    )
    for key in (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "vocab_size",
    ):
        assert getattr(found, key) == getattr(config, key)
    assert found.rms_norm_eps == pytest.approx(config.rms_norm_eps)


@pytest.mark.parametrize(
    ("form", "type_"), [("int8", "int8"), ("fp8", "fp8"), ("safetensors", "bfloat16"), ("safetensors", "float32")]
)
def test_other_forms_are_the_same_model(form, type_, model_dir, tmp_path):
    report = export_model(FoundModel(model_dir("llama")), tmp_path / "out", form, type_, None)
    assert failed(report) == {} and report.digest.startswith("sha256:")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        ours, theirs = (
            m.eval()(input_ids=ids).logits.float()
            for m in (model, AutoModelForCausalLM.from_pretrained(model_dir("llama")))
        )
    assert (ours - theirs).abs().max() < (0.15 if form == "fp8" else 0.05) * theirs.abs().max()


def test_a_gguf_with_bos_begins_every_prompt_with_it_once(bos_model, tmp_path):
    report = export_model(FoundModel(bos_model), tmp_path / "out", "gguf", "f16", None)
    assert failed(report) == {}


def planted(source, folder, change):
    """The verdict on a GGUF whose header says something else."""
    made = original(source)
    bos = made.text.special.bos
    header = header_of(made.config, made.tokenizer, made.text.special.stops, add_bos=bos is not None)
    folder.mkdir()
    write_gguf(folder / GGUF_FILE, source, made.config, change(header), "f16")
    return judged(made, EXPORT_FORMS["gguf"].read(folder, made, "f16"), ("gguf", "f16"), folder, None)


def without(header, key):
    return replace(header, ids={name: token for name, token in header.ids.items() if name != key})


FAULTS = {
    "another template": (lambda h: replace(h, chat_template=h.chat_template.replace("[assistant]", "[model]")), "chat template"),
    "no template": (lambda h: replace(h, chat_template=None), "chat template"),
    "BOS twice": (lambda h: replace(h, chat_template="{{ bos_token }}" + h.chat_template), "chat template"),
    "no BOS before text": (lambda h: replace(h, flags={**h.flags, "add_bos_token": False}), "plain text"),
    "no EOS": (lambda h: without(h, "eos_token_id"), "special ids"),
    "EOS behind every text": (lambda h: replace(h, flags={**h.flags, "add_eos_token": True}), "plain text"),
    "another EOS": (lambda h: replace(h, ids={**h.ids, "eos_token_id": 0}), "special ids"),
    "another rotary base": (
        lambda h: replace(h, numbers={**h.numbers, "rope.freq_base": ("float32", 5e5)}), "numbers",
    ),
    "other scores of tokens": (
        lambda h: replace(h, vocabulary=replace(h.vocabulary, scores=[-s for s in h.vocabulary.scores])), "plain text",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_fails_by_name(fault, bos_model, tmp_path):
    change, check = FAULTS[fault]
    report = planted(bos_model, tmp_path / "out", change)
    assert check in failed(report) and report.exit_code == 1


@pytest.mark.parametrize("form", ["int8", "fp8", "safetensors"])
def test_another_number_in_the_config_of_a_folder_fails(form, model_dir, tmp_path):
    """No other check sees it: models are compared with the source's own config."""
    made, row = original(model_dir("qwen3")), EXPORT_FORMS[form]
    type_ = next(iter(row.types))
    row.write(tmp_path, made, type_)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    (tmp_path / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    report = judged(made, row.read(tmp_path, made, type_), (form, type_), tmp_path, None)
    assert list(failed(report)) == ["numbers"] and report.exit_code == 1
    assert "rms_norm_eps: 0.1, expected" in failed(report)["numbers"]
    assert "rope_parameters.rope_theta: 500000.0, expected" in failed(report)["numbers"]


@pytest.mark.parametrize("form", EXPORT_FORMS)
def test_a_folder_that_is_quantised_already_is_refused(form, model_dir, texts, tmp_path, monkeypatch):
    monkeypatch.setenv("POSTTRAIN_EXPORT_PYTHON", sys.executable)
    EXPORT_FORMS["fp8"].write(tmp_path, original(model_dir("qwen3")), "fp8")
    row, type_ = EXPORT_FORMS[form], next(iter(EXPORT_FORMS[form].types))
    with pytest.raises(ModelError, match=r"holds its weights quantised \(compressed-tensors in config.json\)"):
        export_model(FoundModel(tmp_path), tmp_path / "out", form, type_, None, texts if row.fitted else None)
    assert not (tmp_path / "out").exists()


def test_a_bos_that_the_source_does_not_write_fails(model_dir, tmp_path):
    """A template without BOS, and a file that says to add one."""
    report = planted(
        model_dir("qwen3"), tmp_path / "out",
        lambda h: replace(h, ids={**h.ids, "bos_token_id": 0}, flags={**h.flags, "add_bos_token": True}),
    )  # fmt: skip
    assert set(failed(report)) == {"chat template", "plain text", "special ids"}


def test_a_tensor_past_the_forms_bound_fails(model_dir, tmp_path):
    made = original(model_dir("qwen3"))
    header = header_of(made.config, made.tokenizer, made.text.special.stops, add_bos=False)
    write_gguf(tmp_path / GGUF_FILE, made.folder, made.config, header, "q8_0")
    view = EXPORT_FORMS["gguf"].read(tmp_path, made, "q8_0")
    name = "model.layers.1.self_attn.k_proj.weight"
    turned = {**view.tensors, name: view.tensors[name].roll(1, 0)}
    report = judged(made, replace(view, tensors=turned), ("gguf", "q8_0"), tmp_path, None)
    assert list(failed(report)) == ["tensors"] and name in failed(report)["tensors"]
    blank = {**view.tensors, name: view.tensors[name] * float("nan")}
    report = judged(made, replace(view, tensors=blank), ("gguf", "q8_0"), tmp_path, None)
    assert (
        list(failed(report)) == ["tensors"] and f"off by nan of what the form may ({name})" in failed(report)["tensors"]
    )
    fewer = {key: tensor for key, tensor in view.tensors.items() if key != name}
    assert "tensors" in failed(judged(made, replace(view, tensors=fewer), ("gguf", "q8_0"), tmp_path, None))


def test_a_refused_form_leaves_a_record_and_no_folder(model_dir, tmp_path, monkeypatch):
    row = EXPORT_FORMS["gguf"]
    broken = replace(row, read=lambda *given: (lambda view: replace(view, tensors={}))(row.read(*given)))
    monkeypatch.setitem(EXPORT_FORMS, "gguf", broken)
    report = export_model(FoundModel(model_dir("qwen3")), tmp_path / "out", "gguf", "f16", None)
    assert report.exit_code == 1 and not (tmp_path / "out").exists() and report.digest == ""
    record = json.loads((tmp_path / "out.refused.json").read_text())
    assert not record["ready"] and [check["name"] for check in record["checks"] if not check["passed"]] == ["tensors"]


def suite_at(folder, count):
    rows = [
        {"id": str(n), "prompt": f"What is {n} plus {n}?", "target": "e", "scorer": "contains"} for n in range(count)
    ]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [(load_suite("sums", folder / "sums.jsonl"), SuiteKeys(path=str(folder / "sums.jsonl"), max_tokens=4))]


def test_the_gates_test_is_part_of_the_form_gate(model_dir, tmp_path):
    scores = FormScores(suite_at(tmp_path, 60), margin=0.3)
    report = export_model(FoundModel(model_dir("qwen3")), tmp_path / "out", "gguf", "q8_0", scores)
    assert report.exit_code == 0 and report.verdict.verdict.value == "PASS"
    assert json.loads((tmp_path / "out" / "form.json").read_text())["verdict"]["verdict"] == "PASS"
    with pytest.raises(GateError, match="sums"):
        export_model(
            FoundModel(model_dir("qwen3")),
            tmp_path / "few",
            "gguf",
            "q8_0",
            FormScores(suite_at(tmp_path, 5), margin=0.02),
        )
    assert not (tmp_path / "few").exists()


@pytest.mark.parametrize(
    ("architecture", "changes", "words"),
    [
        ("mistral", {}, "a sliding window of 6 tokens"),
        ("gemma2", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar 64"),
        ("gpt2", {}, "gpt2 is not among the architectures"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0}},
            "rotary scaling yarn",
        ),
    ],
)
def test_what_the_form_cannot_say_is_refused(architecture, changes, words, model_dir, tmp_path):
    with pytest.raises(ModelError, match=words):
        export_model(FoundModel(model_dir(architecture, **changes)), tmp_path / "out", "gguf", "f16", None)
    assert not (tmp_path / "out").exists()
