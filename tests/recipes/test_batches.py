import random
from dataclasses import dataclass, field, fields

import pytest

from posttrain.config.stages import SFTKeys
from posttrain.data.dataset import Dataset, DataSummary
from posttrain.distributed.ranks import SingleProcess
from posttrain.recipes.batches import Schedule, best_fit, fill_with_groups, flat, for_rank, split_groups

ARGUMENTS = [one.name for one in fields(Schedule) if not one.name.startswith("_")]


class Rank:
    """Stands where a rank stands: enough of a rank to deal rows."""

    def __init__(self, rank, world_size):
        self.rank, self.world_size = rank, world_size

    def share(self, items):
        return list(items[self.rank :: self.world_size])


def schedule(rows, ranks=None, cost=None, **options):
    keys = SFTKeys(base_model="m", datasets=[{"path": "x.jsonl"}], **{"per_device_train_batch_size": 2, **options})
    data = Dataset(rows, DataSummary((), ""), "", (len(rows),), (None,))
    return Schedule.of(data, keys, ranks or SingleProcess(), size=lambda row: row, cost=cost), keys


def test_every_row_once_an_epoch_and_the_last_step_may_be_short():
    made, keys = schedule(list(range(1, 8)), gradient_accumulation_steps=2, num_train_epochs=3)
    assert made.total_steps(keys) == 6
    for epoch in range(3):
        steps = [made.step(2 * epoch), made.step(2 * epoch + 1)]
        assert [len(s) for s in steps] == [2, 2]
        assert sorted(flat(steps[0]) + flat(steps[1])) == list(range(1, 8))
    assert flat(made.step(0)) != flat(made.step(2))


@pytest.mark.parametrize("packing", [False, True])
def test_any_step_can_be_asked_for_in_any_order(packing):
    """A resumed run asks for a late epoch first; what a step holds does not depend on what was asked before."""
    options = {"packing": packing, "sequence_len": 8}
    forward, _ = schedule(list(range(1, 8)), **options)
    expected = [forward.step(number) for number in range(30)]
    backward, _ = schedule(list(range(1, 8)), **options)
    assert [backward.step(number) for number in reversed(range(30))] == expected[::-1]


@dataclass(frozen=True)
class Counted(Schedule):
    """A schedule that notes which epochs it counts the steps of."""

    counted: list = field(default_factory=list)

    def steps_in(self, epoch):
        self.counted.append(epoch)
        return super().steps_in(epoch)


def test_a_step_is_found_without_a_walk_over_the_epochs_before_it():
    """Two rows for 300 epochs: what a late step costs does not grow with the epochs that went before."""
    made = Counted(**{name: getattr(schedule([3, 4])[0], name) for name in ARGUMENTS})
    assert [made.locate(number) for number in range(300)] == [(number, 0) for number in range(300)]
    assert made.counted == list(range(300))
    assert made.locate(7) == (7, 0)
    assert len(made.counted) == 300


def test_a_last_step_with_too_few_rows_is_folded_into_the_one_before():
    """Seven rows, two a step: the last one joins the third step, and nothing is lost."""
    data = Dataset(list(range(1, 8)), DataSummary((), ""), "", (7,), (None,))
    keys = SFTKeys(base_model="m", datasets=[{"path": "x.jsonl"}], per_device_train_batch_size=2, num_train_epochs=2)
    made = Schedule.of(data, keys, SingleProcess(), size=lambda row: row, least_rows=2)
    assert made.total_steps(keys) == 6
    for epoch in range(2):
        steps = [made.step(3 * epoch + n) for n in range(3)]
        assert [[len(micro) for micro in step] for step in steps] == [[2], [2], [2, 1]]
        assert sorted(row for step in steps for row in flat(step)) == list(range(1, 8))


