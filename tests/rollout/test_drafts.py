"""Speculation changes nothing: the same tokens with the same random numbers, the same log-probs, in fewer passes of the model."""

import pytest

from posttrain.config.stages import SFTKeys
from posttrain.models.load import load_policy
from posttrain.rollout import drafts
from posttrain.rollout.drafts import Acceptance, Drafter, DraftStore, DraftTree, Speculation
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.types import Request, SamplingParams, in_order

ARCHITECTURES = ["qwen3", "llama", "gemma3_text", "mistral"]
WAYS = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "top_p": {"temperature": 0.8, "top_p": 0.7},
}
FAST = {("qwen3", "greedy"), ("llama", "top_p"), ("mistral", "plain")}
PROMPTS = [(5, 6, 7), (9,), tuple(range(40, 60))]
MAX_TOKENS = 10


def requests(first_seed):
    """Groups of three."""
    return [Request(PROMPTS[n // 3], first_seed + n) for n in range(3 * len(PROMPTS))]


def engines(policy, **options):
    options = {"stop_token_ids": tuple(range(100, 104)), "batch_size": 6, **options}
    return EmbeddedEngine(policy, **options), EmbeddedEngine(policy, speculation=Speculation(), **options)


@pytest.fixture
def widths(monkeypatch):
    """How many tokens each row wrote, pass by pass."""
    found = []

    def record(self, rows, *, real=Drafter.drafts):
        made = real(self, rows)
        found.append([1 + len(draft) for draft in made])
        return made

    monkeypatch.setattr(Drafter, "drafts", record)
    return found


@pytest.mark.parametrize(
    ("architecture", "way"),
    [
        pytest.param(architecture, way, marks=[] if (architecture, way) in FAST else pytest.mark.slow)
        for architecture in ARCHITECTURES
        for way in WAYS
    ],
)
def test_tokens_are_those_of_plain_sampling_whether_drafts_were_right_or_wrong(
    shared_policy, architecture, way, widths
):
    params = SamplingParams(MAX_TOKENS, **WAYS[way])
    plain, speculating = engines(shared_policy(architecture))
    for seed in (0, 100, 0):
        theirs, ours = (in_order(engine.generate(requests(seed), params)) for engine in (plain, speculating))
        assert [(one.ids, one.finish) for one in ours] == [(one.ids, one.finish) for one in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert one.logp == pytest.approx(other.logp, abs=1e-5)
            for _ in range(4):  # most drafts are wrong from here on
                speculating._speculation.store.add(
                    (None, PROMPTS[one.request // 3]), (*one.ids[: 1 + one.request], *[7] * 6)
                )
    assert max(map(max, widths)) > 4
    counts = speculating._speculation.counts
    assert 0 < counts.accepted < counts.offered


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3_text"])
def test_in_exact_mode_they_and_their_log_probs_are_equal_to_the_bit(model_dir, architecture, widths):
    keys = SFTKeys(base_model=str(model_dir(architecture)), datasets=[{"path": "unused.jsonl"}])
    plain, speculating = engines(load_policy(keys, exact=True))
    for seed in (0, 100, 0):
        theirs, ours = (list(engine.generate(requests(seed), SamplingParams(8))) for engine in (plain, speculating))
        assert in_order(ours) == in_order(theirs)
    assert max(map(max, widths)) > 4


def test_the_experts_of_verified_tokens_are_those_of_plain_sampling(model_dir, widths):
    keys = SFTKeys(base_model=str(model_dir("qwen3_moe")), datasets=[{"path": "unused.jsonl"}])
    plain, speculating = engines(load_policy(keys, trainable=False, routed="compare"))
    for _ in range(2):
        theirs, ours = (in_order(e.generate(requests(0), SamplingParams(6))) for e in (plain, speculating))
        assert [one.ids for one in ours] == [one.ids for one in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert len(one.routed_experts) == len(one.ids) and (one.routed_experts == other.routed_experts).all()
    assert max(map(max, widths)) > 4


def test_what_was_sampled_before_is_verified_in_fewer_passes(shared_policy, widths):
    _, engine = engines(shared_policy("qwen3"), stop_token_ids=(), batch_size=9)
    passes = []
    for _ in range(2):
        widths.clear()
        list(engine.generate(requests(0), SamplingParams(16)))
        passes.append(len(widths))
    assert passes[0] == 15 and passes[1] < 8


def test_an_update_forgets_no_completions_and_a_caller_who_leaves_early_leaves_nothing_half_known(shared_policy):
    _, engine = engines(shared_policy("qwen3"), stop_token_ids=())
    first = next(iter(engine.generate(requests(0), SamplingParams(4))))
    assert sum(len(engine._speculation.store.of((None, prompt))) for prompt in PROMPTS) >= 1
    kept = engine._speculation.store.of((None, PROMPTS[first.request // 3]))
    assert first.ids in kept and all(len(ids) == 4 for ids in kept)


def test_a_draft_follows_the_most_completions_and_ends_where_it_is_in_doubt():
    tree = DraftTree()
    for ids in ([5, 6, 7], [5, 6, 8, 8], [5, 6, 8, 9]):
        tree.add(ids)
    node = tree.root.next[5]
    assert tree.draft(node, 7, 1.0, 0.4) == [6, 8]
    assert tree.draft(node, 7, 1.0, 0.6) == [6]  # 3 / 3.5, then times 2 / 3.5
    assert tree.draft(node, 1, 1.0, 0.0) == [6]
    assert tree.draft(node, 7, 0.1, 0.4) == []
    assert tree.elsewhere([1, 1, 5, 6]) is tree.root.next[5].next[6]
    assert tree.elsewhere([6, 5]) is None


def nodes_below(node):
    return sum(1 + nodes_below(child) for child in node.next.values())


def test_a_tree_forgets_the_completion_that_ended_first_and_what_it_alone_had():
    tree, without = DraftTree(), DraftTree()
    for ids in ([5, 6, 7, 1], [5, 6, 8, 8], [5, 9], [5, 6, 8, 8]):
        tree.add(ids)
    under_way = tree.root
    for end in (1, 2, 3):
        under_way = tree.grow(under_way, [5, 6, 7][max(0, end - 2) : end])
    tree.forget_oldest()
    for ids in ([5, 6, 8, 8], [5, 9], [5, 6, 8, 8], [5, 6, 7]):
        without.add(ids)
    assert tree.num_tokens == without.num_tokens == 13
    assert nodes_below(tree.root) == nodes_below(without.root) == 6
    assert tree.elsewhere([6, 7]) is under_way and tree.elsewhere([7, 1]) is None
    while tree.has_finished:
        tree.forget_oldest()
    assert tree.root.counts == {5: 1} and nodes_below(tree.root) == 3 and tree.elsewhere([8, 8]) is None


class Row:
    """Of one prompt; as a row of `Decoding` is, as far as drafts go."""

    def __init__(self, prompt, num_left=1000):
        self.ids, self.drafted_for, self.num_left = [], (None, prompt), num_left


def test_the_trees_of_a_call_hold_no_more_than_they_may():
    def drafted():
        drafter = Drafter(Speculation(), most=3, tree_tokens=60)
        stays, found, largest = Row((1,)), [], 0
        for number in range(40):
            row = Row((1,))
            for token in range(8):
                row.ids.append(number % 20 * 8 + token)
                found.append(drafter.drafts([row, stays])[0])
                (tree,) = drafter._trees.values()
                largest = max(largest, nodes_below(tree.root))
            drafter.leave(row, is_whole=True)
        return found, largest

    found, largest = drafted()
    assert 50 < largest <= 62 and not any(found)
    assert drafted() == (found, largest)


def test_a_row_that_outgrows_the_trees_goes_on_by_what_it_said_before():
    drafter, endless = Drafter(Speculation(), most=3, tree_tokens=60), Row((9,))
    for number in range(200):
        endless.ids.append(5 if number % 3 else 6)
        found = drafter.drafts([endless])
    (tree,) = drafter._trees.values()
    assert nodes_below(tree.root) == 60 and found == [[5, 6, 5]]


def test_drafts_from_trees_without_room_change_no_token(shared_policy, widths, monkeypatch):
    monkeypatch.setattr(Drafter.__init__, "__defaults__", (24,))
    plain, speculating = engines(shared_policy("qwen3"), stop_token_ids=())
    for _ in range(2):
        theirs, ours = (in_order(e.generate(requests(0), SamplingParams(12))) for e in (plain, speculating))
        assert [one.ids for one in ours] == [one.ids for one in theirs]
    assert max(map(max, widths)) > 2


def test_the_store_holds_no_more_than_it_may_and_the_newest():
    store = DraftStore(max_tokens=20, most_each=2)
    for number in range(3):
        store.add((None, (1, 2)), (number,) * 3)
    assert list(store.of((None, (1, 2)))) == [(1, 1, 1), (2, 2, 2)]
    assert store.num_tokens == 8
    store.add((None, (3,)), (4,) * 10)
    assert store.num_tokens == 19
    store.add((None, (5,)), (4,))
    assert not store.of((None, (1, 2))) and store.num_tokens == 13
    store.add((None, (6,)), (1,) * 40)
    assert store.num_tokens == 0


def test_a_source_that_is_wrong_is_asked_no_more_where_many_rows_pay_for_it():
    counts = Acceptance()
    assert counts.rate > 64 / (64 + drafts._PASS_TOKENS)
    counts.note(offered=100, accepted=3)
    assert counts.rate < 64 / (64 + drafts._PASS_TOKENS)
    for _ in range(100):
        counts.note(offered=100, accepted=90)
    assert counts.rate > 0.8 and counts.offered <= drafts._REMEMBERED
