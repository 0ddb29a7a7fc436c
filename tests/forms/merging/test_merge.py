import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.config.kinds import STAGE_KINDS
from posttrain.config.resolved import resolved_yaml
from posttrain.errors import ConfigError, ModelError
from posttrain.forms.merging.adapters import trained_on
from posttrain.forms.merging.merge import MergeOptions, merge_models
from posttrain.forms.merging.recipe import read_recipe

PROBE = torch.arange(3, 40)[None]


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=PROBE).logits


def merging(folder, text, models, out="out", **options):
    path = folder / "merge.yaml"
    path.write_text(text)
    report = merge_models(read_recipe(path), folder / out, lambda name: models[name], MergeOptions(**options))
    return folder / out, report


LINEAR = "merge_method: linear\nmodels:\n- {model: a, parameters: {weight: W}}\n- {model: b, parameters: {weight: V}}\n"


@pytest.fixture
def pair(relative_of):
    return {"a": relative_of("qwen3", 1), "b": relative_of("qwen3", 2)}


def test_weights_one_and_zero_give_the_first_model_to_the_bit(pair, tmp_path):
    out, report = merging(tmp_path, LINEAR.replace("W", "1").replace("V", "0"), pair)
    ours, first = (load_file(folder / "model.safetensors") for folder in (out, pair["a"]))
    assert ours.keys() == first.keys() and all(torch.equal(ours[name], first[name]) for name in first)
    record = json.loads((out / "posttrain.json").read_text())
    assert record["parents"] == list(report.parents.values()) and len(set(record["parents"])) == 2


