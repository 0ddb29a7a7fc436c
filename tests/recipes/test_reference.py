import json
import math

import pytest


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("precompute", ["auto", True])
def test_the_first_dpo_loss_is_ln_2_whatever_the_init_moved_out_of_the_base(init, precompute, train):
    options = {"adapter": "lora", "lora_r": 4, "init_lora_weights": init, "precompute_ref_log_probs": precompute}
    folder = train("dpo", max_steps=2, **options)
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    [export] = [event for event in events if event["kind"] == "export"]
    assert export["max_logit_difference"] < 1e-4 * export["max_logit"]
