"""A certificate in words and tables, for the terminal, the run's folder and the docs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from posttrain.files import write_atomic, write_json
from posttrain.rewards.certificate import Certificate
from posttrain.rewards.check import MutationResult

KINDS: Mapping[str, tuple[str, str]] = {
    "E": ("must equal gold", "kept"),
    "Z": ("no more than wrong", "false passes"),
    "N": ("must survive", "survived"),
    "A": ("no more than the plain answer", "fooled"),
}
"""Class of a mutation → what it asks, and what its rate counts."""


def rate(row: MutationResult) -> str:
    """Recall of a rewriting, false passes of a cheat, survivals of a hostile text, error rate under an attack."""
    counted = row.violations if row.kind in "ZA" else row.num - row.violations
    return f"{counted / row.num:.1%} {KINDS[row.kind][1]}"


def markdown(certificate: Certificate) -> str:
    """The report: verdict, reasons, every mutation, every measure."""
    rewards = ", ".join(certificate.config["rewards"])
    lines = [f"# Reward certificate: {certificate.verdict}", "", f"Rewards: {rewards}  ", f"Rewards' digest: `{certificate.reward_digest}`  "]  # fmt: skip
    lines += [f"Cases' digest: `{certificate.cases_digest}`", ""]
    lines += [f"- failed: {failure}" for failure in certificate.failures]
    lines += [f"- note: {warning}" for warning in certificate.warnings]
    lines += ["", "| mutation | class | texts | violations | rate |", "|---|---|---|---|---|"]
    lines += [
        f"| {row.name} | {KINDS[row.kind][0]} | {row.num} | {row.violations} | {rate(row)} |"
        for row in certificate.mutations
    ]
    lines += ["", "| measured | value |", "|---|---|"]
    lines += [f"| {name} | {value:.4g} |" for name, value in certificate.measures.items()]
    return "\n".join(lines) + "\n"


def write(certificate: Certificate, path: Path) -> None:
    """The certificate as JSON at `path`, and as a report beside it; once the JSON is there, both are."""
    write_atomic(path.with_suffix(".md"), markdown(certificate))
    write_json(path, certificate.to_json())
