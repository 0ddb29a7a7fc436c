"""Online DPO end to end on a tiny model: which pairs it makes of its samples, and that a step on them is a step of `dpo`."""

import json
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.config.datasets import DatasetKeys
from posttrain.config.online_dpo import OnlineDPOKeys
from posttrain.data.dataset import Dataset
from posttrain.errors import ConfigError
from posttrain.health.rules import rules_for
from posttrain.recipes import dpo, online_dpo

ATOL = 1e-6
LORA = {"adapter": "lora", "lora_r": 4}


def close(a, b, atol=ATOL):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() <= atol, name


def kept(folder):
    """Prompt, ids and reward of each completion of the first step, a list for each prompt."""
    groups = {}
    for path in sorted((folder / "scored").glob("00000000-*.json")):
        call = json.loads(path.read_text())
        for prompt, ids, reward in zip(call["prompts"], call["columns"]["completion_ids"], call["totals"], strict=True):
            groups.setdefault(json.dumps(prompt), []).append((prompt, ids, reward))
    return list(groups.values())


def summed_logp(model, prompt_ids, ids):
    logits = model(torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1]
    return torch.stack([logits.log_softmax(-1)[t, token] for t, token in enumerate(ids)]).sum()


def test_a_step_is_the_mean_of_dpo_s_loss_over_the_best_and_the_worst_of_each_prompt(train, runner, model_dir):
    """Value and gradient, pair by pair in float64, from what was sampled and paid."""
    rate, beta = 0.05, 0.3
    options = {"optim": "sgd", "learning_rate": rate, "max_grad_norm": 1e9, "weight_decay": 0.0, "max_steps": 1}
    folder = train("online_dpo", beta=beta, keep_rollouts=True, num_prompts_per_step=3, **options)
    model = AutoModelForCausalLM.from_pretrained(model_dir("qwen3"), dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(model_dir("qwen3"))
    losses = []
    groups = kept(folder)
    assert len(groups) == 3
    for group in groups:
        prompt_ids = tokenizer.apply_chat_template(group[0][0], add_generation_prompt=True, return_dict=False)
        rewards = [reward for _, _, reward in group]
        best, worst = rewards.index(max(rewards)), rewards.index(min(rewards))
        assert best != worst
        w, b = (summed_logp(model, prompt_ids, group[place][1]) for place in (best, worst))
        # The reference is the model itself: its log-probs are these, as constants.
        d = (w - w.detach()) - (b - b.detach())
        losses.append(-torch.log(torch.sigmoid(beta * d)))
    loss = torch.stack(losses).mean()
    loss.backward()
    row = runner.rows(folder)[0]
    assert row["loss"] == pytest.approx(loss.item(), abs=ATOL)
    assert row["pairs/count"] == 3
    gradient: dict[str, Any] = {name: p.grad for name, p in model.named_parameters()}
    assert row["grad_norm"] == pytest.approx(sum(float(g.square().sum()) for g in gradient.values()) ** 0.5, rel=1e-5)
    before, after = load_file(model_dir("qwen3") / "model.safetensors"), runner.weights(folder)
    for name, start in before.items():
        assert (after[name] - (start.double() - rate * gradient[name])).abs().max() <= ATOL, name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {**LORA, "loss_type": ["ipo", "sft"], "loss_weights": [0.01, 1.0]},
        {"num_iterations": 2, "max_steps": 4},
        {"loss_type": "simpo", "beta": 2.0},
    ],
    ids=["sigmoid", "lora, two losses", "a batch used twice", "no reference"],
)
def test_on_the_same_pairs_its_steps_are_those_of_dpo(options, train, runner, monkeypatch):
    """Also a batch's second step, against the reference of the first: the loss rests on no log-probs of the sampler."""
    seen, paired = [], online_dpo.pair_rows

    def recorded(groups):
        seen.append(paired(groups))
        return seen[-1]

    monkeypatch.setattr(online_dpo, "pair_rows", recorded)
    shared = {"max_steps": 3, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "temperature": 0.7, **options}
    sampled = train("online_dpo", name="online", **shared)
    rows, load = [row for step in seen for row in step], dpo.load_with_held_out
    assert [len(step) for step in seen] == [2] * shared["max_steps"]
    monkeypatch.setattr(dpo, "load_with_held_out", lambda *args: (replace(load(*args)[0], rows=rows), {}))
    monkeypatch.setattr(Dataset, "order", lambda self, seed, epoch, sequential=False: list(range(len(self))))
    shared = {name: value for name, value in shared.items() if name not in ("num_iterations", "temperature")}
    given = train("dpo", name="given", per_device_train_batch_size=2, precompute_ref_log_probs=False, **shared)
    assert runner.losses(sampled) == pytest.approx(runner.losses(given), abs=ATOL)
    close(runner.weights(sampled), runner.weights(given))


