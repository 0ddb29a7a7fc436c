from posttrain.gate import GateSpec, Guard, Primary, decide, verdict_table


def test_the_table_shows_every_number_that_decided(binary_pair):
    spec = GateSpec((Guard("format", 0.05),), (Primary("heldout", 0.05),))
    pairs = {"format": binary_pair(5, 5, 600, "format"), "heldout": binary_pair(200, 50, 1000)}
    sides = [{suite: pair[side] for suite, pair in pairs.items()} for side in (0, 1)]
    verdict = decide(spec, *sides)
    lines = verdict_table(verdict).splitlines()
    test = verdict.tests[1]
    for shown in ("primary", "heldout", "exact", "1000", "+0.1500", f"[{test.low:+.4f}, {test.high:+.4f}]", f"{test.bound:+.4f}", "+0.0500", "PASS"):  # fmt: skip
        assert shown in lines[3]
    assert lines[-1] == "PASS: all 2 tests cleared their line (alpha 0.05)"
    assert len({line.index("verdict") if "verdict" in line else line.index("PASS") for line in lines[0:4:3]}) == 1


def test_an_invalid_verdict_has_no_numbers_and_a_reason():
    text = verdict_table(decide(GateSpec(guards=(Guard("format", 0.05),)), {}, {}))
    assert "[–, –]" in text
    assert text.endswith("INVALID: guard format: the candidate has no report on suite 'format' (alpha 0.05)")
