"""Attention of rows over several devices: that of whole rows, and as much work for each device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.test_attention import Case, assert_all_close, dense, inputs, with_gradients
from trainjax.ops import attention
from trainjax.ops.attention import attend
from trainjax.ops.blocked import Prefix, blocked
from trainjax.ops.fold import Fold


def row_over(parts: int) -> Fold:
    """Rows in so many parts, over as many devices."""
    devices = np.array(jax.devices()[:parts]).reshape(1, 1, parts, 1)
    return Fold(jax.sharding.Mesh(devices, ("data", "fsdp", "sequence", "tensor")), 1, parts)


def in_parts(fold: Fold, q, k, v, segments, window=None, **settings):
    """`attend` of folded rows, as whole rows."""
    q, k, v, ids = (None if x is None else fold(jnp.asarray(x)) for x in (q, k, v, segments))
    return fold.undo(
        attend(q, k, v, ids, window=window, mesh=fold.mesh, parts=fold.parts, **settings)
    )


@pytest.mark.parametrize(
    ("parts", "case"),
    [
        (2, Case(segments=True)),
        (3, Case(seq=21)),  # the device in the middle is its own mirror; halves of 3 and 4 tokens
        (4, Case(heads=4, kv_heads=1, segments=True, window=9)),  # wider than a part
        (4, Case(window=3)),  # and narrower
        (4, Case(seq=4)),  # one token each
    ],
)
def test_rows_over_devices_and_their_gradients_are_those_of_the_dense_formula(parts, case):
    args = inputs(case)
    attend_parts = functools.partial(in_parts, row_over(parts), window=case.window)
    assert_all_close(with_gradients(attend_parts, *args), dense(case, *args), 1e-5)


@pytest.mark.parametrize("window", [None, 4, 9])
def test_virtual_tokens_are_seen_from_every_device(window):
    case, fold = Case(segments=True), row_over(4)
    q, k, v, g, ids = inputs(case)
    rng = np.random.default_rng(1)
    first = np.array([[np.argmax(row == i) for i in row] for row in ids])
    virtual = rng.standard_normal((2, case.kv_heads, 3, case.dim), np.float32)
    places = jnp.asarray(np.arange(case.seq) - first + 3)

    def whole(q, k, v, segments):
        return blocked(q, k, v, segments, prefix=Prefix(*virtual, places), window=window)

    def parts(q, k, v, segments):
        prefix = Prefix(*map(jnp.asarray, virtual), fold(places))
        return in_parts(fold, q, k, v, segments, window, prefix=prefix)

    expected = with_gradients(whole, q, k, v, g, ids)
    found = with_gradients(parts, q, k, v, g, ids)
    assert_all_close(found, [np.asarray(x, np.float64) for x in expected], 1e-5)


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_every_device_compares_its_queries_with_as_many_keys(parts, monkeypatch):
    q, k, v, *_ = inputs(case := Case(seq=24))

    def keys_of_the_device(query, key, value, at, segments, **_):
        return jnp.full_like(query, jnp.sum(at + 1))

    monkeypatch.setattr(attention, "tiled", keys_of_the_device)
    found = in_parts(row_over(parts), q, k, v, None)
    np.testing.assert_array_equal(found, case.seq * (case.seq + 1) / 2 / parts)


def test_every_query_comes_back_to_its_own_place(monkeypatch):
    q, k, v, *_ = inputs(case := Case(seq=21))

    def places(query, key, value, at, segments, **_):
        return jnp.broadcast_to(at[:, None, None].astype(query.dtype), query.shape)

    monkeypatch.setattr(attention, "tiled", places)
    found = in_parts(row_over(3), q, k, v, None)
    np.testing.assert_array_equal(found[:, :, 0, 0], np.tile(np.arange(case.seq), (case.batch, 1)))


@pytest.mark.parametrize(("window", "is_exchanged"), [(None, True), (6, True), (5, False)])
def test_queries_stay_where_a_window_leaves_all_devices_the_same(window, is_exchanged):
    q, k, v, *_ = inputs(Case())
    run = functools.partial(in_parts, row_over(4), segments=None, window=window)
    assert ("ppermute" in str(jax.make_jaxpr(run)(q, k, v))) == is_exchanged
