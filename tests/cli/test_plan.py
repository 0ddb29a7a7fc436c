"""`posttrain plan`: what it prints, what it refuses, and that it loads no torch."""

import json
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from posttrain.cli.plan import plan
from posttrain.errors import ConfigError, ModelError

QWEN3_8B = {
    "model_type": "qwen3", "hidden_size": 4096, "num_hidden_layers": 36, "vocab_size": 151936, "intermediate_size": 12288,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "dtype": "bfloat16", "max_position_embeddings": 40960,
}  # fmt: skip
FLAT = """
base_model: ./base
adapter: qlora
load_in_4bit: true
lora_r: 16
lora_alpha: 32
lora_target: [q_proj, k_proj, v_proj, o_proj]
sequence_len: 4096
gradient_checkpointing: true
bf16: true
datasets: [{ path: ./rows.jsonl, type: chat }]
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(QWEN3_8B))
    (tmp_path / "rows.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    (tmp_path / "rewards.py").write_text("def right(completions, **_):\n    return [0.0 for _ in completions]\n")
    (tmp_path / "sft.yaml").write_text(FLAT)
    return tmp_path


def _run(*arguments):
    app = typer.Typer()
    app.command()(plan)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_the_flat_yaml_of_8b_on_a_24_gb_card(folder):
    result = _run(folder / "sft.yaml", "--device", "rtx4090")
    assert result.exit_code == 0
    assert "8,190.7M parameters; on one rtx4090, 20.1 GiB free" in result.output
    assert "trains 15.3M parameters (0.2%)" in result.output
    assert (
        "may not fit: QLoRA needs" in result.output
        and "it would fit with per_device_train_batch_size: 1" in result.output
    )
    assert _run(folder / "sft.yaml", "--device", "h100", "--tokens", "500").output.count("fits    yes") == 1


def test_offloaded_layers_have_a_line_with_what_is_copied_and_how_long_it_takes(folder):
    """NF4 halves a byte: 36 layers of 96.5 MiB, of which 34 are copied, twice, at 0.8 of PCIe 4.0's 32 GB/s."""
    result = _run(folder / "sft.yaml", "--device", "rtx4090", "--set", "layer_offloading=true")
    assert "for layers in the machine's memory, pinned" in result.output
    assert (
        "copied at 25.6 GB/s: 6.1 GiB (256 ms) a micro-batch, 3.2 GiB (136 ms) a pass without gradients"
        in result.output
    )
    record = json.loads(
        _run(folder / "sft.yaml", "--device", "rtx4090", "--set", "layer_offloading=true", "--json").output
    )
    assert record["stages"][0]["host"]["layers"] > record["stages"][0]["copied_bytes"] > 3 << 30


@pytest.mark.parametrize("key", ["layer_offloading=true", "torch_compile=true", "optim=paged_adamw_8bit"])
def test_what_one_process_alone_can_train_with_is_said_to_be_refused(key, folder):
    """As the run says it before it begins."""
    options = [
        "--set",
        key,
        "--set",
        "adapter=lora",
        "--set",
        "load_in_4bit=false",
        "--set",
        "gradient_checkpointing=true",
    ]
    said = f"refused {key.replace('=', ': ')} is for one training process: a run of 2 is refused; set {key.partition('=')[0]}: "
    result = _run(folder / "sft.yaml", "--device", "h100", "--devices", "2", *options)
    assert said in result.output and result.exit_code == 1
    assert "torchrun" not in result.output
    alone = _run(folder / "sft.yaml", "--device", "h100", *options)
    assert "refused" not in alone.output and alone.exit_code == 0


def test_processes_that_shards_do_not_divide_are_said_to_be_refused(folder):
    def planned(cards):
        return _run(folder / "sft.yaml", "--gpus", cards, "--set", "sharding={dp_shard_size: 3}")

    result = planned("4xH100")
    assert "refused sharding.dp_shard_size: 3 with 4 processes; set a number that divides them" in result.output
    assert result.exit_code == 1 and "torchrun" not in result.output
    assert planned("6xH100").exit_code == 0
    assert planned("1xH100").exit_code == 0


def test_inputs_of_layers_that_each_process_offloads_are_counted(folder):
    options = ["--gpus", "2xH100", "--set", "gradient_checkpointing=offload"]
    output = _run(folder / "sft.yaml", *options).output
    assert "offload 18.0 GiB for activations in the machine's memory, pinned by each process" in output


