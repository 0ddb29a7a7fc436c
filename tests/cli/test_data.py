"""`posttrain data` as a user types it."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from posttrain.cli.app import main

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A base with one token per byte, and data for all stages."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(tmp_path / "base")
    rows = {
        "sft": [
            chat("2+2?", "4"),
            chat("2+3?", "5"),
            chat("2+2?", "4"),
            {"messages": [{"role": "user", "content": "x"}]},
        ],
        "pairs": [
            {"prompt": "2+2?", "chosen": " 4", "rejected": " 5"},
            {"prompt": "2+3?", "chosen": " 5", "rejected": " 6"},
        ],
        "prompts": [{"prompt": "2+2?", "answer": "4"}, {"prompt": "2+3?", "answer": "5"}],
        "suite": [{"id": "1", "prompt": "what is two and three?", "target": "5"}],
    }
    for name, values in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in values))
    (tmp_path / "sft.yaml").write_text("base_model: ./base\ndatasets: [{ path: sft.jsonl }]\n")
    (tmp_path / "pipeline.yaml").write_text(
        "name: p\nbase_model: ./base\nevals: { heldout: suite.jsonl }\nstages:\n"
        "  - sft: { datasets: [{ path: sft.jsonl }] }\n"
        "  - dpo: { datasets: [{ path: pairs.jsonl }] }\n"
        "  - grpo: { datasets: [{ path: prompts.jsonl }], reward_funcs: [exact] }\n"
    )
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_:
        main(["data", *arguments])
    output = capsys.readouterr()
    return exit_.value.code, output.out, output.err


def test_a_stage_shows_format_mask_lengths_skips_and_lint(folder, capsys):
    code, out, _ = run(capsys, "sft.yaml", "--examples", "1")
    assert code == 0
    assert "sft.jsonl: chat (column `messages` in all 4 rows)" in out
    assert "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n⟦4<|im_end|>⟧\n" in out
    assert "2+3?" not in out.split("source")[0]  # one example was asked for
    assert "skipped 1 rows of sft.jsonl: no assistant turn (sft.jsonl:4)" in out
    assert "cache: miss: first time" in out
    assert "duplicate: 1 rows" in out and "sft.jsonl:3 same as sft.jsonl:1" in out
    row = next(line for line in out.splitlines() if line.strip().startswith("sft.jsonl  "))
    assert row.split()[1:3] == ["3", "4"]
    assert "cache: hit" in run(capsys, "sft.yaml")[1]


def test_a_pipeline_shows_all_stages_or_the_one_named(folder, capsys):
    code, out, _ = run(capsys, "pipeline.yaml")
    assert code == 0
    assert [line for line in out.splitlines() if line.startswith("==")] == [
        "== sft (stage 1 of 3)",
        "== dpo (stage 2 of 3)",
        "== grpo (stage 3 of 3)",
    ]
    assert "2+2?⟦ 4<|im_end|>⟧" in out and "2+2?⟦ 5<|im_end|>⟧" in out
    assert "columns for the rewards: {'answer': '4'}" in out
    only = run(capsys, "pipeline.yaml", "--stage", "dpo")[1]
    assert "pairs.jsonl: preference" in only and "sft.jsonl" not in only


def test_set_changes_a_key(folder, capsys):
    _, out, _ = run(capsys, "sft.yaml", "--set", "train_on=all", "--examples", "1")
    assert "⟦<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n⟧" in out


def test_refused_data_exits_with_64_and_can_be_cleaned(folder, capsys):
    (folder / "suite.jsonl").write_text('{"id": "1", "prompt": "2+3?", "target": "5"}\n')
    code, out, err = run(capsys, "pipeline.yaml", "--stage", "sft")
    assert code == 64 and "contamination: 1 rows" in out
    assert "sft.jsonl:2 holds a prompt of suite heldout" in out
    assert err.startswith("error: the data is refused: contamination above the limit; fix the rows listed under lint")
    code, out, _ = run(capsys, "pipeline.yaml", "--stage", "sft", "--write-clean", "clean")
    assert code == 0 and "sft.jsonl: 1 rows, 3 taken out" in out
    kept = [json.loads(line) for line in (folder / "clean" / "sft.jsonl").read_text().splitlines()]
    assert kept == [chat("2+2?", "4")]
    assert (folder / "clean" / "removed.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sft.yaml", "--set", "datasets.1.path=empty.jsonl"], "empty.jsonl: the file is empty"),
        (["sft.yaml", "--stage", "ppo"], "--stage ppo: expected one of sft, dpo, kto, reward_model, grpo"),
        (["sft.yaml", "--set", "base_model=./nothing"], "./nothing"),
    ],
)
def test_errors_are_one_line(folder, capsys, arguments, message):
    (folder / "empty.jsonl").write_text("")
    code, _, err = run(capsys, *arguments)
    assert code == 64 and message in err and "Traceback" not in err


def test_escape_codes_of_the_data_never_reach_the_terminal(folder, capsys):
    evil = "\x1b]0;owned\x07\x1b[31mred\x9b2J\rover"
    rows = [chat(evil, f"answer {evil}"), {**chat("2+2?", "4"), evil: 1}]
    (folder / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, out, _ = run(capsys, "sft.yaml")
    assert "\\x1b]0;owned\\x07" in out
    assert not set(out) & {chr(code) for code in (*range(9), *range(11, 32), *range(127, 160))}
    (folder / "prompts.jsonl").write_text(json.dumps({evil: 1}) + "\n")
    (folder / "grpo.yaml").write_text(
        "base_model: ./base\ndatasets: [{ path: prompts.jsonl }]\nreward_funcs: [exact]\n"
    )
    code, _, err = run(capsys, "grpo.yaml")
    assert code == 64 and "\\x1b]0" in err and "\x1b" not in err
