"""Keepers as actors of a Ray cluster: where they are placed, and a deadline on every call. The only importer of ray."""
# pyright: reportMissingImports=false

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.distributed.keeper import Keeper
from posttrain.distributed.roles import RoleLateError, RoleLostError, RoleNode, RoleResources
from posttrain.errors import ConfigError, MissingExtraError

CALL_S = 10.0
"""Deadline of a call of a keeper."""
LEASE_S = 15.0
"""How long a keeper lives whom nobody asks."""
_REACH_S = 5.0
_INIT_S = 60.0
_ROOM_S = 30.0
_ACTOR_S = 60.0
STRATEGIES = ("pack", "spread", "strict_pack", "strict_spread")


class RayCluster:
    """A cluster that this process has joined, and the places that it has been given there.

    Raises, when it is made: MissingExtraError, and ConfigError for an address where no cluster answers.
    """

    def __init__(self, address: str, namespace: str) -> None:
        self._ray = _import_ray()
        self.address, self.namespace = _found(self._ray, address), namespace
        self._group: Any = None
        # Ray itself waits for minutes, in C++, for one who takes its connection and is no head of a cluster.
        given_up = threading.Timer(_INIT_S, _give_up, [address])
        given_up.daemon = True
        given_up.start()
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            self._ray.init(
                address=self.address, namespace=namespace, log_to_driver=False, configure_logging=True,
                logging_level="ERROR",
            )  # fmt: skip
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise ConfigError(
                f"--ray {address}: {_line(error)}; this machine must be a node of the cluster: ray start --address {self.address}"
            ) from error
        finally:
            given_up.cancel()
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, on_sigterm)  # Ray takes it

    def reserve(self, bundles: Sequence[RoleResources], strategy: str) -> None:
        """A place for each, or for none. Raises: ConfigError, with what there is, where there is no room."""
        from ray.util.placement_group import placement_group

        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if lack := lack_of(bundles, nodes, strategy):
            raise ConfigError(f"{lack}; give fewer --workers, or add nodes: ray start --address {self.address}")
        self._group = placement_group([bundle.amounts() for bundle in bundles], strategy=strategy.upper())
        if not self._group.wait(_ROOM_S):
            free = ", ".join(
                f"{amount:g} {name}"
                for name, amount in sorted(self._ray.available_resources().items())
                if name in ("CPU", "GPU")
            )
            raise ConfigError(
                f"the cluster at {self.address} had no room within {_ROOM_S:g} s for {len(bundles)} processes ({strategy}): free are {free or 'no CPUs'}; "
                "somebody else holds the rest"
            )

    def keeper(self, index: int, name: str, resources: RoleResources, lease_s: float = LEASE_S) -> KeeperOnRay:
        """The keeper at place `index`, under a name that any process of the namespace finds."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        at = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
        made = self._ray.remote(_ActorKeeper).options(
            name=name, num_cpus=resources.cpus, num_gpus=resources.gpus, scheduling_strategy=at, max_restarts=0,
        ).remote(lease_s)  # fmt: skip
        return KeeperOnRay(self._ray, made)

    def named(self, name: str) -> KeeperOnRay:
        """One that another process of the namespace has made. Raises: RoleLostError where there is none."""
        try:
            return KeeperOnRay(self._ray, self._ray.get_actor(name, self.namespace))
        except ValueError as error:
            raise RoleLostError(f"no role {name} is kept in the cluster") from error

    def close(self) -> None:
        from ray.util.placement_group import remove_placement_group

        if self._group is not None:
            remove_placement_group(self._group)
        self._ray.shutdown()


class KeeperOnRay:
    """A keeper on a node of the cluster. Raises, from each call: RoleLateError, RoleLostError."""

    def __init__(self, ray: Any, actor: Any) -> None:
        self._ray, self._actor = ray, actor
        self._node: RoleNode | None = None

    @property
    def node(self) -> RoleNode:
        """Asked once; a keeper that was made just now may have to wait for its place."""
        if self._node is None:
            try:
                self._node = self.take(self.ask("node"), _ACTOR_S)
            except RoleLateError as error:
                raise RoleLateError(f"the cluster had no place for it within {_ACTOR_S:g} s") from error
        assert self._node is not None
        return self._node

    def ask(self, method: str, *arguments: Any) -> Any:
        """What `take` gives the answer of; many can be under way."""
        return getattr(self._actor, method).remote(*arguments)

    def take(self, asked: Any, timeout_s: float = CALL_S) -> Any:
        from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError

        try:
            return self._ray.get(asked, timeout=max(0.0, timeout_s))
        except (GetTimeoutError, ActorUnavailableError) as error:
            raise RoleLateError(f"no answer within {timeout_s:g} s") from error
        except RayActorError as error:
            raise RoleLostError(_line(error)) from error

    def call(self, method: str, *arguments: Any) -> Any:
        return self.take(self.ask(method, *arguments))

    def kill(self) -> None:
        """The actor; its program ends with it."""
        self._ray.kill(self._actor)


class _ActorKeeper(Keeper):
    """What runs in the actor's process."""

    def __init__(self, lease_s: float) -> None:
        ray = _import_ray()
        name, address = ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()
        super().__init__(lease_s, name, address, on_expiry=lambda: os._exit(0))