@pytest.mark.parametrize("options", [{}, {"num_iterations": 2, "steps_per_generation": 2}], ids=["once", "four times"])
def test_it_does_not_depend_on_its_micro_batches(options, train, runner):
    options = {"learning_rate": 1e-4, "num_prompts_per_step": 4, "max_steps": 4, **options}
    whole, *split = (
        train("online_dpo", name=str(n), per_device_train_batch_size=n, **options) for n in (8, 3, 1)
    )  # 4 pairs, 1 and 1 at once
    for folder in split:
        assert runner.losses(folder) == pytest.approx(runner.losses(whole), abs=ATOL)
        close(runner.weights(folder), runner.weights(whole), atol=5e-6)


def test_a_batch_is_trained_on_in_as_many_steps_as_asked(train, runner):
    rows = runner.rows(train("online_dpo", num_iterations=2, steps_per_generation=2, max_steps=8))
    assert ["reward" in row for row in rows] == [True, False, False, False] * 2
    assert [row["kl"] == 0 for row in rows[:2]] == [True, False]


def test_groups_whose_rewards_are_equal_give_no_pair_and_are_counted(train, runner):
    options = {"num_prompts_per_step": 6, "num_generations": 2, "reward_funcs": ["last_digit"]}
    rows = runner.rows(train("online_dpo", **options))
    assert any(0 < row["frac_reward_zero_std"] < 1 for row in rows)
    for row in rows:
        assert row["pairs/count"] == pytest.approx(6 * (1 - row["frac_reward_zero_std"]))
        assert row["pairs/reward_margin"] == 1.0


def test_where_all_are_tied_nothing_moves_and_the_rule_rings(train, runner, model_dir):
    fast = {"num_prompts_per_step": 1, "num_generations": 2, "max_completion_length": 3, "max_steps": 12}
    quiet = {"all_wrong": {"enabled": False}, "mastered_prompts": {"enabled": False}}
    health = {**quiet, "advantage_collapse": {"mastered": 2.0}}
    folder = train("online_dpo", reward_funcs=["constant"], health=health, **fast)
    assert all(row["empty_step"] == 1.0 and row["pairs/count"] == 0 for row in runner.rows(folder))
    before = load_file(model_dir("qwen3") / "model.safetensors")
    close({name: tensor for name, tensor in runner.weights(folder).items() if name in before}, before, atol=0)
    events = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    found = [event for event in events if event["kind"] == "finding" and event["rule"] == "advantage_collapse"]
    assert [event["step"] for event in found] == [10]


def test_dynamic_sampling_asks_on_until_there_are_pairs(train, runner):
    rows = runner.rows(
        train("online_dpo", reward_funcs=["last_digit"], dynamic_sampling=True, num_prompts_per_step=3, max_steps=3)
    )
    assert all(row["pairs/count"] == 3 for row in rows)
    assert max(row["sampling/rounds"] for row in rows) > 1


def test_truncated_completions_are_the_worse_ones_or_in_no_pair(train, model_dir, monkeypatch):
    seen, paired = [], online_dpo.pair_rows
    tokenizer, stop = AutoTokenizer.from_pretrained(model_dir("qwen3")), list("aeiou ")

    def recorded(groups):
        seen.extend(paired(groups))
        return paired(groups)

    def cut(answer):
        said = tokenizer.decode([token for token, trained in zip(answer.ids, answer.loss_mask, strict=True) if trained])
        return not any(end in said for end in (*stop, tokenizer.eos_token))

    def shares(**options):
        """Of the pairs, how many chosen and rejected completions are truncated."""
        seen.clear()
        train("online_dpo", num_prompts_per_step=6, max_steps=3, stop=stop, num_generations=6, **options)
        assert len(seen) >= 10
        return [sum(cut(answer) for answer in side) / len(seen) for side in list(zip(*seen, strict=True))[:2]]

    monkeypatch.setattr(online_dpo, "pair_rows", recorded)
    assert min(shares()) > 0
    chosen, rejected = shares(missing_eos_penalty=2.0)
    assert chosen < 0.1 < 0.5 < rejected
    assert shares(mask_truncated_completions=True) == [0, 0]


