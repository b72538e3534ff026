"""Penalties that keep what earlier tasks taught: EWC, L2-SP, O-LoRA, RegLoRA, and LwF.

All but LwF are terms of the params alone. A loss is a sum over micro-batches, so such a term counts in
each of them with the micro-batch's `share` of the batch's weight: the shares sum to 1, so it is counted
once, however the batch is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from trainjax import tree
from trainjax.losses.combine import share
from trainjax.types import Batch, Loss, Metrics, Params, Policy, Reference

# --- quadratic penalties ------------------------------------------------------------------------


def quadratic(params: Params, anchor: Params, importance: Params) -> Float[Array, ""]:
    """`0.5 sum_i F_i (theta_i - anchor_i)^2`, in float32.

    Args:
        params: theta.
        anchor: the params to stay near.
        importance: F, like the params, or a scalar in the place of an array.
    """

    def term(theta: Array, old: Array, weight: Array) -> Array:
        moved = theta.astype(jnp.float32) - old.astype(jnp.float32)
        return jnp.sum(weight * moved * moved)

    return 0.5 * jax.tree.reduce(jnp.add, jax.tree.map(term, params, anchor, importance))


class Anchored(NamedTuple):
    """Where a task left the params, and how much each matters to it.

    Attributes:
        anchor: the params.
        fisher: importances of equal names and shapes, not negative.
    """

    anchor: Params
    fisher: Params


def ewc(anchor: Params, fisher: Params, strength: float) -> Loss:
    """Elastic weight consolidation: `strength * 0.5 * sum_i F_i (theta_i - anchor_i)^2`.

    The one half is the paper's, so with the Fisher of the *mean* log-likelihood of an example
    `strength` is the number of examples the old task counts for. Papers and libraries differ:
    Avalanche has no half, nor have SI and MAS, whose importances serve here with `strength=2 * c`.

    Counted once over the micro-batches (see `combine.share`). Several tasks are a sum of terms, told apart
    with `named`, or one term of `pooled` ones. Metric: `ewc`, the penalty with its strength.

    Args:
        anchor: the old params: an adapter, or the whole model. Copied, so that a step may donate them.
        fisher: `estimate.fisher` at the anchor, or other importances.
        strength: at least 0; changing it does not retrace.

    Raises:
        ValueError: a negative strength; a Fisher, or later params, of another tree than the anchor.

    Source: Kirkpatrick et al. 2017, arXiv:1612.00796, eq. 3.
    """
    check_same_tree(fisher, anchor, "the Fisher")
    return Loss(_ewc, (_copied(anchor), fisher, _strength(strength)))


def l2_sp(anchor: Params, strength: float) -> Loss:
    """L2 towards the starting point: `strength * 0.5 * sum_i (theta_i - anchor_i)^2`.

    EWC in which all params matter alike. The paper's second term, weight decay of a new head, is the
    optimizer's. Counted once over the micro-batches. Metric: `l2_sp`.

    Args:
        anchor: the starting point. Copied.
        strength: at least 0.

    Raises:
        ValueError: a negative strength; later params of another tree than the anchor.

    Source: Li et al. 2018, arXiv:1802.01483.
    """
    return Loss(_l2_sp, (_copied(anchor), _strength(strength)))


def _ewc(inputs: Any, params: Params, batch: Batch, key: PRNGKeyArray | None):
    anchor, fisher, strength = inputs
    check_same_tree(params, anchor, "the params")
    return _once("ewc", strength * quadratic(params, anchor, fisher), batch)


def _l2_sp(inputs: Any, params: Params, batch: Batch, key: PRNGKeyArray | None):
    anchor, strength = inputs
    check_same_tree(params, anchor, "the params")
    ones = jax.tree.map(lambda _: jnp.float32(1.0), anchor)
    return _once("l2_sp", strength * quadratic(params, anchor, ones), batch)


def pooled(first: Anchored, second: Anchored) -> Anchored:
    """One quadratic penalty for two: equal to their sum but for a constant.

    `F_1 (x - a_1)^2 + F_2 (x - a_2)^2 = (F_1 + F_2) (x - a)^2 + const` with
    `a = (F_1 a_1 + F_2 a_2) / (F_1 + F_2)`; where neither matters, `a = a_2`. So any number of tasks
    takes the memory of one: `losses.ewc(*pooled(old, new), strength)`.

    Raises:
        ValueError: trees that differ.

    Source: completing the square; Huszár 2018, arXiv:1712.03847, on why the sum.
    """
    check_same_tree(second.anchor, first.anchor, "the second anchor")

    def anchor(a: Array, f: Array, b: Array, g: Array) -> Array:
        total = f + g
        # b plus a step towards a is exact where a = b; both sides of the division are kept finite.
        step = jnp.where(total > 0, f / jnp.where(total > 0, total, 1.0), 0.0)
        return b + step * (a - b)

    fisher = jax.tree.map(jnp.add, first.fisher, second.fisher)
    return Anchored(jax.tree.map(anchor, *first, *second), fisher)


def check_same_tree(found: Params, expected: Params, what: str) -> None:
    """Equal names and shapes, leaf by leaf.

    Raises:
        ValueError: not so; the message names the first leaf that differs.
    """
    here, there = (
        {name: leaf.shape for name, leaf in tree.flatten(params).items()}
        for params in (found, expected)
    )
    for name in {**there, **here}:
        if here.get(name) != there.get(name):
            raise ValueError(
                f"{what} and the anchor are of different trees: {name!r} is "
                f"{here.get(name, 'missing')} in {what.removeprefix('the ')} and "
                f"{there.get(name, 'missing')} in the anchor"
            )


def _copied(params: Params) -> Params:
    """Arrays of our own: the step donates its state, and the anchor may be that state's params."""
    return jax.tree.map(jnp.copy, params)