def test_what_cannot_fit_is_said_in_one_line_and_by_the_exit_code(folder):
    result = _run(folder / "sft.yaml", "--device", "rtx4090", "--set", "adapter=none", "--set", "load_in_4bit=false")
    assert result.exit_code == 1
    (line,) = [line for line in result.output.splitlines() if "does not fit" in line]
    assert "full fine-tuning needs" in line and "it would fit with" in line and "adapter: qlora" in line


def test_rl_shows_the_rollout_share_and_the_best_split(folder):
    (folder / "rl.yaml").write_text(
        "base_model: ./base\ndatasets: [{path: rows.jsonl, type: prompt}]\nreward_funcs: [rewards.py:right]\n"
        "num_generations: 8\nmax_completion_length: 2048\nnum_prompts_per_step: 32\nmax_steps: 100\nsequence_len: 2304\n"
    )
    output = _run(folder / "rl.yaml", "--device", "h200", "--devices", "8", "--tokens", "300").output
    assert "a generation batch of 256 completions: rollout" in output and "% rollout); 100 steps" in output
    assert "split   best" in output and "for rollout and" in output


def test_every_anchor_of_a_row_is_a_prompt(folder):
    (folder / "ebft.yaml").write_text(
        "base_model: ./base\ndatasets: [{path: rows.jsonl, type: chat}]\nmode: strided\nsequence_len: 100\ncontext_length: 4\n"
        "max_completion_length: 16\nstride: 16\nnum_prompts_per_step: 2\nnum_generations: 4\nmax_steps: 3\n"
    )
    # At 4, 20, 36, 52, 68 and 84 of a row of 100 tokens; at 4 and 20 of one of 40.
    assert "a generation batch of 48 completions" in _run(folder / "ebft.yaml", "--device", "h200").output
    assert "of 16 completions" in _run(folder / "ebft.yaml", "--device", "h200", "--tokens", "40").output


RL = (
    "base_model: ./base\ndatasets: [{path: rows.jsonl, type: prompt}]\nreward_funcs: [rewards.py:right]\nnum_generations: 8\n"
    "max_completion_length: 2048\nnum_prompts_per_step: 32\nmax_steps: 100\nsequence_len: 2304\nrollout: {engine: vllm_server}\n"
)


@pytest.mark.parametrize(
    ("teacher", "held"), [("{model: ./base}", True), ("{model: big@1, url: 'http://127.0.0.1:8000'}", False)]
)
def test_a_teacher_holds_memory_where_it_is_loaded_and_none_where_a_server_has_it(teacher, held, folder):
    (folder / "rl.yaml").write_text(f"{RL}teachers: [{teacher}]\n")
    result = _run(folder / "rl.yaml", "--device", "h200", "--devices", "8")
    assert ("teachers" in result.output) == held


def test_a_cluster_shares_the_model_out_and_ends_with_the_lines_that_start_it(folder):
    (folder / "rl.yaml").write_text(RL)
    run = _run(folder / "rl.yaml", "--gpus", "2x8xH100@eth100", "--tokens", "300", "--usd-per-gpu-hour", "2")
    for says in (
        "on each card of 2x8xh100@eth100, 67.1 GiB free", "on each of 16 whatever the data", "sync_buffers", "vllm_weights",
        "as answers grow (rollout:training): 256 tokens", "if answers may be so many versions old: 0:", " device hours, ", "USD",
        "torchrun --nnodes 2", "--nproc-per-node 8 --no-python posttrain grpo", "srun --nodes 2 --ntasks-per-node 8", "--ray auto --workers 15 --worker gpus=1",
    ):  # fmt: skip
        assert says in run.output
    faster = _run(folder / "rl.yaml", "--gpus", "2x8xH100@ib400", "--tokens", "300", "--json")
    slower = _run(folder / "rl.yaml", "--gpus", "2x8xH100@eth10", "--tokens", "300", "--json")
    (near,), (far,) = (json.loads(r.output)["stages"] for r in (faster, slower))
    assert near["phases_s"]["training"] < far["phases_s"]["training"] and near["shards"] == 16
    assert near["split"]["rollout"] + near["split"]["train"] == 16 and set(near["staleness"]) == {"0", "1", "2", "4"}


def test_copies_of_the_model_are_counted_with(folder):
    (folder / "rl.yaml").write_text(RL + "sharding: {dp_shard_size: node, sync_each_batch: false}\n")
    run = _run(folder / "rl.yaml", "--gpus", "2x8xH100@eth100", "--tokens", "300")
    assert "cut over 8 of 16 processes, 2 copies; gradients are whole on each" in run.output


