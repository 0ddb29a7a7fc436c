"""A tokenizer from elsewhere than the model: trained with, exported, and refused where it does not fit."""

import json
import shutil
from typing import Any

import pytest

from posttrain.errors import ModelError
from posttrain.models.export import merge_into, save_policy
from posttrain.models.load import load_policy, load_tokenizer
from posttrain.models.vocabulary import add_tokens

NEW = ["<new1>", "<new2>"]


@pytest.fixture
def without_tokenizer(keys_of, tmp_path):
    """Keys of a model whose folder has no tokenizer and whose configs name an end of their own, and the folder of another tokenizer."""

    def make(**options):
        keys = keys_of("llama", **options)
        base = shutil.copytree(keys.base_model, tmp_path / "bare")
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (base / file).unlink(missing_ok=True)
        for name in ("config.json", "generation_config.json"):
            config = json.loads((base / name).read_text())
            (base / name).write_text(json.dumps(config | {"eos_token_id": 17, "bos_token_id": 18}))
        tokenizer: Any = load_tokenizer(keys)
        tokenizer.eos_token = "<|endoftext|>"
        tokenizer.save_pretrained(tmp_path / "other")
        return keys.model_copy(update={"base_model": str(base)}), str(tmp_path / "other")

    return make


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_a_tokenizer_of_another_folder_is_trained_with_and_exported(adapter, without_tokenizer, tmp_path):
    keys, other = without_tokenizer(adapter=adapter)
    with pytest.raises(ModelError, match=r"base_model: .*bare has no tokenizer.* or name one in tokenizer_name"):
        load_tokenizer(keys)
    keys = keys.model_copy(update={"tokenizer_name_or_path": other})
    policy = load_policy(keys)
    folder = tmp_path / "stage" / "model"
    save_policy(policy, folder, keys)
    written: Any = load_tokenizer(keys.model_copy(update={"base_model": str(folder), "tokenizer_name_or_path": None}))
    assert written.get_vocab() == policy.tokenizer.get_vocab() and written.eos_token == "<|endoftext|>"
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    turn = written.convert_tokens_to_ids("<|im_end|>")
    assert sorted(ends) == sorted([written.eos_token_id, turn]), "17 is an id of the tokenizer that the model had"
    if adapter == "lora":
        merge_into(tmp_path / "merged", keys.base_model, folder.parent / "adapter", keys)
        assert (tmp_path / "merged" / "tokenizer.json").exists()


def test_a_tokenizer_with_ids_that_the_embedding_lacks_is_refused_before_the_model_is_read(without_tokenizer):
    keys, other = without_tokenizer()
    keys = keys.model_copy(update={"tokenizer_name_or_path": other})
    tokenizer: Any = load_tokenizer(keys)
    add_tokens(tokenizer, NEW)
    tokenizer.save_pretrained(other)
    with pytest.raises(
        ModelError, match=r"other has ids up to 289, .* 288 rows; set added_tokens: \['<new1>'\], which"
    ):
        load_tokenizer(keys)
    grown: Any = load_policy(keys.model_copy(update={"added_tokens": ["<new1>"]}))
    assert grown.base.get_input_embeddings().weight.shape[0] == 290
    with pytest.raises(ModelError, match=r"tokenizer_name_or_path: .*nowhere"):
        load_tokenizer(keys.model_copy(update={"tokenizer_name_or_path": "no/nowhere"}))
