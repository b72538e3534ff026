"""Merging of models and adapters: one file a method, each a `Method` of pure functions.

`merge_models(out, ties([1, 0.5], density=0.5), [a, b], base)` goes from files to files, and
`merge_tensor` merges arrays.
"""

from trainjax.merging import adapters
from trainjax.merging.adapters import merge_adapters
from trainjax.merging.dare import dare_linear, dare_ties
from trainjax.merging.instruction_residual import instruction_residual
from trainjax.merging.linear import linear
from trainjax.merging.method import Block, Method, merge_tensor
from trainjax.merging.model_stock import model_stock
from trainjax.merging.models import merge_models
from trainjax.merging.slerp import slerp
from trainjax.merging.task_arithmetic import task_arithmetic
from trainjax.merging.ties import counted_mean, ties, weighted_mean
from trainjax.merging.timber import timber

__all__ = [
    "Block",
    "Method",
    "adapters",
    "counted_mean",
    "dare_linear",
    "dare_ties",
    "instruction_residual",
    "linear",
    "merge_adapters",
    "merge_models",
    "merge_tensor",
    "model_stock",
    "slerp",
    "task_arithmetic",
    "ties",
    "timber",
    "weighted_mean",
]
