"""What the command line says of where a verb runs, and what is placed for it."""

import json

import pytest

from posttrain.cli.roles import OnCluster, _forwarded, _RoleEvents, engine_resources, on_cluster, worker_resources
from posttrain.config.load import as_pipeline, load_stage
from posttrain.distributed.on_ray import lack_of
from posttrain.distributed.roles import RoleResources
from posttrain.errors import ConfigError


@pytest.fixture
def keys_of(tmp_path, model_dir, data_dir):
    """`keys_of("engine=vllm_server")`: the keys of a GRPO stage with this rollout."""
    (tmp_path / "stage.yaml").write_text(
        f"base_model: {model_dir('qwen3')}\ndatasets: [{{ path: {data_dir / 'prompts.jsonl'} }}]\nreward_funcs: [{data_dir / 'rewards.py'}:spread]\n"
    )
    return lambda *sets: as_pipeline(load_stage("grpo", tmp_path / "stage.yaml", [f"rollout.{one}" for one in sets]))


def test_what_a_worker_takes():
    assert worker_resources("") == (RoleResources(1.0, 0.0), "pack")
    assert worker_resources("gpus=1, cpus=0,placement=spread") == (RoleResources(0.0, 1.0), "spread")
    for wrong in ("cpus", "cpus=x", "cpus=-1", "cpus=nan", "cpus=1,cpus=2", "placement=here"):
        with pytest.raises(ConfigError, match="--worker "):
            worker_resources(wrong)


def test_an_engine_of_the_runs_own_has_a_place(keys_of):
    assert engine_resources(keys_of(), "") == []
    assert engine_resources(keys_of("engine=vllm_server", "url=http://127.0.0.1:8000"), "") == []
    assert engine_resources(keys_of("engine=vllm_server"), "") == [RoleResources(1.0, 0.0)]
    assert engine_resources(keys_of("engine=vllm_server", "replicas=2"), "") == [RoleResources(1.0, 0.0)] * 2
    assert engine_resources(keys_of("engine=vllm_server", "tensor_parallel_size=2"), "gpus=1") == [
        RoleResources(1.0, 2.0)
    ]


def test_servers_on_the_trainers_cards_are_refused_where_the_cluster_gives_cards(keys_of):
    assert engine_resources(keys_of("engine=vllm_server", "placement=colocated"), "") == [RoleResources(1.0, 0.0)]
    assert engine_resources(keys_of("engine=vllm_server", "placement=split"), "gpus=1") == [RoleResources(1.0, 1.0)]
    with pytest.raises(ConfigError, match=r"placement: colocated with --ray and cards.* set placement: split"):
        engine_resources(keys_of("engine=vllm_server", "placement=colocated"), "gpus=1")


def test_secrets_stay_in_the_terminal():
    environ = {
        "HF_HOME": "/models",
        "HF_TOKEN": "x",
        "MLFLOW_TRACKING_PASSWORD": "x",
        "VLLM_API_KEY": "x",
        "PATH": "/bin",
    }
    assert _forwarded(environ) == {"HF_HOME": "/models"}


def test_a_launcher_and_ray_are_not_both_asked(monkeypatch):
    assert on_cluster("auto", 2, "") == OnCluster("auto", 2, "")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="start one posttrain, without torchrun"):
        on_cluster("auto", 2, "")


def test_events_wait_for_the_folder_of_the_run(tmp_path):
    events = _RoleEvents(tmp_path / "run")
    events.tell({"role": "rank-0", "to": "restarting"})
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    events.tell({"role": "rank-0", "to": "stale"})
    found = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [(event["kind"], event["to"]) for event in found] == [("role", "restarting"), ("role", "stale")]


CPU, GPU = RoleResources(1.0, 0.0), RoleResources(1.0, 1.0)
ROOM = [
    ([CPU] * 4, [{"CPU": 2.0}, {"CPU": 2.0}], "pack", None),
    ([CPU] * 5, [{"CPU": 2.0}, {"CPU": 2.0}], "pack", "room for 4: 2 node(s) with 2 CPU; 2 CPU"),
    ([CPU] * 3, [{"CPU": 2.0}, {"CPU": 2.0}], "strict_spread", "room for 2"),
    ([CPU] * 3, [{"CPU": 2.0}, {"CPU": 4.0}], "strict_pack", None),
    ([CPU] * 5, [{"CPU": 2.0}, {"CPU": 4.0}], "strict_pack", "room for 4"),
    ([GPU, GPU], [{"CPU": 8.0}, {"CPU": 8.0, "GPU": 1.0}], "spread", "room for 1: 2 node(s) with 8 CPU; 8 CPU, 1 GPU"),
    (
        [RoleResources(3.0, 0.0)] * 2,
        [{"CPU": 4.0}, {"CPU": 2.0}],
        "pack",
        "2 processes were asked for (2 of 3 CPU; pack)",
    ),
]


@pytest.mark.parametrize(("bundles", "nodes", "strategy", "said"), ROOM)
def test_a_cluster_that_is_too_small_is_said_with_what_there_is(bundles, nodes, strategy, said):
    found = lack_of(bundles, nodes, strategy)
    assert found == "" if said is None else said in found
