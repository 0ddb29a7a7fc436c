import pytest
import torch
from transformers import get_scheduler

from posttrain.config.stages import SFTKeys
from posttrain.errors import ConfigError
from posttrain.models.load import load_policy
from posttrain.recipes.optim import learning_rate, make_optimizer
from posttrain.recipes.run.train_state import _keep_in_pages


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


@pytest.mark.parametrize(
    ("ours", "options", "theirs"),
    [
        ({"lr_scheduler_type": "cosine_with_restarts", "lr_num_cycles": 3}, {"num_cycles": 3}, "cosine_with_restarts"),
        ({"lr_scheduler_type": "polynomial", "lr_power": 2.0}, {"power": 2.0, "lr_end": 0.0}, "polynomial"),
    ],
)
def test_restarts_and_powers_are_those_of_transformers(ours, options, theirs):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler = get_scheduler(theirs, optimizer, 4, 31, scheduler_specific_kwargs=options)
    for step in range(31):
        found = learning_rate(step, 31, keys(warmup_steps=4, **ours))
        assert found == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12), step
        optimizer.step()
        scheduler.step()


def test_a_quadratic_warmup_rises_with_the_square():
    rates = [learning_rate(step, 10, keys(warmup_steps=4, warmup_type="quadratic")) for step in range(5)]
    assert rates == pytest.approx([1e-3 * share for share in (0.0, 1 / 16, 4 / 16, 9 / 16, 1.0)])


def test_after_lr_decay_ratio_the_last_rate_stays():
    options = {"lr_decay_ratio": 0.5, "min_lr_ratio": 0.1, "warmup_steps": 2}
    rates = [learning_rate(step, 20, keys(**options)) for step in range(20)]
    assert rates[10:] == pytest.approx([1e-4] * 10)
    assert rates[:10] == [learning_rate(step, 10, keys(min_lr_ratio=0.1, warmup_steps=2)) for step in range(10)]


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


@pytest.mark.parametrize("optim", ["lion", "lion_8bit", "paged_lion_8bit", "adafactor", "muon", "sgd"])
def test_an_optimizer_of_the_table_trains_and_goes_on_where_it_was(optim, train, runner):
    options = {"optim": optim, "save_steps": 1, "learning_rate": 0.1 if optim == "sgd" else 1e-3}
    whole = train("sft", name="whole", **options)
    losses = runner.losses(whole)
    assert losses[-1] < losses[0]
    train("sft", name="resumed", stop_after=2, **options)
    resumed = train("sft", name="resumed", **options)
    assert runner.rows(resumed)[-1] == runner.rows(whole)[-1]


def test_muon_makes_inner_matrices_orthogonal_steps_and_leaves_the_rest_to_adamw(model_dir):
    keys = SFTKeys(base_model=str(model_dir("llama")), datasets=[{"path": "x.jsonl"}], optim="muon", learning_rate=1e-2)
    policy = load_policy(keys)
    optimizer = make_optimizer(policy, keys)
    before = {name: p.detach().clone() for name, p in policy.trainable()}
    torch.manual_seed(0)
    for _, parameter in policy.trainable():
        parameter.grad = torch.randn_like(parameter)
    gradients = {name: p.grad.clone() for name, p in policy.trainable()}
    optimizer.step()
    moved = {name: (p.detach() - before[name]) / 1e-2 for name, p in policy.trainable()}
    inner = [name for name, p in policy.trainable() if p.ndim == 2 and ".layers." in name]
    assert inner
    for name in inner:
        # The gradient with all singular values 1, times 0.2 √max(A, B) (equation 4), to the accuracy of five iterations in bfloat16.
        left, _, right = torch.linalg.svd(gradients[name], full_matrices=False)
        wanted, step = left @ right, -moved[name] / (0.2 * max(moved[name].shape) ** 0.5)
        assert (step - wanted).norm() < 0.35 * wanted.norm(), name
    for name in moved.keys() - set(inner):
        assert moved[name].abs() == pytest.approx(torch.ones_like(moved[name]), abs=1e-3), name


@pytest.mark.parametrize("optim", ["adamw_8bit", "lion", "adafactor", "muon"])
def test_what_needs_whole_parameters_is_refused_on_shares_of_them(optim, model_dir):
    policy = load_policy(keys().model_copy(update={"base_model": str(model_dir("llama"))}))
    policy.sharding = type("Cut", (), {"is_sharded": True})()
    with pytest.raises(ConfigError, match=f"optim: {optim} needs whole parameters"):
        make_optimizer(policy, keys(optim=optim))


def test_lora_plus_trains_the_b_matrices_faster(model_dir):
    keys = SFTKeys(
        base_model=str(model_dir("qwen3")), datasets=[{"path": "x.jsonl"}], adapter="lora", loraplus_lr_ratio=16
    )
    policy = load_policy(keys)
    faster = [group for group in make_optimizer(policy, keys).param_groups if "lr_ratio" in group]
    expected = {id(p) for name, p in policy.trainable() if ".lora_B." in name}
    assert [group["lr_ratio"] for group in faster] == [16]
    assert {id(p) for p in faster[0]["params"]} == expected
