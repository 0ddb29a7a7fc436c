import pytest
import torch
from transformers import get_scheduler

from posttrain.config.stages import SFTKeys
from posttrain.models.load import load_policy
from posttrain.recipes.optim import learning_rate, make_optimizer
from posttrain.recipes.train_state import _keep_in_pages


def keys(**options):
    return SFTKeys(base_model="m", datasets=[{"path": "x.jsonl"}], learning_rate=1e-3, **options)


@pytest.mark.parametrize(
    ("ours", "theirs"), [("cosine", "cosine"), ("linear", "linear"), ("constant", "constant_with_warmup")]
)
@pytest.mark.parametrize(("warmup", "total"), [(0, 7), (3, 10), (10, 10)])
def test_schedules_are_those_of_transformers(ours, theirs, warmup, total):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total):
        found = learning_rate(step, total, keys(lr_scheduler_type=ours, warmup_steps=warmup))
        assert found == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_wsd_holds_and_decays_over_the_last_fifth():
    rates = [learning_rate(step, 10, keys(lr_scheduler_type="wsd")) for step in range(10)]
    assert rates[:9] == pytest.approx([1e-3] * 9)
    assert rates[9] == pytest.approx(0.5e-3)


@pytest.mark.parametrize("floor", [0.0, 0.2])
def test_wsd_warms_up_from_min_lr_ratio_as_in_transformers(floor):
    """10 steps of warmup, 32 at the peak, and the last fifth of what follows the warmup to decay in."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    shape = {"num_decay_steps": 8, "decay_type": "linear", "min_lr_ratio": floor}
    scheduler = get_scheduler("warmup_stable_decay", optimizer, 10, 50, scheduler_specific_kwargs=shape)
    for step in range(50):
        found = learning_rate(step, 50, keys(lr_scheduler_type="wsd", warmup_steps=10, min_lr_ratio=floor))
        assert found == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12), step
        optimizer.step()
        scheduler.step()


def test_a_ratio_of_warmup_rounds_up_and_a_floor_is_kept():
    assert learning_rate(0, 10, keys(warmup_ratio=0.25)) == 0.0
    assert learning_rate(3, 10, keys(warmup_ratio=0.25)) == 1e-3
    end = learning_rate(1000, 1000, keys(min_lr_ratio=0.1))
    assert end == pytest.approx(1e-4)


def test_weight_decay_is_on_matrices_only_and_8_bit_adam_trains(train, runner):
    plain, eight = (train("sft", name=optim, optim=optim, weight_decay=0.1) for optim in ("adamw", "adamw_8bit"))
    assert runner.losses(eight) == pytest.approx(runner.losses(plain), rel=0.05)


def test_a_paged_optimizer_is_the_same_without_a_gpu_and_goes_on_where_it_was(train, runner):
    """In 32 bits torch's AdamW and that of bitsandbytes round apart."""
    eight, plain = (train("sft", name=optim, optim=optim) for optim in ("adamw_8bit", "adamw"))
    assert runner.losses(train("sft", name="p8", optim="paged_adamw_8bit")) == runner.losses(eight)
    assert runner.losses(train("sft", name="p32", optim="paged_adamw")) == pytest.approx(runner.losses(plain), rel=1e-3)
    train("sft", name="resumed", optim="paged_adamw_8bit", save_steps=1, stop_after=2)
    assert (
        runner.rows(train("sft", name="resumed", optim="paged_adamw_8bit", save_steps=1))[-1] == runner.rows(eight)[-1]
    )


def test_what_is_loaded_into_a_paged_optimizer_is_put_into_its_buffers():
    optimizers = pytest.importorskip("bitsandbytes.optim")
    weight = torch.nn.Parameter(torch.ones(64, 128))

    class Counted(optimizers.PagedAdamW8bit):
        buffers = 0

        def get_state_buffer(self, p, dtype=torch.float32):
            self.buffers += 1
            return super().get_state_buffer(p, dtype)

    optimizer = Counted([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    before = {name: value.clone() for name, value in optimizer.state[weight].items() if name.startswith("state")}
    made = optimizer.buffers
    _keep_in_pages(optimizer)
    assert optimizer.buffers == made + 2
    for name, value in before.items():
        assert torch.equal(optimizer.state[weight][name], value)


def test_lora_plus_trains_the_b_matrices_faster(model_dir):
    keys = SFTKeys(
        base_model=str(model_dir("qwen3")), datasets=[{"path": "x.jsonl"}], adapter="lora", loraplus_lr_ratio=16
    )
    policy = load_policy(keys)
    faster = [group for group in make_optimizer(policy, keys).param_groups if "lr_ratio" in group]
    expected = {id(p) for name, p in policy.trainable() if ".lora_B." in name}
    assert [group["lr_ratio"] for group in faster] == [16]
    assert {id(p) for p in faster[0]["params"]} == expected
