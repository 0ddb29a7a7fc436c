"""A whole copy of a sharded policy's weights, for sampling; refreshed at every sync."""

from __future__ import annotations

import copy
from collections.abc import Callable

from posttrain.models.policy import Policy
from posttrain.protocols import Topology


def replicate(policy: Policy, topology: Topology) -> tuple[Policy, Callable[[], None]]:
    """A copy made before the policy is sharded, and a function that brings it up to date. All ranks call both."""
    whole = copy.copy(policy)
    whole.model = copy.deepcopy(policy.model)
    whole.model.requires_grad_(False)

    def refresh() -> None:
        topology.load_state(whole.model, topology.full_state(policy.model))

    return whole, refresh
