"""OpenRLHF's `train_ppo_ray` all the way to a YAML that the strict loader takes, and each of its keys acting."""

import json
import re
import shutil

import pytest

from posttrain.cli.app import _run
from posttrain.config import load_stage
from posttrain.config.importers.convert import import_file
from posttrain.errors import ConfigError

START = """\
ray job submit --address="http://127.0.0.1:8265" --runtime-env-json='{"working_dir": "/openrlhf"}' \\
   -- python3 -m openrlhf.cli.train_ppo_ray --pretrain base --prompt_data data/train.jsonl --input_key turns --apply_chat_template \\
   --actor_num_nodes 1 --actor_num_gpus_per_node 8 --ref_num_nodes 1 --vllm_num_engines 4 --vllm_tensor_parallel_size 2 --colocate_all_models \\
   --vllm_gpu_memory_utilization 0.6 --micro_train_batch_size 2 --micro_rollout_batch_size 4 --zero_stage 3 --bf16 --packing_samples \\
   --gradient_checkpointing --vllm_sync_backend nccl --enforce_eager --save_path out --use_wandb SECRET \\
"""
GRPO = START + """\
   --advantage_estimator group_norm --rollout_batch_size 32 --n_samples_per_prompt 8 --train_batch_size 128 --prompt_max_len 100 \\
   --generate_max_len 200 --actor_learning_rate 5e-7 --remote_rm_url score.py --label_key answer --use_kl_loss --init_kl_coef 1e-3 --kl_estimator k3 \\
   --max_samples 100000 --num_episodes 2 --save_steps 10 --eval_steps -1
"""  # fmt: skip
PPO = START + """\
   --reward_pretrain rm --rollout_batch_size 64 --train_batch_size 16 --prompt_max_len 100 --generate_max_len 200 --critic_learning_rate 2e-5 \\
   --reward_clip_range -1e9 1e9 --freezing_actor_steps 3
"""  # fmt: skip
DOTTED = """\
python3 -m openrlhf.cli.train_ppo_ray --actor.model_name_or_path base --reward.model_name_or_path rm --data.prompt_dataset data/train.jsonl \\
   --data.input_key turns --data.apply_chat_template --rollout.batch_size 16 --train.batch_size 16 --rollout.max_new_tokens 64 --data.max_len 256 \\
   --reward.clip_range -inf inf --actor.adam.lr 1e-6 --critic.adam.lr 3e-6 --actor.adam.betas 0.9 0.98 --critic.adam.betas 0.9 0.98
"""
REWARD = "def reward_func(prompts, completions, labels, **columns): return [float(c[-1]['content'] == a) for c, a in zip(completions, labels)]\n"
THEIRS = "def reward_func(queries, prompts, labels): return {'rewards': [0.0 for _ in queries]}\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("base", "rm", "data"):
        (tmp_path / name).mkdir()
    (tmp_path / "data/train.jsonl").write_text("")
    (tmp_path / "score.py").write_text(REWARD)
    (tmp_path / "theirs.py").write_text(THEIRS)
    return tmp_path


@pytest.fixture
def imported(folder):
    def run(text):
        (folder / "run.sh").write_text(text)
        made = import_file(folder / "run.sh", folder / "ours.yaml")
        return made, load_stage(made.kind, folder / "ours.yaml").keys

    return run


def test_groups_become_grpo(imported, folder):
    made, keys = imported(GRPO)
    assert (made.kind, keys.loss_type, keys.advantage_estimator, keys.scale_rewards, keys.advantage_eps) == ("grpo", "dapo", "group", "group", 1e-9)  # fmt: skip
    assert (keys.num_prompts_per_step, keys.num_generations, keys.steps_per_generation, keys.num_iterations) == (32, 8, 2, 1)  # fmt: skip
    assert (keys.max_completion_length, keys.sequence_len, keys.overflow) == (200, 300, "error")
    assert (keys.beta, keys.kl_estimator, keys.kl_in_reward, keys.use_bias_correction_kl) == (1e-3, "k3", False, False)
    assert keys.reward_funcs == [f"{folder / 'score.py'}:reward_func"]
    assert keys.datasets[0].columns == {"messages": "turns", "labels": "answer"}
    assert (keys.num_train_epochs, keys.max_steps, keys.save_steps, keys.eval_steps) == (2, -1, 10 * 2, 0)
    assert (keys.learning_rate, keys.per_device_train_batch_size, keys.report_to) == (5e-7, 2, ["wandb"])
    assert "SECRET" not in made.text


