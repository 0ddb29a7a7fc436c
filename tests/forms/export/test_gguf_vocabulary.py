import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from transformers import PreTrainedTokenizerFast

from posttrain.errors import ModelError
from posttrain.forms.export.gguf_file import header_of
from posttrain.forms.export.gguf_vocabulary import BYTE, CONTROL, SPLITS, UNKNOWN, UNUSED, rebuilt, vocabulary_of

TEXT = "I'LL don't  12345 größer\n\n x=1;  naïve 東京"


@pytest.mark.parametrize(("pre", "model"), [("qwen2", {}), ("llama-bpe", {"ignore_merges": True})])
def test_a_known_cut_is_named_and_read_again(pre, model, byte_level):
    made = byte_level(SPLITS[pre], **model)
    vocabulary = vocabulary_of(made, 300)
    assert vocabulary.pre == pre and vocabulary.kinds[299] == UNUSED and vocabulary.kinds[2] == CONTROL
    assert rebuilt(vocabulary).encode(TEXT).ids == made(TEXT)["input_ids"]


def test_an_unknown_cut_is_refused(byte_level):
    with pytest.raises(ModelError, match="the way this tokenizer cuts text"):
        vocabulary_of(byte_level(r"\p{N}{1,2}"), 300)
    with pytest.raises(ModelError, match="cuts text"):
        vocabulary_of(byte_level(SPLITS["qwen2"], ignore_merges=True), 300)


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(tokenizer):
    with pytest.raises(ModelError, match="without a row of the embedding"):
        vocabulary_of(tokenizer, 100)


def test_another_kind_of_tokenizer_is_refused():
    core = Tokenizer(WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    with pytest.raises(ModelError, match="of type WordLevel"):
        vocabulary_of(PreTrainedTokenizerFast(tokenizer_object=core), 2)


def test_sentencepiece_is_scored_by_its_merges(bos_model):
    from posttrain.forms.merging.vocabulary import tokenizer_at

    made = tokenizer_at(bos_model)
    vocabulary = vocabulary_of(made, 288)
    assert vocabulary.model == "llama" and not vocabulary.space_prefix
    assert vocabulary.kinds[3] == UNKNOWN and vocabulary.kinds[4] == BYTE
    score = dict(zip(vocabulary.tokens, vocabulary.scores, strict=True))
    assert score["he"] > score["hell"] > score["hello"]
    text = "hello world é <s>  whole"
    assert rebuilt(vocabulary).encode(text).ids == made(text, add_special_tokens=False)["input_ids"]


def test_a_fourth_stop_token_has_no_place(model_dir, tokenizer):
    from transformers import AutoConfig

    with pytest.raises(ModelError, match="stops at 4 tokens"):
        header_of(AutoConfig.from_pretrained(model_dir("qwen3")), tokenizer, [2, 3, 4, 5], add_bos=False)
    assert isinstance(tokenizer.backend_tokenizer.model, BPE)
