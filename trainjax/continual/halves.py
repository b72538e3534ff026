"""Half fine-tuning: another random half of the matrices trains in every task."""

from __future__ import annotations

import re

import jax.numpy as jnp
import optax

from trainjax import optim, tree
from trainjax.continual.method import Memory, Method
from trainjax.optim.hft import HalfState, training_half
from trainjax.types import Params

_MATRICES = r"^layers/.*kernel$"


def hft() -> Method:
    """Half of the matrices of the layers stays as it is, of an adapter both factors of a matrix.

    Source: Hui et al. 2024, arXiv:2404.18466, where every weight trains; see `optim.half_fine_tuning`.
    """

    def optimizer(
        tx: optax.GradientTransformation, memory: Memory, seed: int
    ) -> optax.GradientTransformation:
        return optax.chain(tx, _half_of_matrices(seed))

    return Method(optimizer=optimizer)


def _half_of_matrices(seed: int) -> optax.GradientTransformation:
    """`optim.half_fine_tuning` for which the factors of an adapter's update are one matrix."""

    def init(params: Params) -> HalfState:
        matrices = {_matrix(name): leaf for name, leaf in tree.flatten(params).items()}
        trains = tree.flatten(training_half(tree.unflatten(matrices), seed, _MATRICES))
        # Copies: a step donates its state, and the factors of a matrix must not share a buffer there.
        return HalfState(tree.map_named(lambda name, _: jnp.copy(trains[_matrix(name)]), params))

    return optax.GradientTransformation(init, optim.half_fine_tuning(seed).update)


def _matrix(name: str) -> str:
    return re.sub("/[ab]$", "", name)
