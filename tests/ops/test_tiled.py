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

PARTS = ([*range(7)], [*range(7, 12), 19], [*range(12, 19)])  # in no order, and of any size


def in_parts(q, k, v, segments, prefix=None, **settings):
    """The row's parts one by one, put together again."""
    outs = []
    for part in (np.array(part, np.int32) for part in PARTS):
        own = prefix
        if prefix is not None and prefix.positions is not None:
            own = prefix._replace(positions=prefix.positions[:, part])
        at = jnp.asarray(part)
        outs.append(tiled(q[:, part], k, v, at, segments, prefix=own, **settings))
    return jnp.concatenate(outs, axis=1)[:, np.argsort(np.concatenate(PARTS))]


CASES = [
    (Case(), (512, 1024)),  # one tile
    (Case(), (3, 4)),  # the last ones are shorter
    (Case(heads=4, kv_heads=4, segments=True), (2, 5)),
    (Case(heads=4, kv_heads=1, window=3), (3, 2)),
    (Case(window=9, segments=True), (4, 3)),
    (Case(seq=20, segments=True), (1, 1)),
]


@pytest.mark.parametrize(("case", "tile"), CASES)
def test_parts_of_a_row_and_their_gradients_are_those_of_the_dense_formula(case, tile):
    args = inputs(case)
    found = with_gradients(functools.partial(in_parts, window=case.window, tile=tile), *args)
    assert_all_close(found, dense(case, *args), 1e-5)


@pytest.mark.parametrize("window", [None, 4])
def test_virtual_tokens_come_before_every_example(window):
    case = Case(segments=True)
    q, k, v, g, ids = inputs(case)
    rng = np.random.default_rng(1)
    first = np.array([[np.argmax(row == i) for i in row] for row in ids])
    shape = (case.kv_heads, 3, case.dim)
    prefix = Prefix(
        *rng.standard_normal((2, *shape), np.float32),
        jnp.asarray(np.arange(case.seq) - first + 3),
    )

    def gradients(attend):
        @jax.jit
        def run(g, *args):
            def attended(q, k, v, keys, values):
                own = Prefix(keys, values, prefix.positions)
                return attend(q, k, v, jnp.asarray(ids), prefix=own, window=window)

            out, pull = jax.vjp(attended, *args)
            return out, *pull(g)

        return run(g, q, k, v, prefix.keys, prefix.values)

    found = gradients(functools.partial(in_parts, tile=(4, 3)))
    for one, other in zip(found, gradients(blocked), strict=True):
        np.testing.assert_allclose(one, other, 0, 1e-5)


def test_completions_see_the_prompt_that_they_share():
    case = Case()
    q, k, v, g, _ = inputs(case)
    ids = jnp.asarray(np.tile([1] * 5 + [2] * 6 + [3] * 6 + [0] * 3, (case.batch, 1)), jnp.int32)
    segments = Branches(ids, jnp.where(ids > 1, 1, 0))
    found = with_gradients(functools.partial(in_parts, tile=(3, 4)), q, k, v, g, segments)
    expected = with_gradients(blocked, q, k, v, g, segments)
    assert_all_close(found, [np.asarray(x, np.float64) for x in expected], 1e-5)


def test_in_bf16_sums_are_in_float32():
    case = Case(seq=20, segments=True, window=13)
    args = inputs(case, jnp.bfloat16)
    attend = functools.partial(in_parts, window=case.window, tile=(4, 4))
    found = with_gradients(attend, *args)
    assert {a.dtype for a in found} == {jnp.dtype(jnp.bfloat16)}
    assert_all_close(found, dense(case, *args), 0.05)


def test_derivatives_of_any_order_are_of_the_same_function():
    q, k, v, g, _ = inputs(Case())
    tangents = tuple(np.ones_like(x) for x in (q, k, v))

    def value(q, k, v):
        return jnp.sum(in_parts(q, k, v, None, tile=(3, 4)) * g)

    own = jax.jit(jax.grad(value, (0, 1, 2)))(q, k, v)
    with any_order():
        along = jax.jit(lambda *args: jax.jvp(value, args, tangents)[1])(q, k, v)
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
