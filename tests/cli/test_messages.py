"""What a stranger types wrong, and the words of the answer that say what to do: exit code 64, no traceback, little text."""

import json
import shutil

import pytest

from posttrain.cli.app import main

CHAT = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
PAIR = {"prompt": "2+2?", "chosen": " 4", "rejected": " 5"}
PROMPT = {"prompt": "2+2?", "answer": "4"}
ITEM = {"prompt": "2+3?", "target": "5", "scorer": "number"}


def rows(*values):
    return "".join(json.dumps(value) + "\n" for value in values)


def numbered(row, count, **columns):
    return rows(*({"id": str(n), **row, **columns} for n in range(count)))


def stage(*lines, path="sft.jsonl"):
    return "\n".join(("base_model: ./base", f"datasets: [{{path: {path}}}]", *lines)) + "\n"


def pipeline(*lines, name="p", gate=""):
    top = f"name: {name}\nbase_model: ./base\nevals: {{ sums: sums.jsonl }}\n"
    return top + "stages:\n  - sft: { datasets: [{ path: sft.jsonl }] }\n" + gate + "".join(f"{x}\n" for x in lines)


FILES = {
    "sft.jsonl": rows(*({"messages": [{"role": "user", "content": f"{n}+2?"}, CHAT["messages"][1]]} for n in range(4))),
    "pairs.jsonl": rows(PAIR, PAIR | {"prompt": "2+3?"}),
    "prompts.jsonl": rows(PROMPT, {"prompt": "2+3?", "answer": "5"}),
    "sums.jsonl": numbered(ITEM, 3),
    "dev.jsonl": numbered(ITEM, 20, split="dev"),
    "same.jsonl": rows(*[CHAT] * 10),
    "rewards.py": "from math import sqrt\n\ndef right(completions, answer, **columns):\n    score = 1.0\n    return [score for _ in completions]\n",
    "one.py": "def one(completions, **columns):\n    return 1.0\n",
    "broken.py": "def broken(completions:\n",
    "sft.yaml": stage(),
    "chat.yaml": stage().replace("jsonl}", "jsonl, type: chat}"),
    "pairs.yaml": stage(path="pairs.jsonl"),
    "grpo.yaml": stage("reward_funcs: [rewards.py:right]", path="prompts.jsonl"),
    "pipeline.yaml": pipeline(),
    "conflict.yaml": stage("adapter: lora", "lora_target_linear: true", "lora_target_modules: [q_proj]"),
    "deep.yaml": "base_model: ./base\n  datasets: [{path: sft.jsonl}]\n",
    "nospace.yaml": "base_model: ./base\nseed:3\nbf16: auto\n",
    "tab.yaml": "base_model: ./base\ndatasets:\n\t- path: sft.jsonl\n",
    "list.yaml": "- sft\n",
    "empty.yaml": "",
    "same.yaml": stage(path="same.jsonl"),
    "notokenizer.yaml": stage().replace("./base", "./notokenizer"),
    "adapter.yaml": stage().replace("./base", "./run/adapter"),
    "pickle.yaml": stage().replace("./base", "./pickle"),
    "gone.yaml": stage(path="sftt.jsonl"),
    "nosuch.yaml": stage("reward_funcs: [rewards.py:nosuch]", path="prompts.jsonl"),
    "one.yaml": stage("reward_funcs: [one.py:one]", path="prompts.jsonl"),
    "broken.yaml": stage("reward_funcs: [broken.py:broken]", path="prompts.jsonl"),
    "column.yaml": stage("reward_funcs: [rewards.py:right]", path="pairs.jsonl"),
    "up.yaml": pipeline(name="../../x"),
    "long.yaml": pipeline(name="x" * 300),
    "devonly.yaml": pipeline(gate="gate: { baseline: 'stage:base', primary: [{ suite: sums, min_delta: 0.05 }] }\n").replace("sums.jsonl", "dev.jsonl"),
    "suite.yaml": pipeline(gate="gate: { baseline: 'stage:base', primary: [{ suite: sum }] }\n"),
    "alias.yaml": pipeline("register: { name: 'a b' }"),
    "longname.yaml": pipeline("register: { name: " + "x" * 300 + " }"),
    "badalias.yaml": pipeline("register: { name: ok, alias: '../up' }"),
    "longalias.yaml": pipeline("register: { name: ok, alias: " + "x" * 300 + " }"),
    "previous.yaml": pipeline("register: { name: ok, alias: previous }"),
    "upsuite.yaml": pipeline().replace("sums:", "'../up':"),
    "longsuite.yaml": pipeline().replace("sums:", "x" * 300 + ":"),
    "split.yaml": pipeline(gate="gate: { baseline: 'stage:base', split: '../up', primary: [{ suite: sums }] }\n"),
    "longsplit.yaml": pipeline(gate="gate: { baseline: 'stage:base', split: " + "x" * 300 + ", primary: [{ suite: sums }] }\n"),
    "stf.yaml": pipeline().replace("- sft", "- stf"),
}  # fmt: skip

