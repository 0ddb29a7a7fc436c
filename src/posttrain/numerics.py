"""Which numbers this version computes: what a run pins instead of the text of the source.

A change that makes any row compute other numbers for the same inputs (a loss, a sampler, a schedule, a score) adds an entry to
its row, in the words that a reader of an upgrade is told. `tests/test_numerics.py` recomputes golden values of every row and
fails until that is done. A comment, a message or a refactoring adds none.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata

_OWN_CACHE = "the embedded engine: of models that run sequences one by one (docs/families.md), log-probs of samples are rounded otherwise: they come from the model's own cache"

REVISIONS: Mapping[str, tuple[str, ...]] = {
    "sft": ("the numbers of 0.1",),
    "dpo": ("the numbers of 0.1",),
    "reward_model": ("the numbers of 0.1",),
    "process_reward_model": ("its first numbers",),
    "grpo": (
        "the numbers of 0.1",
        "credit: turn: a last turn that nobody paid for is no 0 among what turns earned, where earlier ones were paid",
        _OWN_CACHE,
    ),
    "ppo": ("its first numbers", _OWN_CACHE),
    "online_dpo": ("its first numbers", _OWN_CACHE),
    "distill": ("its first numbers", _OWN_CACHE),
    "ebft": ("its first numbers", _OWN_CACHE),
    "grading": ("the scores of 0.1",),
    "rewards": ("the library of 0.1",),
}
"""What computes → what each of its revisions changed, oldest first. The last one is in force."""


def revision(what: str) -> str:
    """The revision in force, counted from 1; 0 for what has no row, such as a stage kind of the user's own."""
    return str(len(REVISIONS.get(what, ())))


def changes_between(what: str, old: str | None, new: str | None) -> str:
    """What the revisions after `old` up to `new` changed, or nothing where this version does not know."""
    known = REVISIONS.get(what, ())
    first, last = (int(text) if text is not None and text.isdecimal() else 0 for text in (old, new))
    return "; ".join(known[first:last])


def installed_version(package: str) -> str | None:
    """Its version, or None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
