"""verl's commands all the way to a YAML that the strict loader takes, and each of its keys acting."""

import json
import shutil
from dataclasses import fields

import datasets
import pytest
import yaml

from posttrain.cli.app import _run
from posttrain.config import load_stage
from posttrain.config.importers.convert import import_file
from posttrain.errors import ConfigError
from posttrain.objectives.spec import PolicySpec
from posttrain.rewards.resolve import load_reward

GRPO = """\
set -x
DATA=data
python3 -m verl.trainer.main_ppo --config-name=ppo_trainer \\
    algorithm.adv_estimator=grpo \\
    data.train_files="['$DATA/train.parquet']" \\
    data.val_files=$DATA/test.parquet \\
    data.train_batch_size=64 \\
    data.max_prompt_length=100 \\
    data.max_response_length=200 \\
    data.filter_overlong_prompts=True \\
    data.truncation='error' \\
    actor_rollout_ref.model.path=base \\
    actor_rollout_ref.model.use_remove_padding=True \\
    actor_rollout_ref.actor.optim.lr=3e-6 \\
    actor_rollout_ref.actor.ppo_mini_batch_size=16 \\
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4 \\
    actor_rollout_ref.actor.use_kl_loss=True \\
    actor_rollout_ref.actor.kl_loss_coef=0.002 \\
    actor_rollout_ref.actor.kl_loss_type=low_var_kl \\
    actor_rollout_ref.actor.entropy_coeff=0 \\
    actor_rollout_ref.model.enable_gradient_checkpointing=True \\
    actor_rollout_ref.actor.fsdp_config.param_offload=False \\
    actor_rollout_ref.rollout.tensor_model_parallel_size=2 \\
    actor_rollout_ref.rollout.name=vllm \\
    actor_rollout_ref.rollout.n=5 \\
    actor_rollout_ref.ref.fsdp_config.param_offload=True \\
    algorithm.use_kl_in_reward=False \\
    custom_reward_function.path=score.py \\
    +custom_reward_function.reward_kwargs.scale=2 \\
    trainer.critic_warmup=0 \\
    trainer.logger=['console','wandb'] \\
    trainer.n_gpus_per_node=8 \\
    trainer.save_freq=20 \\
    trainer.test_freq=5 \\
    trainer.total_epochs=15 $@
"""
PPO = """\
python3 -m verl.trainer.main_ppo algorithm.adv_estimator=gae data.train_files=data/train.parquet data.train_batch_size=32 \\
    actor_rollout_ref.actor.ppo_mini_batch_size=16 actor_rollout_ref.model.path=base critic.model.path=base critic.optim.lr=2e-5 \\
    reward_model.enable=True reward_model.model.path=rm algorithm.use_kl_in_reward=True algorithm.kl_ctrl.kl_coef=0.01 \\
    trainer.critic_warmup=3 trainer.total_training_steps=10
"""
SFT = """\
torchrun --standalone --nproc_per_node=$1 -m verl.trainer.fsdp_sft_trainer data.train_files=data/train.parquet data.val_files=data/test.parquet \\
    data.prompt_key=extra_info data.response_key=extra_info +data.prompt_dict_keys=['question'] +data.response_dict_keys=['answer'] \\
    data.micro_batch_size_per_gpu=8 model.partial_pretrain=base model.lora_rank=32 model.target_modules=[q_proj,v_proj] trainer.default_local_dir=$2
"""
REWARD = "def compute_score(data_source, solution_str, ground_truth, extra_info=None, scale=1): return scale * (solution_str == ground_truth)\nsecond = compute_score\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("base", "rm", "data"):
        (tmp_path / name).mkdir()
    for name in ("train", "test"):
        (tmp_path / f"data/{name}.parquet").write_text("")
    (tmp_path / "score.py").write_text(REWARD)
    return tmp_path


@pytest.fixture
def imported(folder):
    def run(text):
        (folder / "run.sh").write_text(text)
        made = import_file(folder / "run.sh", folder / "ours.yaml")
        return made, load_stage(made.kind, folder / "ours.yaml").keys

    return run


