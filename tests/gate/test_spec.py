import math
from types import SimpleNamespace

import pytest

from posttrain.config.pipeline import GateKeys
from posttrain.errors import GateError
from posttrain.gate import GateSpec, Guard, Primary

YAML = {
    "baseline": "alias:champion",
    "guards": [{"suite": "format", "margin": 0.02}],
    "primary": [{"suite": "heldout", "min_delta": 0.05}],
    "on_fail": {"retry": "sft"},
}


def test_from_mapping_alone_or_in_a_pipeline():
    spec = GateSpec.from_mapping(YAML)
    assert spec == GateSpec((Guard("format", 0.02),), (Primary("heldout", 0.05),))
    assert GateSpec.from_mapping({"name": "run", "gate": YAML}) == spec
    assert GateSpec.from_mapping(spec.to_json()) == spec
    assert spec.suites == ("format", "heldout")


def test_from_config_keys_with_every_key_carried_over():
    keys = GateKeys(
        guards=[{"suite": "format", "margin": 0.02, "discordance": 0.05}],
        primary=[{"suite": "heldout", "min_delta": 0.05}],
        alpha=0.01, power=0.9, discordance=0.3, icc=0.2, looks=4, split="verdict",
    )  # fmt: skip
    guards, primary = (Guard("format", 0.02, 0.05),), (Primary("heldout", 0.05),)
    assert GateSpec.from_keys(keys) == GateSpec(guards, primary, 0.01, 0.9, 0.3, 0.2, "verdict", 4)


def test_a_key_that_is_missing_takes_no_default():
    plain = SimpleNamespace(guards=[], primary=[SimpleNamespace(suite="heldout", min_delta=0.1)], alpha=0.02)
    with pytest.raises(AttributeError, match="discordance"):
        GateSpec.from_keys(plain)


def test_digest_covers_the_rules_and_not_the_flow():
    base = GateSpec.from_mapping(YAML)
    assert GateSpec.from_mapping(YAML | {"on_fail": "stop"}).digest == base.digest
    assert GateSpec.from_mapping(YAML | {"alpha": 0.01}).digest != base.digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gards": []}, "did you mean 'guards'"),
        ({"guards": [{"suite": "a", "margn": 0.1}]}, "did you mean 'margin'"),
        ({"guards": [{"suite": "a"}]}, "margin"),
        ({"guards": [{"suite": "a", "margin": 0}]}, "expected a loss above 0"),
        ({"guards": [{"suite": "a", "margin": math.nan}]}, "expected a loss above 0"),
        ({"guards": ["a"]}, "expected a mapping"),
        ({"primary": [{"suite": "a", "min_delta": -0.1}]}, "expected a gain of 0 or more"),
        ({"primary": [{"suite": "a"}, {"suite": "a"}]}, "stands twice"),
        ({"guards": [], "primary": []}, "at least one entry"),
        ({"alpha": 0.7}, "gate.alpha"),
        ({"power": "high"}, "gate.power"),
        ({"guards": [{"suite": "a", "margin": 0.1, "discordance": 2}]}, "discordance 2"),
        ({"looks": -1}, "gate.looks"),
    ],
)
def test_bad_specs_say_what_is_wrong(change, message):
    with pytest.raises(GateError, match=message):
        GateSpec.from_mapping(YAML | change)


def test_alpha_is_spent_over_looks_and_sums_to_alpha():
    spec = GateSpec(primary=(Primary("a"),), looks=10_000)
    assert spec.alpha_at(1) == pytest.approx(0.05 * 6 / math.pi**2)
    assert spec.alpha_at(3) == pytest.approx(spec.alpha_at(1) / 9)
    assert sum(spec.alpha_at(look) for look in range(1, 10_001)) == pytest.approx(0.05, rel=1e-3)
    assert GateSpec(primary=(Primary("a"),)).alpha_at(7) == 0.05


def test_a_look_past_the_budget_is_refused():
    spec = GateSpec(primary=(Primary("a"),), looks=2)
    with pytest.raises(GateError, match="look 3 at this suite, but the gate allows 2"):
        spec.alpha_at(3)


def test_two_rounds_share_alpha_and_spending_needs_no_budget():
    spec = GateSpec(primary=(Primary("a"),), rounds=2)
    assert (spec.alpha_at(1), spec.extended.alpha_at(1)) == (0.025, 0.025)
    assert spec.extended.split == "gate+reserve"
    spent = GateSpec(primary=(Primary("a"),), spend=True)
    assert spent.alpha_at(1) == pytest.approx(0.05 * 6 / math.pi**2)
    assert spent.alpha_at(1000) > 0
    assert GateSpec.from_mapping(spent.to_json()) == spent


def test_extend_makes_two_rounds_and_limits_are_read():
    from posttrain.config.pipeline import GateKeys

    keys = GateKeys(primary=[{"suite": "a"}], on_inconclusive="extend", limits={"truncated": 0.1})
    spec = GateSpec.from_keys(keys)
    assert (spec.rounds, spec.limits.truncated, spec.limits.errors) == (2, 0.1, None)
    assert GateSpec.from_mapping(spec.to_json()) == spec
