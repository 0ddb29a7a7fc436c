import json

import pytest
import torch
from safetensors.torch import load_file

from posttrain.data.dataset import sequences
from posttrain.data.load import load_sft
from posttrain.errors import DataError
from posttrain.models.batch import pack
from posttrain.models.export import merge_into, save_policy
from posttrain.models.load import load_config, load_policy, load_tokenizer
from posttrain.models.vocabulary import add_tokens
from posttrain.pipeline.data_checks import lint_keys

NEW = ["<new1>", "<new2>"]
ROW = {
    "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "<new1> ok <new2>"}],
}


@pytest.fixture
def keys_with_new(keys_of, tmp_path):
    """Keys of a stage whose data uses two tokens that its tokenizer has and its embedding has not."""
    import shutil

    def make(architecture, **options):
        keys = keys_of(architecture, **options)
        folder = tmp_path / f"base-{architecture}"
        if not folder.exists():
            shutil.copytree(keys.base_model, folder)
            tokenizer = load_tokenizer(keys.model_copy(update={"added_tokens": []}))
            add_tokens(tokenizer, NEW)
            tokenizer.save_pretrained(folder)
        (tmp_path / "rows.jsonl").write_text(3 * (json.dumps(ROW) + "\n"))
        dataset = keys.datasets[0].model_copy(update={"path": str(tmp_path / "rows.jsonl")})
        return keys.model_copy(update={"base_model": str(folder), "datasets": [dataset]})

    return make


def test_tokens_beyond_the_embedding_are_named_before_training_with_the_key_that_mends_it(keys_with_new):
    keys = keys_with_new("llama")
    message = r"rows.jsonl:1: the tokenizer gives '<new1>' the id 288, .* only 288 rows; set added_tokens: .*<new2>"
    with pytest.raises(DataError, match=message):
        lint_keys(keys, {})
    lint_keys(keys.model_copy(update={"added_tokens": NEW}), {})


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
@pytest.mark.parametrize("adapter", ["none", "lora", "qlora"])
def test_added_tokens_start_at_the_mean_are_trained_and_exported(architecture, adapter, keys_with_new, tmp_path):
    options = {"adapter": adapter, "load_in_4bit": adapter == "qlora", "lora_r": 4, "added_tokens": NEW}
    keys = keys_with_new(architecture, **options)
    policy = load_policy(keys)
    head = policy.base.get_output_embeddings()
    given = load_file(f"{keys.base_model}/model.safetensors")
    for end, name in ((policy.base.get_input_embeddings(), "model.embed_tokens.weight"), (head, "lm_head.weight")):
        rows = getattr(end, "modules_to_save", {"default": end})["default"].weight.detach()
        assert rows.shape[0] == 290
        expected = given.get(name, given["model.embed_tokens.weight"]).mean(0)
        torch.testing.assert_close(rows[288:], expected.expand(2, -1), atol=1e-5, rtol=1e-4)
    data = load_sft(keys, policy.tokenizer)
    optimizer = torch.optim.SGD([parameter for _, parameter in policy.trainable()], lr=0.5)
    policy.model.train()
    batch = pack([list(sequences(row)) for row in data.rows])
    (-policy.score(batch).logp_M.mean()).backward()
    optimizer.step()
    report = save_policy(policy, tmp_path / "out/model", keys)
    assert report.relative < 1e-4
    exported = load_file(tmp_path / "out/model/model.safetensors")["model.embed_tokens.weight"]
    assert exported.shape[0] == 290
    assert (exported[288] - given["model.embed_tokens.weight"].mean(0)).abs().max() > 1e-5
    next_stage = keys.model_copy(update={"base_model": str(tmp_path / "out/model")})
    assert load_config(next_stage).vocab_size == len(load_tokenizer(next_stage)) == 290
    if adapter != "none":
        merge_into(tmp_path / "again", keys.base_model, tmp_path / "out/adapter", keys)


def test_tokens_that_the_tokenizer_lacks_are_added_whole(keys_of):
    tokenizer = load_tokenizer(keys_of("llama", added_tokens=["<tool>", "<|im_end|>"]))
    assert tokenizer("a<tool>b")["input_ids"].count(288) == 1
    assert len(tokenizer) == 289