def test_grpo_becomes_a_yaml_that_the_loader_takes(imported, folder):
    made, keys = imported(GRPO)
    assert (made.kind, keys.loss_type, keys.advantage_estimator, keys.scale_rewards) == (
        "grpo",
        "dapo",
        "group",
        "group",
    )
    assert [source.path for source in (*keys.datasets, *keys.eval_datasets)] == [
        str(folder / f"data/{name}.parquet") for name in ("train", "test")
    ]
    assert keys.datasets[0].columns == {"ground_truth": "reward_model.ground_truth"}
    assert (keys.num_prompts_per_step, keys.steps_per_generation, keys.num_generations) == (64, 4, 5)
    assert (keys.max_completion_length, keys.sequence_len, keys.overflow) == (200, 300, "drop")
    assert (keys.beta, keys.kl_estimator, keys.kl_in_reward, keys.use_bias_correction_kl) == (0.002, "k3", False, False)
    assert (keys.learning_rate, keys.per_device_train_batch_size, keys.gradient_checkpointing) == (3e-6, 4, True)
    assert (keys.num_train_epochs, keys.max_steps, keys.report_to) == (15, -1, ["wandb"])


def test_steps_of_theirs_are_generation_batches(imported):
    keys = imported(GRPO)[1]
    assert (keys.save_steps, keys.eval_steps) == (20 * 4, 5 * 4)
    assert imported(f"{GRPO.rstrip()[:-3]} actor_rollout_ref.actor.ppo_epochs=2\n")[1].save_steps == 20 * 4 * 2


def test_what_verl_does_unasked_is_written_out(imported):
    keys = imported(GRPO)[1]
    assert (keys.delta, keys.advantage_eps, keys.weight_decay, keys.lr_scheduler_type) == (3, 1e-6, 0.01, "constant")
    ppo = imported(PPO)[1]
    assert (ppo.gae_lambda, ppo.cliprange_value, ppo.vf_coef, ppo.num_train_epochs) == (1, 0.5, 1, 30)
    sft = imported(SFT)[1]
    assert (sft.warmup_ratio, sft.adam_beta2, sft.seed, sft.overflow, sft.sequence_len) == (0.1, 0.95, 1, "error", 1024)


def test_a_custom_reward_is_called_as_verl_calls_it(imported, folder):
    keys = imported(GRPO)[1]
    (spec,) = keys.reward_funcs
    reward = load_reward(spec, keys.reward_kwargs["compute_score"])
    assert reward(["p"], ["4"], data_source=["mine"], ground_truth=["4"]) == [2]


def test_ppo_has_its_critic_and_its_reward_model(imported, folder):
    made, keys = imported(PPO)
    assert (made.kind, keys.reward_funcs, keys.value_model) == ("ppo", [f"model:{folder / 'rm'}"], None)
    assert (keys.beta, keys.kl_in_reward, keys.critic_learning_rate) == (0.01, True, 2e-5)
    assert (keys.critic_warmup_steps, keys.max_steps) == (2 * 2, 10 * 2), "there the policy learns from batch 3 on"
    assert "critic.model.path: changed" in made.text
    assert imported(PPO.replace("critic.model.path=base", "critic.model.path=rm"))[1].value_model == str(folder / "rm")


def test_sft_reads_questions_that_lie_inside_a_column(imported):
    made, keys = imported(SFT)
    assert made.kind == "sft"
    assert keys.datasets[0].columns == {"instruction": "extra_info.question", "output": "extra_info.answer"}
    assert (keys.per_device_train_batch_size, keys.gradient_accumulation_steps, keys.num_processes) == (8, 32, 1)
    assert (keys.adapter, keys.lora_r, keys.lora_alpha, keys.lora_target) == ("lora", 32, 16, ["q_proj", "v_proj"])
    assert keys.output_dir.endswith("runs/ours"), "only a shell knows theirs"


