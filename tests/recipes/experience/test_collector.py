"""Generation batches whose rewards are written down by hand: what is trained on, and what is said of it."""

import json
import math
from functools import partial

import pytest
import torch

from posttrain.data.load import load_prompts
from posttrain.distributed.ranks import SingleProcess
from posttrain.health.controls import Controls
from posttrain.models.load import freeze_reference, load_policy, load_tokenizer
from posttrain.models.text import decoder
from posttrain.recipes.credit import GroupCredit
from posttrain.recipes.experience.alternating import Alternating
from posttrain.recipes.experience.collector import Collector
from posttrain.recipes.experience.engines import EngineSource, make_engine
from posttrain.recipes.experience.prompts import PromptStream
from posttrain.recipes.scorers import PolicyScorer, ReferenceScorer
from posttrain.recipes.teachers import Teachers
from posttrain.report.build import build_report
from posttrain.rollout.collect import sample_groups
from posttrain.rollout.experience import Experience, to_arrays
from posttrain.types import RewardBreakdown

GROUP = 4


@pytest.fixture
def collector(runner, model_dir, data_dir):
    """`collector(rewards, **keys)`; `rewards(call, item)` is what completion `item` of scoring call `call` earns."""

    def make(rewards, *, moved=0.0, **options):
        keys = runner.keys_of("grpo", model_dir("qwen3"), data_dir, num_generations=GROUP, **options)
        keys = keys.model_copy(update={"reward_funcs": ["boxed"]})
        tokenizer, ranks, calls = load_tokenizer(keys), SingleProcess(), []
        policy = load_policy(keys, tokenizer=tokenizer).without_dropout()
        freeze_reference(policy)
        with torch.no_grad():
            for _, parameter in policy.trainable():
                parameter.mul_(1.0 + moved)

        def score(prompts, completions, columns):
            calls.append(len(completions))
            values = [rewards(len(calls) - 1, item) for item in range(len(completions))]
            return [RewardBreakdown(value, {"boxed": value}) for value in values]

        engine = make_engine(EngineSource(keys, policy))
        stream = PromptStream(load_prompts(keys, tokenizer), keys.seed, {})
        trainer, reference = (Scores(policy, keys.temperature, 4, ranks) for Scores in (PolicyScorer, ReferenceScorer))
        return Collector(
            keys,
            Alternating(keys, partial(sample_groups, engine), decoder(tokenizer), score, stream, ranks),
            trainer,
            reference,
            GroupCredit(keys, Teachers([]), trainer),
            ranks,
        )

    return make


def advantages_of(experience):
    return [[float(sample.advantage[0]) for sample in group] for group in experience.groups]


def by_hand(rewards, eps=1e-4):
    """(r − mean) / (std + eps) over the scored of a group, 0 for the others."""
    known = [reward for reward in rewards if reward is not None]
    centre = sum(known) / len(known) if known else 0.0
    std = math.sqrt(sum((r - centre) ** 2 for r in known) / (len(known) - 1)) if len(known) > 1 else 0.0
    return [0.0 if r is None or std == 0 else (r - centre) / (std + eps) for r in rewards]


REWARDS = [1.0, None, 0.0, 1.0, None, None, None, None]


def test_an_unscored_completion_has_no_advantage_under_overlong_shaping(collector):
    """A cache of the whole length: each token costs 1/6."""
    experience = (
        collector(lambda call, item: REWARDS[item], soft_overlong_cache=6).collect(0, None, Controls()).experience
    )
    for place, (group, found) in enumerate(zip(experience.groups, advantages_of(experience), strict=True)):
        shaped = [
            None if reward is None else reward - t.num_loss_tokens / 6
            for reward, t in zip(REWARDS[place * GROUP : (place + 1) * GROUP], group, strict=True)
        ]
        assert found == pytest.approx(by_hand(shaped), abs=1e-7)
    assert experience.metrics["frac_unscored"] == 5 / 8