def test_a_shared_micro_batch_is_counted_with_and_what_cannot_share_is_refused(folder):
    def planned(size):
        return _run(folder / "sft.yaml", "--gpus", "6xH100", "--set", f"sharding={{sp_size: {size}}}")

    assert "micro-batches are shared by 2 processes: each holds 1/2 of their tokens" in planned(2).output
    result = planned(3)
    assert "refused sharding.sp_size: 3 with " in result.output and "attention heads and" in result.output
    assert result.exit_code == 1 and "torchrun" not in result.output
    assert "refused sharding.sp_size: 4 with 6 processes; set a number that divides them" in planned(4).output


def test_layers_held_between_processes_are_counted_with_and_what_cannot_be_held_so_is_refused(folder):
    def planned(size):
        sets = [
            "--set",
            f"sharding={{tensor_parallel_size: {size}}}",
            "--set",
            "adapter=none",
            "--set",
            "load_in_4bit=false",
        ]
        return _run(folder / "sft.yaml", "--gpus", "6xH100", *sets)

    assert "layers are held by 2 processes between them: each computes 1/2 of their heads" in planned(2).output
    assert "refused sharding.tensor_parallel_size: 3 with " in planned(3).output
    assert "refused sharding.tensor_parallel_size: 4 with 6 processes; set a number that divides" in planned(4).output


def test_vllm_inside_one_of_several_processes_is_said_to_be_refused(folder):
    (folder / "rl.yaml").write_text(RL.replace("vllm_server", "vllm"))
    says = "a run of 8 is refused; set rollout.engine: vllm_server"
    assert says in _run(folder / "rl.yaml", "--gpus", "8xH100").output
    (folder / "rl.yaml").write_text(RL)
    assert "is refused" not in _run(folder / "rl.yaml", "--gpus", "8xH100").output


def test_training_without_an_engine_of_its_own_names_the_copy_that_every_process_holds(folder):
    (folder / "rl.yaml").write_text(RL.replace("rollout: {engine: vllm_server}", ""))
    output = _run(folder / "rl.yaml", "--gpus", "8xH100").output
    assert "replica 15.3 GiB" in output or "replica 30.5 GiB" in output
    assert "every process holds a whole copy to sample with, and samples slowly" in output


def test_servers_and_copies_that_sample_are_lines_of_the_plan(folder):
    (folder / "rl.yaml").write_text(RL.replace("vllm_server}", "vllm_server, replicas: 2}"))
    output = _run(folder / "rl.yaml", "--gpus", "8xH100").output
    assert (
        "engine  colocated: 2 servers of vLLM on the cards that train, " in output
        and "asleep while it trains" in output
    )
    (folder / "rl.yaml").write_text(RL.replace("engine: vllm_server", "max_staleness: 2"))
    output = _run(folder / "rl.yaml", "--gpus", "1xH100").output
    assert "max_staleness 2: samples on a second copy (" in output


def test_a_split_is_planned_on_the_cards_that_are_left_and_started_so(folder):
    def planned(gpus, *options, rollout="placement: split, replicas: 2, tensor_parallel_size: 2"):
        (folder / "rl.yaml").write_text(RL.replace("vllm_server}", f"vllm_server, {rollout}}}"))
        return _run(folder / "rl.yaml", "--gpus", gpus, "--tokens", "300", *options)

    split = planned("8xH100")
    for says in (
        "engine  split: 2 servers of vLLM over 2 cards, 4 cards of their own beside 4 for training", "on each of 4 whatever the data",
        "--nproc-per-node 4 --no-python", "--ntasks-per-node 4 --gpus-per-node 8", "--ray auto --workers 4 --worker gpus=1",
    ):  # fmt: skip
        assert says in split.output
    assert "vllm_weights" not in split.output
    (apart,), (together,), (alone,) = (
        json.loads(made.output)["stages"]
        for made in (
            planned("8xH100", "--json"),
            planned("8xH100", "--json", rollout="replicas: 2, tensor_parallel_size: 2"),
            planned("4xH100", "--json", rollout="replicas: 2, tensor_parallel_size: 2"),
        )
    )
    assert apart["phases_s"]["rollout"] == together["phases_s"]["rollout"]
    assert apart["phases_s"]["training"] == alone["phases_s"]["training"] > together["phases_s"]["training"]
    assert apart["shards"] == 4 and together["shards"] == 8


