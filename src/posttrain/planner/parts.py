"""Public parts: cards and links with their data-sheet rates, the shares of them that software was measured to reach, and clusters of them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from posttrain.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Rates:
    """What of a device's rates is reached, and what a pass costs besides: one set of constants for all models and cards.

    `matmul`, `attention`: shares of the FLOP rate in training, `decode_flops`, `decode_bandwidth` in decoding. `pointwise`:
    bytes that norms, activations, residuals and casts move per value of a layer's width in a training step with
    recomputation; `vocabulary`: the same per logit. `host_copy`: of the link to the machine's memory, assumed. `spread`: standard deviation of the logarithm of answers' lengths.
    """

    matmul: float = 0.74
    attention: float = 0.75
    pointwise: float = 370.0
    vocabulary: float = 850.0
    decode_flops: float = 0.5
    decode_bandwidth: float = 0.6
    host_copy: float = 0.8
    decode_step_s: float = 4e-3
    layer_call_s: float = 0.0
    allreduce_s: float = 20e-6
    far_allreduce_s: float = 50e-6
    sync_bytes_s: float = 5.7e9
    spread: float = 0.7


PUBLISHED = Rates()


@dataclass(frozen=True, slots=True)
class Device:
    """One device: bytes, bytes/s, FLOP/s (dense, in the type it trains in), and bytes/s each way of its links to its node's others and to the machine's memory.

    `reached`: of `PUBLISHED`'s shares, where a card's software is younger. `source`: where the numbers are from.
    """

    name: str
    memory_bytes: float
    bandwidth: float
    flops: float
    link: float
    host_link: float = 32e9
    reached: float = 1.0
    source: str = ""
    memory_use: float = 0.9
    bytes_per_value: int = 2
    rates: Rates = field(default=PUBLISHED)


_NVIDIA = "NVIDIA data sheet, "
DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device("a100", 80e9, 2.039e12, 312e12, 300e9, source=_NVIDIA + "A100 80GB SXM"),
        Device("h100", 80e9, 3.35e12, 989e12, 450e9, 64e9, source=_NVIDIA + "H100 SXM"),
        Device("h200", 141e9, 4.8e12, 989e12, 450e9, 64e9, source=_NVIDIA + "H200 SXM"),
        Device("h20", 96e9, 4.0e12, 148e12, 450e9, 64e9, source="NVIDIA H20, as published by resellers"),
        Device("b200", 180e9, 8.0e12, 2250e12, 900e9, 64e9, reached=0.67, source=_NVIDIA + "HGX B200"),
        Device("gb200", 186e9, 8.0e12, 2500e12, 900e9, 450e9, reached=0.67, source=_NVIDIA + "GB200 NVL72"),
        Device("l4", 24e9, 0.3e12, 121e12, 32e9, source=_NVIDIA + "L4; PCIe 4.0 x16"),
        Device("l40s", 48e9, 0.864e12, 362e12, 32e9, source=_NVIDIA + "L40S; PCIe 4.0 x16"),
        Device("a10g", 24e9, 0.6e12, 70e12, 32e9, source="AWS G5; PCIe 4.0 x16"),
        Device("a6000", 48e9, 0.768e12, 154.8e12, 32e9, source=_NVIDIA + "RTX A6000; PCIe 4.0 x16"),
        Device("rtx3090", 24e9, 0.936e12, 71e12, 32e9, source="NVIDIA GA102 whitepaper; PCIe 4.0 x16"),
        Device("rtx4090", 24e9, 1.008e12, 165e12, 32e9, source="NVIDIA Ada whitepaper; PCIe 4.0 x16"),
    )
}
"""FLOP rates are dense bf16 with float32 sums."""


@dataclass(frozen=True, slots=True)
class Link:
    """Between nodes: bytes/s each way that a node has."""

    name: str
    bytes_s: float
    source: str


LINKS: dict[str, Link] = {
    link.name: link
    for link in (
        Link("ib400", 400e9, "eight ports of 400 Gb/s, as in a DGX H100"),
        Link("ib200", 200e9, "eight ports of 200 Gb/s, as in a DGX A100"),
        Link("eth400", 50e9, "one port of 400 Gb/s"),
        Link("eth100", 12.5e9, "one port of 100 Gb/s"),
        Link("eth25", 3.1e9, "one port of 25 Gb/s"),
        Link("eth10", 1.25e9, "one port of 10 Gb/s"),
    )
}


@dataclass(frozen=True, slots=True)
class Cluster:
    """`nodes` machines of `per_node` equal devices, and the link between machines."""

    device: Device
    per_node: int = 1
    nodes: int = 1
    link: Link = LINKS["ib400"]

    @property
    def num_devices(self) -> int:
        return self.per_node * self.nodes

    def without(self, devices: int) -> Cluster:
        """What is left to train on where others take so many: of one machine some of it, of several whole ones or as many of each."""
        left = self.num_devices - devices
        if left % self.nodes == 0:
            return replace(self, per_node=left // self.nodes)
        return replace(self, nodes=-(-left // self.per_node))

    @property
    def device_link(self) -> float:
        """Bytes/s each way of one device when all of them talk: between nodes they share the node's link."""
        return self.device.link if self.nodes == 1 else min(self.device.link, self.link.bytes_s / self.per_node)

    def __str__(self) -> str:
        one = f"{self.per_node}x{self.device.name}"
        return one if self.nodes == 1 else f"{self.nodes}x{one}@{self.link.name}"


_CLUSTER = re.compile(r"(?:(?P<nodes>[1-9]\d*)x)?(?P<count>[1-9]\d*)x(?P<card>[a-z0-9]+)(?:@(?P<link>\w+))?")


def parse_cluster(text: str) -> Cluster:
    """`8xH100`: one machine; `2x8xH100`: two; `2x8xH100@eth100`: with that link between them. Raises: ConfigError."""
    found = _CLUSTER.fullmatch(text.lower())
    if not found:
        raise ConfigError(
            f"--gpus {text}: expected COUNTxCARD or NODESxCOUNTxCARD[@LINK], such as 8xH100 or 2x8xH100@ib400"
        )
    card, link = found["card"], found["link"] or "ib400"
    if card not in DEVICES:
        raise ConfigError(f"--gpus {text}: no card {card} in the table; expected one of {', '.join(DEVICES)}")
    if link not in LINKS:
        raise ConfigError(f"--gpus {text}: no link {link} in the table; expected one of {', '.join(LINKS)}")
    return Cluster(DEVICES[card], int(found["count"]), int(found["nodes"] or 1), LINKS[link])
