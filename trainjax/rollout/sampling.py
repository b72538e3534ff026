"""From logits to tokens: temperature, top-k, top-p, min-p, and a draw, without sorting the vocabulary.

All three filters keep the tokens above some logit, and that logit is found by bisection over the bits
of a float: 32 passes of compare-and-sum, exact, and with settings that may change without a new program.
Sorting 49152 entries a row costs 20 times as much on a CPU. The draw inverts the distribution's running
sum with one uniform number a row, where Gumbel noise would take one for every entry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, UInt

from trainjax.types import pytree

Number = Float[Array, ""] | Float[np.ndarray, ""] | np.float32
Count = Int[Array, ""] | Int[np.ndarray, ""] | np.int32

_GREEDY = 1e-5  # a temperature below it takes the most probable token
_BLOCK = 128  # the running sum goes over blocks of the vocabulary first, then within one


@pytree
class Sampler:
    """How the next token is drawn; make one with `sampler`.

    A pytree: jit sees the settings as inputs, so another temperature is no new program. A setting
    that is None is off, is part of the structure and costs nothing.

    Attributes:
        temperature: divides the logits; None takes the most probable token.
        top_k: keeps the k most probable tokens.
        top_p: keeps the fewest most probable tokens whose probabilities sum to at least this.
        min_p: keeps the tokens at least this many times as probable as the most probable one.
    """

    temperature: Number | None = None
    top_k: Count | None = None
    top_p: Number | None = None
    min_p: Number | None = None


class Drawn(NamedTuple):
    """Tokens and what they cost.

    Attributes:
        tokens: one a row.
        logprobs: of the token under the model's own distribution: temperature 1, nothing cut off.
        sampler_logprobs: of the token under the distribution it was drawn from; 0 if greedy.
    """

    tokens: Int[Array, " rows"]
    logprobs: Float[Array, " rows"]
    sampler_logprobs: Float[Array, " rows"]


greedy = Sampler()
"""Always the most probable token; of equals, the one with the lowest id."""


def sampler(
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Sampler:
    """A sampler with the filters in the usual order: temperature, top-k, top-p, min-p.

    Args:
        temperature: divides the logits; 0 is greedy, and the rest is then without effect. So is what is
            below 1e-5, as in vLLM: such quotients can be beyond float32.
        top_k: how many of the most probable tokens to keep; None for all.
        top_p: keep the fewest most probable tokens with this share of what top-k left.
        min_p: keep tokens with at least this share of the top token's probability.

    Raises:
        ValueError: temperature below 0, top_k below 1, top_p outside (0, 1], min_p outside [0, 1).

    Source: top-p, Holtzman et al. 2020, arXiv:1904.09751, sec. 3.1; min-p, Nguyen et al. 2024,
    arXiv:2407.01082, eq. 1-3. The order is that of `transformers`. Equal logits at a filter's edge
    all stay; there, `transformers` lets the order of its sort decide for top-p.

    >>> sampler(0.0) == greedy
    True
    """
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature} is not a number from 0 (greedy) upwards")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} would keep no token; give 1 or more, or None for all")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p={top_p} is not a share in (0, 1]; 1 or None keeps all tokens")
    if min_p is not None and not 0.0 <= min_p < 1.0:
        raise ValueError(f"min_p={min_p} is not a share in [0, 1); 0 or None keeps all tokens")
    if temperature < _GREEDY:
        return greedy
    return Sampler(
        np.float32(temperature),
        None if top_k is None else np.int32(min(top_k, np.iinfo(np.int32).max)),
        # 1 is off: rounded sums would reach it before the last tokens.
        None if top_p in (None, 1.0) else np.float32(top_p),
        None if min_p in (None, 0.0) else np.float32(min_p),
    )


def sample(
    sampler: Sampler,
    logits: Float[Array, "rows vocab"],
    keys: Key[Array, " rows"] | None = None,
) -> Drawn:
    """One token a row. A row's token depends on its own logits and key alone.

    Args:
        sampler: the settings.
        logits: float32. What the caller does not use of the result, jit does not compute.
        keys: `[rows]` random keys, one a row; greedy needs none.
    """
    if sampler.temperature is None:
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return Drawn(tokens, _logprobs(logits, tokens), jnp.zeros(tokens.shape, jnp.float32))
    if keys is None:
        raise ValueError("sampling needs keys, one a row; greedy needs none")
    kept = filtered(sampler, logits)
    tokens = _draw(jax.vmap(_uniform)(keys), kept)
    return Drawn(tokens, _logprobs(logits, tokens), _logprobs(kept, tokens))


def _uniform(key: PRNGKeyArray) -> Float[Array, ""]:
    return jax.random.uniform(key, dtype=jnp.float32)


def filtered(sampler: Sampler, logits: Float[Array, "rows vocab"]) -> Float[Array, "rows vocab"]:
    """The logits divided by the temperature, -inf where a filter leaves the token out."""
    scaled = logits if sampler.temperature is None else logits / sampler.temperature
    if sampler.top_k is not None:
        scaled = top_k(scaled, sampler.top_k)
    if sampler.top_p is not None:
        scaled = top_p(scaled, sampler.top_p)
    if sampler.min_p is not None:
        scaled = min_p(scaled, sampler.min_p)
    return scaled


def top_k(logits: Float[Array, "rows vocab"], k: Count) -> Float[Array, "rows vocab"]:
    """Keeps the k highest logits of a row, and those equal to the lowest of them."""
    order = _ordered(logits)

    def enough(kept: Bool[Array, "rows vocab"]) -> Bool[Array, " rows"]:
        return jnp.sum(kept, axis=-1, dtype=jnp.int32) >= k

    return jnp.where(order >= _highest(enough, order), logits, -jnp.inf)


def top_p(logits: Float[Array, "rows vocab"], p: Number) -> Float[Array, "rows vocab"]:
    """Keeps the smallest set of the highest logits whose probability is at least p."""
    order, probs = _ordered(logits), jax.nn.softmax(logits, axis=-1)

    def enough(kept: Bool[Array, "rows vocab"]) -> Bool[Array, " rows"]:
        return jnp.sum(jnp.where(kept, probs, 0.0), axis=-1) >= p

    return jnp.where(order >= _highest(enough, order), logits, -jnp.inf)


def min_p(logits: Float[Array, "rows vocab"], p: Number) -> Float[Array, "rows vocab"]:
    """Keeps tokens that are at least p times as probable as the row's most probable one."""
    floor = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(p)
    return jnp.where(logits >= floor, logits, -jnp.inf)