def lack_of(bundles: Sequence[RoleResources], nodes: Sequence[Mapping[str, float]], strategy: str) -> str:
    """What the nodes, each with its resources, have too little of for the bundles; "" where they have enough.

    Each bundle goes to the first node with room: all that Ray's own search finds for bundles of one size.
    """
    left = [dict(node) for node in nodes]
    apart = strategy == "strict_spread"
    if strategy == "strict_pack":
        left = sorted(left, key=lambda node: node.get("CPU", 0.0), reverse=True)[:1]
    placed = 0
    for bundle in sorted(bundles, key=lambda bundle: (bundle.gpus, bundle.cpus), reverse=True):
        wanted = bundle.amounts()
        room = next(
            (node for node in left if all(node.get(key, 0.0) >= amount for key, amount in wanted.items())), None
        )
        if room is not None:
            placed += 1
            if apart:
                left.remove(room)
            else:
                room.update({key: room[key] - amount for key, amount in wanted.items()})
    if placed == len(bundles):
        return ""
    there = "; ".join(
        ", ".join(f"{node.get(key, 0.0):g} {key}" for key in ("CPU", "GPU") if key == "CPU" or key in node)
        for node in nodes
    )
    sizes = ", ".join(f"{number} of {size}" for size, number in Counter(map(str, bundles)).items())
    return f"{len(bundles)} processes were asked for ({sizes}; {strategy}), and the cluster has room for {placed}: {len(nodes)} node(s) with {there}"


def _found(ray: Any, address: str) -> str:
    """host:port of a cluster that answers. Raises: ConfigError, before Ray waits for minutes."""
    if address != "auto" and not re.fullmatch(r"[^/\s]+:\d{1,5}", address):
        raise ConfigError(f"--ray {address}: got {address!r}, expected auto, local, or HOST:PORT of a cluster's head")
    try:
        found = ray._private.services.canonicalize_bootstrap_address_or_die(address)
    except (ConnectionError, ValueError) as error:
        raise ConfigError(
            f"--ray {address}: no cluster of Ray was found here; start one with: ray start --head"
        ) from error
    host, _, port = found.rpartition(":")
    try:
        socket.create_connection((host, int(port)), _REACH_S).close()
    except OSError as error:
        raise ConfigError(
            f"--ray {address}: nobody answers at {found} ({error}); start a cluster with: ray start --head"
        ) from error
    return found


def _give_up(address: str) -> None:
    line = f"error: --ray {address}: no answer within {_INIT_S:g} s; is this the head of a cluster of Ray?\n"
    os.write(sys.stderr.fileno(), line.encode())
    os._exit(64)


def _import_ray() -> Any:
    """Raises: MissingExtraError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("--ray needs Ray; pip install 'posttrain[ray]'") from error
    return ray


def _line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