@pytest.mark.parametrize(
    ("gpus", "rollout", "says"),
    [
        ("2xH100", "placement: split, replicas: 2", "split with 2 servers on a card each beside 1 for training needs 3 cards, and 2 are seen here; set rollout.replicas: 1"),
        ("1xL4", "placement: split", "needs 2 cards, and 1 are seen here; set fewer training processes, or placement: colocated"),
        ("2x4xH100", "placement: split, replicas: 3", "split keeps 3 of 8 cards on 2 machines; keep as many of each, or whole machines"),
        ("4xL4", "placement: split, memory_gib: 40", "a server of vLLM needs "),
    ],
)  # fmt: skip
def test_a_split_that_cannot_be_is_refused_by_name(folder, gpus, rollout, says):
    (folder / "rl.yaml").write_text(RL.replace("vllm_server}", f"vllm_server, {rollout}}}"))
    result = _run(folder / "rl.yaml", "--gpus", gpus)
    assert result.exit_code == 1 and says in result.output and "torchrun" not in result.output


def test_a_split_over_machines_is_started_by_ray_and_one_that_ray_has_no_room_for_is_said(folder):
    (folder / "rl.yaml").write_text(RL.replace("vllm_server}", "vllm_server, placement: split, replicas: 8}"))
    output = _run(folder / "rl.yaml", "--gpus", "2x8xH100").output
    assert "--ray auto --workers 8 --worker gpus=1" in output and "--nproc-per-node" not in output
    assert "torchrun and SLURM start servers on the first machine alone" in output
    (folder / "rl.yaml").write_text(RL.replace("vllm_server}", "vllm_server, tensor_parallel_size: 8}"))
    output = _run(folder / "rl.yaml", "--gpus", "8xH100").output
    assert "Ray gives servers cards of their own, 8 here, and leaves none to train on" in output


def test_a_server_over_more_cards_than_a_machine_has_is_said_to_be_refused(folder):
    (folder / "rl.yaml").write_text(RL.replace("vllm_server}", "vllm_server, tensor_parallel_size: 8}"))
    result = _run(folder / "rl.yaml", "--gpus", "2x4xH100")
    assert result.exit_code == 1
    assert "rollout.tensor_parallel_size: 8 on a machine of 4 cards" in result.output
    assert "is on one machine" not in _run(folder / "rl.yaml", "--gpus", "8xH100").output


def test_gpt2_and_a_mixture_of_experts_are_planned_from_the_config_alone(folder):
    config = {
        "model_type": "gpt2",
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_positions": 1024,
        "vocab_size": 50257,
    }
    (folder / "base" / "config.json").write_text(json.dumps(config))
    assert (
        "124.4M parameters; on" in _run(folder / "sft.yaml", "--device", "l4", "--set", "lora_target=all-linear").output
    )
    config = {
        **QWEN3_8B,
        "model_type": "qwen3_moe",
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 1024,
    }
    (folder / "base" / "config.json").write_text(json.dumps(config))
    assert "M active)" in _run(folder / "sft.yaml", "--device", "h100").output


