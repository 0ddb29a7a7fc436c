"""Who this process is, from the variables of torchrun, accelerate and SLURM."""

import pytest

from posttrain.distributed.launch import Launch, first_host, not_read, read_launch
from posttrain.errors import ConfigError

TORCHRUN = {
    "WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29500",
    "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2",
}  # fmt: skip
SRUN = {
    "SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "gpu[07-08]",
}  # fmt: skip


@pytest.mark.parametrize("environ", [{}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": "1", "RANK": "0", "MASTER_PORT": "1"}])
def test_a_process_alone(environ):
    assert read_launch(environ) is None


def test_torchrun_says_who_this_is_and_that_it_keeps_the_store():
    assert read_launch(TORCHRUN) == Launch(3, 4, 1, "node0", 29500, store_is_there=True, attempt="2")


def test_accelerate_launch_is_read_as_torchrun_is():
    assert read_launch(TORCHRUN | {"ACCELERATE_MIXED_PRECISION": "bf16"}) == read_launch(TORCHRUN)


def test_a_step_of_srun_meets_on_its_first_node():
    launch = read_launch(SRUN)
    assert (launch.rank, launch.world_size, launch.local_rank, launch.address) == (5, 8, 1, "gpu07")
    assert 20_000 <= launch.port < 30_000
    assert launch.port != read_launch(SRUN | {"SLURM_STEP_ID": "1"}).port
    assert read_launch(SRUN | {"MASTER_PORT": "1234", "MASTER_ADDR": "here"}).port == 1234


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node1", "node1"), ("a,b", "a"), ("gpu[07-09,12],cpu1", "gpu07"), ("rack-2-gpu[3]", "rack-2-gpu3")],
)
def test_first_host(nodes, first):
    assert first_host(nodes) == first


COMMAND = ["sft", "stage.yaml"]
LINE = "torchrun --nproc-per-node {} --no-python posttrain sft stage.yaml"
REFUSED = [
    ({"WORLD_SIZE": "abc"}, "WORLD_SIZE=abc: got 'abc' in the environment, expected a whole number from 1 on"),
    ({"WORLD_SIZE": "0"}, "expected a whole number from 1 on"),
    ({"WORLD_SIZE": ""}, "expected a whole number from 1 on"),
    ({"WORLD_SIZE": "2"}, "RANK, MASTER_ADDR, MASTER_PORT are not set; start them with: " + LINE.format(2)),
    (TORCHRUN | {"RANK": "4"}, "RANK=4 is not below WORLD_SIZE=4"),
    (TORCHRUN | {"RANK": "-1"}, "RANK=-1: got '-1'"),
    (TORCHRUN | {"MASTER_PORT": "http"}, "MASTER_PORT=http"),
    ({"MASTER_PORT": "29500"}, "MASTER_PORT is set and WORLD_SIZE is not: .* " + LINE.format("N")),
    ({"ACCELERATE_USE_FSDP": "true", "ACCELERATE_MIXED_PRECISION": "no"}, "ACCELERATE_MIXED_PRECISION, ACCELERATE_USE_FSDP are"),
    ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"}, "SLURM_NTASKS=4 and this is no step of srun.*srun posttrain sft stage.yaml"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("environ", "message"), REFUSED, ids=lambda value: value[:30] if isinstance(value, str) else ""
)
def test_several_may_have_been_meant_and_one_was_started(environ, message):
    with pytest.raises(ConfigError, match=message) as refusal:
        read_launch(environ, COMMAND)
    assert "\n" not in str(refusal.value)


def test_what_accelerate_passes_on_is_told():
    assert not_read(TORCHRUN) == ""
    said = not_read(TORCHRUN | {"ACCELERATE_MIXED_PRECISION": "bf16", "FSDP_SHARDING_STRATEGY": "FULL_SHARD"})
    assert said.startswith(
        "of accelerate, not read, the YAML decides: ACCELERATE_MIXED_PRECISION=bf16, FSDP_SHARDING_STRATEGY=FULL_SHARD;"
    )