def _ordered(x: Float[Array, "rows vocab"]) -> UInt[Array, "rows vocab"]:
    """Integers in the order of the floats: a positive float's bits are in order already."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32) + 0.0, jnp.uint32)  # -0.0 becomes 0.0
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits & sign != 0, ~bits, bits | sign)


def _highest(
    enough: Callable[[Bool[Array, "rows vocab"]], Bool[Array, " rows"]],
    order: UInt[Array, "rows vocab"],
) -> UInt[Array, "rows 1"]:
    """The highest bar such that the tokens that reach it are enough; every row's lowest is."""

    def halve(_, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = high - (high - low) // jnp.uint32(2)
        good = enough(order >= middle[:, None])
        return jnp.where(good, middle, low), jnp.where(good, high, middle - jnp.uint32(1))

    # Rows that are done stay: there the middle is the low, of which it is known that it is enough.
    bounds = jnp.min(order, axis=-1), jnp.max(order, axis=-1)
    return lax.fori_loop(0, 32, halve, bounds)[0][:, None]


def _draw(
    uniform: Float[Array, " rows"], logits: Float[Array, "rows vocab"]
) -> Int[Array, " rows"]:
    """The first token at which the running sum of the probabilities exceeds `uniform`."""
    rows, vocab = logits.shape
    mass = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    mass = jnp.pad(mass, ((0, 0), (0, -vocab % _BLOCK))).reshape(rows, -1, _BLOCK)
    blocks = jnp.sum(mass, axis=-1)
    block, rest = _first_above(blocks, uniform * jnp.sum(blocks, axis=-1))
    within = jnp.take_along_axis(mass, block[:, None, None], axis=1)[:, 0]
    token, _ = _first_above(within, rest)
    return block * _BLOCK + token


def _first_above(
    mass: Float[Array, "rows n"], level: Float[Array, " rows"]
) -> tuple[Int[Array, " rows"], Float[Array, " rows"]]:
    """The first entry whose running sum exceeds a level, and by how much the level exceeds those before.

    The level is kept below the total, so that rounding cannot lead to an entry without mass.
    """
    sums = jnp.cumsum(mass, axis=-1)
    total = sums[:, -1]
    level = jnp.minimum(level, jnp.nextafter(total, jnp.zeros_like(total)))
    index = jnp.sum(sums <= level[:, None], axis=-1, dtype=jnp.int32)
    before = jnp.where(index > 0, _at(sums, jnp.maximum(index - 1, 0)), 0.0)
    return index, jnp.maximum(level - before, 0.0)


def _logprobs(logits: Float[Array, "rows vocab"], tokens: Int[Array, " rows"]) -> Array:
    return _at(logits, tokens) - jax.nn.logsumexp(logits, axis=-1)


def _at(x: Float[Array, "rows n"], index: Int[Array, " rows"]) -> Float[Array, " rows"]:
    return jnp.take_along_axis(x, index[:, None], axis=-1)[:, 0]
