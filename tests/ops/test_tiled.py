"""Attention of parts of rows, in tiles, against the dense formula of whole rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.test_attention import Case, assert_all_close, dense, inputs, with_gradients
from trainjax.derivatives import any_order
from trainjax.ops.attention import attend
from trainjax.ops.blocked import Branches, Prefix, blocked
from trainjax.ops.tiled import tiled

SEQ = 20


def in_parts(size, q, k, v, g, segments, prefix=None, **settings):
    """Output and gradients of the row's parts, put together again; one program serves them all.

    Each part has so many tokens, from anywhere in the row. Gradients of what all of them see are summed.
    """

    @jax.jit
    def run(q, g, at, positions, k, v, segments, *virtual):
        def attended(q, k, v, *virtual):
            own = Prefix(*virtual, positions) if virtual else None
            return tiled(q, k, v, at, segments, prefix=own, **settings)

        out, pull = jax.vjp(attended, q, k, v, *virtual)
        return out, *pull(g)

    parts = np.random.default_rng(0).permutation(SEQ).reshape(-1, size).astype(np.int32)
    parts.sort(axis=1)
    virtual = () if prefix is None else (prefix.keys, prefix.values)
    total, dtypes = [np.zeros(x.shape) for x in (q, q, k, v, *virtual)], set()
    for at in parts:
        positions = None if prefix is None else np.asarray(prefix.positions)[:, at]
        found = jax.device_get(run(q[:, at], g[:, at], at, positions, k, v, segments, *virtual))
        dtypes |= {array.dtype for array in found[:4]}
        for whole, part in zip(total[:2], found[:2], strict=True):
            whole[:, at] = part
        for whole, part in zip(total[2:], found[2:], strict=True):
            whole += part
    assert dtypes == {q.dtype}
    return total


CASES = [
    (Case(), (512, 1024), 10),  # one tile
    (Case(), (3, 4), 4),  # the last ones are shorter
    (Case(heads=4, kv_heads=4, segments=True), (2, 5), 10),
    (Case(heads=4, kv_heads=1, window=3), (3, 2), 5),
    (Case(window=9, segments=True), (4, 3), 20),
    (Case(segments=True), (1, 1), 4),
]
assert {case.seq for case, *_ in CASES} == {SEQ}


@pytest.mark.parametrize(("case", "tile", "size"), CASES)
def test_parts_of_a_row_and_their_gradients_are_those_of_the_dense_formula(case, tile, size):
    args = inputs(case)
    found = in_parts(size, *args, window=case.window, tile=tile)
    assert_all_close(found, dense(case, *args), 1e-5)


@pytest.mark.parametrize("window", [None, 4])
def test_virtual_tokens_come_before_every_example(window):
    case = Case(segments=True)
    q, k, v, g, ids = inputs(case)
    rng = np.random.default_rng(1)
    first = np.array([[np.argmax(row == i) for i in row] for row in ids])
    keys, values = rng.standard_normal((2, case.kv_heads, 3, case.dim), np.float32)
    prefix = Prefix(keys, values, jnp.asarray(np.arange(case.seq) - first + 3))

    @jax.jit
    def whole(g, *args):
        def attended(q, k, v, keys, values):
            own = Prefix(keys, values, prefix.positions)
            return blocked(q, k, v, jnp.asarray(ids), prefix=own, window=window)

        out, pull = jax.vjp(attended, *args)
        return out, *pull(g)

    found = in_parts(10, q, k, v, g, ids, prefix, tile=(4, 3), window=window)
    for one, other in zip(found, whole(g, q, k, v, keys, values), strict=True):
        np.testing.assert_allclose(one, other, 0, 1e-5)


def test_completions_see_the_prompt_that_they_share():
    case = Case()
    q, k, v, g, _ = inputs(case)
    ids = np.tile([1] * 5 + [2] * 6 + [3] * 6 + [0] * 3, (case.batch, 1)).astype(np.int32)
    segments = Branches(ids, np.where(ids > 1, 1, 0).astype(np.int32))
    found = in_parts(5, q, k, v, g, segments, tile=(3, 4))
    expected = with_gradients(blocked, q, k, v, g, segments)
    assert_all_close(found, [np.asarray(x, np.float64) for x in expected], 1e-5)


def test_in_bf16_sums_are_in_float32():
    case = Case(segments=True, window=13)
    args = inputs(case, jnp.bfloat16)
    found = in_parts(10, *args, window=case.window, tile=(4, 4))
    assert_all_close(found, dense(case, *args), 0.05)


def test_derivatives_of_any_order_are_of_the_same_function():
    q, k, v, g, _ = inputs(Case())
    at = np.arange(5, 15, dtype=np.int32)
    args, g = (q[:, at], k, v), g[:, at]
    tangents = tuple(np.ones_like(x) for x in args)

    def value(q, k, v):
        return jnp.sum(tiled(q, k, v, jnp.asarray(at), None, tile=(3, 4)) * g)

    own = jax.jit(jax.grad(value, (0, 1, 2)))(*args)
    with any_order():
        along = jax.jit(lambda *args: jax.jvp(value, args, tangents)[1])(*args)
    np.testing.assert_allclose(along, sum(np.asarray(x).sum() for x in own), rtol=1e-4)


def test_attention_of_long_rows_goes_in_tiles_and_is_the_same():
    case = Case(batch=1, seq=1100, heads=2, kv_heads=1, dim=8, segments=True, window=700)
    args = inputs(case)
    found = with_gradients(functools.partial(attend, window=case.window), *args)
    assert_all_close(found, dense(case, *args), 1e-5)
    q, k, v, *_ = map(jnp.asarray, args)
    text = str(jax.make_jaxpr(attend)(q, k, v))
    assert "1100,1100" not in text
    assert f"{2 * 256},512" in text  # of two heads' queries with the keys of a tile


def test_no_array_grows_with_the_square_of_the_row():
    """A part of 512 tokens of rows of 4096: no array is larger than the keys, but for the blocks' scores."""
    heads, dim, part, length, tile = 4, 8, 512, 4096, (64, 128)
    arrays = (
        jax.ShapeDtypeStruct((1, n, h, dim), jnp.float32)
        for n, h in ((part, heads), (length, 1), (length, 1))
    )

    def run(q, k, v):
        return jnp.sum(tiled(q, k, v, jnp.arange(part) + 1000, tile=tile))

    memory = jax.jit(jax.grad(run, (0, 1, 2))).lower(*arrays).compile().memory_analysis()
    keys, scores = 4 * length * dim, 4 * heads * tile[0] * tile[1]
    assert memory.temp_size_in_bytes < 8 * keys + 4 * scores < 4 * heads * part * length / 4
