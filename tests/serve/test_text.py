"""Streams are the whole text, whatever the tokens; nothing of a stop string gets out."""

import random

import pytest

from posttrain.serve.text import AnswerText, Detokenizer

SENTENCES = ["What is 1 plus 2? The answer is 3.", "naïve — 漢字 🙂🙃 ok", "a\n\n b  c\t", "🙂"]


def whole(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("seed", range(8))
def test_pieces_are_the_whole_text_for_any_tokens(tokenizer, seed):
    chosen = random.Random(seed)
    ids = [chosen.randrange(3, len(tokenizer)) for _ in range(60)]
    detokenizer = Detokenizer(lambda ids: whole(tokenizer, ids))
    pieces = [detokenizer.push(token) for token in ids]
    assert "".join(pieces) + detokenizer.flush() == whole(tokenizer, ids)
    assert any(pieces)


@pytest.mark.parametrize("text", SENTENCES)
def test_no_character_comes_in_parts(tokenizer, text):
    detokenizer = Detokenizer(lambda ids: whole(tokenizer, ids))
    pieces = [detokenizer.push(token) for token in tokenizer(text)["input_ids"]]
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("stops", [("answer",), ("is 3", "x"), ("?", "? The"), ("zzz", "3.!")])
@pytest.mark.parametrize("step", [1, 3, 100])
def test_a_stop_string_is_held_back_until_it_is_none(tokenizer, stops, step):
    text = "What is 1 plus 2? The answer is 3."
    ids = tokenizer(text)["input_ids"]
    ends = [text.find(stop) for stop in stops if stop in text]
    if ends:
        # The engine stops at the token that completes the first of them.
        complete = next(n for n in range(len(ids)) if any(stop in whole(tokenizer, ids[:n]) for stop in stops))
        ids = ids[:complete]
    answer = AnswerText(Detokenizer(lambda ids: whole(tokenizer, ids)), stops, {2})
    said, tokens = "", []
    for at in range(0, len(ids), step):
        last = at + step >= len(ids)
        piece = answer.push(ids[at : at + step], (), ("stop" if ends else "length") if last else None)
        said += piece.text
        tokens += [token.id for token in piece.tokens]
    assert said == (text[: min(ends)] if ends else text)
    assert whole(tokenizer, tokens).startswith(said)
    assert ends or tokens == ids


def test_the_token_that_ends_an_answer_is_no_part_of_it(tokenizer):
    ids = [*tokenizer("yes")["input_ids"], 2]
    answer = AnswerText(Detokenizer(lambda ids: whole(tokenizer, ids), {1}), (), {2})
    piece = answer.push(ids, (), "stop")
    assert (piece.text, [token.id for token in piece.tokens]) == ("yes", ids[:-1])
    assert answer.num_tokens == len(ids)
