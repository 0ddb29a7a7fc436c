"""Files of every tool with their text damaged as files are: cut off, of wrong types, with keys of a shell or another program in them."""

import json
import random
import re
import traceback

import pytest

from posttrain.config.importers.convert import import_file
from posttrain.errors import ConfigError

INFO = {"mine": {"file_name": "mine.json", "columns": {"prompt": "q", "response": "a"}}}
YAMLS = {
    "axolotl": "base_model: a/b\nadapter: lora\nlora_target_modules: [q_proj, v_proj]\nlora_r: 8\ndatasets:\n  - path: c/d\n    type: chat_template\n    roles_to_train: [assistant]\n"
    "special_tokens:\n  pad_token: <pad>\nval_set_size: 0.1\nsequence_len: 64\nmicro_batch_size: 2\nlearning_rate: 2e-4\nlr_scheduler: cosine\nbf16: auto\nwarmup_ratio: 0.1\n",
    "axolotl grpo": "base_model: a/b\nrl: grpo\ndatasets:\n  - path: c/d\ntrl:\n  reward_funcs: [r.f]\n  num_generations: 4\n  max_completion_length: 64\n  beta: 0.01\n"
    "micro_batch_size: 4\ngradient_accumulation_steps: 2\nlearning_rate: 1e-6\nsequence_len: 128\n",
    "llamafactory": "model_name_or_path: a/b\nstage: dpo\nfinetuning_type: lora\nlora_target: all\npref_beta: 0.1\ntemplate: llama3\ndataset: mine\ncutoff_len: 64\nval_size: 0.1\n"
    "learning_rate: 1e-5\nnum_train_epochs: 1.0\nsave_steps: 10\n",
    "trl": "model_name_or_path: a/b\ndataset_name: c/d\nuse_peft: true\nlora_r: 8\nlora_target_modules: [q_proj]\nlearning_rate: 2e-4\npacking: true\nmax_length: 64\n"
    "eval_strategy: steps\neval_steps: 5\nassistant_only_loss: true\nwarmup_steps: 3\n",
    "trl grpo": "model_name_or_path: a/b\ndataset_name: c/d\nreward_funcs: [r.f]\nnum_generations: 4\nper_device_train_batch_size: 8\nmax_completion_length: 32\nbeta: 0.1\n"
    "scale_rewards: true\nepsilon: 0.2\ndatasets:\n  - path: e/f\n    name: x\n",
    "torchtune": "output_dir: ./out\nmodel:\n  _component_: torchtune.models.llama3_2.lora_llama3_2_1b\n  lora_attn_modules: ['q_proj', 'v_proj']\n  lora_rank: 8\ntokenizer:\n"
    "  _component_: torchtune.models.llama3.llama3_tokenizer\n  path: base/tokenizer.model\n  max_seq_len: 64\ncheckpointer:\n  checkpoint_dir: base\n  output_dir: ${output_dir}\n"
    "dataset:\n  _component_: torchtune.datasets.alpaca_cleaned_dataset\n  packed: False\nbatch_size: 4\noptimizer:\n  _component_: torch.optim.AdamW\n  lr: 3e-4\n"
    "  betas: [0.9, 0.95]\nloss:\n  _component_: torchtune.modules.loss.LinearCrossEntropyLoss\nepochs: 1\n",
    "verl": "data:\n  train_files: rows.parquet\n  max_prompt_length: 64\n  max_response_length: 64\n  train_batch_size: 8\nactor_rollout_ref:\n  model:\n    path: a/b\n  actor:\n"
    "    ppo_mini_batch_size: 4\n    optim:\n      lr: 1e-6\n  rollout:\n    n: 4\n    response_length: ${data.max_response_length}\nalgorithm:\n  adv_estimator: grpo\n"
    "custom_reward_function:\n  path: r.py\n  name: f\n",
}  # fmt: skip
SCRIPTS = {
    "trl": "set -x\nMODEL=a/b\ntrl dpo --model_name_or_path $MODEL \\\n  --dataset_name c/d --learning_rate 5e-7 \\\n  --per_device_train_batch_size 2 --beta 0.1 --use_peft --lora_target_modules q_proj v_proj\n",
    "torchtune": "tune run lora_finetune_single_device --config theirs.yaml optimizer.lr=1e-4 batch_size=2\n",
    "openrlhf": "MODEL=a/b\ndeepspeed --module openrlhf.cli.train_sft \\\n  --max_len 64 --dataset c/d --input_key question --output_key response \\\n  --train_batch_size 8 --micro_train_batch_size 2 --pretrain $MODEL --zero_stage 3 --learning_rate 5e-6\n",
    "openrlhf rl": "python -m openrlhf.cli.train_ppo_ray --pretrain a/b --prompt_data c/d --input_key q --advantage_estimator group_norm --n_samples_per_prompt 4 \\\n"
    "  --train_batch_size 8 --rollout_batch_size 8 --reward_clip_range -1e9 1e9 --generate_max_len 64 --remote_rm_url r.py\n",
    "verl": "python3 -m verl.trainer.main_ppo algorithm.adv_estimator=grpo data.train_files=rows.parquet data.train_batch_size=8 \\\n"
    "  actor_rollout_ref.model.path=a/b actor_rollout_ref.rollout.n=4 custom_reward_function.path=r.py custom_reward_function.name=f\n",
}  # fmt: skip
ODD = ("", "null", "~", "true", "'yes'", "0", "-1", "1.5", "'1e-5'", "1e400", ".nan", "9" * 400, "abc", "[]", "[1, null]", "{}", "{a: {b: 1}}", "[[1]]", "${X}", "$X", "${a.b}",
       "${oc.env:HOME}", "${base_model}", "???", "!!python/object:os.system x", "&a 1", "*a", "2024-01-01", "|\n  text", "'it''s'", "\\", "é\u2028")  # fmt: skip