def test_what_a_finished_run_took_corrects_the_times(folder):
    plain = json.loads(_run(folder / "sft.yaml", "--device", "h100", "--set", "max_steps=10", "--json").output)
    (folder / "run").mkdir()
    rows = [{"step": n, "num_tokens": n * 8 * 500.0, "step_time": 3.0} for n in range(1, 6)]
    (folder / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = _run(folder / "sft.yaml", "--device", "h100", "--measured", folder / "run", "--tokens", "500").output
    assert "times what is predicted of training" in output
    # 8 rows of 500 tokens took 3 s, so the plan of 8 rows of 500 tokens says 3 s.
    assert "time    about 3.0 s a step (4,000 tokens)" in output
    assert plain["stages"][0]["total_s"] == pytest.approx(10 * plain["stages"][0]["step_s"])


STRIDED = (
    "base_model: ./base\ndatasets: [{path: rows.jsonl, type: chat}]\nmode: strided\nsequence_len: 100\ncontext_length: 4\n"
    "max_completion_length: 16\nstride: 16\nnum_prompts_per_step: 2\nnum_generations: 4\nmax_steps: 3\nper_device_train_batch_size: 8\n"
)
SAMPLED = (
    "base_model: ./base\ndatasets: [{path: rows.jsonl, type: prompt}]\nreward_funcs: [rewards.py:right]\nsequence_len: 80\nmax_completion_length: 16\n"
    "num_prompts_per_step: 12\nnum_generations: 4\nmax_steps: 3\nper_device_train_batch_size: 8\n"
)


@pytest.mark.parametrize(("kind", "text"), [("ebft", STRIDED), ("grpo", SAMPLED)])
def test_a_run_that_samples_corrects_a_plan_of_the_same_to_what_it_took(kind, text, folder):
    """48 completions of 16 tokens a step, which is what is counted as tokens; the prompts before them are planned."""
    (folder / "rl.yaml").write_text(text)
    (folder / "run").mkdir()
    took = {"time/train_s": 3.0, "time/rollout_s": 5.0, "step_time": 8.0, "completions/mean_length": 16.0, "completions/max_length": 16.0}  # fmt: skip
    rows = [{"step": n, "num_tokens": n * 48 * 16.0, **took} for n in range(1, 5)]
    (folder / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = (folder / "rl.yaml", "--device", "h100", "--stage", kind, "--measured", folder / "run", "--json")
    made = json.loads(_run(*asked).output.partition("\n")[2])["stages"][0]["phases_s"]
    assert made["rollout"] == pytest.approx(5.0, rel=0.01)
    assert made.get("log-probs", 0.0) + made["training"] == pytest.approx(3.0, rel=0.05)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--gpus", "8xH100", "--device", "h100"], "--gpus 8xH100 beside --device"),
        (["--gpus", "many"], "--gpus many: expected COUNTxCARD"),
        (["--measured", "nowhere"], "--measured nowhere: got no metrics.jsonl"),
    ],
)
def test_options_that_cannot_be_meant_are_refused_by_name(folder, options, says):
    with pytest.raises(ConfigError, match=says):
        _run(folder / "sft.yaml", *options)


def test_this_machine_is_probed(folder):
    from posttrain.cli.probe import probe

    device = probe(seconds=0.6)
    assert device.source == "probed" and device.flops > 1e8 and device.bandwidth > 1e8 and device.rates.layer_call_s > 0


def test_a_model_that_is_not_here(folder):
    (folder / "hub.yaml").write_text(FLAT.replace("./base", "nobody/absent-model"))
    with pytest.raises(
        ModelError,
        match=r"base_model nobody/absent-model: got no config.json here, expected a local folder or a model in the hub cache",
    ):
        _run(folder / "hub.yaml")


@pytest.mark.parametrize(
    ("base", "config", "says"),
    [
        ("a..b", None, "got no config.json here"),
        ("big@1", None, "needs `register:`"),
        (
            "./broken",
            '{"model_type": "qwen3", ',
            "broken/config.json: not JSON: .* at column 25; expected the config of",
        ),
        ("./broken", "[1]", "broken/config.json: got a list, expected the config of"),
        ("./broken", "\udcff", "broken/config.json: not UTF-8"),
    ],
)
def test_a_base_that_names_nothing_readable_is_one_line(base, config, says, folder):
    if config is not None:
        (folder / "broken").mkdir()
        (folder / "broken" / "config.json").write_text(config, errors="surrogateescape")
    (folder / "sft.yaml").write_text(FLAT.replace("./base", base))
    with pytest.raises((ModelError, ConfigError), match=says):
        _run(folder / "sft.yaml", "--device", "h200")


def test_an_unknown_device(folder):
    with pytest.raises(ConfigError, match=r"--device tpu: expected this, or one of a100, h100"):
        _run(folder / "sft.yaml", "--device", "tpu")


def test_no_torch_is_loaded(folder):
    code = "import sys; from posttrain.cli.app import main\ntry: main(sys.argv[1:])\nexcept SystemExit as done: assert done.code == 0, done.code\nassert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", str(folder / "sft.yaml"), "--device", "h100"],
        capture_output=True,
        check=False,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "QLoRA" in done.stdout or "fits    yes" in done.stdout


def test_reward_models_and_judges_of_this_process_are_counted_whole_on_each(folder):
    (folder / "rm").mkdir()
    head = {"architectures": ["Qwen3ForSequenceClassification"], "id2label": {"0": "reward"}}
    (folder / "rm" / "config.json").write_text(json.dumps(QWEN3_8B | head))
    (folder / "here.yaml").write_text("model: ./base\n")
    (folder / "served.yaml").write_text("model: ./base\nurl: http://127.0.0.1:8000/v1\n")
    written = FLAT.replace("chat", "prompt").replace(
        "sequence_len: 4096", "sequence_len: 4096\nmax_completion_length: 512"
    )
    (folder / "grpo.yaml").write_text(f"{written}reward_funcs: [rewards.py:right]\n")

    def parts(cards, *rewards):
        funcs = f"reward_funcs=[{', '.join(['rewards.py:right', *rewards])}]"
        result = _run(folder / "grpo.yaml", "--gpus", cards, "--set", funcs, "--stage", "grpo", "--json")
        return json.loads(result.output)["stages"][0]["parts"]

    assert "judges" not in parts("1xH100", "judge:served.yaml")
    one = parts("1xH100", "model:rm")["judges"]
    assert one == pytest.approx(2 * 8.19e9, rel=0.01)
    assert parts("1xH100", "model:rm", "judge:here.yaml", "judge:served.yaml")["judges"] == 2 * one
    assert parts("4xH100", "model:rm")["judges"] == one