def test_conversations_are_trained_as_such(imported):
    start = "torchrun -m verl.trainer.{} data.train_files=data/train.parquet {}=base {} optim.lr=1e-6\n"
    old = start.format("fsdp_sft_trainer", "model.partial_pretrain", "data.multiturn.enable=true data.multiturn.messages_key=turns data.multiturn.tools_key=tools")  # fmt: skip
    new = start.format("sft_trainer", "model.path", "data.messages_key=turns engine=fsdp optim.lr_scheduler_type=cosine optim.lr_warmup_steps_ratio=0.03 optim.betas='[0.9,0.95]'")  # fmt: skip
    for text in (old, new):
        keys = imported(text)[1]
        assert (keys.datasets[0].type, keys.datasets[0].columns) == ("chat", {"messages": "turns"})
        assert (keys.train_on, keys.learning_rate, keys.adam_beta2) == ("assistant", 1e-6, 0.95)
    assert keys.warmup_ratio == 0.03
    bare = imported(start.format("sft_trainer", "model.path", "").replace(" optim.lr=1e-6", ""))[1]
    assert (bare.learning_rate, bare.lr_scheduler_type, bare.warmup_ratio) == (1e-3, "constant", 0)


def test_a_yaml_of_ones_own_lies_below_the_command(imported, folder):
    (folder / "config").mkdir()
    mine = {"defaults": ["ppo_trainer", "_self_"], "algorithm": {"adv_estimator": "rloo"}, "actor_rollout_ref": {"rollout": {"n": 3, "temperature": 0.7}}}  # fmt: skip
    (folder / "config/mine.yaml").write_text(yaml.safe_dump(mine))
    text = GRPO.replace("--config-name=ppo_trainer", "--config-path config --config-name=mine").replace("    algorithm.adv_estimator=grpo \\\n", "")  # fmt: skip
    keys = imported(text)[1]
    assert (keys.advantage_estimator, keys.temperature, keys.num_generations) == ("rloo", 0.7, 5)
    with pytest.raises(ConfigError, match=r"run.sh:3: ./theirs.yaml: no such file beside the script"):
        imported(GRPO.replace("ppo_trainer", "theirs"))