def test_a_quantised_model_is_refused(pair, tmp_path):
    quantised = tmp_path / "b"
    shutil.copytree(pair["b"], quantised)
    config = json.loads((quantised / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (quantised / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"holds its weights quantised \(fp8 in config.json\)"):
        merging(tmp_path, LINEAR.replace("W", "1").replace("V", "0"), pair | {"b": quantised})
    assert not (tmp_path / "out").exists()


def test_shards_hold_the_same_tensors_and_load(pair, tmp_path):
    text = LINEAR.replace("W", "1").replace("V", "2")
    whole, _ = merging(tmp_path, text, pair)
    shards, _ = merging(tmp_path, text, pair, "shards", shard_bytes=60_000)
    files = sorted(shards.glob("*.safetensors"))
    assert len(files) > 3 and files[0].name.startswith("model-00001-of-")
    one, many = (AutoModelForCausalLM.from_pretrained(folder) for folder in (whole, shards))
    assert torch.equal(logits(one), logits(many))
    assert AutoTokenizer.from_pretrained(shards).chat_template


def test_masks_are_those_of_the_seed(pair, model_dir, tmp_path):
    text = "merge_method: dare_ties\nbase_model: base\nparameters: {weight: 0.5, density: 0.5}\nmodels: [{model: a}, {model: b}]\n"
    models = pair | {"base": model_dir("qwen3")}
    outs = [merging(tmp_path, text, models, f"out{n}", seed=seed)[0] for n, seed in enumerate((1, 1, 2))]
    one, again, other = (load_file(out / "model.safetensors") for out in outs)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_layers_are_stacked_with_their_entries_of_the_config(pair, tmp_path):
    text = ("merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [0, 2]}]\n"
            "- sources: [{model: b, layer_range: [1, 2]}]\n")  # fmt: skip
    out, _ = merging(tmp_path, text, pair)
    config = json.loads((out / "config.json").read_text())
    assert config["num_hidden_layers"] == len(config["layer_types"]) == 3
    model = AutoModelForCausalLM.from_pretrained(out)
    expected = load_file(pair["b"] / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(model.state_dict()["model.layers.2.mlp.up_proj.weight"], expected)
    with pytest.raises(ConfigError, match=r"layer_range \[1, 3\]: b has only 2 layers"):
        merging(tmp_path, text.replace("[1, 2]", "[1, 3]"), pair, "more")


def test_what_is_not_finite_is_never_written(pair, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    tensors = load_file(pair["a"] / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    for file in pair["a"].iterdir():
        if file.suffix != ".safetensors":
            (broken / file.name).write_bytes(file.read_bytes())
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model.norm.weight: the merged tensor is not finite"):
        merging(tmp_path, LINEAR.replace("W", "1").replace("V", "1"), pair | {"a": broken})
    assert not (tmp_path / "out").exists()


def test_models_of_two_architectures_are_refused(pair, model_dir, tmp_path):
    with pytest.raises(ConfigError, match=r"different architectures .*a: qwen3, b: llama"):
        merging(tmp_path, LINEAR.replace("W", "1").replace("V", "1"), pair | {"b": model_dir("llama")})


@pytest.fixture
def grown(pair, tmp_path):
    """Model b with one more token, and a row for it."""
    folder = tmp_path / "grown"
    model, tokenizer = (kind.from_pretrained(pair["b"]) for kind in (AutoModelForCausalLM, AutoTokenizer))
    tokenizer.add_tokens(["<think>"])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_union_of_tokens_gives_a_token_the_row_of_the_model_that_has_it(pair, grown, tmp_path):
    text = LINEAR.replace("W", "1").replace("V", "3")
    with pytest.raises(ConfigError, match=r"tokenizer_source: b has other tokens than a"):
        merging(tmp_path, text, pair | {"b": grown})
    out, _ = merging(tmp_path, text + "tokenizer_source: union\n", pair | {"b": grown})
    new = AutoTokenizer.from_pretrained(out).convert_tokens_to_ids("<think>")
    theirs = load_file(grown / "model.safetensors")["model.embed_tokens.weight"]
    row = AutoTokenizer.from_pretrained(grown).convert_tokens_to_ids("<think>")
    ours = load_file(out / "model.safetensors")["model.embed_tokens.weight"]
    torch.testing.assert_close(ours[new], theirs[row])
    assert AutoModelForCausalLM.from_pretrained(out).config.vocab_size == len(ours)
    base, _ = merging(tmp_path, text + "tokenizer_source: base\n", pair | {"b": grown}, "base")
    assert len(load_file(base / "model.safetensors")["model.embed_tokens.weight"]) == 288


@pytest.fixture
def adapters(model_dir, tmp_path):
    found = {"base": model_dir("qwen3")}
    for place, name in enumerate(("a", "b")):
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(found["base"]),
            LoraConfig(
                task_type="CAUSAL_LM", r=4, lora_alpha=8, use_rslora=bool(place), target_modules=["q_proj", "down_proj"]
            ),
        )
        torch.manual_seed(place)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(tmp_path / name)
        found[name] = tmp_path / name
    return found


OF_ADAPTERS = ("merge_method: ties\nbase_model: base\nmodels:\n- {model: a, parameters: {weight: 1, density: 0.6}}\n"
               "- {model: b, parameters: {weight: 0.5}}\n")  # fmt: skip


def test_merging_adapters_is_merging_the_merged_models(adapters, tmp_path):
    out, _ = merging(tmp_path, OF_ADAPTERS, adapters)
    models = dict(adapters)
    for name in "ab":
        base = AutoModelForCausalLM.from_pretrained(adapters["base"])
        whole = PeftModel.from_pretrained(base, adapters[name]).merge_and_unload()
        whole.save_pretrained(tmp_path / f"whole-{name}")
        AutoTokenizer.from_pretrained(adapters["base"]).save_pretrained(tmp_path / f"whole-{name}")
        models[name] = tmp_path / f"whole-{name}"
    expected, _ = merging(tmp_path, OF_ADAPTERS, models, "expected")
    one, other = (load_file(folder / "model.safetensors") for folder in (out, expected))
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-5, rtol=1e-5)


def test_adapters_merge_to_one_adapter_whose_energy_is_stated(adapters, tmp_path):
    text = OF_ADAPTERS.replace("ties", "task_arithmetic")
    out, report = merging(tmp_path, text, adapters, adapter_rank=8)
    assert report.factored.energy == pytest.approx(1.0, abs=1e-9)  # a sum of two of rank 4
    whole, _ = merging(tmp_path, text, adapters, "whole")
    one = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(adapters["base"]), out)
    expected = logits(AutoModelForCausalLM.from_pretrained(whole))
    torch.testing.assert_close(logits(one), expected, atol=1e-3, rtol=1e-3)
    _, half = merging(tmp_path, text, adapters, "half", adapter_rank=2)
    update = load_file(whole / "model.safetensors"), load_file(adapters["base"] / "model.safetensors")
    names = [name for name in update[0] if "q_proj" in name or "down_proj" in name]
    squares = [torch.linalg.svdvals((update[0][n] - update[1][n]).double()).square() for n in names]
    share = sum(s[:2].sum() for s in squares) / sum(s.sum() for s in squares)
    assert half.factored.energy == pytest.approx(float(share), rel=1e-4) and half.factored.energy < 0.95
    assert half.factored.least < half.factored.energy


def test_a_merge_that_moves_the_base_too_is_no_adapter(adapters, tmp_path):
    text = LINEAR.replace("W", "1").replace("V", "1") + "base_model: base\nparameters: {normalize: false, weight: 0}\n"
    with pytest.raises(ConfigError, match=r"this merge also changes .*which no adapter adapts"):
        merging(tmp_path, text, adapters, adapter_rank=4)


def test_an_adapter_of_a_base_in_4_bits_is_not_added_to_another(adapters, tmp_path):
    (adapters["a"] / "posttrain.json").write_text(json.dumps({"base_digest": None, "load_in_4bit": True}))
    with pytest.raises(ModelError, match=r"trained on a base in 4 bits.*--onto dequantized"):
        merging(tmp_path, OF_ADAPTERS, adapters)


def test_a_fault_is_said_before_the_first_tensor_is_read(pair, model_dir, tmp_path):
    text = "merge_method: della\nbase_model: base\nparameters: {weight: 1, epsilon: 0.4}\nmodels: [{model: a, parameters: {density: 0.5}}, {model: b, parameters: {density: [0.5, 0.2]}}]\n"
    models = pair | {"base": model_dir("qwen3")}
    with pytest.raises(ConfigError, match=r"epsilon: got 0.4 with density 0.2 for model.layers.1.* of b"):
        merging(tmp_path, text, models)
    with pytest.raises(ConfigError, match=r"density: got 1.5"):
        merging(tmp_path, text.replace("0.5, 0.2", "0.5, 1.5"), models)
    with pytest.raises(ModelError, match=r"mlp.* shapes differ: .*'b'"):
        merging(
            tmp_path, LINEAR.replace("W", "1").replace("V", "1"), pair | {"b": model_dir("qwen3", intermediate_size=96)}
        )
    with pytest.raises(ConfigError, match=r"merge.yaml:1: chat_template: expected the text of a Jinja template"):
        merging(tmp_path, "chat_template: chatml\n" + LINEAR.replace("W", "1").replace("V", "1"), pair)


def test_an_adapter_for_the_given_base_loads_that_as_the_first_stage_of_a_policy_did(pair, tmp_path):
    """A reward model that is trained before it, over the base in 4 bits, says nothing of it."""
    for number, (kind, base, adapter) in enumerate(
        (("reward_model", "a", "qlora"), ("sft", "a", "lora"), ("dpo", "b", "lora")), start=1
    ):
        keys = STAGE_KINDS[kind].keys(base_model=str(pair[base]), datasets=[{"path": "rows.jsonl"}], adapter=adapter)
        stage = tmp_path / f"stages/{number:02d}-{kind}"
        (stage / "adapter_total").mkdir(parents=True)
        (stage / "config.yaml").write_text(resolved_yaml(keys, tmp_path, stage))
    (tmp_path / "rows.jsonl").touch()
    keys = trained_on(stage / "adapter_total")
    assert (keys.base_model, keys.load_in_4bit) == (str(pair["a"]), False)