def test_part_of_an_epoch_and_the_epoch_that_is_logged():
    made, keys = schedule(list(range(1, 9)), num_train_epochs=1.5)
    assert made.total_steps(keys) == 6
    assert [made.epoch_after(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.25]


def lognormal(count, sequence_len=1024):
    draw = random.Random(7)
    return [min(sequence_len, max(8, round(draw.lognormvariate(5.5, 0.9)))) for _ in range(count)]


@pytest.mark.parametrize("per_device", [1, 4])
def test_packing_uses_its_places_on_lognormal_lengths(per_device):
    sizes, budget = lognormal(5000), per_device * 1024
    made, _ = schedule(sizes, packing=True, sequence_len=1024, per_device_train_batch_size=per_device)
    micros = flat([made.step(step) for step in range(made.steps_in(0))])
    assert all(sum(micro) <= budget for micro in micros)
    assert sorted(flat(micros)) == sorted(sizes)
    assert sum(map(sum, micros)) / (len(micros) * budget) >= 0.99


def test_packing_is_a_function_of_seed_and_epoch_and_a_window_keeps_the_order_of_the_epoch():
    sizes = lognormal(400)
    options = {"packing": True, "sequence_len": 1024, "per_device_train_batch_size": 1}
    first, again, other = (schedule(sizes, **options, seed=seed)[0] for seed in (1, 1, 2))
    steps = first.steps_in(0)
    assert [first.step(n) for n in range(steps)] == [again.step(n) for n in range(steps)]
    assert [first.step(n) for n in range(steps)] != [first.step(steps + n) for n in range(steps)]
    assert [first.step(n) for n in range(steps)] != [other.step(n) for n in range(steps)]
    windowed, _ = schedule(sizes, **options, seed=1, packing_window=100)
    order = windowed.data.order(1, 0)
    packed = [flat(windowed.step(n)) for n in range(windowed.steps_in(0))]
    seen = 0
    for at in range(0, 400, 100):
        window = sorted(sizes[i] for i in order[at : at + 100])
        taken = []
        while len(taken) < 100:
            taken += packed[seen]
            seen += 1
        assert sorted(taken) == window


def test_best_fit_puts_each_row_where_it_leaves_least():
    sizes = [5, 4, 1, 9, 3, 3, 3, 3]
    assert best_fit(range(8), sizes.__getitem__, 10) == [[2, 3], [0, 1], [4, 5, 6], [7]]
    assert best_fit([1, 0], [12, 3].__getitem__, 10) == [[0], [1]]


@pytest.mark.parametrize("num_micros", [1, 2, 3, 4])
def test_ranks_get_as_many_micro_batches_and_together_every_row_once(num_micros):
    micros = [[2 * i, 2 * i + 1] for i in range(num_micros)]
    dealt = [for_rank(micros, Rank(rank, 2)) for rank in range(2)]
    assert len(dealt[0]) == len(dealt[1])
    rows = [row for mine in dealt for micro in mine if not micro.idle for row in micro.rows]
    assert sorted(rows) == flat(micros)


def test_two_ranks_take_the_steps_of_one_process_with_twice_the_accumulation():
    two, _ = schedule(list(range(1, 17)), Rank(0, 2))
    one, _ = schedule(list(range(1, 17)), gradient_accumulation_steps=2)
    assert [two.step(n) for n in range(4)] == [one.step(n) for n in range(4)]


@pytest.mark.parametrize("at_once", [1, 2, 3, 4, 5, 8, 100])
def test_groups_fill_micro_batches_whole_where_they_fit_and_in_parts_where_not(at_once):
    groups = [tuple((group, member) for member in range(4)) for group in range(5)]
    micros = fill_with_groups(split_groups(groups, at_once), at_once)
    assert flat(flat(micros)) == flat(groups)
    assert all(sum(len(part) for part in micro) <= at_once for micro in micros)
    if at_once >= 4:
        assert flat(micros) == groups
        assert [len(micro) for micro in micros[:-1]] == [at_once // 4] * (len(micros) - 1)


# --- shares ----------------------------------------------------------------------------------------------------------


def lengths(number):
    draw = random.Random(3)
    return [round(draw.lognormvariate(5, 0.8)) for _ in range(number)]


@pytest.mark.parametrize("packing", [False, True])
def test_shares_hold_the_rows_of_the_step_that_one_process_takes(packing):
    rows = lengths(203)
    options = {"packing": packing, "sequence_len": 1024, "gradient_accumulation_steps": 4}
    mixed, _ = schedule(rows, **{**options, "gradient_accumulation_steps": 8})
    shares, keys = schedule(rows, cost=float, num_processes=2, **options)
    assert shares.total_steps(keys) == mixed.total_steps(keys)
    for step in range(shares.total_steps(keys)):
        assert sorted(flat(shares.step(step))) == sorted(flat(mixed.step(step)))
        assert all(micro for micro in shares.step(step))


def test_shares_are_even_where_micro_batches_in_order_are_not():
    rows = lengths(320)
    shares, keys = schedule(rows, Rank(0, 2), cost=float, gradient_accumulation_steps=8)
    as_they_come, _ = schedule(rows, Rank(0, 2), gradient_accumulation_steps=8)
    for step in range(shares.total_steps(keys)):
        (found,) = {shares.balance(shares.step(step), 2)["ranks/imbalance"]}
        assert found <= 0.05
    before = [[sum(flat(as_they_come.step(0)[rank::2]))] for rank in (0, 1)]
    assert max(before)[0] / (sum(map(sum, before)) / 2) > 1.05


def test_a_micro_batch_holds_no_more_rows_than_it_may_and_each_rank_has_as_many():
    shares, keys = schedule(lengths(37), Rank(0, 4), cost=float, gradient_accumulation_steps=2)
    for step in range(shares.total_steps(keys)):
        micros = shares.step(step)
        assert max(map(len, micros)) <= 2
        assert len({len(for_rank(micros, Rank(rank, 4))) for rank in range(4)}) == 1
        assert sorted(flat([m.rows for r in range(4) for m in for_rank(micros, Rank(r, 4)) if not m.idle])) == sorted(
            flat(micros)
        )


def test_more_processes_than_micro_batches_share_them():
    shares, _ = schedule(lengths(16), Rank(0, 4), cost=float, num_processes=1)
    whole, _ = schedule(lengths(16))
    assert [len(micro) for micro in shares.step(0)] == [1, 1]
    assert flat(shares.step(0)) == flat(whole.step(0))


@dataclass(frozen=True)
class Planned(Schedule):
    """A schedule that notes which epochs it plans."""

    planned: list = field(default_factory=list)

    def _plan(self, epoch):
        self.planned.append(epoch)
        return super()._plan(epoch)


def test_a_resume_plans_its_own_epoch_and_not_those_before_it():
    made = Planned(**{name: getattr(schedule([3, 4, 5])[0], name) for name in ARGUMENTS})
    made.step(2 * 300)
    assert made.planned == [0, 300]


def test_the_rows_of_many_steps_are_known_once_all_were_seen():
    costs = []
    rows = list(range(1, 33))
    made, _ = schedule(rows, Rank(0, 2), cost=lambda row: costs.append(row) or float(row))
    part, whole = made.places_until(3), made.places_until(8)
    assert part == whole[:12] and sorted(whole) == list(range(32))
    costs.clear()
    assert made.places_until(10_000) == whole and len(costs) == 32