def test_a_yaml_alone_is_known_by_its_keys(folder):
    config = {
        "actor_rollout_ref": {"model": {"path": "base"}, "rollout": {"n": 4}}, "algorithm": {"adv_estimator": "grpo"}, "trainer": {"nnodes": 1, "project_name": "p"},
        "data": {"train_files": "data/train.parquet"}, "custom_reward_function": {"path": "score.py", "name": "compute_score"},
    }  # fmt: skip
    (folder / "verl.yaml").write_text(yaml.safe_dump(config))
    assert import_file(folder / "verl.yaml", None).kind == "grpo"
    assert load_stage("grpo", folder / "verl.yaml").keys.num_generations == 4, "in place, too"


ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
ACTS = [
    (f"{ACTOR}.optim.lr_warmup_steps=3", "warmup_steps", 12),
    (f"{ACTOR}.optim.lr_warmup_steps_ratio=0.1", "warmup_ratio", 0.1),
    (f"{ACTOR}.optim.warmup_style=cosine", "lr_scheduler_type", "cosine"),
    (f"{ACTOR}.optim.min_lr_ratio=0.1", "min_lr_ratio", 0.1),
    (f"{ACTOR}.optim.weight_decay=0.1", "weight_decay", 0.1),
    (f"{ACTOR}.optim.betas=[0.8,0.9]", "adam_beta1", 0.8),
    (f"{ACTOR}.optim.optimizer=AdamW8bit", "optim", "adamw_8bit"),
    (f"{ACTOR}.grad_clip=0.5", "max_grad_norm", 0.5),
    (f"{ACTOR}.clip_ratio_low=0.1", "epsilon", 0.1),
    (f"{ACTOR}.clip_ratio_high=0.28", "epsilon_high", 0.28),
    (f"{ACTOR}.clip_ratio=0.2", "epsilon", 0.2),
    (f"{ACTOR}.clip_ratio_c=10.0", "delta", 10),
    (f"{ACTOR}.policy_loss.loss_mode=gspo", "loss_type", "gspo"),
    (f"{ACTOR}.policy_loss.loss_mode=gspo", "kl_reduction", "token_mean"),
    (f"{ACTOR}.policy_loss.loss_mode=gspo", "delta", None),
    (f"{ACTOR}.policy_loss.loss_mode=geo_mean", "loss_type", "gmpo"),
    (f"{ACTOR}.policy_loss.loss_mode=clip_cov {ACTOR}.policy_loss.clip_cov_ub=40", "clip_cov_ub", 40),
    (f"{ACTOR}.policy_loss.loss_mode=kl_cov {ACTOR}.policy_loss.ppo_kl_coef=1.0", "ppo_kl_coef", 1.0),
    (f"{ACTOR}.policy_loss.loss_mode=kl_cov {ACTOR}.policy_loss.clip_cov_lb=2", "loss_type", "kl_cov"),
    (f"{ACTOR}.loss_agg_mode=seq-mean-token-mean", "loss_type", "grpo"),
    (
        f"{ACTOR}.policy_loss.loss_mode=gspo {ACTOR}.loss_agg_mode=seq-mean-token-sum",
        "kl_reduction",
        "sequence_sum_mean",
    ),
    (f"{ACTOR}.ppo_epochs=3", "num_iterations", 3),
    (f"{ACTOR}.tis_imp_ratio_cap=2.0", "importance_sampling_cap", 2),
    (f"{ACTOR}.tis_imp_ratio_cap=2.0", "importance_sampling_correction", "token_truncate"),
    (f"{ROLLOUT}.temperature=0.6", "temperature", 0.6),
    (f"{ROLLOUT}.top_p=0.9", "top_p", 0.9),
    (f"{ROLLOUT}.top_k=-1", "top_k", 0),
    (f"{ROLLOUT}.top_k=40", "top_k", 40),
    ("algorithm.norm_adv_by_std_in_grpo=False", "scale_rewards", "none"),
    (
        "reward_model.reward_manager=dapo reward_model.overlong_buffer.enable=True reward_model.overlong_buffer.len=50",
        "soft_overlong_cache",
        50,
    ),
    ("data.apply_chat_template_kwargs.tools.style=short", "chat_template_kwargs", {"tools": {"style": "short"}}),
    (
        "+custom_reward_function.reward_kwargs.judge.url=x",
        "reward_kwargs",
        {"compute_score": {"scale": 2, "judge": {"url": "x"}}},
    ),
    ("data.apply_chat_template_kwargs.enable_thinking=False", "chat_template_kwargs", {"enable_thinking": False}),
    ("actor_rollout_ref.model.lora_rank=8 actor_rollout_ref.model.lora_alpha=4", "lora_alpha", 4),
    ("actor_rollout_ref.model.lora_rank=8", "lora_target", "all-linear"),
    ("trainer.default_local_dir=out/x", "output_dir", "out/x"),
    ("trainer.max_actor_ckpt_to_keep=7", "save_total_limit", 7),
    ("trainer.total_training_steps=5", "max_steps", 20),
    ("custom_reward_function.name=second", "reward_kwargs", {"second": {"scale": 2}}),
]


def test_lengths_that_the_shell_computes_are_read(imported):
    text = GRPO.replace("DATA=data\n", "DATA=data\nquestion=$((1024 * 2))\nwhole=$(((question + 100) * 2))\n")
    text = text.replace("prompt_length=100", "prompt_length=${question}").replace("=200", "=$((whole / 2 - 48))")
    keys = imported(text)[1]
    assert (keys.max_completion_length, keys.sequence_len) == (2100, 2048 + 2100)
    with pytest.raises(ConfigError, match=r"data.max_prompt_length: \$\(\(elsewhere\*2\)\)"):
        imported(GRPO.replace("prompt_length=100", "prompt_length=$((elsewhere * 2))"))


