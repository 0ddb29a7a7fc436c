"""Content-addressed store, lineage, versions, aliases, and promotion by compare-and-swap.

Knows nothing of how a verdict was reached, only what it is about.
"""

from posttrain.registry.audit import Event
from posttrain.registry.looks import JudgedSuite
from posttrain.registry.manifest import Manifest, check_chain, environment_pins
from posttrain.registry.reader import Verification
from posttrain.registry.registry import Registry
from posttrain.registry.store import ContentStore

__all__ = [
    "ContentStore",
    "Event",
    "JudgedSuite",
    "Manifest",
    "Registry",
    "Verification",
    "check_chain",
    "environment_pins",
]
