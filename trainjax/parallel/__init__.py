"""Parallelism as data layout: processes, a mesh of their devices, and rules from names to partitions."""

from trainjax.parallel.cluster import (
    Cluster,
    as_first,
    check_agreement,
    find,
    initialize,
    is_first,
    is_peer_lost,
    wait_for_all,
)
from trainjax.parallel.mesh import mesh
from trainjax.parallel.rules import DECODER, place, rows, shardings, spec

__all__ = [
    "DECODER",
    "Cluster",
    "as_first",
    "check_agreement",
    "find",
    "initialize",
    "is_first",
    "is_peer_lost",
    "mesh",
    "place",
    "rows",
    "shardings",
    "spec",
    "wait_for_all",
]
