"""Parallelism as data layout: a mesh of devices, and rules from names to partitions."""

from trainjax.parallel.mesh import mesh
from trainjax.parallel.rules import DECODER, place, rows, shardings, spec

__all__ = ["DECODER", "mesh", "place", "rows", "shardings", "spec"]