def _strength(strength: float) -> np.float32:
    if not strength >= 0:
        raise ValueError(f"strength={strength} of a penalty is at least 0")
    return np.float32(strength)


def _once(name: str, penalty: Array, batch: Batch) -> tuple[Array, Metrics]:
    """A penalty as a loss term that micro-batches count once, and as a metric."""
    value = share(batch) * penalty
    return value, {name: jax.lax.stop_gradient(value)}


# --- penalties on low-rank updates --------------------------------------------------------------


def overlap(
    a: Float[Array, "*stack in rank"], earlier: Float[Array, "*stack in others"]
) -> Float[Array, ""]:
    """`sum_jk (earlier^T A)_jk^2`: how far the columns of A lie in the span of earlier ones."""
    products = jnp.einsum("...ij,...ik->...jk", earlier, a.astype(jnp.float32))
    return jnp.sum(products * products)


def o_lora(earlier: Sequence[Params], strength: float) -> Loss:
    """Orthogonal LoRA: `strength * sum over matrices and earlier tasks of ||A_task^T A||_F^2`.

    Keeps the inputs that this adapter listens to orthogonal to those of earlier adapters, which
    should be merged into the base. Counted once over the micro-batches. Metric: `o_lora`.

    Args:
        earlier: adapters of earlier tasks on the same matrices, of any ranks.
        strength: at least 0.

    Raises:
        ValueError: a negative strength; no earlier adapter; one on other matrices.

    Source: Wang et al. 2023, arXiv:2310.14152, for A as `[in, rank]`. (The authors' code
    sums absolute values where the paper squares.)
    """
    if not earlier:
        raise ValueError("o_lora needs the adapter of at least one earlier task, and got none")
    factors = [_factors(adapter) for adapter in earlier]
    for adapter in factors[1:]:
        _check_same_matrices(adapter, factors[0])
    spans = {
        name: jnp.concatenate([f[name][0].astype(jnp.float32) for f in factors], axis=-1)
        for name in factors[0]
    }
    return Loss(_o_lora, (spans, _strength(strength)))


def _o_lora(inputs: Any, params: Params, batch: Batch, key: PRNGKeyArray | None):
    spans, strength = inputs
    factors = _factors(params)
    _check_same_matrices(factors, spans)
    total = sum(overlap(a, spans[name]) for name, (a, _) in factors.items())
    return _once("o_lora", strength * total, batch)


