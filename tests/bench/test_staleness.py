"""The table of staleness: each bound beside 0 of the same seed."""

import json

import staleness
from posttrain.evidence import EvalReport, ItemRecord
from time_to_accuracy import Done, Options


def done(folder, scores, seconds, age=None):
    items = tuple(ItemRecord(str(place), "", (float(score),), None, ("",)) for place, score in enumerate(scores))
    report = EvalReport("heldout", "gate", "s", "m", "boxed", items, {}, 0.0)
    aged = {} if age is None else {"sampling/staleness/mean": age, "sampling/staleness/max": age}
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "reward": 0.5} | aged) + "\n")
    return Done({"call_s": seconds, "others_cpus": 0.25}, folder / "model", {"heldout": report})


def test_a_bound_is_paired_with_0_of_the_same_seed(tmp_path):
    runs = {
        (seed, bound): done(tmp_path / f"{seed}-{bound}", [1, 1, bound == 0, seed == 1], seed * (1.0 + bound), bound or None)
        for seed in (1, 2) for bound in staleness.BOUNDS
    }  # fmt: skip
    lines = staleness.render(runs, Options((1, 2), 1, 0, "gate", tmp_path), 0).splitlines()
    head, zero, one = ([cell.strip().split(" (")[0] for cell in lines[place].split("|")[1:-1]] for place in (2, 4, 5))
    assert len(head) == len(zero) == len(one)
    assert dict(zip(head, zero, strict=True))["less that with 0"] == "–"
    assert one[:8] == ["1", "62.5 %", "75.0 50.0", "-25.0", "0.50", "3 s", "2.00", "1.00"]