def test_every_loss_of_a_command_is_one_that_the_loss_itself_takes(imported):
    """What is mapped can be run: the objective has rules of its own beside those of the YAML."""
    for mode in ("vanilla", "gspo", "geo_mean", "clip_cov", "kl_cov"):
        for adding in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum"):
            try:
                keys = imported(
                    f"{GRPO.rstrip()[:-3]} {ACTOR}.policy_loss.loss_mode={mode} {ACTOR}.loss_agg_mode={adding}\n"
                )[1]
            except ConfigError:
                assert mode.endswith("_cov") or (mode, adding) == ("vanilla", "seq-mean-token-sum")
                continue
            PolicySpec(
                **{field.name: getattr(keys, field.name) for field in fields(PolicySpec) if hasattr(keys, field.name)}
            )


@pytest.mark.parametrize(("more", "key", "value"), ACTS)
def test_a_key_acts(imported, folder, more, key, value):
    found = getattr(imported(f"{GRPO.rstrip()[:-3]} {more}\n")[1], key)
    assert found == (str(folder / value) if key == "output_dir" else value)


def test_the_samplers_experts_are_replayed(imported):
    for mode, how in (("R3", "replay"), ("disabled", "off")):
        text = f"{GRPO.rstrip()[:-3]} {ACTOR}.router_replay.mode={mode}\n"
        assert imported(text)[1].rollout.routed_experts == how


REFUSED = [
    (f"{ACTOR}.router_replay.mode=R2", "set R3 or disabled"),
    ("algorithm.adv_estimator=reinforce_plus_plus", "whitened token by token"),
    ("algorithm.adv_estimator=remax", "remax: no such advantage here; set one of gae, grpo, rloo"),
    (f"{ACTOR}.policy_loss.loss_mode=gpg", "no such loss in grpo"),
    (f"{ACTOR}.policy_loss.loss_mode=kl_cov {ACTOR}.loss_agg_mode=seq-mean-token-mean", "no such mean here; set token-mean"),
    (f"{ACTOR}.loss_agg_mode=seq-mean-token-sum-norm", "loss_type: dr_grpo"),
    (f"{ACTOR}.loss_agg_mode=seq-mean-token-sum", "no such mean here; set token-mean, or write"),
    (f"{ACTOR}.clip_ratio=0.1", "set clip_ratio_low and clip_ratio_high"),
    (f"{ACTOR}.clip_ratio_c=1.1", "set it above 1.2"),
    (f"{ACTOR}.kl_loss_type=abs", "abs: no such estimator here"),
    ("algorithm.use_kl_in_reward=True", "in the loss or in the reward here; keep one"),
    (f"{ACTOR}.ppo_mini_batch_size=60", "64 prompts are no whole steps of 60"),
    (f"{ROLLOUT}.n=1", "set it to 2 or more"),
    (f"{ROLLOUT}.multi_turn.enable=True", "classes of verl's"),
    ("data.truncation=middle data.filter_overlong_prompts=False", "a row keeps its end here"),
    ("data.train_max_samples=100", "drawn at random"),
    ("reward_model.reward_manager=prime", "set naive"),
    ("algorithm.filter_groups.enable=True", "dynamic_sampling: true"),
    ("algorithm.rollout_is_threshold=2.0", "importance_sampling_correction"),
    ("actor_rollout_ref.model.exclude_modules=x", "target_modules"),
    ("actor_rollout_ref.actor.no_such_key=1", "no key of verl's that is known here"),
    ("reward_model.reward_manager=dapo reward_model.overlong_buffer.enable=True reward_model.overlong_buffer.len=50 reward_model.overlong_buffer.penalty_factor=2", "set 1.0"),
]  # fmt: skip


@pytest.mark.parametrize(("more", "message"), REFUSED)
def test_what_has_no_counterpart_is_refused_by_name(imported, more, message):
    with pytest.raises(ConfigError) as caught:
        imported(f"{GRPO.rstrip()[:-3]} {more}\n")
    assert message in str(caught.value)
    assert more.split()[-1].partition("=")[0].rpartition(".")[0] in str(caught.value)