def key_entries(adapter: Params, fraction: float = 0.02) -> dict[str, Int[Array, "*stack entries"]]:
    """The largest entries of an adapter's update, by name of the matrix.

    Args:
        adapter: LoRA's factors. Its updates are made here, one name at a time.
        fraction: of each matrix's entries; at least one is taken.

    Returns:
        Places in the flattened `[in, out]` of each matrix. Those of several tasks are joined along the
        last axis.

    Raises:
        ValueError: a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction} of a matrix's entries is above 0 and at most 1")

    def largest(a: Array, b: Array) -> Array:
        update = jnp.abs(a @ b).reshape(*a.shape[:-2], -1)
        return jax.lax.top_k(update, max(1, int(fraction * update.shape[-1])))[1]

    return {name: largest(a, b) for name, (a, b) in _factors(adapter).items()}


def entries_size(
    a: Float[Array, "*stack in rank"],
    b: Float[Array, "*stack rank out"],
    entries: Int[Array, "*stack entries"],
) -> Float[Array, "*stack"]:
    """The mean of `|(A B)_ij|` over the given entries of each matrix, without making `A B`."""
    row, column = jnp.divmod(entries, b.shape[-1])
    rows = jnp.take_along_axis(a, row[..., None], axis=-2)
    columns = jnp.take_along_axis(jnp.swapaxes(b, -1, -2), column[..., None], axis=-2)
    return jnp.mean(jnp.abs(jnp.sum(rows * columns, axis=-1)), axis=-1, dtype=jnp.float32)


def reg_lora(entries: dict[str, Array], strength: float) -> Loss:
    """RegLoRA: `strength` times the mean size of the update at the key entries of earlier updates.

    The mean is over a matrix's entries and then over matrices; the update is `A B` without its scale,
    of an adapter that starts anew for each task. Counted once over the micro-batches. Metric:
    `reg_lora`.

    Args:
        entries: `key_entries` of earlier adapters.
        strength: at least 0; the authors take 2500.

    Raises:
        ValueError: a negative strength; an adapter on other matrices.

    Source: Chen et al. 2025, arXiv:2505.02486; agrees with the authors' code (SEFE).
    """
    return Loss(_reg_lora, (entries, _strength(strength)))


def _reg_lora(inputs: Any, params: Params, batch: Batch, key: PRNGKeyArray | None):
    entries, strength = inputs
    factors = _factors(params)
    _check_same_matrices(factors, entries)
    sizes = [entries_size(a, b, entries[name]) for name, (a, b) in factors.items()]
    mean = jnp.mean(jnp.concatenate([jnp.ravel(size) for size in sizes]))
    return _once("reg_lora", strength * mean, batch)


def _factors(adapter: Params) -> dict[str, tuple[Array, Array]]:
    """A and B of each matrix of a LoRA adapter, by the matrix's name.

    Raises:
        ValueError: the tree is not of such factors.
    """
    named = tree.flatten(adapter)
    names = dict.fromkeys(name.rpartition("/")[0] for name in named)
    if odd := named.keys() ^ {f"{name}/{factor}" for name in names for factor in "ab"}:
        raise ValueError(f"not an adapter of pairs a and b: {min(odd)!r} has no counterpart")
    return {name: (named[f"{name}/a"], named[f"{name}/b"]) for name in names}


def _check_same_matrices(found: dict[str, Any], expected: dict[str, Any]) -> None:
    if odd := sorted(found.keys() ^ expected.keys()):
        raise ValueError(f"adapters of other matrices: {odd[0]!r} is in only one of the two")


# --- learning without forgetting ----------------------------------------------------------------

_FLOOR = 1e-6
"""Added to the probability of all other tokens: what float32 leaves of `1 - p` for `p` near 1."""


def grouped_kl(
    logprobs: Float[Array, "batch seq kept"], old_logprobs: Float[Array, "batch seq kept"]
) -> Float[Array, "batch seq"]:
    """`KL(old || new)` over the kept tokens, and all others as one more outcome.

    `sum_k q_k log(q_k / p_k) + (1 - sum q) log((1 - sum q) / (1 - sum p))`, which is at most the KL
    over the whole vocabulary and equals it where the model agrees on the proportions of the others.

    Args:
        logprobs: log p of some distinct tokens.
        old_logprobs: log q of the same tokens under the old model; no gradient.
    """
    chex.assert_equal_shape([logprobs, old_logprobs])
    old_logprobs = jax.lax.stop_gradient(old_logprobs)
    kept = jnp.sum(jnp.exp(old_logprobs) * (old_logprobs - logprobs), axis=-1)
    others, old_others = _log_rest(logprobs), _log_rest(old_logprobs)
    return kept + jnp.exp(old_others) * (old_others - others)


def _log_rest(logprobs: Float[Array, "batch seq kept"]) -> Float[Array, "batch seq"]:
    """`log(1 - sum_k p_k)`; with a floor that keeps value and gradient finite and of the right sign."""
    rest = jnp.maximum(-jnp.expm1(jax.nn.logsumexp(logprobs, axis=-1)), 0.0)
    return jnp.log(rest + _FLOOR)


def lwf(policy: Policy, reference: Reference | None = None) -> Loss:
    """Learning without forgetting: the model's confidence in each target stays that of the old model.

    `sum_t weights_t KL(old || new)`, where a token is either the target or another (`grouped_kl` of
    one token): from one stored number a token, of which the first is `log q`. It is a lower bound of
    the paper's distillation, which compares all outputs at a temperature, and is 0 with zero gradient
    for a policy that is the old model. On targets drawn from the old model,
    `batch | {"targets": old.draw(params, batch, key)}`, `sft` is the other estimate: its expected
    gradient is that of the KL over the whole vocabulary.

    Metric: `lwf`.

    Args:
        policy: `(params, batch, key, where) -> TokenStats`.
        reference: the old model, `(batch, where) -> TokenStats`; without it the batch carries
            `reference_logprobs`, `[batch, seq]`, which were stored once.

    Source: Li and Hoiem 2016, arXiv:1606.09282, with the difference above.
    """
    return Loss(_lwf, (policy, reference))


def _lwf(inputs: Any, params: Params, batch: Batch, key: PRNGKeyArray | None):
    policy, reference = inputs
    weights = batch["weights"]
    where = weights != 0
    old = batch["reference_logprobs"] if reference is None else reference(batch, where).logprobs
    new = policy(params, batch, key, where).logprobs
    # Where nobody asked both are 0, the log of a certain event: no difference, and no weight.
    value = jnp.sum(weights * grouped_kl(new[..., None], old[..., None]))
    return value, {"lwf": jax.lax.stop_gradient(value)}