_NAMED = re.compile(
    r"^.+: .*(;|, expected|: the file|missing|not a \w+ configuration here:|cannot be read|expected|does not exist|broken YAML: |a key must be text).*$"
)
"""A key or the file, and what to do; or a line over those of our own loader."""


def cut(text, chance):
    return text[: chance.randrange(len(text) + 1)]


def other_value(text, chance):
    """Another value for one key: behind its colon, or its `=`, or its blank."""
    places = list(re.finditer(r"(?<=: )[^\n]+|(?<==)[^\s\\]+|(?<=--)\w+ [^\s\\]+", text))
    if not places:
        return text
    place = chance.choice(places)
    word = chance.choice(ODD)
    word = f"{place[0].split()[0]} {word}" if text[place.start() - 1] == "-" else word
    return text[: place.start()] + word + text[place.end() :]


def twice(text, chance):
    return text + chance.choice(text.splitlines(keepends=True) or [""])


def without_a_line(text, chance):
    lines = text.splitlines(keepends=True)
    gone = chance.randrange(len(lines) + 1)
    return "".join(line for number, line in enumerate(lines) if number != gone)


def unknown_key(text, chance):
    return text.rstrip("\n") + chance.choice(
        (" --no_such_key 3\n", "\nno_such_key: 3\n", " no.such=3\n", "\n<<: *none\n", "\n? [1]\n: 2\n")
    )


def odd_letters(text, chance):
    place = chance.randrange(len(text) + 1)
    return chance.choice((text.replace("\n", "\r\n"), "\ufeff" + text, text.replace("  ", "\t"), text + "\n---\n" + text, text[:place] + chance.choice("\0\x1b\t'\"`{}[]:#&*!|>%@") + text[place:]))  # fmt: skip


DAMAGES = (cut, other_value, other_value, other_value, twice, without_a_line, unknown_key, odd_letters)


def fails(name, text, path):
    """What is wrong with how the file is answered; None where it is imported, or refused by name."""
    path.write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
    try:
        import_file(path, path.with_name("ours.yaml"), name.split()[0])
    except ConfigError as error:
        unnamed = [line for line in str(error).splitlines() if not (line.startswith("  ") or _NAMED.match(line))]
        return f"says {unnamed}" if unnamed else None
    except Exception:  # noqa: BLE001 - what is looked for
        return traceback.format_exc()
    return None


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.json").write_text("[]")
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(INFO))
    (tmp_path / "r.py").write_text("def f(prompts, completions, **_): return [0.0 for _ in completions]\n")
    (tmp_path / "rows.parquet").write_text("")
    (tmp_path / "theirs.yaml").write_text(YAMLS["torchtune"])
    monkeypatch.chdir(tmp_path)
    return tmp_path


FILES = [(name, text, ".yaml") for name, text in YAMLS.items()] + [(name, text, ".sh") for name, text in SCRIPTS.items()]  # fmt: skip


def damaged(text, chance):
    for _ in range(chance.randint(1, 2)):
        text = chance.choice(DAMAGES)(text, chance)
    return text


def answered(number, folder):
    """Damages each file `number` times, the same ones at every call. A file that is whole is imported."""
    for name, text, suffix in FILES:
        chance = random.Random(f"{name} {suffix}")
        assert fails(name, text, folder / f"whole{suffix}") is None, name
        assert (folder / "ours.yaml").is_file()
        for _ in range(number):
            broken = damaged(text, chance)
            if problem := fails(name, broken, folder / f"broken{suffix}"):
                raise AssertionError(f"{name} {suffix}\n{broken!r}\n{problem}")


def test_a_file_that_is_damaged_is_imported_or_refused_by_name(folder):
    answered(5, folder)


@pytest.mark.slow
def test_many_files_that_are_damaged_are_imported_or_refused_by_name(folder):
    answered(300, folder)


@pytest.mark.parametrize("path", ["9" * 400, "~nosuchuser/rows.jsonl", "a\\0b"])
def test_a_path_that_no_file_can_have_is_answered(folder, path):
    text = YAMLS["trl"].replace("c/d", f'"{path}"')
    assert fails("trl", text, folder / "broken.yaml") is None