def test_a_reward_of_verls_own_is_refused_with_what_to_do(imported):
    text = "".join(line for line in GRPO.splitlines(keepends=True) if "custom_reward" not in line)
    with pytest.raises(
        ConfigError,
        match=r"custom_reward_function.path: missing: .*data_source.*default_compute_score as compute_score",
    ):
        imported(text)


def test_a_critic_of_its_own_schedule_is_refused(imported):
    with pytest.raises(ConfigError, match=r"critic.optim.lr_warmup_steps_ratio: 0.05 beside the policy's 0.0"):
        imported(f"{PPO.rstrip()} critic.optim.lr_warmup_steps_ratio=0.05\n")
    both = "critic.optim.lr_warmup_steps_ratio=0.05 actor_rollout_ref.actor.optim.lr_warmup_steps_ratio=0.05"
    assert imported(f"{PPO.rstrip()} {both}\n")[1].warmup_ratio == 0.05
    with pytest.raises(ConfigError, match=r"critic.model.path: missing"):
        imported(PPO.replace("critic.model.path=base", ""))


def test_a_trainer_that_is_not_read_is_named(imported):
    with pytest.raises(ConfigError, match=r"run.sh:2: recipe.dapo.main_dapo: of verl its main_ppo"):
        imported("set -x\npython3 -m recipe.dapo.main_dapo algorithm.adv_estimator=grpo\n")


def test_no_key_is_dropped_silently(imported):
    """Every key of the command is in the YAML: at a key of ours, or among the others."""
    for text in (GRPO, PPO, SFT):
        made = imported(text)[0]
        given = [word.lstrip("+").partition("=")[0] for word in text.split() if "=" in word and "." in word]
        assert [
            key for key in given if not key.startswith("-") and "reward_kwargs" not in key and key not in made.text
        ] == []


@pytest.fixture
def with_rows(folder, model_dir):
    """verl's own rows, and a model that can be trained on them."""
    (folder / "base").rmdir()
    shutil.copytree(model_dir("qwen3"), folder / "base")
    for name, start in (("train", 0), ("test", 50)):
        rows = [
            {
                "data_source": "mine",
                "prompt": [{"role": "user", "content": f"Say {number}."}],
                "reward_model": {"style": "rule", "ground_truth": str(number)},
                "extra_info": {"index": number, "question": f"Say {number}.", "answer": str(number)},
            }
            for number in range(start, start + 16)
        ]
        datasets.Dataset.from_list(rows).to_parquet(folder / f"data/{name}.parquet")
    return folder


def test_its_rows_are_shown_as_they_are_trained_on(with_rows, capsys):
    (with_rows / "run.sh").write_text(SFT)
    assert _run(["import", "run.sh"]) == 0
    assert _run(["data", "run.posttrain.yaml", "--examples", "1"]) == 0
    assert "Say " in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["grpo", "gae"])
def test_an_imported_command_trains_with_its_own_reward(with_rows, estimator, capsys):
    text = (
        GRPO.replace("adv_estimator=grpo", f"adv_estimator={estimator}")
        .replace("=64", "=4")
        .replace("_size=16", "_size=2")
    )
    text = text.replace("max_response_length=200", "max_response_length=8").replace(
        "trainer.total_epochs=15 $@", "critic.model.path=base trainer.total_training_steps=1"
    )
    text = text.replace("'console','wandb'", "console")
    (with_rows / "run.sh").write_text(text)
    kind = "ppo" if estimator == "gae" else "grpo"
    assert _run(["import", "run.sh"]) == 0
    assert _run([kind, "run.posttrain.yaml", "--set", "reward_check=off", "--set", "allow_raw_base=true"]) == 0, (
        capsys.readouterr().err
    )
    folder = with_rows / f"runs/run.posttrain/stages/01-{kind}"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2], "a generation batch of two optimizer steps"
    assert "rewards/compute_score/mean" in rows[0]
