"""The A/A check of the baseline, wired into a gate."""

from dataclasses import replace

import pytest

from posttrain.errors import GateError
from posttrain.evidence import EvalReport, Verdict

SFT = {"datasets": [{"path": "sft.jsonl"}], "learning_rate": 1e-2, "max_steps": 8, "lr_scheduler_type": "constant"}


def test_the_baseline_is_asked_again_and_a_difference_blocks(project):
    gate = {"baseline": "stage:base", "primary": [{"suite": "yes", "min_delta": 0.35}], "aa": 2}
    run = project([{"sft": SFT}], gate=gate)
    assert run.run().verdict is Verdict.PASS
    assert sum(line.startswith("A/A yes: 0 of 40 items changed") for line in run.said) == 2
    first, again = (EvalReport.load(run.out / place) for place in ("evals/base/yes-gate", "aa/base-1/yes-gate"))
    assert first.model_digest == again.model_digest
    assert [item.completions for item in first.items] == [item.completions for item in again.items]
    assert first.suite_digest != again.suite_digest, "another seed is another decoding"

    changed = [replace(item, scores=(1.0,)) if n < 4 else item for n, item in enumerate(again.items)]
    replace(again, items=tuple(changed)).save(run.out / "aa/base-1/yes-gate")
    with pytest.raises(GateError, match=r"no verdict can be trusted here: A/A yes: 4 of 40 items changed"):
        run.run()
    assert run.state.status == "error"
