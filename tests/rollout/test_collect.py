from posttrain.rollout.collect import sample_groups, score_groups
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.types import Completion, Origin, Prompt, RewardBreakdown, SamplingParams

ORIGIN = Origin("p.jsonl", 1)


def test_a_group_is_seeded_by_the_place_of_its_prompt_in_the_run(shared_policy):
    engine = EmbeddedEngine(shared_policy("qwen3"), stop_token_ids=())
    rows = [(Prompt(ORIGIN, "a"), (5, 6)), (Prompt(ORIGIN, "b"), (7, 8))]
    params = SamplingParams(max_tokens=4)
    both = sample_groups(engine, rows, 3, params, (1, 0), [10, 11])
    assert [len(group) for group in both] == [3, 3]
    assert len({c.ids for c in both[0]}) == 3
    [second] = sample_groups(engine, rows[1:], 3, params, (1, 0), [11])
    assert [c.ids for c in second] == [c.ids for c in both[1]]
    [later] = sample_groups(engine, rows[1:], 3, params, (1, 1), [11])
    assert [c.ids for c in later] != [c.ids for c in second]


def test_rewards_get_what_trl_gives_them():
    """Text prompts give strings, conversations give message lists; columns missing in a row are None."""
    chat = ({"role": "user", "content": "Hi"},)
    rows = [(Prompt(ORIGIN, "Say:", {"answer": "1"}), (5,)), (Prompt(ORIGIN, chat, {"hint": "x"}), (6,))]
    groups = [[Completion((i, i + 1), (-0.1, -0.1), "stop", 0) for i in (10, 20)] for _ in rows]
    seen = {}

    def score(prompts, completions, columns):
        seen.update(prompts=prompts, completions=completions, columns=columns)
        return [RewardBreakdown(float(i), {"f": float(i)}) for i in range(len(prompts))]

    result = score_groups(rows, groups, lambda ids: f"<{ids[0]}>", score)
    message = [{"role": "user", "content": "Hi"}]
    assert seen["prompts"] == ["Say:", "Say:", message, message]
    assert seen["completions"] == [
        "<10>",
        "<20>",
        [{"role": "assistant", "content": "<10>"}],
        [{"role": "assistant", "content": "<20>"}],
    ]
    assert seen["columns"]["answer"] == ["1", "1", None, None]
    assert seen["columns"]["hint"] == [None, None, "x", "x"]
    assert seen["columns"]["completion_ids"][1] == [20, 21]
    assert [[r.reward.total for r in group.rollouts] for group in result] == [[0.0, 1.0], [2.0, 3.0]]
    assert result[1].prompt_ids == (6,)
