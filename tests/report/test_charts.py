"""Charts as text: what a reader of the page sees in them."""

import base64
import re

from posttrain.report import charts


def svg_of(chart):
    return base64.b64decode(chart.uri.split(",")[1]).decode()


def labels(chart):
    return re.findall(r"<text[^>]*>([^<]+)</text>", svg_of(chart))


def loss_chart(values):
    return charts.learning_curves("sft", [{"step": step, "loss": value} for step, value in enumerate(values)])[0]


def test_tick_labels_keep_their_decimals():
    ticks = [text for text in labels(loss_chart([0.009, 0.005, 0.001])) if text.startswith("0.0")]
    assert len(ticks) >= 4 and len(set(ticks)) == len(ticks)
    assert {"0.002", "0.004"} <= set(ticks)


def test_charts_follow_the_readers_colour_scheme():
    svg = svg_of(loss_chart([2.0, 1.0]))
    assert "@media (prefers-color-scheme: dark)" in svg
    drawn = re.sub(r"<style>.*?</style>", "", svg)
    assert "var(--c0)" in drawn and not re.findall(r"(?:fill|stroke): #", drawn)


def test_every_kind_shows_learning_rate_throughput_and_memory():
    rows = [
        {"step": n, "loss": 1.0 / n, "learning_rate": 0.1, "time": 2.0 * n, "num_tokens": 500.0 * n,
         "memory_peak_bytes": 100.0 * n * 2**20} for n in (1, 2, 3)
    ]  # fmt: skip
    for kind in ("sft", "dpo", "grpo"):
        drawn = {chart.title: chart for chart in charts.learning_curves(kind, rows)}
        assert {"Learning rate", "Throughput", "Memory"} <= drawn.keys()
        assert "250 at step 3" in drawn["Throughput"].alt
        assert "300 at step 3" in drawn["Memory"].alt


def test_the_loss_of_preferences_has_its_own_words():
    sft, dpo = (charts.learning_curves(kind, [{"step": 1, "loss": 0.7}])[0] for kind in ("sft", "dpo"))
    assert "training answers" in sft.meaning and "preferring the chosen" in dpo.meaning


def test_a_paired_difference_plot_has_one_unit():
    rows = [
        {"suite": name, "role": "primary", "estimate": 0.2, "low": 0.1, "high": 0.3, "line": 0.05, "verdict": "PASS"}
        for name in ("heldout", "length")
    ]
    drawn = charts.forests(rows, {"heldout": True, "length": False})
    assert ["percentage points" in " ".join(labels(chart)) for chart in drawn] == [True, False]
    assert "score units" in " ".join(labels(drawn[1]))


def test_a_legend_has_room_of_its_own_above_the_curves():
    rows = [{"step": n, "loss": 1.0, "reward": 0.1 * n, "reward_std": 0.4} for n in range(20)]
    two, one = charts.learning_curves("grpo", rows)[0], loss_chart([2.0, 1.0])
    assert {"reward", "reward_std"} <= set(labels(two))
    height_of_two, height_of_one = (float(re.search(r'height="([\d.]+)pt"', svg_of(chart))[1]) for chart in (two, one))
    assert height_of_two > height_of_one + 25


def test_the_page_shows_who_decides_what_is_paid_for_length_and_how_far_the_reward_is_ahead_of_the_score():
    rows = [
        {"step": n, "reward": 0.1 * n, "rewards/rm/share": 0.25, "rewards/correct/share": 0.75,
         "reward_length_information": 0.5, "rewards/rm/length_information": 1.0,
         **({"eval_score": 0.3} if n % 2 == 0 else {})} for n in range(1, 7)
    ]  # fmt: skip
    drawn = {chart.title: chart for chart in charts.learning_curves("grpo", rows)}
    assert "rewards/rm/share: 0.25 at step 1" in drawn["Who decides"].alt
    assert "rewards/correct/share: 0.75 at step 1, 0.75 at step 6" in drawn["Who decides"].alt
    assert "rewards/rm/length_information: 1 at step 1" in drawn["Paid for length"].alt
    # Mean rewards of the steps up to each validation: 0.15, 0.35, 0.55; the score stays.
    assert "0 at step 2" in drawn["Reward ahead of the score"].alt
    assert "0.4 at step 6" in drawn["Reward ahead of the score"].alt
