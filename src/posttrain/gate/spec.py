"""What a gate asks: frozen and plain, with a digest."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

from posttrain.errors import GateError
from posttrain.files import digest_json

SELECTION_SPLIT = "dev"
"""Split on which attempts and stages are chosen; the gate's own split is opened for the verdict alone."""
RESERVE_SPLIT = "reserve"
"""Split of the items that `on_inconclusive: extend` adds."""
_FLOW_KEYS = frozenset({"baseline", "on_fail", "on_inconclusive", "aa", "approve"})
"""Keys of a gate in a pipeline that say what happens around the verdict and do not change it."""


@dataclass(frozen=True, slots=True)
class Guard:
    """The candidate must not be worse by `margin` or more."""

    suite: str
    margin: float
    discordance: float | None = None

    @property
    def line(self) -> float:
        return -self.margin


@dataclass(frozen=True, slots=True)
class Primary:
    """The candidate must be better by more than `min_delta`."""

    suite: str
    min_delta: float = 0.0
    discordance: float | None = None

    @property
    def line(self) -> float:
        return self.min_delta


@dataclass(frozen=True, slots=True)
class Limits:
    """What the candidate's answers must not exceed on any suite of the gate, whatever they score; None is off.

    `truncated`: share of answers cut off at `max_tokens`. `length_ratio`: mean tokens of an answer, over the baseline's.
    `errors`: share of items that ended in an error; those within it count as wrong.
    """

    truncated: float | None = None
    length_ratio: float | None = None
    errors: float | None = None


@dataclass(frozen=True, slots=True)
class GateSpec:
    """Guards, primaries and the error rates they are held to.

    `discordance` (share of items on which the models differ) and `icc` (correlation within a cluster) are assumptions
    for planning. `looks` > 0 spends alpha over that many looks at the same items and refuses more; `spend` spends it
    without such a budget. `rounds` is 2 where an inconclusive verdict is made again with more items: each round then
    has half of alpha, so that both together stay within it.
    """

    guards: tuple[Guard, ...] = ()
    primary: tuple[Primary, ...] = ()
    alpha: float = 0.05
    power: float = 0.8
    discordance: float = 0.2
    icc: float = 0.1
    split: str = "gate"
    looks: int = 0
    spend: bool = False
    rounds: int = 1
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        _check(self)

    @property
    def suites(self) -> tuple[str, ...]:
        """Every suite once, guards first."""
        return tuple(dict.fromkeys(test.suite for test in (*self.guards, *self.primary)))

    @property
    def digest(self) -> str:
        return digest_json(self.to_json())

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> GateSpec:
        """From parsed YAML or JSON, alone or under the key `gate`. Raises: GateError on an unknown or missing key."""
        if isinstance(values.get("gate"), Mapping):
            values = cast("Mapping[str, Any]", values["gate"])
        known = list(cls.__slots__)
        _refuse_unknown(values, [*known, *_FLOW_KEYS], "the gate spec")
        plain = {key: value for key, value in values.items() if key in known and key not in _NESTED}
        try:
            return cls(
                limits=_row(Limits, values.get("limits") or {}),
                guards=tuple(_row(Guard, row) for row in values.get("guards") or ()),
                primary=tuple(_row(Primary, row) for row in values.get("primary") or ()),
                **plain,
            )
        except TypeError as error:
            raise GateError(f"the gate spec cannot be read: {error}") from error

    @classmethod
    def from_keys(cls, keys: Any) -> GateSpec:
        """From a config object with the same attributes (`GateKeys`)."""
        return cls(
            guards=tuple(Guard(row.suite, row.margin, row.discordance) for row in keys.guards),
            primary=tuple(Primary(row.suite, row.min_delta, row.discordance) for row in keys.primary),
            alpha=keys.alpha, power=keys.power, discordance=keys.discordance, icc=keys.icc, split=keys.split,
            looks=keys.looks, rounds=2 if keys.on_inconclusive == "extend" else 1,
            limits=Limits(**{name: getattr(keys.limits, name) for name in Limits.__slots__}),
        )  # fmt: skip

    def alpha_at(self, look: int) -> float:
        """Alpha of one round of the `look`-th look, counted from 1.

        Spent, a look has alpha · 6 / (π² look²), which sums to alpha over all looks. Raises: GateError past the budget.
        """
        whole = self.alpha / self.rounds
        if self.looks == 0 and not self.spend:
            return whole
        if look < 1 or (self.looks and look > self.looks):
            raise GateError(
                f"look {look} at this suite, but the gate allows {self.looks}: make a gate split of new items, or raise looks "
                "before anyone looks again"
            )
        return whole * 6.0 / (9.869604401089358 * look**2)

    @property
    def extended(self) -> GateSpec:
        """The same gate on the items of its split and the reserve together: the second round."""
        return replace(self, split=f"{self.split}+{RESERVE_SPLIT}")


_NESTED = ("guards", "primary", "limits")


def _row(kind: type[Any], row: Any) -> Any:
    if not isinstance(row, Mapping):
        raise GateError(f"got {row!r} for a {kind.__name__.lower()}, expected a mapping such as {{suite: heldout, …}}")
    fields = cast("Mapping[str, Any]", row)
    _refuse_unknown(fields, list(kind.__slots__), f"a {kind.__name__.lower()}")
    return kind(**fields)


def _refuse_unknown(values: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1, 0.0)[0]
            raise GateError(f"unknown key {key!r} in {where}; did you mean {near!r}?")


def _check(spec: GateSpec) -> None:
    if not spec.guards and not spec.primary:
        raise GateError("a gate needs at least one entry in guards or primary")
    ranges = {"alpha": (0.0, 0.5), "power": (0.0, 1.0), "discordance": (0.0, 1.0 + 1e-9), "icc": (-1e-9, 1.0)}
    for name, (low, high) in ranges.items():
        value = getattr(spec, name)
        if not _is_number(value) or not low < value < high:
            raise GateError(f"gate.{name}: got {value!r}, expected a number between {low:g} and {high:g}")
    if spec.looks < 0:
        raise GateError(f"gate.looks: got {spec.looks}, expected 0 (one look) or a budget of looks")
    for name, highest in {"truncated": 1.0, "length_ratio": math.inf, "errors": 1.0}.items():
        value = getattr(spec.limits, name)
        if value is not None and not (_is_number(value) and 0 <= value <= highest):
            raise GateError(f"gate.limits.{name}: got {value!r}, expected a number from 0 to {highest:g}, or null")
    for guard in spec.guards:
        if not _is_number(guard.margin) or guard.margin <= 0:
            raise GateError(f"guard {guard.suite}: got margin {guard.margin!r}, expected a loss above 0 such as 0.02")
    for primary in spec.primary:
        if not _is_number(primary.min_delta) or primary.min_delta < 0:
            raise GateError(
                f"primary {primary.suite}: got min_delta {primary.min_delta!r}, expected a gain of 0 or more"
            )
    for test in (*spec.guards, *spec.primary):
        if test.discordance is not None and not (_is_number(test.discordance) and 0 < test.discordance <= 1):
            raise GateError(f"{test.suite}: got discordance {test.discordance!r}, expected a share above 0, at most 1")
    for tests in (spec.guards, spec.primary):
        names = [test.suite for test in tests]
        if len(set(names)) < len(names):
            raise GateError(f"a suite stands twice in the gate: {', '.join(names)}; keep one entry for each")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