def test_gae_becomes_ppo_with_its_critic(imported, folder):
    made, keys = imported(PPO)
    assert (made.kind, keys.reward_funcs, keys.value_model) == ("ppo", [f"model:{folder / 'rm'}"], str(folder / "rm"))
    assert (keys.beta, keys.kl_in_reward, keys.num_generations, keys.steps_per_generation) == (0.01, True, 1, 4)
    assert (keys.critic_learning_rate, keys.critic_warmup_steps) == (2e-5, 3 * 4)
    own = imported(PPO.rstrip() + " --critic_pretrain base\n")
    assert own[1].value_model is None
    assert "critic_pretrain: changed" in own[0].text


def test_what_openrlhf_does_unasked_in_rl_is_written_out(imported):
    keys = imported(PPO)[1]
    assert (keys.lr_scheduler_type, keys.min_lr_ratio, keys.warmup_ratio, keys.adam_beta2) == ("cosine", 0.1, 0.03, 0.95)  # fmt: skip
    assert (keys.gae_lambda, keys.cliprange_value, keys.vf_coef, keys.num_train_epochs, keys.max_steps) == (1, 0.5, 1, 1, -1)  # fmt: skip
    bare = imported(PPO.replace("--critic_learning_rate 2e-5", "").replace("--prompt_max_len 100", ""))[1]
    assert (bare.learning_rate, bare.critic_learning_rate, bare.sequence_len) == (1e-6, 9e-6, 1024 + 200)


def test_the_dotted_spelling_says_the_same(imported, folder):
    made, keys = imported(DOTTED)
    assert (made.kind, keys.max_completion_length, keys.sequence_len) == ("ppo", 64, 256)
    assert (keys.learning_rate, keys.critic_learning_rate, keys.adam_beta2) == (1e-6, 3e-6, 0.98)
    assert keys.value_model == str(folder / "rm")
    with pytest.raises(ConfigError, match=r"critic.adam.betas: .* beside the policy's"):
        imported(DOTTED.replace(" --critic.adam.betas 0.9 0.98", ""))


def test_no_key_is_dropped_silently(imported):
    """Every key of the command is in the YAML: at a key of ours, or among the others."""
    for text in (GRPO, PPO, DOTTED, f"{GRPO.rstrip()} --max_len 4096\n"):
        made = imported(text)[0]
        given = [word[2:] for word in text.partition("train_ppo_ray")[2].split() if word.startswith("--")]
        assert [key for key in given if not re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.])", made.text)] == []


def test_a_default_of_theirs_that_is_ours_is_no_news(imported):
    notes = imported(PPO)[0].notes
    assert "warmup_ratio: 0.03 (OpenRLHF's default; here it is 0)" in notes
    assert not [note for note in notes if note.startswith(("kl_in_reward", "num_train_epochs"))]


ACTS = [
    ("--advantage_estimator dr_grpo --reward_clip_range -1e9 1e9", "scale_rewards", "none"),
    ("--advantage_estimator rloo --reward_clip_range -1e9 1e9", "advantage_estimator", "rloo"),
    ("--max_epochs 2", "save_steps", 40),
    ("--max_epochs 2", "num_iterations", 2),
    ("--save_steps -1", "save_steps", 0),
    ("--eval_steps 3", "eval_steps", 6),
    ("--temperature 0.7", "temperature", 0.7),
    ("--top_p 0.9", "top_p", 0.9),
    ("--policy_loss_type gspo", "loss_type", "gspo"),
    ("--policy_loss_type gspo", "kl_reduction", "token_mean"),
    ("--eps_clip 0.1", "epsilon", 0.1),
    ("--eps_clip_low_high 0.2 0.28", "epsilon_high", 0.28),
    ("--eps_clip_low_high 0.1 0.28 --eps_clip 0.3", "epsilon", 0.1),
    ("--dual_clip 3", "delta", 3),
    ("--entropy_loss_coef 0.01", "entropy_coef", 0.01),
    ("--kl_estimator k2", "kl_estimator", "k2"),
    ("--init_kl_coef 0", "beta", 0),
    ("--overlong_buffer_len 50", "soft_overlong_cache", 50),
    ("--lr_scheduler constant", "warmup_ratio", 0),
    ("--lr_scheduler constant", "min_lr_ratio", 0),
    ("--l2 0.1", "weight_decay", 0.1),
    ("--adam_betas 0.8 0.9", "adam_beta1", 0.8),
    ("--max_norm 0.5", "max_grad_norm", 0.5),
    ("--lora_rank 16", "adapter", "lora"),
    ("--seed 7", "seed", 7),
    ("--normalize_reward", "reward_funcs", None),
    ("--n_samples_per_prompt 16", "steps_per_generation", 4),
]


