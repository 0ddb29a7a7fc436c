"""What must hold before a version takes an alias. Pure checks: each returns the reason against it, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from posttrain.evidence import Decision, GateVerdict, Verdict, approvers
from posttrain.names import STRICT, kept_alias
from posttrain.registry.manifest import CERTIFICATE, MODEL, Manifest

HOLD = "hold"
"""Tag of a version that must not be promoted; its value says why."""
DECISION = "decision"
"""Role of what a person decided on a verdict, among a version's records."""
CHAMPION = "champion"


def bad_name(what: str, value: str) -> str:
    """Why `value` cannot name a model or an alias ("" if it can)."""
    reason = STRICT.against(value) or (kept_alias(value) if what == "alias" else "")
    return reason.replace("got ", f"got {what} ", 1)


def against_verdict(verdict: GateVerdict, digest: str, decisions: Sequence[Decision] = ()) -> str:
    """Why this verdict does not speak for the model `digest` ("" if it does). A person may accept an INCONCLUSIVE one."""
    enough = {Verdict.PASS}
    for decision in decisions:
        if not decision.accepted or decision.verdict_digest != verdict.digest:
            return (
                f"{decision.by} {'accepted another verdict' if decision.accepted else 'rejected it'}: {decision.reason}"
            )
        enough.add(Verdict.INCONCLUSIVE)
    if verdict.verdict not in enough:
        return f"the gate's verdict is {verdict.verdict.value} ({verdict.reason}), expected PASS"
    if not verdict.tests or any(test.verdict not in enough for test in verdict.tests):
        return "the verdict says PASS, but its tests do not: it was not written by a gate"
    if verdict.candidate_digest != digest:
        return f"the verdict is about {verdict.candidate_digest}, this version is {digest}: gate this version"
    return ""


def against_approvals(chain: Sequence[Manifest], verdict: GateVerdict, decisions: Sequence[Decision]) -> str:
    """Why the people whom the version's own gate asks for have not approved this verdict ("" if they have)."""
    needed, given = chain[-1].num_approvals, approvers(decisions, verdict.digest)
    if len(given) >= needed:
        return ""
    who = f"{len(given)} have ({', '.join(given)})" if given else "nobody has"
    return f"its gate asks that {needed} people approve the verdict, {who}: start its run again, which asks for them"


def against_baseline(
    verdict: GateVerdict, holder: tuple[int, str] | None, chain: Sequence[Manifest], alias: str
) -> str:
    """Why the verdict's baseline is not what the candidate would replace ("" if it is). `holder`: version, digest."""
    if holder is not None:
        if verdict.baseline_digest == holder[1]:
            return ""
        return (
            f"the gate compared with {verdict.baseline_digest}, but {alias} is now version {holder[0]} ({holder[1]}): "
            "the verdict is stale, gate against the present holder"
        )
    base = chain[0].inputs[MODEL]
    if verdict.baseline_digest == base:
        return ""
    return (
        f"nothing holds {alias} yet, so the baseline must be the base model of this version, {base}; "
        f"the gate compared with {verdict.baseline_digest}"
    )


def against_rewards(chain: Sequence[Manifest], has: Callable[[str], bool], load: Callable[[str], Any]) -> str:
    """Why the rewards of an RL stage are not proven ("" if they are, or there was no RL)."""
    for manifest in chain:
        if not manifest.needs_certificate:
            continue
        digest = manifest.inputs.get(CERTIFICATE)
        if digest is None:
            return f"stage {manifest.stage} was trained without a reward certificate: set reward_check: require and retrain"
        if not has(digest):
            return f"the reward certificate {digest} of stage {manifest.stage} was not registered with this version"
        certificate: Mapping[str, Any] = load(digest)
        if certificate.get("verdict") != "pass":
            return (
                f"the reward certificate of stage {manifest.stage} says {certificate.get('verdict')!r}, expected 'pass'"
            )
    return ""