MISTAKES = [
    # command, words of the answer, words that must not be in it
    ("sft conflict.yaml", "keep lora_target", "this is sft"),
    ("sft sft.yaml --set use_dft_losss=true", "unknown key", "use_dora"),
    ("sft sft.yaml --set save_only_model=true", "leave it out", "base_model?"),
    ("sft sft.yaml --set lerning_rate=1", "did you mean learning_rate?", ""),
    ("sft sft.yaml --set learning_rate=fast", "expected a number (> 0)", ""),
    ("sft sft.yaml --set learning_rate", "expected KEY=VALUE", ""),
    ("sft sft.yaml --set num_generations=4", "num_generations is a grpo, ppo, online_dpo, distill and ebft key; this is sft", ""),
    ("sft sft.yaml --quiet --verbose", "give one of them", ""),
    ("sft sft.yaml --on-change yes", "refuse", ""),
    ("sft nosuch_file.yaml", "no such file; ./ has", "Errno"),
    ("sft base", "got a folder, expected a YAML file", ""),
    ("sft gone.yaml", "did you mean sft.jsonl?", ""),
    ("sft deep.yaml", "line 2 is indented deeper than line 1", ""),
    ("sft nospace.yaml", "with a space behind the colon", ""),
    ("sft tab.yaml", "indent with spaces, not tabs", ""),
    ("sft list.yaml", "got a list, expected a mapping of keys", ""),
    ("sft empty.yaml", "the file is empty", ""),
    ("sft pipeline.yaml", "posttrain run pipeline.yaml", ""),
    ("sft grpo.yaml", "if this is meant as grpo: posttrain grpo grpo.yaml", ""),
    ("sft pairs.yaml -q", "This is the preference format, which is for dpo", ""),
    ("dpo chat.yaml", "chat is not for dpo, which takes preference or alpaca_preference or kto or alpaca_kto", "learning_rate"),
    ("dpo chat.yaml", "posttrain sft chat.yaml", ""),
    ("dpo sft.yaml -q --set allow_raw_base=true", "expected for pairs", ""),
    ("grpo chat.yaml", "posttrain sft chat.yaml", ""),
    ("grpo sft.yaml", "posttrain sft sft.yaml", ""),
    ("run sft.yaml", "did you mean posttrain sft sft.yaml?", ""),
    ("run grpo.yaml", "did you mean posttrain grpo grpo.yaml?", ""),
    ("run up.yaml", "letters, digits, spaces and . _ -", "a string"),
    ("run long.yaml", "at most 100 characters", "File name too long"),
    ("run stf.yaml", "did you mean sft?", ""),
    ("run suite.yaml", "did you mean sums?", ""),
    ("run devonly.yaml -q", "it has 20 on dev", ""),
    ("run alias.yaml", "register.name", ""),
    ("run longname.yaml", "register.name: got a name of 300 characters", ""),
    ("run badalias.yaml", "register.alias: got '../up', expected a letter", ""),
    ("run longalias.yaml", "register.alias: got a name of 300 characters", ""),
    ("run previous.yaml", "kept by the registry itself", ""),
    ("run upsuite.yaml", "got '../up', expected letters", ""),
    ("run longsuite.yaml", "got a name of 300 characters", ""),
    ("run split.yaml", "gate.split: got '../up', expected letters", ""),
    ("run longsplit.yaml", "gate.split: got a name of 300 characters", ""),
    ("sft same.yaml -q", "duplicate: 9 rows", "lint sft:"),
    ("data same.yaml", "fix the rows listed under lint", ""),
    ("data sft.yaml --stage rlhf", "expected one of sft, dpo, kto, reward_model, process_reward_model, grpo, ppo, online_dpo, distill, ebft", ""),
    ("data pipeline.yaml --stage grpo", "pipeline.yaml has sft", ""),
    ("plan pipeline.yaml --device a1000", "expected this, or one of", ""),
    ("sft notokenizer.yaml -q", "tokenizer.json and tokenizer_config.json are not", "chat template"),
    ("sft adapter.yaml -q", "is an adapter, not a model; merge it first", "config.json"),
    ("sft pickle.yaml -q", "has only pickled weights", ""),
    ("eval NOSUCHFOLDER --suite sums.jsonl", "is not a local folder and could not be fetched", "tokenizer"),
    ("eval ./nosuch --suite sums.jsonl", "no such folder", "hub.com"),
    ("eval run/adapter --suite sums.jsonl", "is an adapter, not a model", ""),
    ("eval base --suite sum.jsonl", "no such file; ./ has dev.jsonl", "Errno"),
    ("eval base", "add --suite FILE", ""),
    ("eval base --suite dev.jsonl", "it has 20 on dev", ""),
    ("chat NOSUCHFOLDER --prompt hi", "is not a local folder and could not be fetched", ""),
    ("merge run/model --out out", "there is nothing to merge; its adapter is run/adapter", "adapter_config"),
    ("merge run/adapter", "--out", ""),
    ("rewards check nosuch.yaml", "no function 'nosuch' (it defines right)", "sqrt"),
    ("rewards check one.yaml", "expected a list with one number or None per completion", ""),
    ("rewards check broken.yaml", "broken.py:1: the file is not valid Python", ""),
    ("rewards check column.yaml", "needs the column answer; the dataset has chosen", ""),
    ("gate run run --spec grpo.yaml", "unknown key", ""),
    ("gate run", "expected `posttrain gate A B --spec gate.yaml`", ""),
    ("report run", "run", "Errno"),
    ("diff run run2", "run", "Errno"),
    ("registry show nosuch", "name its folder with --registry", "sqlite"),
    ("explain nonsense", "the nearest is", ""),
    ("explain batch", "per_device_train_batch_size", ""),
    ("train sft.yaml", "sft, dpo, reward_model, process_reward_model, grpo, ppo, online_dpo, distill or ebft for a single stage, run for a pipeline", ""),
    ("evaluate base", "to score a model: eval", ""),
    ("kto pairs.yaml", "loss_type: kto", ""),
    ("promote p", "posttrain registry", ""),
    ("expalin seed", "explain", ""),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_model_in):
    place = tmp_path_factory.mktemp("stranger")
    base = make_model_in(place / "base", "qwen3")
    for name in ("notokenizer", "pickle"):
        shutil.copytree(base, place / name)
    for path in (place / "notokenizer").glob("tokenizer*"):
        path.unlink()
    (place / "pickle" / "model.safetensors").rename(place / "pickle" / "pytorch_model.bin")
    (place / "run" / "adapter").mkdir(parents=True)
    (place / "run" / "adapter" / "adapter_config.json").write_text("{}")
    shutil.copytree(base, place / "run" / "model")
    for name, text in FILES.items():
        (place / name).write_text(text)
    return place


@pytest.mark.parametrize(
    ("command", "words", "absent"), MISTAKES, ids=[f"{command}: {words}" for command, words, _ in MISTAKES]
)
def test_a_mistake_is_answered_with_what_to_do(folder, monkeypatch, capsys, command, words, absent):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as caught:
        main(command.split())
    said = " ".join(capsys.readouterr().err.split())
    assert caught.value.code == 64, said
    assert words in said
    assert not absent or absent not in said
    assert "Traceback" not in said
    assert len(said) < 1200, "an answer, not a dump"
    assert not (folder / "runs").exists(), "a start that is refused leaves no run behind"