def test_an_unscored_completion_has_no_advantage_with_the_kl_in_the_reward(collector, runner, model_dir, data_dir):
    made = collector(lambda call, item: REWARDS[item], beta=0.5, kl_in_reward=True, moved=0.05)
    experience = made.collect(0, None, Controls()).experience
    keys = runner.keys_of("grpo", model_dir("qwen3"), data_dir)
    given = make_engine(EngineSource(keys))
    for place, (group, found) in enumerate(zip(experience.groups, advantages_of(experience), strict=True)):
        kls = [
            sum(t.behavior_logp) - sum(logp)
            for t, logp in zip(
                group, given.score([(t.ids.tolist(), len(t.ids) - t.num_loss_tokens) for t in group]), strict=True
            )
        ]
        rewards = REWARDS[place * GROUP : (place + 1) * GROUP]
        shaped = [None if r is None else r - 0.5 * kl for r, kl in zip(rewards, kls, strict=True)]
        assert found == pytest.approx(by_hand(shaped), abs=1e-4)
        assert max(map(abs, kls)) > 1e-2
    assert experience.metrics["frac_unscored"] == 5 / 8


def test_a_batch_whose_completions_are_all_right_counts_as_mastered(collector):
    experience = collector(lambda call, item: 1.0).collect(0, None, Controls()).experience
    assert experience.metrics["frac_reward_zero_std"] == 1.0
    assert experience.metrics["frac_reward_all_right"] == 1.0
    assert experience.metrics["frac_reward_all_wrong"] == 0.0
    assert (
        collector(lambda call, item: 0.0).collect(0, None, Controls()).experience.metrics["frac_reward_all_wrong"]
        == 1.0
    )


def test_a_mastered_batch_is_known_by_the_best_of_the_run_after_a_resume(collector):
    """An own reward: the second batch is all at 3, the best of the first."""
    made = collector(lambda call, item: 3.0 if call else float(item % 4))
    made._keys = made._sampling._keys = made._keys.model_copy(update={"reward_funcs": ["own.py:fn"]})
    first = made.collect(0, None, Controls()).experience
    assert first.reward_bounds == ((0.0, 3.0),)
    resumed = Experience.of(json.loads(json.dumps(first.header())), to_arrays(first.groups))
    assert resumed.header() == first.header()
    assert made.collect(1, resumed, Controls()).experience.metrics["frac_reward_all_right"] == 1.0


def test_dynamic_sampling_does_not_resample_mastered_prompts_for_ever(collector):
    """The first batch of mastered prompts takes all its rounds, later ones a single one; a batch that is not does as ever."""
    made = collector(lambda call, item: 1.0, dynamic_sampling=True, dynamic_sampling_max_rounds=3)
    experience, rounds = None, []
    for generation in range(3):
        collected = made.collect(generation, experience, Controls())
        experience = collected.experience
        rounds.append(experience.metrics["sampling/rounds"])
        assert experience.metrics["frac_reward_all_right"] == 1.0
        assert collected.ledger["trained"] == []
    assert rounds == [3, 1, 1]
    hard = collector(lambda call, item: 0.0, dynamic_sampling=True, dynamic_sampling_max_rounds=3)
    experience = hard.collect(0, None, Controls()).experience
    assert hard.collect(1, experience, Controls()).experience.metrics["sampling/rounds"] == 3


