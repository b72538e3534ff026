"""Fira: Adam in a subspace of each matrix's gradient, and what is outside of it by the same factor."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from trainjax import tree
from trainjax.optim.settings import settings_of
from trainjax.types import Params


class Projected(NamedTuple):
    """What is known of one matrix, or of a stack of them.

    Attributes:
        basis: `[..., short, rank]`, orthonormal columns.
        mu, nu: Adam's averages of the gradient in the subspace, `[..., rank, long]`; `[..., long, rank]`
            of matrices with more rows than columns.
        norm: of the last step's part outside of the subspace, `[..., 1, 1]`.
    """

    basis: Float[Array, "*stack short rank"]
    mu: Float[Array, "*stack rows columns"]
    nu: Float[Array, "*stack rows columns"]
    norm: Float[Array, "*stack 1 1"]


class Plain(NamedTuple):
    """Adam's averages of what is not projected."""

    mu: Array
    nu: Array


class FiraState(NamedTuple):
    """State of Fira over all parameters.

    Attributes:
        step: steps done.
        of: a `Projected` or a `Plain` for each parameter.
    """

    step: Int[Array, ""]
    of: Params


def scale_by_fira(
    rank: int = 128,
    *,
    every: int = 200,
    scale: float = 0.25,
    growth: float = 1.01,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    outside: bool = True,
) -> optax.GradientTransformation:
    """See `fira`; without decay and learning rate, and with `outside` off GaLore's."""
    for name, value in {"rank": rank, "every": every}.items():
        if value < 1:
            raise ValueError(f"{name}={value} is at least 1")
    if not growth > 1:
        raise ValueError(f"growth={growth}, the largest ratio of two steps' norms, is above 1")

    def init(params: Params) -> FiraState:
        return FiraState(jnp.zeros((), jnp.int32), jax.tree.map(lambda p: _init(p, rank), params))

    def update(updates: Params, state: FiraState, params: Any = None) -> Any:
        count = state.step + 1

        def adam(mu: Array, nu: Array, g: Array) -> tuple[Array, Array, Array]:
            mu, nu = b1 * mu + (1 - b1) * g, b2 * nu + (1 - b2) * g * g
            step = mu / (1 - b1**count) / (jnp.sqrt(nu / (1 - b2**count)) + eps)
            return step, mu, nu

        def leaf(g: Array, own: Projected | Plain) -> tuple[Array, Projected | Plain]:
            if isinstance(own, Plain):
                step, mu, nu = adam(own.mu, own.nu, g)
                return step, Plain(mu, nu)
            side = _side(g.shape)
            basis = jax.lax.cond(
                state.step % every == 0, lambda: _basis(g, rank, side), lambda: own.basis
            )
            inside = _into(basis, g, side)
            step, mu, nu = adam(own.mu, own.nu, inside)
            norm = own.norm
            if outside:
                # phi (G - P R) = phi G - P (phi R): one product with P, and no array of the rest alone.
                factor = _norms(step, side) / jnp.maximum(_norms(inside, side), 1e-30)
                factor, norm = _limited(factor, g, inside, norm, growth, side)
                found = factor * g + _out_of(basis, step - factor * inside, side)
            else:
                found = _out_of(basis, step, side)
            return scale * found, Projected(basis, mu, nu, norm)

        pairs = jax.tree.map(lambda own, g: leaf(g, own), state.of, updates, is_leaf=_is_own)
        steps, owns = (
            jax.tree.map(lambda pair, part=part: pair[part], pairs, is_leaf=_is_pair)
            for part in (0, 1)
        )
        return steps, FiraState(count, owns)

    return optax.GradientTransformation(init, update)