def over(text, more):
    """The command with these options in the place of those of the same name."""
    words = text.rstrip().replace("\\\n", " ").split(" ")
    for name in (word for word in more.split() if word.startswith("--")):
        if name in words:
            start = words.index(name)
            end = next((n for n in range(start + 1, len(words)) if words[n].startswith("--")), len(words))
            del words[start:end]
    return f"{' '.join(words)} {more}\n"


@pytest.mark.parametrize(("more", "key", "value"), ACTS)
def test_a_key_acts(imported, folder, more, key, value):
    found = getattr(imported(over(GRPO, more))[1], key)
    assert found == ([f"{folder / 'score.py'}:reward_func"] if key == "reward_funcs" else value)


PPO_ACTS = [
    ("--gamma 0.99", "gamma", 0.99),
    ("--lambd 0.95", "gae_lambda", 0.95),
    ("--value_clip 0.2", "cliprange_value", 0.2),
    ("--freezing_actor_steps -1", "critic_warmup_steps", 0),
    ("--n_samples_per_prompt 2", "num_generations", 2),
    ("--use_kl_loss", "kl_in_reward", False),
    ("--init_kl_coef 0.05", "beta", 0.05),
]


@pytest.mark.parametrize(("more", "key", "value"), PPO_ACTS)
def test_a_key_of_ppo_acts(imported, more, key, value):
    assert getattr(imported(over(PPO, more))[1], key) == value


REFUSED = [
    (GRPO, "--advantage_estimator reinforce", "advantage_estimator: reinforce: its advantages are whitened token by token"),
    (GRPO, "--advantage_estimator reinforce_baseline", "reinforce_pp_baseline, which whiten completions"),
    (GRPO, "--advantage_estimator other", "other: no such advantage here; set one of gae, group_norm"),
    (GRPO, "--advantage_estimator rloo", "reward_clip_range: -10 to 10 (its default): advantages beyond it are cut there"),
    (GRPO, "--reward_clip_range -1 1", "-1 to 1: advantages beyond it are cut"),
    (GRPO, "--n_samples_per_prompt 1", "n_samples_per_prompt: 1: a completion is compared"),
    (GRPO, "--train_batch_size 100", "train_batch_size: 32 prompts of 8 completions are no whole steps of 100"),
    (GRPO, "--remote_rm_url http://localhost:5000/get_reward", "remote_rm_url: http://localhost:5000/get_reward: a server is asked there; write `def reward_func(prompts"),
    (GRPO, "--remote_rm_url theirs.py", "theirs.py: reward_func(queries, prompts, labels) is given prompts and completions as one rendered text"),
    (GRPO, "--remote_rm_url nowhere.py", "nowhere.py: cannot be read (FileNotFoundError)"),
    (GRPO, "--policy_loss_type gspo --dual_clip 3", "dual_clip: 3: a bound on gspo's ratio"),
    (GRPO, "--dual_clip 1.1", "set it above 1.2"),
    (GRPO, "--kl_target 0.1", "kl_target: 0.1: beta is steered in another way here"),
    (GRPO, "--dynamic_filtering", "dynamic_sampling: true"),
    (GRPO, "--enable_vllm_is_correction", "importance_sampling_correction"),
    (GRPO, "--async_train", "async_train: true: sampling and training alternate here"),
    (GRPO, "--agent_func_path a.py", "agent_func_path: a.py: its agents are classes of OpenRLHF's"),
    (GRPO, "--stop_properly_penalty_coef 0.5", "stop_properly_penalty_coef: 0.5"),
    (GRPO, "--overlong_buffer_len 50 --overlong_penalty_factor 2", "overlong_penalty_factor: 2: the penalty ends at -1 here"),
    (GRPO, "--enable_ema", "enable_ema: true"),
    (GRPO, "--pretrain_data a/b", "ptx_datasets in a YAML of ours"),
    (GRPO, "--entropy_loss_coef 0.1 --policy_loss_type gspo", "entropy_loss_coef: 0.1 with gspo"),
    (GRPO, "--no_such_key 3", "no_such_key: no key of OpenRLHF's that is known here"),
    (PPO, "--normalize_reward", "normalize_reward: true: a reward model's scores"),
    (PPO, "--value_head_prefix value_head", "value_head_prefix: value_head: the head of a reward model"),
    (PPO, "--reward_pretrain a,b", "reward_pretrain: a,b: one reward model"),
    (PPO, "--reward_clip_range -5 5", "reward_clip_range: -5 to 5: rewards beyond it are cut there"),
    (PPO, "--kl_estimator k3", "kl_estimator: k3 in the reward"),
    (PPO, "--no_advantage_std_norm", "no_advantage_std_norm: true: advantages of a critic are whitened here"),
    (PPO, "--policy_loss_type gspo", "policy_loss_type: gspo: no such loss in ppo"),
    (PPO, "--lora_rank 8", "lora_rank: with gae: the critic is trained under an adapter too there"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "more", "message"), REFUSED)