def test_dynamic_sampling_says_what_became_of_all_that_was_sampled(collector):
    """Of each round's prompts the first group is mixed, the other all right: the mixed ones are kept, and half were mastered."""
    made = collector(lambda call, item: float(item > 0), dynamic_sampling=True, num_prompts_per_step=2)
    metrics = made.collect(0, None, Controls()).experience.metrics
    assert metrics["frac_reward_zero_std"] == 0.0
    assert metrics["frac_reward_all_right"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("num_parts", [1, 2, 3, 4, 6])
def test_kept_groups_are_spread_evenly_over_the_steps_of_a_batch(num_parts):
    for num_groups in range(13):
        groups = tuple(((), number) for number in range(num_groups))
        experience = Experience(0, 0, groups, {}, ())
        parts = [experience.part(index, num_parts) for index in range(num_parts)]
        assert [group for part in parts for group in part] == list(groups)
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert sizes == sorted(sizes, reverse=True)


def test_an_empty_step_is_neither_counted_nor_shown_as_trained(train, runner, tmp_path):
    folder = train("grpo", reward_funcs=["constant"], steps_per_generation=2, max_steps=4)
    rows = runner.rows(folder)
    assert [row["empty_step"] for row in rows] == [1.0] * 4
    assert not any({"loss", "grad_norm", "learning_rate", "update_norm"} & row.keys() for row in rows)
    assert {row["num_tokens"] for row in rows} == {0.0}
    result = json.loads((folder / "result.json").read_text())
    assert (result["steps"], result["tokens"]) == (0, 0)
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [e["prompts"]["trained"] for e in events if e["kind"] == "rollouts"] == [[], []]


def test_a_batch_that_fills_some_of_its_steps_counts_those(train, runner):
    """Dynamic sampling that keeps fewer groups than there are steps: after one round, three prompts for three steps."""
    options = {"num_prompts_per_step": 3, "steps_per_generation": 3, "max_steps": 9, "reward_funcs": ["last_digit"]}
    folder = train("grpo", dynamic_sampling=True, dynamic_sampling_max_rounds=1, save_steps=9, **options)
    rows = runner.rows(folder)
    empty = [row["step"] for row in rows if "empty_step" in row]
    assert 0 < len(empty) < 9
    assert all("loss" in row and row["grad_norm"] > 0 for row in rows if "empty_step" not in row)
    assert json.loads((folder / "result.json").read_text())["steps"] == 9 - len(empty)
    state = json.loads((folder / "checkpoints/step-00000009/state.json").read_text())
    assert (state["step"], state["empty_steps"]) == (9, len(empty))
    # The updates that were made are the optimizer's own count of them.
    assert {value for name, value in state["scalars"].items() if name.endswith("step")} <= {9 - len(empty)}


def test_a_mastered_run_ends_in_mastered_prompts_and_is_not_held(runner, model_dir, data_dir, tmp_path):
    keys = runner.keys_of(
        "grpo", model_dir("qwen3"), data_dir, max_steps=12, num_generations=2, max_completion_length=2
    )
    # What is never too long has this penalty's best, 0, from the first step on.
    runner.run_stage("grpo", tmp_path, keys.model_copy(update={"reward_funcs": ["soft_overlong"]}))
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [e["rule"] for e in events if e["kind"] == "finding"] == ["mastered_prompts"]
    assert json.loads((tmp_path / "result.json").read_text())["held"] == []


def test_what_scored_nothing_has_neither_mean_nor_std(runner, model_dir, data_dir, tmp_path):
    (tmp_path / "own.py").write_text(
        "def silent(completions, **columns):\n    return [None] * len(completions)\n\n\n"
        "def length(completions, **columns):\n    return [float(len(c[0]['content'])) for c in completions]\n"
    )
    keys = runner.keys_of("grpo", model_dir("qwen3"), data_dir, max_steps=2)
    own = [f"{tmp_path / 'own.py'}:{name}" for name in ("silent", "length")]
    runner.run_stage("grpo", tmp_path / "run", keys.model_copy(update={"reward_funcs": own}))
    row = runner.rows(tmp_path / "run")[0]
    assert row["rewards/silent/mean"] is None and row["rewards/silent/std"] is None
    assert row["rewards/length/std"] > 0 and row["reward"] > 0
    assert row["nonfinite"] == ["rewards/silent/mean", "rewards/silent/std"]
    assert "silent" not in build_report(tmp_path / "run").read_text()
