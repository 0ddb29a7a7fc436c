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
        (
            ["sft.yaml", "--stage", "rlhf"],
            "--stage rlhf: expected one of sft, dpo, kto, reward_model, process_reward_model, grpo",
        ),
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


def exit_code(*arguments):
    with pytest.raises(SystemExit) as caught:
        main([*arguments])
    return caught.value.code


def test_rows_are_made_of_samples_and_made_again(tmp_path, model_dir, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "2+2?", "answer": "4"}\n{"prompt": "2+3?", "answer": "5"}\n')
    (tmp_path / "rewards.py").write_text(
        "def length(completions, **_):\n    return [float(len(c)) for c in completions]\n"
    )
    (tmp_path / "best.yaml").write_text(
        f"base_model: {model_dir('qwen3')}\ndatasets: [{{ path: prompts.jsonl }}]\nreward_funcs: [rewards.py:length]\n"
        "keep: top1\nkeep_truncated: true\nnum_generations: 4\nmax_completion_length: 4\n"
    )
    assert exit_code("data", "synth", "best.yaml", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["prompts"], report["completions"], report["rows"], report["left"]) == (2, 8, 2, report["left"])
    assert exit_code("data", "synth", "best.yaml", "--remake", "all") == 0
    assert "remade 2 rows, 2 the same to the byte" in capsys.readouterr().out
    rows = tmp_path / "runs" / "best" / "rows.jsonl"
    rows.write_text(rows.read_text().replace('"completion": "', '"completion": "x', 1))
    assert exit_code("data", "synth", "best.yaml", "--remake", "1") == 1
    assert "line 1 differs" in capsys.readouterr().out
    assert exit_code("data", "synth", "best.yaml", "--remake", "one") == 64
    assert "--remake one: expected the number of a line" in capsys.readouterr().err


def test_what_is_wrong_in_a_file_of_synth_is_said_with_its_line(tmp_path, model_dir, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "2+2?", "answer": "4"}\n')
    (tmp_path / "bad.yaml").write_text(
        f"base_model: {model_dir('qwen3')}\ndatasets: [{{ path: prompts.jsonl }}]\nreward_funcs: [exact]\n"
        "num_generation: 4\nkeep: best\ndifficulty: { min: 0.5, max: 0.2 }\n"
    )
    assert exit_code("data", "synth", "bad.yaml") == 64
    said = capsys.readouterr().err
    assert "bad.yaml:4: num_generation: " in said and "did you mean num_generations?" in said
    assert "bad.yaml:5: keep: got 'best', expected" in said
    assert "bad.yaml:6: difficulty" in said and "keeps no prompt; swap them" in said
    assert (
        exit_code(
            "data",
            "synth",
            "bad.yaml",
            "--set",
            "num_generation=",
            "--set",
            "keep=top1",
            "--set",
            "difficulty=",
            "--set",
            "min_margin=1",
        )
        == 64
    )
    assert "min_margin does nothing with keep: top1; remove it" in capsys.readouterr().err


def test_a_set_is_curated_and_what_left_is_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"q{n % 4}", "completion": f"an answer to {n % 4}"} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "clean.yaml").write_text("datasets: [{ path: rows.jsonl }]\n")
    assert exit_code("data", "curate", "clean.yaml") == 0
    assert capsys.readouterr().out.splitlines()[:3] == ["read: 6", "kept: 4", "left duplicate: 2"]
    assert exit_code("data", "curate", "clean.yaml", "--set", "dedup=off", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"read": 6, "kept": 6, "left": {}}
