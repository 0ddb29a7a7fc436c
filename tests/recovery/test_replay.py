"""Rewards that the clock decides: on record before they are used, and the same when their step is made again."""

import pytest

from posttrain.distributed.ranks import SingleProcess
from posttrain.recipes.experience.replay import ReplayedRewards
from posttrain.recipes.run.stage import Stage
from posttrain.recipes.run.train_state import TrainState
from posttrain.types import RewardBreakdown

PROMPTS, TEXTS, COLUMNS = ["p", "q"], ["a", "b"], {"completion_ids": [[1], [2]]}


@pytest.fixture
def stage(runner, model_dir, data_dir, tmp_path):
    keys = runner.keys_of("grpo", model_dir("llama"), data_dir, save_total_limit=2)
    made = Stage("grpo", tmp_path / "run", keys, SingleProcess())
    yield made
    made.close()


def state_at(stage, step):
    return TrainState(None, None, stage.guard, world_size=1, rows_per_step=8, step=step)


class Clock:
    """Times out the first time it is asked, as a busy machine does, and never again."""

    def __init__(self):
        self.calls = 0

    def __call__(self, prompts, completions, columns):
        self.calls += 1
        late = RewardBreakdown(None, {"r": None}, "r: took longer than 1 s and was killed")
        return [late if self.calls == 1 else RewardBreakdown(0.1, {"r": 0.1}), RewardBreakdown(1 / 3, {"r": 1 / 3})]


def test_a_step_made_again_has_the_rewards_of_the_first_time(stage):
    clock, state = Clock(), state_at(stage, 4)
    first = ReplayedRewards(stage, clock, state)(PROMPTS, TEXTS, COLUMNS)
    assert first[0].total is None
    # A process that was killed and started again: the same step, the same completions.
    assert ReplayedRewards(stage, clock, state_at(stage, 4))(PROMPTS, TEXTS, COLUMNS) == first
    assert clock.calls == 1


def test_another_step_or_other_completions_are_scored(stage):
    clock, state = Clock(), state_at(stage, 4)
    rewards = ReplayedRewards(stage, clock, state)
    rewards(PROMPTS, TEXTS, COLUMNS)
    rewards(PROMPTS, ["a", "c"], COLUMNS)
    rewards(PROMPTS, TEXTS, {"completion_ids": [[1], [3]]})
    state.step = 5
    assert rewards(PROMPTS, TEXTS, COLUMNS)[0].total == 0.1
    assert clock.calls == 4


def test_what_is_on_record_was_accepted(stage):
    """A batch that is refused (too many unscored) is scored again on the next start."""

    def refuse(prompts, completions, columns):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        ReplayedRewards(stage, refuse, state_at(stage, 0))(PROMPTS, TEXTS, COLUMNS)
    assert not list((stage.folder / "rewards").glob("*"))


def test_records_before_the_checkpoints_are_let_go(stage):
    state = state_at(stage, 0)
    rewards = ReplayedRewards(stage, Clock(), state)
    stage.folder.mkdir(parents=True, exist_ok=True)
    for step in range(6):
        state.step = step
        rewards(PROMPTS, TEXTS, COLUMNS)
        stage.checkpoints.store.save(step + 1, lambda folder: (folder / "a").write_text("a") and None)
    assert stage.checkpoints.store.resumable_from() == 5
    assert sorted(int(path.name[:8]) for path in (stage.folder / "rewards").glob("*.json")) == [4, 5]