def test_plan_says_what_is_advised_with_its_source_and_not_what_was_switched_off(folder):
    said = _run(folder / "sft.yaml", "--device", "h100")
    assert "advice  lora_rate: learning_rate 2e-05 is one for all weights" in said.output
    assert "advice  lora_layers: lora_target q_proj, k_proj, v_proj, o_proj leaves out the MLP's layers" in said.output
    made = json.loads(_run(folder / "sft.yaml", "--device", "h100", "--json").output)
    assert [one["name"] for one in made["stages"][0]["advice"]] == ["lora_rate", "lora_layers"]
    quiet = _run(folder / "sft.yaml", "--device", "h100", "--set", "advice_off=[lora_rate, lora_layers]")
    assert "advice" not in quiet.output


def test_plan_compares_the_rank_with_the_data_that_is_there(folder):
    """15.3 M parameters at 2 bits hold the bits of 123 MB of text."""
    with (folder / "rows.jsonl").open("a") as file:
        file.truncate(200_000_000)
    assert "advice  lora_rank: lora_r 16" in _run(folder / "sft.yaml", "--device", "h100").output


def _grpo(folder, **options):
    (folder / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    written = {
        "base_model": "./base", "datasets": [{"path": "./prompts.jsonl"}], "reward_funcs": ["rewards.py:right"], "sequence_len": 4096,
        "max_completion_length": 512, "num_iterations": 2, **options,
    }  # fmt: skip
    path = folder / "grpo.yaml"
    path.write_text(json.dumps(written))
    return path


def test_plan_notes_what_has_no_effect(folder):
    path = _grpo(folder, sapo_temperature_pos=2.0)
    said = _run(path, "--stage", "grpo", "--device", "h100")
    assert "note    sapo_temperature_pos: no effect, because loss_type is not sapo" in said.output
    made = json.loads(_run(path, "--stage", "grpo", "--device", "h100", "--json").output)
    assert "sapo_temperature_pos: no effect, because loss_type is not sapo" in made["notes"]


def test_plan_refuses_exactly_what_the_loop_refuses(folder):
    from posttrain.config.rl import GRPOKeys
    from posttrain.objectives.policy import POLICY_LOSSES
    from posttrain.objectives.spec import PolicySpec
    from posttrain.objectives.terms import spec_from

    refused = 0
    for loss_type in POLICY_LOSSES:
        for options in ({}, {"delta": 4.0}, {"delta": 1.1}, {"epsilon_high": 0.28}, {"clip_cov_lb": 9.0}):
            path = _grpo(folder, loss_type=loss_type, **options)
            given = {"base_model": "b", "datasets": [{"path": "p"}], "reward_funcs": ["r"]}
            try:
                spec_from(PolicySpec, GRPOKeys.model_validate({**given, "loss_type": loss_type, **options}))
            except ConfigError as error:
                refused += 1
                with pytest.raises(ConfigError) as found:
                    _run(path, "--stage", "grpo", "--device", "h100")
                assert str(found.value) == str(error)
            else:
                _run(path, "--stage", "grpo", "--device", "h100")
    assert refused > 10


@pytest.mark.parametrize("options", [{"loss_type": "clip_cov"}, {"loss_type": "kl_cov"}, {"top_entropy_quantile": 0.2}])
def test_the_pass_that_chooses_tokens_is_in_the_time_of_a_step(options, folder):
    """As long as the pass that a reference takes, once a pass over the batch."""

    def phases(**given):
        made = _run(_grpo(folder, **given), "--stage", "grpo", "--device", "h100", "--json")
        return json.loads(made.output)["stages"][0]["phases_s"]

    assert "log-probs" not in phases()
    scored = phases(beta=0.1)["log-probs"]
    assert phases(**options)["log-probs"] == pytest.approx(2 * scored)