def test_what_has_no_counterpart_is_refused_by_name(imported, text, more, message):
    with pytest.raises(ConfigError) as caught:
        imported(over(text, more))
    assert message in str(caught.value)


def test_a_kl_that_is_added_after_groups_are_compared_is_refused(imported):
    with pytest.raises(ConfigError, match=r"init_kl_coef: 0.01 \(0.01 where it is silent\): the KL is taken off"):
        imported(over(GRPO, "--init_kl_coef 0.01").replace("--use_kl_loss", ""))


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("--prompt_data data/train.jsonl", "prompt_data: missing"),
        ("--apply_chat_template", "apply_chat_template: off: text that no template renders"),
        ("--remote_rm_url score.py", "missing: nothing says what a completion is worth"),
    ],
)
def test_what_is_missing_is_named(imported, missing, message):
    with pytest.raises(ConfigError, match=message):
        imported(GRPO.replace(missing, ""))
    with pytest.raises(ConfigError, match="max_new_tokens: missing: a completion then has the room"):
        imported(DOTTED.replace("--rollout.max_new_tokens 64", ""))


@pytest.mark.slow
@pytest.mark.parametrize("text", [GRPO, PPO], ids=["grpo", "ppo"])
def test_an_imported_command_trains(folder, model_dir, text, capsys):
    (folder / "base").rmdir()
    shutil.copytree(model_dir("qwen3"), folder / "base")
    rows = [{"turns": [{"role": "user", "content": f"Say {n}."}], "answer": str(n)} for n in range(16)]
    (folder / "data/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = "--rollout_batch_size 4 --n_samples_per_prompt 2 --train_batch_size 4 --generate_max_len 8 --num_episodes 1 --remote_rm_url score.py --label_key answer"
    kind = "grpo" if text is GRPO else "ppo"
    (folder / "run.sh").write_text(
        over(text, more).replace("--use_wandb SECRET", "").replace("--reward_pretrain rm", "")
    )
    assert _run(["import", "run.sh"]) == 0
    assert _run([kind, "run.posttrain.yaml", "--set", "reward_check=off", "--set", "allow_raw_base=true", "--set", "max_steps=2", "--set", "output_dir=out"]) == 0, capsys.readouterr().err  # fmt: skip
    lines = (folder / f"out/stages/01-{kind}/metrics.jsonl").read_text().splitlines()
    found = [row for row in map(json.loads, lines) if "loss" in row]
    assert [row["step"] for row in found] == [1, 2], "a generation batch of two optimizer steps"
    assert any("rewards/reward_func/mean" in line for line in lines)