def fira(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    *,
    every: int = 200,
    scale: float = 0.25,
    growth: float = 1.01,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mask: Any = None,
) -> optax.GradientTransformation:
    """Full-rank training with the optimizer state of a low rank: moments of `rank * long` instead of
    `short * long`.

    With P the first left singular vectors of the gradient G (its shorter side first), found anew at every
    `every`-th step, `R = P^T G` and `psi(R)` Adam's step of it:
    `theta <- theta - lr scale (P psi(R) + phi * (G - P R))`, with `phi_i = |psi(R)_i| / |R_i|` for each
    column: what lies outside of the subspace is scaled as what lies in it was. From step to step that
    part's norm grows by no more than `growth`. A matrix whose shorter side is no longer than `rank`, and
    what is no matrix, has Adam itself, without `scale`. Projections are of each layer of a stack, and are
    made within the jitted step (`lax.cond`).

    Args:
        learning_rate: a rate or a schedule.
        rank: of the subspaces.
        every: steps between two subspaces; the moments are kept from one to the next.
        scale: of projected matrices' steps against the others'.
        growth: limit of the part outside; 1.01 in the paper.
        b1, b2, eps: Adam's.
        weight_decay: decoupled, times the learning rate.
        mask: what decays, as in `optax.adamw`.

    Raises:
        ValueError: a rank or interval below 1, a growth that is not above 1.

    Source: Chen et al. 2024, arXiv:2410.01623, algorithm 1; Zhao et al. 2024, arXiv:2403.03507, for the
    projection.
    """
    return optax.chain(
        scale_by_fira(rank, every=every, scale=scale, growth=growth, b1=b1, b2=b2, eps=eps),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


@settings_of(scale_by_fira, "growth", "outside")
def galore(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    *,
    weight_decay: float = 0.0,
    mask: Any = None,
    **settings: Any,
) -> optax.GradientTransformation:
    """`fira` without what lies outside of the subspace: `theta <- theta - lr scale P psi(P^T G)`.

    `optax.contrib.galore` for models whose layers are stacked in one array, each of which is a matrix here.

    Args:
        learning_rate, rank, weight_decay, mask: as in `fira`.
        settings: `every`, `scale`, `b1`, `b2` and `eps`, as in `fira`.

    Raises:
        ValueError: as `fira`.

    Source: Zhao et al. 2024, arXiv:2403.03507, algorithm 2.
    """
    return optax.chain(
        scale_by_fira(rank, outside=False, **settings),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _side(shape: tuple[int, ...]) -> int:
    """The axis that the projection shortens: the shorter one, so that the other is a column's number."""
    return -2 if shape[-2] <= shape[-1] else -1


def _into(basis: Array, x: Array, side: int) -> Array:
    """`P^T x`, or `x P` where columns lie along the last axis; a transposed copy of x would cost more."""
    return jnp.swapaxes(basis, -1, -2) @ x if side == -2 else x @ basis


def _out_of(basis: Array, x: Array, side: int) -> Array:
    """`P x`, or `x P^T`."""
    return basis @ x if side == -2 else x @ jnp.swapaxes(basis, -1, -2)


def _norms(x: Array, side: int) -> Array:
    """Euclidean norm of each column."""
    return jnp.sqrt(jnp.sum(x * x, axis=side, keepdims=True))


def _limited(
    factor: Array, x: Array, inside: Array, before: Array, growth: float, side: int
) -> tuple[Array, Array]:
    """Factors that make what lies outside no longer than `growth` times what it was, and its length.

    The basis is orthonormal: the square of a column's part outside is the column's less that inside.
    """
    outside = jnp.maximum(_norms(x, side) ** 2 - _norms(inside, side) ** 2, 0.0)
    norm = jnp.sqrt(jnp.sum(factor**2 * outside, (-2, -1), keepdims=True))
    most = jnp.where(before > 0, growth * before, norm)
    return factor * jnp.minimum(1.0, most / jnp.maximum(norm, 1e-30)), jnp.minimum(norm, most)


def _init(p: Array, rank: int) -> Projected | Plain:
    if p.ndim < 2 or min(p.shape[-2:]) <= rank:
        return Plain(jnp.zeros_like(p), jnp.zeros_like(p))
    *stack, rows, columns = p.shape
    of_moments = (rank, columns) if _side(p.shape) == -2 else (rows, rank)
    return Projected(
        basis=jnp.zeros((*stack, min(rows, columns), rank), p.dtype),
        mu=jnp.zeros((*stack, *of_moments), p.dtype),
        nu=jnp.zeros((*stack, *of_moments), p.dtype),
        norm=jnp.zeros((*stack, 1, 1), p.dtype),
    )


def _is_own(node: Any) -> bool:
    return isinstance(node, Projected | Plain)


def _is_pair(node: Any) -> bool:
    """A step and its state, in a plain tuple."""
    return type(node) is tuple


def _basis(x: Array, rank: int, side: int) -> Array:
    """The first singular vectors of the shorter side: eigenvectors of `x x^T` or `x^T x`."""
    wide = tree.wide(x)
    turned = jnp.swapaxes(wide, -1, -2)
    _, vectors = jnp.linalg.eigh(wide @ turned if side == -2 else turned @ wide)
    return vectors[..., ::-1][..., :rank].astype(x.dtype)
