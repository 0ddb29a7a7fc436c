"""Each key of `sharding` acts: collectives are counted and their dtypes seen; and none of them changes what is learned."""

import json
import subprocess
import sys

import pytest

from posttrain.distributed.sharding import ShardingSpec, sharding_over
from posttrain.errors import ConfigError

SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from posttrain.distributed.ranks import join_ranks
from posttrain.models.batch import pack
from posttrain.models.export import save_policy
from posttrain.models.load import load_policy
from posttrain.models.proof import probe_logits
from posttrain.objectives.terms import spec_from
from posttrain.distributed.sharding import ShardingSpec, sharding_over
from posttrain.recipes.batches import MicroBatch
from posttrain.recipes.optim import accumulating
from posttrain.types import TokenSeq
from posttrain.files import digest_tree
import stage_runner

class Collectives(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            tensors = [t for a in args for t in (a if isinstance(a, (list, tuple)) else [a]) if isinstance(t, torch.Tensor)]
            self.seen.append((func.__name__.split(".")[0], str(tensors[0].dtype) if tensors else ""))
        return func(*args, **(kwargs or {}))

torch.set_num_threads(1)
job, found = json.loads(sys.argv[1]), {}
with join_ranks() as ranks:
    for name, options in job["rows"].items():
        keys = stage_runner.keys_of("sft", Path(job["model"]), Path(job["data"]), **options)
        sharding = sharding_over(ranks, spec_from(ShardingSpec, keys.sharding))
        policy = load_policy(keys, sharding=sharding)
        layer, ran, dtypes = policy.base.get_decoder().layers[0], [], []
        layer.register_forward_pre_hook(lambda module, given: ran.append(1))
        layer.register_forward_hook(lambda module, given, output: dtypes.append(str(output.dtype)))
        before = probe_logits(policy.model)
        ran.clear(), dtypes.clear()
        sharding.release(policy.model)
        rows = [TokenSeq(tuple(range(3 + i, 20 + i)), (True,) * 17) for i in range(4)]
        mine = [MicroBatch([row]) for row in ranks.share(rows)]
        policy.model.train()
        with Collectives() as collectives:
            for micro in accumulating(policy, mine):
                micro.backward(-policy.score(pack([[row] for row in micro.rows])).logp_M.sum())
        calls, seen = len(ran), sorted(set(dtypes))
        norm = sharding.clip_grad_norm([p for _, p in policy.trainable()], 0.0)
        after = probe_logits(policy.model)
        same = True
        if policy.has_adapter:
            # As if it had been begun with other values: what a pass under them gathered is of no other pass.
            sharding.release(policy.model)
            policy.start = {key: parameter.detach() + 0.05 for key, parameter in policy.trainable()}
            batch = pack([[rows[0]]])
            with torch.no_grad():
                own, reference, again = policy.score(batch).logp_M, policy.reference_logp(batch), policy.score(batch).logp_M
            same = torch.equal(own, again) and not torch.equal(own, reference)
            sharding.release(policy.model)
        folder = Path(job["folder"]) / name / str(ranks.world_size) / "model"
        save_policy(policy, folder, keys, ranks=ranks)
        gathers, reduces, sums = ([d for op, d in collectives.seen if word in op] for word in ("allgather", "reduce_scatter", "allreduce"))
        found[name] = {
            "gathers": len(gathers), "reduces": len(reduces), "all_reduces": len(sums), "gathered": sorted(set(gathers)),
            "reduced": sorted(set(reduces)), "ran": calls, "activations": seen, "norm": norm,
            "held": sorted({str(sharding.local(p).dtype) for _, p in policy.trainable()}), "digest": digest_tree(folder),
            "probe": bool(torch.equal(before, after)), "logits": float(before.abs().sum()), "reference": same,
            "numbers": sum(sharding.local(p).numel() for _, p in policy.trainable()),
        }
    if ranks.is_main:
        Path(os.environ["FOUND"]).write_text(json.dumps(found))
"""
ROWS = {
    "usual": {},
    "kept": {"sharding": {"reshard_after_forward": False}},
    "once a step": {"sharding": {"sync_each_batch": False}},
    "bfloat16": {"sharding": {"param_dtype": "bfloat16"}},
    "reduced in bfloat16": {"sharding": {"reduce_dtype": "bfloat16"}},
    "again": {"gradient_checkpointing": True},
    "again, from the host": {"gradient_checkpointing": "offload"},
    "adapter in bfloat16": {"adapter": "lora", "lora_r": 4, "sharding": {"param_dtype": "bfloat16"}},
    "adapter": {"adapter": "lora", "lora_r": 4},
    "adapter, kept": {"adapter": "lora", "lora_r": 4, "sharding": {"reshard_after_forward": False}},
}


def _job(rows, model, data_dir, tmp_path):
    return {"model": str(model), "data": str(data_dir), "folder": str(tmp_path / "models"), "rows": rows}


def test_each_key_acts_and_changes_no_number(model_dir, data_dir, found_by, tmp_path):
    found = found_by(2, SCRIPT, _job(ROWS, model_dir("llama"), data_dir, tmp_path))
    usual, layers = found["usual"], json.loads((model_dir("llama") / "config.json").read_text())["num_hidden_layers"]
    # Two micro-batches: each gathers root and layers, the layers again in its backward, and reduces the gradients of all.
    assert (usual["gathers"], usual["reduces"]) == (2 * (2 * layers + 1), 2 * (layers + 1))
    assert (found["kept"]["gathers"], found["kept"]["reduces"]) == (2 * (layers + 1), usual["reduces"])
    assert (found["once a step"]["gathers"], found["once a step"]["reduces"]) == (usual["gathers"], layers + 1)
    again, offloaded = found["again"], found["again, from the host"]
    assert (usual["ran"], again["ran"], offloaded["ran"]) == (2, 4, 4)
    assert offloaded["norm"] == again["norm"]
    half = found["bfloat16"]
    assert half["gathered"] == half["activations"] == ["torch.bfloat16"]
    assert half["reduced"] == half["held"] == usual["gathered"] == usual["activations"] == ["torch.float32"]
    assert (found["reduced in bfloat16"]["reduced"], found["reduced in bfloat16"]["gathered"]) == (
        ["torch.bfloat16"],
        usual["gathered"],
    )
    for name in ROWS:
        twin = found["adapter" if name.startswith("adapter") else "usual"]
        # The probe, by which an export is proven, sees the weights as they are held.
        assert found[name]["probe"] and found[name]["logits"] == twin["logits"], name
        assert found[name]["digest"] == twin["digest"], name
        assert found[name]["reference"], name
        assert found[name]["norm"] == pytest.approx(twin["norm"], rel=3e-2 if "bfloat16" in name else 1e-5), name


@pytest.mark.slow
def test_four_ranks_hold_two_copies_or_four(model_dir, data_dir, found_by, tmp_path):
    rows = {
        "one": {},
        "two": {"sharding": {"dp_shard_size": 2}},
        "four": {"sharding": {"dp_shard_size": 1}},
        "node": {"sharding": {"dp_shard_size": "node"}},
        "one, adapter": {"adapter": "lora", "lora_r": 4},
        "two, adapter": {"adapter": "lora", "lora_r": 4, "sharding": {"dp_shard_size": 2}},
    }
    found = found_by(4, SCRIPT, _job(rows, model_dir("llama"), data_dir, tmp_path))
    one = found["one"]
    assert found["two"]["numbers"] == pytest.approx(2 * one["numbers"], rel=0.02)
    assert found["four"]["numbers"] == pytest.approx(4 * one["numbers"], rel=0.02)
    assert found["node"]["numbers"] == one["numbers"]
    assert (one["all_reduces"], found["two"]["all_reduces"]) == (0, found["two"]["reduces"])
    assert found["four"]["gathers"] == 0
    for name in rows:
        twin = found["one, adapter" if name.endswith("adapter") else "one"]
        assert found[name]["norm"] == pytest.approx(twin["norm"], rel=1e-5)
        assert found[name]["digest"] == twin["digest"]


EXPERTS = {"lora_target": ["q_proj", "gate_up_proj", "down_proj"], "adapter": "lora", "lora_r": 4}


@pytest.mark.slow
def test_experts_of_a_layer_are_gathered_by_themselves(model_dir, data_dir, found_by, tmp_path):
    """Two micro-batches: root, layers and their experts; the last two again in the backward."""
    rows = {"all": {}, "kept": {"sharding": {"reshard_after_forward": False}}, "adapter": EXPERTS}
    found = found_by(2, SCRIPT, _job(rows, model_dir("qwen3_moe"), data_dir, tmp_path))
    assert (found["all"]["gathers"], found["all"]["reduces"]) == (2 * (2 * 2 * 2 + 1), 2 * (2 * 2 + 1))
    assert found["kept"]["gathers"] == 2 * (2 * 2 + 1)
    assert all(found[name]["probe"] and found[name]["reference"] for name in rows)
    assert found["kept"]["digest"] == found["all"]["digest"]


LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]


@pytest.mark.slow
def test_two_copies_take_the_steps_of_one_process_which_goes_on_from_them(model_dir, data_dir, runner, tmp_path):
    """The checkpoint holds the first copy, in as many parts as that has."""
    options = {"learning_rate": 1e-4, "max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 1}
    common = {"kind": "sft", "model": str(model_dir("llama")), "data": str(data_dir)}
    copies = options | {"sharding": {"dp_shard_size": 2}}
    jobs = [
        common | {"folder": str(tmp_path / "straight"), "options": copies},
        common | {"folder": str(tmp_path / "stopped"), "options": copies, "stop_after": 1},
    ]
    done = subprocess.run(
        [*LAUNCH, runner.__file__, json.dumps(jobs)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-6000:]
    files = {path.name for path in (tmp_path / "stopped/checkpoints/step-00000001").glob("*.safetensors")}
    assert files == {f"{stem}-0000{n}-of-00002.safetensors" for stem in ("weights", "optimizer") for n in (1, 2)}
    keys = runner.keys_of("sft", model_dir("llama"), data_dir, **options, num_processes=4)
    for folder in ("stopped", "one"):
        runner.run_stage("sft", tmp_path / folder, keys)
        assert runner.losses(tmp_path / folder) == pytest.approx(runner.losses(tmp_path / "straight"), rel=1e-6)
        for name, tensor in runner.weights(tmp_path / "straight").items():
            assert (runner.weights(tmp_path / folder)[name] - tensor).abs().max() < 2e-5, name


class Ranks:
    def __init__(self, hosts):
        self.hosts, self.world_size = hosts, len(hosts)

    def gather(self, value):
        return self.hosts


@pytest.mark.parametrize(
    ("size", "hosts", "message"),
    [
        (3, "aaaa", "sharding.dp_shard_size: 3 with 4 processes; expected a number that divides them"),
        ("node", "aaab", "the machines have 3, 1 processes; expected as many on each"),
    ],
)
def test_what_does_not_divide_the_processes_is_refused(size, hosts, message):
    with pytest.raises(ConfigError, match=message):
        sharding_over(Ranks(hosts), ShardingSpec(dp_shard_size=size))


def test_one_process_holds_all_and_says_that_the_keys_do_nothing(caplog):
    assert sharding_over(Ranks("a")).num_shards == 1
    assert not caplog.text
    assert sharding_over(Ranks("a"), ShardingSpec(dp_shard_size=4)).num_shards == 1
    assert "sharding: no effect, because there is one process" in caplog.text
