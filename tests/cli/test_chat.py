import io
import shutil
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.cli.app import main
from posttrain.cli.chat import Conversation


def run(*argv):
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in argv])
    return caught.value.code


@pytest.fixture
def pipe(monkeypatch, capsys):
    """Answers to piped lines, and what went to stderr. Line feeds inside an answer are kept apart by a mark."""

    def ask(text, *argv):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        monkeypatch.setattr("typer.echo", lambda message, err=False: (errors if err else answers).append(message))
        answers, errors = [], []
        assert run("chat", *argv) == 0
        return answers, errors

    return ask


def expected_answer(folder, messages, num_tokens):
    """Greedy decoding by transformers."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=num_tokens, do_sample=False, attention_mask=torch.ones_like(ids))
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def user(text):
    return {"role": "user", "content": text}


def test_one_prompt_gives_the_greedy_answer_of_transformers(model_dir, capsys):
    folder = model_dir("qwen3")
    assert run("chat", folder, "--prompt", "What is 2 plus 3?", "--temperature", 0, "--max-tokens", 8) == 0
    assert capsys.readouterr().out == expected_answer(folder, [user("What is 2 plus 3?")], 8) + "\n"


def test_the_history_and_the_system_message_are_part_of_the_question(pipe, model_dir):
    folder = model_dir("qwen3")
    options = (folder, "--temperature", 0, "--max-tokens", 6, "--system", "Be brief.")
    answers, errors = pipe("What is 2 plus 3?\n\nWhy?\n", *options)
    system = {"role": "system", "content": "Be brief."}
    first = expected_answer(folder, [system, user("What is 2 plus 3?")], 6)
    history = [system, user("What is 2 plus 3?"), {"role": "assistant", "content": first}]
    assert answers == [first, expected_answer(folder, [*history, user("Why?")], 6)]
    assert errors == []


def test_reset_forgets_and_exit_ends(pipe, model_dir):
    answers, _ = pipe(
        "Why?\nWhy?\n/reset\nWhy?\n/exit\nWhy?\n", model_dir("qwen3"), "--temperature", 1, "--max-tokens", 12
    )
    assert len(answers) == 3
    assert answers[0] == answers[2] != answers[1]


def test_the_seed_decides_the_answer(pipe, model_dir):
    options = (model_dir("qwen3"), "--temperature", 1, "--max-tokens", 12)
    assert pipe("Why?\n", *options, "--seed", 1) == pipe("Why?\n", *options, "--seed", 1)
    assert pipe("Why?\n", *options, "--seed", 1) != pipe("Why?\n", *options, "--seed", 2)


def test_a_base_without_a_template_goes_on_with_the_text(pipe, model_dir, tmp_path):
    folder = shutil.copytree(model_dir("qwen3"), tmp_path / "raw")
    (folder / "chat_template.jinja").unlink()
    answers, [notice] = pipe("2 + 2 =\n", folder, "--temperature", 0, "--max-tokens", 5)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([tokenizer("2 + 2 =")["input_ids"]])
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(ids))
    assert answers == [tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)]
    assert notice.startswith("no chat template")


def test_a_conversation_beyond_the_window_is_refused(model_dir, capsys):
    assert run("chat", model_dir("qwen3"), "--prompt", "why " * 600) == 64
    assert "the model's window is 512; /reset starts over" in capsys.readouterr().err


def test_escape_codes_of_an_answer_never_reach_a_terminal(model_dir, monkeypatch, capsys):
    monkeypatch.setattr(Conversation, "answer", lambda self, text: "\x1b[2Jgone\x9b1m\tkept\n")
    folder = model_dir("qwen3")
    for terminal, shown in ((True, "\\x1b[2Jgone\\x9b1m\tkept\n\n"), (False, "gone\x9b1m\tkept\n\n")):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
        assert run("chat", folder, "--prompt", "x") == 0
        assert capsys.readouterr().out == shown