def test_supervised_rows_are_trained_on_beside_the_pairs_and_without_them(train, runner, data_dir):
    rows = [{"path": str(data_dir / "sft.jsonl")}]
    folder = train("online_dpo", ptx_datasets=rows, ptx_coef=1.0, reward_funcs=["constant"], max_steps=2)
    assert all(row["ptx_loss"] > 0 and row["update_norm"] > 0 for row in runner.rows(folder))


def test_it_samples_ahead_of_its_training(train, runner):
    """Its loss corrects for nothing: the pairs of older weights are pairs all the same."""
    rows = runner.rows(train("online_dpo", rollout={"max_staleness": 1}, max_steps=3))
    assert all(row["pairs/count"] == 2 for row in rows)


@pytest.mark.parametrize("options", [{}, {"ld_alpha": 0.5}])
def test_the_distance_is_k3_of_each_token_and_never_below_0(options, train, runner, model_dir):
    """A batch used over and over: its pairs are no samples of the policy any more, and log π/π_ref of them falls below 0."""
    rows = runner.rows(train("online_dpo", num_iterations=6, max_steps=6, learning_rate=1e-2, beta=0.01, **options))
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-9)
    moved = [row["rewards/chosen"] + row["rewards/rejected"] for row in rows]
    assert min(moved) < 0, "k1 would have been below 0"
    assert all(row["kl"] > 0 for row in rows[1:])


def test_beta_is_steered_to_the_distance_that_is_asked_for(train, runner):
    options = {"max_steps": 4, "learning_rate": 1e-2}
    free = runner.rows(train("online_dpo", name="free", **options))
    held = runner.rows(train("online_dpo", name="held", kl_target=1e-6, **options))
    assert held[1]["loss"] != free[1]["loss"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss_type": "kto"}, r"loss_type: kto in online_dpo: it reads labels of single answers"),
        ({"loss_type": ["sigmoid", "kto"]}, r"loss_type: kto in online_dpo"),
        ({"loss_type": "sft"}, r"loss_type: sft in online_dpo: it imitates"),
        ({"teachers": [{"model": "start"}]}, r"teachers in online_dpo: .* use grpo or distill"),
        ({"num_generations": 1}, r"greater than or equal to 2"),
        ({"beta": 0}, r"greater than 0"),
        (
            {"loss_type": "simpo", "kl_target": 0.1},
            r"kl_target steers beta by the KL.*beside beta: 0.1 the loss_type here keeps none",
        ),
        ({"rollout": {"exact": True}}, r"rollout.exact: true in online_dpo"),
        ({"epsilon": 0.1}, r"epsilon"),
        ({"entropy_coef": 0.1}, r"entropy_coef"),
    ],
)
def test_what_has_no_pair_to_prefer_is_refused_by_name(options, said):
    with pytest.raises(ValueError, match=said):
        OnlineDPOKeys.model_validate({"base_model": "m", "datasets": [{"path": "p"}], "reward_funcs": ["r"], **options})


def test_combinations_that_a_loss_is_not_defined_for_are_refused_as_in_dpo(runner):
    keys = partial(OnlineDPOKeys, base_model="m", datasets=[DatasetKeys(path="p")], reward_funcs=["r"])
    with pytest.raises(ConfigError, match="exo_pair needs label_smoothing"):
        online_dpo.pair_objective(keys(loss_type="exo_pair"))


def test_an_action_that_its_loss_has_no_term_for_is_refused():
    with pytest.raises(ConfigError, match="raise_entropy"):
        rules_for("online_dpo", {"entropy_collapse": {"action": "raise_entropy"}})
    assert rules_for("grpo", {"entropy_collapse": {"action": "raise_entropy"}})
